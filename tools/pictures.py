"""Takes the pictures of docs/images: a run's report, and a page of two runs compared, by a headless Chromium.

`make pictures` trains the runs that are shown and calls this with their folders.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tunesmith.api import report
from tunesmith.comparing import compare

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZES = {  # width and height in pixels
    "report-desktop": (1280, 1280),
    "report-phone": (390, 1200),
    "compare-desktop": (1280, 980),
}
SCHEMES = {"dark": 0, "light": 1}  # as Blink counts them
COLOURS = 256  # of a picture: a third of its bytes, and nothing that an eye would miss


def main(arguments: list[str]) -> int:
    """The exit code: 2 where it is called wrongly or no browser is there."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if len(arguments) != 3 or browser is None:
        sys.stderr.write(f"usage: pictures.py RUN OTHER OTHER, with one of {', '.join(BROWSERS)} on the PATH\n")
        return 2
    run, *others = (Path(argument) for argument in arguments)
    with tempfile.TemporaryDirectory() as folder:
        compared = Path(folder) / "compare.html"
        compare(*others, out=compared)
        pages = {"report": Path(str(report(run))).resolve(), "compare": compared}
        for name, size in SIZES.items():
            for scheme, number in SCHEMES.items():
                _take(browser, pages[name.partition("-")[0]], size, number, IMAGES / f"{name}-{scheme}.png")
    return 0


def _take(browser: str, page: Path, size: tuple[int, int], scheme: int, to: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "page.png"
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",  # the page is our own, and a container has no sandbox to offer
                "--hide-scrollbars",
                f"--user-data-dir={folder}/profile",
                f"--window-size={size[0]},{size[1]}",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--screenshot={taken}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        with Image.open(taken) as image:
            image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)
    sys.stdout.write(f"wrote docs/images/{to.name}: {to.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
