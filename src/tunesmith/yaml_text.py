"""YAML 1.2 text to plain values, each with its line, and back: no tags, no merge keys, no surprises."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from tunesmith.errors import InputError

MAX_BYTES = 1_000_000
# A recipe has tens of values. Aliases of aliases can make billions out of a few lines, so values are counted.
MAX_VALUES = 20_000
MAX_DEPTH = 32
MAX_SHOWN = 20  # problems listed at once

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_BASED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+")
# ruamel and YAML 1.1 each leave some of these as text (1e-4, .5e3): here every usual spelling is a number.
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_TAG = re.compile(r"(&\S+\s+)?!")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", ".Inf", ".INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def read_scalar(text: str) -> Any:
    """What an unquoted word means: null, true or false, a whole number, a number, else the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    digits = text.replace("_", "")
    if len(text) > 400:  # int() refuses thousands of digits with an error of its own
        return text
    if _INT.fullmatch(text):
        return int(digits)
    if _BASED.fullmatch(text):
        return int(text, 0)
    return float(digits) if _FLOAT.fullmatch(text) else text


@dataclass(frozen=True, slots=True)
class Read:
    """A document as plain values, and the line on which each key path (`train.epochs`) stands."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict[str, int])


def read_yaml(text: str, name: str) -> Read:
    """Parse one document.

    Raises InputError with `name`, line and column for broken YAML, a key given twice, a tag, a merge
    key, a document of more than 1 MB and aliases that multiply beyond reason.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise InputError(f"{name} is larger than 1 MB", "give a recipe, which is a few lines; data go into files")
    root = compose(text, name)
    if root is None:
        return Read(None)
    walk = _Walk(name, text)
    value = walk.value(root, (), 0)
    if walk.twice:
        raise InputError("\n".join(walk.twice[:MAX_SHOWN]), "keep one of each")
    return Read(value, walk.lines)


def compose(text: str, name: str) -> Node | None:
    """The tree of a document, whatever its tags mean; InputError with `name`, line and column for broken YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    try:
        root: Node | None = yaml.compose(text)
        return root
    except YAMLError as error:
        raise _broken(error, name) from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{name} is not YAML that can be read: {error}", "see docs/recipes.md for a recipe") from error


class _Walk:
    """Turns nodes into values, noting lines and every key given twice."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.lines: dict[str, int] = {}
        self.twice: list[str] = []
        self.count = 0

    def refuse(self, node: Node, cause: str, remedy: str) -> InputError:
        mark = node.start_mark
        return InputError(f"{self.name}:{mark.line + 1}:{mark.column + 1}: {cause}", remedy)

    def value(self, node: Node, path: tuple[str, ...], depth: int) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise self.refuse(node, f"more than {MAX_VALUES} values, aliases (*name) counted", "see docs/recipes.md")
        if _TAG.match(self.text, node.start_mark.index):
            raise self.refuse(node, "YAML tags (!name) are not read here", "remove the tag; quote a text")
        if isinstance(node, ScalarNode):
            return node.value if node.style else read_scalar(node.value)
        if isinstance(node, SequenceNode):
            items: list[Any] = []
            for index, item in enumerate(node.value):
                inner = (*path, str(index))
                self.lines[".".join(inner)] = item.start_mark.line + 1
                items.append(self.value(item, inner, depth + 1))
            return items
        assert isinstance(node, MappingNode)
        return self.mapping(node, path, depth)

    def mapping(self, node: MappingNode, path: tuple[str, ...], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise self.refuse(key_node, "a key must be one word", "write `key: value`")
            key: str = key_node.value
            if key == "<<":
                raise self.refuse(key_node, "merge keys (<<) are not read here", "write the keys out")
            inner = (*path, key)
            dotted, line = ".".join(inner), key_node.start_mark.line + 1
            if key in found:
                first = self.lines[dotted]
                self.twice.append(f"{self.name}:{line}: {dotted} is given twice, first on line {first}")
                continue
            self.lines[dotted] = line
            found[key] = self.value(value_node, inner, depth + 1)
        return found


def _broken(error: YAMLError, name: str) -> InputError:
    """ruamel's complaint in one line, with its place."""
    mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    remedy = "indent with spaces, and write `key: value` with a space after the colon"
    if "\\t" in problem or "tab" in problem.split():
        problem, remedy = "a tab where YAML wants spaces", "indent with spaces"
    elif "mapping values are not allowed" in problem:
        problem = "a second `:` on the line, or a wrong indent"
        remedy = 'put quotes around a text that has ": " in it, and give keys of one level the same indent'
    elif "another document" in problem:
        problem, remedy = "a second document begins (---)", "keep one recipe in a file"
    elif "maximum depth" in problem:
        problem, remedy = f"nested deeper than {MAX_DEPTH} levels", "see docs/recipes.md for a recipe"
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark is not None else name
    return InputError(f"{place}: not valid YAML: {problem}", remedy)


class _Representer(SafeRepresenter):
    """Quotes a text that `read_scalar` would take for something else, or that has line breaks of any kind."""

    def text(self, value: str) -> Any:
        plain = isinstance(read_scalar(value), str) and value.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Representer.add_representer(str, _Representer.text)


def write_yaml(value: Any, *, one_line: bool = False) -> str:
    """Plain values as YAML that `read_yaml` reads back to the same values; keys keep their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = one_line
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(value, stream)
    text = stream.getvalue()
    return text.removesuffix("\n...\n").rstrip("\n") if one_line else text
