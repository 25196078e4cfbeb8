"""Every place in the source where an error is made, with its cause and remedy as words, read from the syntax tree.

What an f-string fills in is shown as ‹words›. A function that only makes an error from texts of its callers is
followed to them, so that each caller is a site of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expression_words import DEPTH, Function, Scope, is_text, matching, parameters, text_of

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tunesmith"
# Class -> its exit code (None: the third argument), and where cause and remedy stand among its arguments.
KINDS: Mapping[str, tuple[int | None, int, int]] = {
    "InputError": (2, 0, 1),
    "RefusedError": (3, 0, 1),
    "ResourceError": (4, 0, 1),
    "StoppedError": (75, 0, 1),
    "Problem": (2, 1, 2),
    "Failure": (None, 0, 1),
}
# What becomes the cause of an InputError about a recipe's key, or about an argument, and the remedy given then.
OF_A_TYPE = {
    "ValueError": "see docs/recipes.md for every key",
    "ArgumentTypeError": "see `tunesmith ‹verb› --help`",
}


@dataclass(frozen=True)
class Site:
    """One place that makes an error. `rule`: it is known by its text, as a row of a table is, not by its line."""

    file: str
    line: int
    last: int
    kind: str
    exit_code: str
    cause: str
    remedy: str
    rule: bool = False

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def says_something(self) -> bool:
        """False where the whole cause comes from elsewhere."""
        return bool(re.sub(r"‹[^›]*›|[\W\d_]", "", self.cause))


# ---------------------------------------------------------------- sites


@dataclass(frozen=True)
class _Made:
    """A call that makes an error, in its function."""

    file: str
    call: ast.Call
    scope: Scope
    owner: ast.ClassDef | None
    returned: bool

    @property
    def kind(self) -> str:
        return _name(self.call.func)


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


class _Modules:
    """The parsed source, and its calls by the name that they call."""

    def __init__(self, source: Path) -> None:
        self.trees = {
            path.relative_to(source).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(source.rglob("*.py"))
        }
        self.calls: dict[str, list[_Made]] = {}
        for file, tree in self.trees.items():
            self._walk(tree, file, Scope(tree), None, returned=False)

    def _walk(self, node: ast.AST, file: str, scope: Scope, owner: ast.ClassDef | None, *, returned: bool) -> None:
        for inner in ast.iter_child_nodes(node):
            here, of = scope, owner
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                here = replace(scope, function=inner)
            if isinstance(inner, ast.ClassDef):
                of = inner
            if isinstance(inner, ast.Call):
                self.calls.setdefault(_name(inner.func), []).append(_Made(file, inner, scope, owner, returned))
            self._walk(inner, file, here, of, returned=isinstance(inner, ast.Return))

    def callers(self, made: _Made) -> list[_Made]:
        """The calls of the function that `made` stands in; of a private one only those of its own file."""
        function = made.scope.function
        assert function is not None
        method = made.owner is not None and function in made.owner.body
        return [
            call
            for call in self.calls.get(function.name, [])
            if isinstance(call.call.func, ast.Attribute) == method
            and (call.file == made.file or not function.name.startswith("_"))
        ]


def _argument(call: ast.Call, index: int, name: str) -> ast.expr | None:
    named = next((k.value for k in call.keywords if k.arg == name), None)
    return named if named is not None else call.args[index] if index < len(call.args) else None


def _texts(made: _Made) -> tuple[ast.expr, ast.expr] | None:
    _, cause, remedy = KINDS[made.kind]
    found = _argument(made.call, cause, "cause"), _argument(made.call, remedy, "remedy")
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _handed_on(texts: Sequence[ast.expr], function: Function | None) -> set[str]:
    """The parameters that a function puts into its error's texts."""
    if function is None:
        return set()
    names = {n.id for text in texts for n in ast.walk(text) if isinstance(n, ast.Name)}
    return names & set(parameters(function))


def _bound(call: ast.Call, function: Function, scope: Scope, method: bool) -> dict[str, tuple[ast.expr, Scope]]:
    """Parameter -> the caller's argument for it, defaults included."""
    names = parameters(function)[1 if method else 0 :]
    defaults = dict(zip(reversed(names), reversed(function.args.defaults), strict=False))
    bound = {name: (value, scope) for name, value in defaults.items()}
    bound.update({name: (value, scope) for name, value in zip(names, call.args, strict=False)})
    bound.update({k.arg: (k.value, scope) for k in call.keywords if k.arg})
    return bound


def _expanded(modules: _Modules, made: _Made, scope: Scope, at: _Made, depth: int) -> Iterator[Site]:
    texts = _texts(made)
    if texts is None:
        return
    function = at.scope.function
    handed = _handed_on(texts, function) if at is made else set(parameters(function)) if function else set[str]()
    if depth and function is not None and handed and at.returned:
        method = at.owner is not None and function in at.owner.body
        found: list[Site] = []
        for caller in modules.callers(at):
            bound = _bound(caller.call, function, caller.scope, method)
            texts_given = [n for n in handed if n in bound and (is_text(bound[n][0]) or _resolves(*bound[n]))]
            if texts_given:
                given = {name: bound[name] for name in bound if name in texts_given}
                inner = replace(made.scope, given={**made.scope.given, **given})
                found += _expanded(modules, made, inner, caller, depth - 1) or []
        if found:
            yield from found
            return
    yield _site(made, scope, at)


def _resolves(node: ast.expr, scope: Scope) -> bool:
    return isinstance(node, ast.Name) and bool(scope.values(node.id))


def _site(made: _Made, scope: Scope, at: _Made) -> Site:
    texts = _texts(made)
    assert texts is not None
    code = KINDS[made.kind][0]
    exit_code = _number(made.call.args[-1], made.scope.module) if code is None else str(code)
    cause, remedy = (_tidy(text_of(text, scope)) for text in texts)
    if made.kind == "Problem":
        remedy = remedy or OF_A_TYPE["ValueError"]  # as where all problems of a recipe become one error
    return Site(at.file, at.call.lineno, at.call.end_lineno or at.call.lineno, made.kind, exit_code, cause, remedy)


def _number(node: ast.expr, module: ast.Module) -> str:
    """An exit code as it is named in its module."""
    if isinstance(node, ast.IfExp):
        return f"{_number(node.body, module)} or {_number(node.orelse, module)}"
    if isinstance(node, ast.Name):
        for statement in module.body:
            for target in statement.targets if isinstance(statement, ast.Assign) else ():
                found = matching(target, statement.value, node.id)  # type: ignore[union-attr]
                if found:
                    return _number(found[0], module)
    return str(node.value) if isinstance(node, ast.Constant) else "‹code›"


def _tidy(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- rows of tables


def _rules(file: str, modules: _Modules) -> Iterator[Site]:
    """Rules of compatibility that refuse: rows of data, whose texts have {...} in place of an f-string's."""
    for made in modules.calls.get("Rule", []):
        if made.file != file or any(k.arg == "substitute" for k in made.call.keywords):
            continue
        reason, remedy = (_filled(text_of(made.call.args[i], made.scope)) for i in (2, 3))
        yield Site(file, made.call.lineno, made.call.lineno, "Rule", "2", reason, remedy, rule=True)


def substitutions(source: Path = SOURCE) -> list[tuple[str, str]]:
    """What is not refused but done in another way: why, and how."""
    modules = _Modules(source)
    found: list[tuple[str, str]] = []
    for made in modules.calls.get("Rule", []):
        way = next((k.value for k in made.call.keywords if k.arg == "substitute"), None)
        if way is not None:
            found.append((_filled(text_of(made.call.args[2], made.scope)), _filled(text_of(way, made.scope))))
    return found


def _filled(template: str) -> str:
    """`{f.model.name}` -> ‹model name›."""

    def words(match: re.Match[str]) -> str:
        return "‹" + " ".join(re.findall(r"[A-Za-z]{2,}", match[1])) + "›"

    return re.sub(r"\{([^}]+)\}", words, template)


def _of_types(modules: _Modules) -> Iterator[Site]:
    """What a type refuses: a validator's ValueError about a recipe, an argument's about a command line."""
    for kind, remedy in OF_A_TYPE.items():
        for made in modules.calls.get(kind, []):
            function = made.scope.function
            validates = function is not None and "validator" in "".join(map(ast.unparse, function.decorator_list))
            ours = made.file == "models/catalog.py"  # what is wrong there is not a user's
            if (validates and not ours) or kind == "ArgumentTypeError":
                cause = _tidy(text_of(made.call.args[0], made.scope))
                yield Site(made.file, made.call.lineno, made.call.lineno, kind, "2", cause, remedy, rule=True)


def find(source: Path = SOURCE) -> list[Site]:
    """All sites, in the order of files and lines."""
    modules = _Modules(source)
    found = [*_rules("rule_table.py", modules), *_of_types(modules)]
    for kind in KINDS:
        for made in modules.calls.get(kind, []):
            found += _expanded(modules, made, made.scope, made, DEPTH)
    once = {(site.file, site.line, site.cause): site for site in found}
    return sorted(once.values(), key=lambda site: (site.file, site.line, site.cause))


if __name__ == "__main__":
    for one in find():
        print(f"{one.place} {one.kind} {one.exit_code}\n    {one.cause}\n    {one.remedy}")
