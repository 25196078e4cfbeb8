"""Expressions of the source that make a text, as words: what they fill in is shown as ‹words› from its names."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

WORDS = {"error": "reason", "e": "reason", "bad": "reason", "why": "reason"}
# Functions that say what they are given in another way.
TRANSPARENT = frozenset(
    {"str", "repr", "map", "sorted", "sum", "list", "set", "float", "int", "max", "min", "show", "shown"}
    | {"_printable", "_first_line", "_reason"}
)
DEPTH = 4  # of functions that hand texts on
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Scope:
    """What the names in an expression stand for: arguments given by a caller, else what is assigned to them."""

    module: ast.Module
    function: Function | None = None
    given: Mapping[str, tuple[ast.expr, Scope]] = field(default_factory=dict)

    def values(self, name: str) -> list[tuple[ast.expr, Scope]]:
        if name in self.given:
            return [self.given[name]]
        if self.function is not None and name in parameters(self.function):
            return []
        inside = _assigned(self.function, name) if self.function is not None else []
        return [(value, self) for value in inside] or [
            (value, Scope(self.module)) for value in _assigned(self.module, name, deep=False)
        ]


def parameters(function: Function) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _assigned(node: ast.AST, name: str, *, deep: bool = True) -> list[ast.expr]:
    """The texts assigned to a name; none where anything else is assigned to it too."""
    found: list[ast.expr] = []
    for inner in ast.walk(node) if deep else ast.iter_child_nodes(node):
        if isinstance(inner, ast.Assign):
            for target in inner.targets:
                found += matching(target, inner.value, name)
        elif isinstance(inner, ast.AnnAssign) and inner.value is not None:
            found += matching(inner.target, inner.value, name)
    return found if all(map(is_text, found)) else []


def matching(target: ast.expr, value: ast.expr, name: str) -> list[ast.expr]:
    if isinstance(target, ast.Name) and target.id == name:
        return [value]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return [v for t, v in zip(target.elts, value.elts, strict=False) if isinstance(t, ast.Name) and t.id == name]
    return []


def is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return is_text(node.body) or is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (is_text(node.left) or is_text(node.right))
    return isinstance(node, ast.JoinedStr)


def text_of(node: ast.expr, scope: Scope, depth: int = DEPTH) -> str:
    """An expression that makes a text, as a person would read it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, scope, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, scope, depth)
    if isinstance(node, ast.BinOp) and is_text(node):
        return text_of(node.left, scope, depth) + text_of(node.right, scope, depth)
    if isinstance(node, ast.IfExp):
        ways = dict.fromkeys(text_of(way, scope, depth) for way in (node.body, node.orelse))
        return " or ".join(way for way in ways if way.strip())
    if isinstance(node, ast.Name) and depth:
        found = dict.fromkeys(text_of(value, inner, depth - 1) for value, inner in scope.values(node.id))
        if any(text.strip() for text in found):
            return " or ".join(text for text in found if text.strip())
    given = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(scope.given)
    if len(given) == 1 and depth:  # a text of the caller's, only dressed
        value, inner = scope.given[given.pop()]
        return text_of(value, inner, depth - 1)
    return f"‹{words_of(node)}›"


def words_of(node: ast.AST) -> str:
    """What an expression stands for, in words taken from its names."""
    if isinstance(node, ast.Name):
        return WORDS.get(node.id, _spaced(node.id))
    if isinstance(node, ast.Attribute):
        return _of_attribute(node)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Call):
        return _of_call(node)
    if isinstance(node, ast.Subscript):
        key = node.slice
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            return " ".join(dict.fromkeys(f"{words_of(node.value)} {_spaced(key.value)}".split()))
        return words_of(node.value)
    if isinstance(node, ast.BinOp):
        return words_of(node.left)
    if isinstance(node, ast.IfExp | ast.BoolOp):
        return words_of(node.body if isinstance(node, ast.IfExp) else node.values[0])
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return words_of(node.generators[0].iter)
    return "value"


def _spaced(name: str) -> str:
    return re.sub(r"_[A-Z]+$", "", name).strip("_").replace("_", " ")


def _of_attribute(node: ast.Attribute) -> str:
    if node.attr == "__name__":
        return words_of(node.value)
    owner = node.value
    if isinstance(owner, ast.Name) and (owner.id == "self" or len(owner.id) == 1):
        return _spaced(node.attr)
    above = words_of(owner)
    return _spaced(node.attr) if above in ("value", "") else f"{above} {_spaced(node.attr)}"


def _of_call(node: ast.Call) -> str:
    function, first = node.func, node.args[-1] if node.args else None
    if isinstance(function, ast.Name):
        if function.id == "len" and first is not None:
            return f"number of {words_of(first)}"
        if function.id == "type" and first is not None:
            return f"type of {words_of(first)}"
        return words_of(first) if first is not None and function.id in TRANSPARENT else _spaced(function.id)
    if isinstance(function, ast.Attribute):
        if function.attr == "join" and first is not None:
            return words_of(first)
        if isinstance(function.value, ast.Constant | ast.Call) or function.attr in (
            "strip",
            "absolute",
            "get",
            "group",
        ):
            return words_of(function.value)
        return _of_attribute(function)
    return "value"
