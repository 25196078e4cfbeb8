"""A program that a model wrote is contained: each way out that is tried here ends in its own failure."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tunesmith import sandbox
from tunesmith.errors import RefusedError
from tunesmith.sandbox import Limits, run


@pytest.fixture(scope="module", autouse=True)
def _contained() -> None:
    try:
        sandbox.check()
    except RefusedError as error:
        pytest.skip(str(error))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process of the program outlives its run."""
    yield
    left = [p.pid for p in psutil.Process().children(recursive=True) if "sandbox_worker" in " ".join(p.cmdline())]
    assert left == []


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 + 1 == 2", ""),
        ("from __future__ import annotations\nimport dataclasses, re, typing", ""),
        ("if __name__ != '__main__': raise RuntimeError", ""),
        ("open('a', 'w').write('b'); assert open('/tmp/a').read() == 'b'", ""),
        ("import os\nfor _ in range(3): os.fork()", ""),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "the process ended with 0"),
        ("import os\nfor fd in range(64):\n  try: os.write(fd, b'{\"passed\": true}')\n  except OSError: pass\n"
         "os._exit(0)", "the process ended with 0"),
        ("import ctypes; ctypes.string_at(0)", "the process ended with -11"),
    ],
)  # fmt: skip
def test_a_program_passes_where_it_comes_to_its_end(program: str, why: str) -> None:
    found = run(program)
    assert (found.passed, found.why[: len(why)]) == (not why, why)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("while True: pass", "it took more than 1 s"),
        ("import time\ntry: time.sleep(60)\nfinally: time.sleep(60)", "it took more than 1 s"),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "it took more than 1 s"),
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        ("import threading, time\nfor _ in range(64): threading.Thread(target=time.sleep, args=[9]).start()",
         "RuntimeError: can't start new thread"),
        ("bytearray(10 << 30)", "MemoryError"),
        ("import os\nfor _ in range(3): os.fork()\nheld = bytearray(500 << 20)\nwhile True: pass",
         "its processes took more than 2048 MiB"),
        ("open('big', 'wb').write(bytes(17 << 20))", "OSError: [Errno 27] File too large"),
        ("for i in range(5): open(str(i), 'wb').write(bytes(15 << 20))", "OSError: [Errno 28] No space left"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_left")
def test_what_a_program_takes_is_limited(program: str, why: str) -> None:
    # What is stopped by another limit than its seconds may need many of them where the machine is busy.
    start = time.monotonic()
    found = run(program, Limits(seconds=1.0 if why.endswith(" s") else 50.0))
    assert (found.passed, found.why[: len(why)]) == (False, why)
    assert time.monotonic() - start < 50  # below what the one that sleeps would take


@pytest.mark.parametrize("path", ["/etc/passwd", "/usr/here", "/here", "/dev/here", f"{sys.prefix}/here", "{there}"])
def test_nothing_outside_is_written(path: str, tmp_path: Path) -> None:
    outside = path.format(there=tmp_path / "here")
    found = run(f"open({outside!r}, 'a').write('x')")
    assert (found.passed, found.why.split(":")[0]) in [(False, "OSError"), (False, "FileNotFoundError")]
    assert not os.path.exists(tmp_path / "here")
    assert not outside.endswith("here") or not os.path.exists(outside)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', {port}), 2)", "OSError: [Errno 101]"),
        ("import os; assert 'TUNESMITH_DATA' not in os.environ and os.getuid() == 65534 and os.getpid() < 5", ""),
        ("import os; os.listdir({here!r})", "FileNotFoundError"),
        ("import os; os.kill({pid}, 9)", "ProcessLookupError"),
        ("import os; os.kill(1, 9)", "PermissionError"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("import os; os.chroot('/')", "PermissionError"),
        *((f"import ctypes; c = ctypes.CDLL(None, use_errno=1)\nassert (c.{call}, ctypes.get_errno()) == (-1, 1)", "")
          for call in ("unshare(0x10000000)", "syscall({clone}, 0x10000011, 0, 0, 0, 0)", "shmget(0, 4096, 0o1600)",
                       "mount(b'none', b'/scratch', b'tmpfs', 0, None)", "ptrace(16, 1, 0, 0)",
                       "memfd_create(b'held', 0)")),
    ],
)  # fmt: skip
def test_neither_the_network_nor_the_machine_is_reached(program: str, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
        here = os.path.dirname(__file__)
        found = run(program.format(port=server.getsockname()[1], here=here, pid=os.getpid(), clone=clone))
    assert (found.passed, found.why[: len(why)]) == (not why, why)


def test_it_works_for_an_ordinary_user() -> None:
    """The same, asked for by nobody through the system's interpreter, who may not read this one."""
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not os.path.exists(python):
        pytest.skip("needs root, to become another user, and the system's Python")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        worker = shutil.copy(Path(sandbox.__file__).with_name("sandbox_worker.py"), folder)
        os.chmod(worker, 0o644)
        (Path(folder) / "tunesmith").mkdir()
        for name in ("sandbox.py", "sandbox_worker.py", "errors.py"):
            shutil.copy(Path(sandbox.__file__).with_name(name), Path(folder) / "tunesmith" / name)
        (Path(folder) / "psutil.py").write_text("class Error(Exception): ...\ndef Process(pid): raise Error\n")
        asked = (
            f"import sys; sys.path.insert(0, {folder!r})\n"
            "from tunesmith.sandbox import run\n"
            "tried = ['x = 1', 'import os\\nwhile True: os.fork()', \"open('/here', 'w')\", 'bytearray(10 << 30)']\n"
            "print([run(text).why.split(':')[0] for text in tried])\n"
        )
        found = subprocess.run(
            [python, "-c", asked], user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60
        )
    if "cannot be contained" in found.stderr:
        pytest.skip("this machine allows users no namespaces")
    assert found.stdout.strip() == "['', 'BlockingIOError', 'OSError', 'MemoryError']", found.stderr


def test_an_interpreter_may_lie_in_the_folder_for_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "there").touch()
    tmp_path.chmod(0o755)
    shown = sandbox._shown()  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(sandbox, "_shown", lambda: [*shown, str(tmp_path)])
    text = f"import os, tempfile\nassert os.path.exists({str(tmp_path / 'there')!r})\n"
    text += "with tempfile.NamedTemporaryFile('w') as file:\n    file.write('x')\n"
    assert run(text).why == ""


def test_where_a_program_cannot_be_contained_it_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(
            RefusedError, match="cannot be contained on this machine: it needs Linux, and this is darwin"
        ):
            run("")
    monkeypatch.setattr(sandbox, "_shown", lambda: ["/no such folder"])
    with pytest.raises(RefusedError, match="cannot be contained on this machine: mount /no such folder"):
        run(f"open({str(tmp_path / 'here')!r}, 'w')")
    assert not (tmp_path / "here").exists()
