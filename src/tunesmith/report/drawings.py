"""How answers are drawn: the settings that were tried, and which was taken, in words and in rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.models.drawing import Setting
from tunesmith.report.figures import figure, in_rows, p_value

Json = Mapping[str, Any]
HEADINGS = ("setting", "value", "from the best", "p (Holm)")


def taken(decoding: Json, model: str) -> str:
    """Which setting a model answers by, and why, in a sentence without its stop."""
    own = decoding["models"][model]
    setting, tried = Setting(**own["chosen"]), own["tried"]
    said = f"{model} answers " + (f"at {setting}" if setting.temperature else "greedily")
    if len(tried) == 1:
        return f"{said}, the one setting that was tried"
    judged = in_rows(decoding["n"], "validation ")
    return (
        f"{said}: of {len(tried)} settings the simplest that {judged} do not show to be worse "
        f"by {decoding['metric']} than the best"
    )


def rows(decoding: Json, model: str) -> list[tuple[str, str, str, str]]:
    """The settings of a model as HEADINGS has them; the one that was taken is marked."""
    own = decoding["models"][model]
    return [
        (
            str(_setting(one)) + " (taken)" * (_setting(one) == Setting(**own["chosen"])),
            figure(one["value"])
            + (" (no interval)" if one["reason"] else f" [{figure(one['low'])}, {figure(one['high'])}]"),
            figure(one["difference"], "+"),
            "-" if one["p"] is None else p_value(one["p"]),
        )
        for one in own["tried"]
    ]


def as_arguments(decoding: Json | None) -> str:
    """How the tuned model draws, as transformers' `generate` is told it; greedily where nothing was tried."""
    setting = Setting() if decoding is None else Setting(**decoding["models"]["tuned"]["chosen"])
    if setting.temperature == 0:
        return "do_sample=False"
    return f"do_sample=True, temperature={setting.temperature:g}, top_p={setting.top_p:g}, top_k={setting.top_k}"


def _setting(tried: Json) -> Setting:
    return Setting(tried["temperature"], tried["top_p"], tried["top_k"])
