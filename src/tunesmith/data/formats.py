"""Data formats as a table: how each is recognised, and how its records become canonical rows."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from tunesmith.data import conversation, questions, several
from tunesmith.data.fields import Fields, absent_column, shown
from tunesmith.errors import InputError
from tunesmith.types import Row

Learned = Literal["messages", "label", "score", "tags", "pair", "retrieval", "span", "choices", "text"]
Kind = Learned | Literal["words", "query", "texts", "passage", "question", "open choices"]
KINDS: Mapping[Kind, str] = {
    "messages": "a conversation: what the assistant says is learned",
    "label": "a text and its class",
    "score": "a text and a number",
    "tags": "the words of a text and a tag for each",
    "pair": "two texts and a class or number of both",
    "retrieval": "a query and the passages that answer it",
    "span": "a question about a text, and where the text answers it, if it does",
    "choices": "a question, texts to choose from, and which is right",
    "text": "plain text, all of which is learned",
    "words": "the words of a text, to be tagged",
    "query": "a query, to be answered",
    "texts": "two texts, to be compared",
    "passage": "a passage of a corpus",
    "question": "a question about a text, to be answered from it",
    "open choices": "a question and texts to choose from",
}
Value = dict[str, Any]
Raw = tuple[Mapping[str, Any], str]


@dataclass(frozen=True, slots=True)
class Format:
    """A format: the columns that tell it, those that it may have, and a record as it stands in a file.

    `kind` is the canonical form of its rows (docs/architecture.md).
    """

    name: str
    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[Fields], Value]
    sample: str
    means: str = ""

    @property
    def says(self) -> str:
        """What a row is, for people."""
        return self.means or KINDS[self.kind]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional


def _messages(fields: Fields) -> Value:
    return {"messages": conversation.messages(fields, "messages"), **conversation.tools(fields)}


def _sharegpt(fields: Fields) -> Value:
    found = conversation.sharegpt(fields, "conversations")
    system = fields.optional_text("system")
    if system is not None:
        found = [_turn("system", system), *found]
    return {"messages": found, **conversation.tools(fields)}


def _alpaca(fields: Fields) -> Value:
    found: list[Value] = []
    system, extra = fields.optional_text("system"), fields.optional_text("input")
    if system is not None:
        found.append(_turn("system", system))
    for index, pair in enumerate(fields.items("history") if fields.get("history") is not None else []):
        texts = cast("list[Any]", pair) if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise fields.wrong(f"history[{index}]", f"must be two texts, this is {shown(pair)}", "[question, answer]")
        found += [_turn("user", texts[0]), _turn("assistant", texts[1])]
    asked = fields.text("instruction")
    found.append(_turn("user", asked if extra is None else f"{asked}\n\n{extra}"))
    found.append(_turn("assistant", fields.text("output")))
    return {"messages": found}


def _prompt_completion(fields: Fields) -> Value:
    """Only the completion is learned, whatever answers the prompt holds; of several texts the first."""
    found: list[Value] = []
    others: list[str] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        given = fields.need(name)
        if role == "assistant" and isinstance(given, list) and given and isinstance(given[0], str):
            first, *others = fields.texts(name)
            found.append(_turn(role, first))
        elif isinstance(given, list):
            said = conversation.messages(fields, name)
            found += conversation.untrained(said) if role == "user" else said
        else:
            found.append(_turn(role, fields.text(name)))
    return {"messages": found, **conversation.tools(fields), **({"other_answers": others} if others else {})}


def _text_label(fields: Fields) -> Value:
    return {"text": fields.text("text"), "label": fields.label("label")}


def _text_labels(fields: Fields) -> Value:
    return {"text": fields.text("text"), "labels": fields.labels("labels")}


def _text_score(fields: Fields) -> Value:
    return {"text": fields.text("text"), "score": fields.number("score")}


def _tokens_tags(fields: Fields) -> Value:
    words, tags = fields.words("tokens"), fields.word_tags("tags")
    if len(words) != len(tags):
        raise fields.wrong("tags", f"there are {len(tags)} tags for {len(words)} words", "give each word one tag")
    return {"tokens": words, "tags": tags}


def _tokens(fields: Fields) -> Value:
    return {"tokens": fields.words("tokens")}


def _text(fields: Fields) -> Value:
    return {"text": fields.text("text")}


def _turn(role: str, content: str) -> Value:
    return {"role": role, "content": content}


# From the most to the least particular: detection takes the first whose required columns are all there.
FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format(
            "messages",
            "messages",
            ("messages",),
            ("tools",),
            _messages,
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
        ),
        Format(
            "sharegpt",
            "messages",
            ("conversations",),
            ("system", "tools"),
            _sharegpt,
            '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
        ),
        Format(
            "alpaca",
            "messages",
            ("instruction", "output"),
            ("input", "system", "history"),
            _alpaca,
            '{"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"}',
        ),
        Format(
            "prompt+completion",
            "messages",
            ("prompt", "completion"),
            ("tools",),
            _prompt_completion,
            '{"prompt": "What is 2 + 2?", "completion": "4"}',
        ),
        Format(
            "text+label",
            "label",
            ("text", "label"),
            (),
            _text_label,
            '{"text": "Where is my card?", "label": "card_arrival"}',
        ),
        Format(
            "text+labels",
            "label",
            ("text", "labels"),
            (),
            _text_labels,
            '{"text": "Thanks, that was fun!", "labels": ["gratitude", "joy"]}',
            "a text and its classes: several, one or none",
        ),
        Format(
            "text+score",
            "score",
            ("text", "score"),
            (),
            _text_score,
            '{"text": "The room was fine, the breakfast was not.", "score": 2.5}',
        ),
        Format(
            "tokens+tags",
            "tags",
            ("tokens", "tags"),
            (),
            _tokens_tags,
            '{"tokens": ["Ada", "Lovelace", "lived", "in", "London"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]}',
        ),
        Format(
            "text_a+text_b+label",
            "pair",
            ("text_a", "text_b", "label"),
            (),
            several.two_texts_label,
            '{"text_a": "Where is my card?", "text_b": "My card has not come.", "label": "same"}',
            "two texts and their class, such as whether they mean the same",
        ),
        Format(
            "text_a+text_b+score",
            "pair",
            ("text_a", "text_b", "score"),
            (),
            several.two_texts_score,
            '{"text_a": "A man plays a flute.", "text_b": "Someone makes music.", "score": 3.8}',
            "two texts and a number, such as how alike they are",
        ),
        Format(
            "query+positive",
            "retrieval",
            ("query", "positive"),
            ("negatives",),
            several.query_positive,
            '{"query": "Who found oxygen?", "positive": "Scheele found it in 1772.", "negatives": ["Air is a mix."]}',
            "a query with the text of a passage that answers it, or a list of them, and of some that do not",
        ),
        Format(
            "query+positive_ids",
            "retrieval",
            ("query", "positive_ids"),
            ("negative_ids",),
            several.query_ids,
            '{"query": "Who found oxygen?", "positive_ids": ["oxygen-2"], "negative_ids": ["air-1"]}',
            "a query with the ids of the passages of `data.corpus` that answer it, and of some that do not",
        ),
        Format(
            "context+question+answers",
            "span",
            ("context", "question", "answers"),
            (),
            questions.answered_in_text,
            '{"context": "Oxygen was found in 1773.", "question": "When was oxygen found?", '
            '"answers": {"text": ["1773"], "answer_start": [20]}}',
        ),
        Format(
            "question+choices+label",
            "choices",
            ("question", "choices", "label"),
            ("context",),
            questions.answered_choices,
            '{"question": "What do bees make?", "choices": ["milk", "honey", "wool"], "label": 1}',
        ),
        Format("text", "text", ("text",), (), _text, '{"text": "Any plain text to go on learning the language from."}'),
        Format("tokens", "words", ("tokens",), (), _tokens, '{"tokens": ["Who", "was", "Ada", "Lovelace", "?"]}'),
        Format("query", "query", ("query",), (), several.query, '{"query": "Who found oxygen?"}'),
        Format(
            "text_a+text_b",
            "texts",
            ("text_a", "text_b"),
            (),
            several.two_texts,
            '{"text_a": "Where is my card?", "text_b": "My card has not come."}',
        ),
        Format(
            "question+choices",
            "open choices",
            ("question", "choices"),
            ("context",),
            questions.open_choices,
            '{"question": "What do bees make?", "choices": ["milk", "honey", "wool"]}',
        ),
        Format(
            "context+question",
            "question",
            ("context", "question"),
            (),
            questions.about_text,
            '{"context": "Oxygen was found in 1773.", "question": "When was oxygen found?"}',
        ),
        Format(
            "passage",
            "passage",
            ("text",),
            ("id",),
            several.passage,
            '{"id": "air-1", "text": "Air is a gas."}',
        ),
    )
}


def detect(sample: Sequence[Raw], columns: Mapping[str, str] | None = None) -> str:
    """The name of the format of all these records; an unknown or a mixed one is refused with places."""
    first = sample[0]
    name = _format_of(first[0], columns or {})
    if name is None:
        raise _unknown(*first)
    for raw, where in sample[1:]:
        if _format_of(raw, columns or {}) != name:
            raise _mixed(name, first[1], raw, columns or {}, where)
    return name


def convert(raw: Mapping[str, Any], format: str, columns: Mapping[str, str], where: str) -> Value:
    """The canonical `Row.value` of one record; whatever is wrong with it is refused with its place."""
    for canonical, column in columns.items():
        if column not in raw:
            raise absent_column(column, raw, where, mapped_as=canonical)
    return FORMATS[format].make(Fields(raw, columns, where))


def rows(
    stream: Iterable[Raw], format: str | None, columns: Mapping[str, str], tags: Sequence[str] = ()
) -> tuple[str, Iterator[Row]]:
    """The format of a stream of records (detected from the first one if None), and its canonical rows.

    `tags` are columns that the rows keep beside their value. A later record whose columns tell another format is
    refused, with both places.
    """
    check_names(format, columns)
    records = iter(stream)
    first = next(records)
    for canonical, column in columns.items():
        if column not in first[0]:
            raise absent_column(column, first[0], first[1], mapped_as=canonical)
    name = format or detect([first], columns)
    together = itertools.chain([first], records)
    return name, _convert_all(together, name, first[1], columns, tags, detected=format is None)


def _convert_all(
    records: Iterable[Raw], name: str, first: str, columns: Mapping[str, str], tags: Sequence[str], *, detected: bool
) -> Iterator[Row]:
    same: set[tuple[str, ...]] = set()  # the sets of keys already seen to be of this format
    for raw, where in records:
        keys = tuple(raw)
        if detected and keys not in same:
            if all(column in raw for column in columns.values()) and _format_of(raw, columns) != name:
                raise _mixed(name, first, raw, columns, where)
            if len(same) < 1000:
                same.add(keys)
        kept = {tag: Fields(raw, {}, where).tag(tag) for tag in tags}
        yield Row(convert(raw, name, columns, where), where, kept)


def check_names(format: str | None, columns: Mapping[str, str]) -> None:
    """Refuses an unknown format, and a column map whose left sides no (or not this) format knows."""
    if format is not None and format not in FORMATS:
        raise InputError(f"unknown data format {format!r}", _nearest(format, FORMATS))
    known = FORMATS[format].columns if format else tuple(dict.fromkeys(c for f in FORMATS.values() for c in f.columns))
    for canonical in columns:
        if canonical not in known:
            of = f"the format {format!r}" if format else "any format"
            raise InputError(f"data.columns: {canonical!r} is not a column of {of}", _nearest(canonical, known))


def _nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(names)}"


def _format_of(raw: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    taken = set(columns.values())
    present = {name for name in raw if name not in taken} | set(columns)
    fitting = (form for form in FORMATS.values() if present.issuperset(form.required))
    return next((form.name for form in fitting if set(columns).issubset(form.columns)), None)


def _unknown(raw: Mapping[str, Any], where: str) -> InputError:
    known = "; ".join(" and ".join(form.required) for form in FORMATS.values())
    return InputError(
        f"{where}: no known format has the columns {', '.join(map(str, raw)) or '(none)'}",
        "say which column is which, as in data.columns: {prompt: question, completion: answer}, or of labelled texts "
        f"data.columns: {{text: body, label: queue}}; known: {known}",
    )


def _mixed(name: str, first: str, raw: Mapping[str, Any], columns: Mapping[str, str], where: str) -> InputError:
    other = _format_of(raw, columns)
    lacks = [c for c in FORMATS[name].required if columns.get(c, c) not in raw]
    what = f"lacks {', '.join(map(repr, lacks))}" if other is None else f"is {other!r}"
    return InputError(
        f"two schemas in one file: {first} is {name!r}, {where} {what} (columns: {', '.join(map(str, raw))})",
        "write all rows of a file with the same columns, or split it and list both under data.train",
    )
