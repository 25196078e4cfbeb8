"""The shell of pages: no text of others acts in it, its policy lets nothing else run, its plots are to scale."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import ChoiceLoader, DictLoader

from tunesmith.report import page
from tunesmith.report.figures import figure, percent
from tunesmith.report.plots import Mark, Scale, path, scale_of

HOSTILE = '</script><img src=x onerror="alert(1)">{{ 7*7 }}<!-- \u202ereversed\x00\u2028'
BODY = """{% import "parts.html" as parts %}
<section id="first" data-title="First &amp; last"><h2 title="{{ text }}">{{ text }}</h2>
{{ parts.interval(scale, [mark], zero=0.5) }}{{ parts.code(text, text) }}
{{ parts.stats([(text, text, text)]) }}</section>
"""


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the content of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", {}))


def elements(text: str) -> Elements:
    parsed = Elements()
    parsed.feed(text)
    return parsed


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    environment = page._environment()  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(environment, "loader", ChoiceLoader([DictLoader({"hostile.html": BODY}), environment.loader]))
    mark = Mark(HOSTILE, 0.25, 0.125, 0.5)
    yield page.render(
        "hostile", title=HOSTILE, context={"text": HOSTILE, "scale": Scale(0, 1), "mark": mark}, data={HOSTILE: HOSTILE}
    )
    environment.cache.clear()  # type: ignore[union-attr]


def test_hostile_text_makes_no_element_and_hides_no_character(shown: str) -> None:
    parsed = elements(shown)
    tags = [tag for tag, _ in parsed.found]
    assert "img" not in tags
    assert tags.count("script") == 3
    assert not [name for _, attributes in parsed.found for name in attributes if name.startswith("on")]
    assert "\\u202ereversed\\x00" in shown
    assert not set(shown) & {"\u202e", "\x00", "\u2028"}
    assert "{{ 7*7 }}" in shown
    title = page.harmless(HOSTILE)
    assert dict(parsed.found)["h2"]["title"] == title
    assert json.loads(parsed.scripts[1]) == {title: title}


def test_the_policy_allows_these_scripts_and_nothing_from_elsewhere(shown: str) -> None:
    parsed = elements(shown)
    policy = next(str(a["content"]) for tag, a in parsed.found if tag == "meta" and "http-equiv" in a)
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    run = {parsed.scripts[0], parsed.scripts[2]}
    assert allowed == {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run}
    assert policy.startswith("default-src 'none';")
    fetched = [
        a[key] for tag, a in parsed.found for key in ("src", "href", "action", "data") if key in a and tag != "a"
    ]
    assert fetched == ["data:,"]
    assert "@import" not in shown
    assert "url(" not in shown


def test_sections_become_the_contents(shown: str) -> None:
    assert '<a href="#first">First &amp; last</a>' in shown


@given(st.text())
def test_embedded_data_is_the_harmless_text_and_closes_no_script(text: str) -> None:
    embedded = page.embedded([text])
    assert json.loads(embedded) == [page.harmless(text)]
    assert "<" not in embedded
    embedded.encode()


def test_an_interval_stands_where_its_numbers_are(shown: str) -> None:
    assert re.search(r'<line class="reach" x1="12.5%" x2="50.0%"', shown)
    assert re.search(r'<circle cx="25.0%"', shown)
    assert re.search(r'<line class="zero" x1="50.0%"', shown)


@given(st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 6)), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_ticks_are_few_round_and_inside(low: float, span: float, most: int) -> None:
    ticks = Scale(low, low + span).ticks(most)
    assert 1 <= len(ticks) <= most + 1
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    steps = {float(f"{b - a:.4g}") for a, b in itertools.pairwise(ticks)}
    assert len(steps) <= 1
    assert all(f"{step:e}"[:3] in ("1.0", "2.0", "2.5", "5.0") for step in steps)


def test_a_scale_holds_what_is_known_and_gives_room_where_nothing_is_fixed() -> None:
    scale = scale_of([0.5, None, float("inf"), 1.5], include=[0.0])
    assert scale.low == 0.0
    assert scale.high == pytest.approx(1.5 * 1.06)
    assert scale_of([]).at(0.5) == 50.0
    assert scale_of([2.0]).holds(2.0)


def test_a_path_goes_down_as_values_rise_and_breaks_where_there_is_none() -> None:
    assert path([0, 1, 2, 3], [0.0, 1.0, None, 0.5], Scale(0, 4), Scale(0, 2), 40) == "M0 40L25 20M75 30"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (-1.5, "-1.500"), (12.345, "12.35"), (123.45, "123.5"), (12345.6, "12346"), (1e5, "1.0e5")],
)
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text
    assert figure(None) == "unknown"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.7816, "78.2%"), (1, "100%"), (0, "0%"), (0.9999, "99.99%"), (0.0001, "0.01%"), (None, "unknown")],
)
def test_percent_rounds_nothing_to_all_or_nothing(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_no_end_of_a_line_tears_a_p_value_apart() -> None:
    from tunesmith.report.page import _told

    assert _told("x <b> (+1.0 to +2.0, p < 0.001).") == (
        'x &lt;b&gt; (+1.0 to +2.0, <span class="whole">p &lt; 0.001</span>).'
    )
    assert _told("(p = 1). They") == '(<span class="whole">p = 1</span>). They'
