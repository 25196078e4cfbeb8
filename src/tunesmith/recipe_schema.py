"""The recipe's JSON schema: for editors, and as the words in which errors say what a value must be."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from tunesmith.recipe import Recipe

Node = dict[str, Any]


def alternatives(node: Node, schema: Node) -> list[Node]:
    """The schemas that a value may meet, references followed; one if there is no choice."""
    if "$ref" in node:
        return alternatives(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    for word in ("anyOf", "oneOf", "allOf"):
        if word in node:
            return [found for one in node[word] for found in alternatives(one, schema)]
    return [node]


def child(node: Node, key: str | int, schema: Node) -> Node | None:
    """The schema of one key or item of a value; None where the value may not have it."""
    for one in alternatives(node, schema):
        if isinstance(key, int):
            if "items" in one:
                return one["items"]
            continue
        if key in one.get("properties", {}):
            return one["properties"][key]
        patterns: Node = one.get("patternProperties", {})
        allowed = [free for pattern, free in patterns.items() if re.search(pattern, key)]
        for free in (*allowed, one.get("additionalProperties", False)):
            if free is not False:
                return {} if free is True else free
    return None


def key_paths(schema: Node, node: Node | None = None, above: str = "") -> Iterator[str]:
    """Every key of the schema with its full path (`train.epochs`), keys inside lists left out."""
    for one in alternatives(node or schema, schema):
        for key, inner in one.get("properties", {}).items():
            yield above + key
            yield from key_paths(schema, inner, f"{above}{key}.")


def describe(node: Node, schema: Node) -> str:
    """What a value must be, in words: "a whole number above 0", "one of linear, cosine"."""
    words = [_one(one, schema) for one in alternatives(node, schema) if one.get("type") != "null"]
    return " or ".join(dict.fromkeys(words)) or "a value"


def _one(node: Node, schema: Node) -> str:
    kind = node.get("type")
    if "const" in node or "enum" in node:
        words = node.get("enum", [node.get("const")])
        return str(words[0]) if len(words) == 1 else "one of " + ", ".join(map(str, words))
    if kind in ("number", "integer"):
        return _number(node)
    if kind == "array" and "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])} (each {describe(node['prefixItems'][0], schema)})"
    if kind == "array":
        least = f" of at least {node['minItems']}" if node.get("minItems") else ""
        return f"a list{least} (each item {describe(node.get('items', {}), schema)})"
    if kind == "object" and "properties" in node:
        keys = list(node["properties"])
        more = ", ..." if len(keys) > 4 or node.get("additionalProperties") else ""
        return f"a set of keys ({', '.join(keys[:4])}{more})"
    if kind == "object":
        return f"a set of at least {node['minProperties']} key" if node.get("minProperties") else "a set of keys"
    plain = {"string": "a path" if node.get("format") == "path" else "text", "boolean": "true or false"}
    return plain.get(str(kind), "a value")


def _number(node: Node) -> str:
    words = ["a whole number" if node["type"] == "integer" else "a number"]
    bounds = {"exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below", "maximum": "at most"}
    words += [f"{word} {node[key]:.10g}" for key, word in bounds.items() if key in node]
    return " and ".join([" ".join(words[:2]), *words[2:]])


def recipe_schema(
    methods: Mapping[str, type[BaseModel]], objectives: Mapping[str, type[BaseModel]], trackers: Iterable[str] = ()
) -> dict[str, Any]:
    """JSON schema of a recipe for editors, with the options of every method and objective, and names of trackers."""
    schema: Node = copy.deepcopy(Recipe.model_json_schema())
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tunesmith recipe"
    definitions: Node = schema["$defs"]
    definitions.pop("Choice", None)
    for key, models in (("method", methods), ("objective", objectives)):
        choices: list[Node] = []
        bare: list[str] = []
        for name in sorted(models):
            template = f"#/$defs/{key}.{name}.{{model}}"
            options: Node = models[name].model_json_schema(ref_template=template)
            inner: Node = options.pop("$defs", {})
            definitions.update({f"{key}.{name}.{title}": one for title, one in inner.items()})
            required = list(options.get("required", []))
            properties = {"name": {"const": name}, **options.get("properties", {})}
            choices.append(
                {
                    "type": "object",
                    "title": f"{key} {name}",
                    "description": options.get("description", ""),
                    "properties": properties,
                    "required": ["name", *required],
                    "additionalProperties": False,
                }
            )
            bare += [] if required else [name]
        said = {word: schema["properties"][key][word] for word in ("description", "examples")}
        schema["properties"][key] = {"oneOf": [{"enum": bare}, *choices], "title": key, **said}
    tracker: Node = {"enum": sorted(trackers)}
    schema["properties"]["report_to"]["anyOf"] = [tracker, {"type": "array", "items": tracker}]
    return schema
