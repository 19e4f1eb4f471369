"""Random JSON schemas, of everything that people write: the property tests' input."""

from __future__ import annotations

import random
import string
from typing import Any

Schema = dict[str, Any]

PATTERNS = (r"^[a-z]{2,5}$", r"^[A-Z]{3}-[0-9]{2,4}$", r"^#[0-9a-f]{6}$", r"^(yes|no|maybe)$")
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4")


def random_schema(seed: int) -> Schema:
    """The schema number `seed`; half of them are objects at the top, as most requests want."""
    rng = random.Random(f"schema-{seed}")
    schema = _object(rng, 3) if rng.random() < 0.5 else _schema(rng, 3)
    if rng.random() < 0.2:
        schema = {"type": "object", "properties": {"item": {"$ref": "#/$defs/thing"}}} | {
            "required": ["item"],
            "additionalProperties": False,
            "$defs": {"thing": schema},
        }
    return schema


def _schema(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _string, _integer, _number, _choice, _boolean]
    if depth > 0:
        kinds += [_object, _object, _array, _array, _any_of, _tuple]
    return rng.choice(kinds)(rng, depth - 1)


def _name(rng: random.Random) -> str:
    letters = string.ascii_lowercase + "_"
    name = "".join(rng.choices(letters, k=rng.randint(1, 9)))
    return rng.choice((name, name, name, name.title() + " 1", 'a "quoted" name', "größe", "名前"))


def _object(rng: random.Random, depth: int) -> Schema:
    names = list(dict.fromkeys(_name(rng) for _ in range(rng.randint(0, 4))))
    schema: Schema = {
        "type": "object",
        "properties": {name: _schema(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    more = rng.random()
    if more < 0.6:
        schema["additionalProperties"] = False
    elif more < 0.8:
        schema["additionalProperties"] = _schema(rng, 0)
    if rng.random() < 0.3:
        schema |= {"title": "A thing", "description": "What it is."}
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": _schema(rng, depth)}
    if rng.random() < 0.5:
        schema["minItems"] = rng.randint(0, 2)
    if rng.random() < 0.5:
        schema["maxItems"] = schema.get("minItems", 0) + rng.randint(0, 3)
    return schema


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_schema(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_schema(rng, depth) for _ in range(rng.randint(1, 2))] + [{"type": "null"}]}


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.random()
    if kind < 0.15:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind < 0.3:
        return {"type": "string", "format": rng.choice(FORMATS)}
    schema: Schema = {"type": "string"}
    if kind < 0.6:
        schema["minLength"] = rng.randint(0, 6)
    if rng.random() < 0.3:
        schema["maxLength"] = schema.get("minLength", 0) + rng.randint(0, 12)
    return schema


def _integer(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "integer"}
    if rng.random() < 0.5:
        schema["minimum"] = rng.randint(-1000, 1000)
    if rng.random() < 0.5:
        schema["maximum"] = schema.get("minimum", -1000) + rng.randint(0, 5000)
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "number"}
    if rng.random() < 0.3:
        schema["minimum"] = rng.randint(-10, 10)
        schema["exclusiveMaximum"] = schema["minimum"] + rng.randint(1, 100)
    return schema


def _boolean(rng: random.Random, depth: int) -> Schema:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))


def _choice(rng: random.Random, depth: int) -> Schema:
    values = ["alpha", "beta", "Ünïcode", 'with "quotes"', "two\nlines", 1, -2.5, True, None]
    if rng.random() < 0.2:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randint(1, 4))}
