"""What the validation library finds, in words a user can act on: the value that stands there, what is wrong with it, what would work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_ext.config.section import meaning_of

_KINDS = {
    "int_type": ("a whole number", "write it without quotes, for example 4"),
    "int_from_float": ("a whole number", "write it without a fraction, for example 4"),
    "float_type": ("a number", "write it without quotes, for example 0.1"),
    "bool_type": ("true or false", "write true or false"),
    "string_type": ("text", "put it in quotes"),
    "path_type": ("a path", "write the path of a file"),
    "tuple_type": ("a list", "write it in brackets, for example [[1, 2]]"),
    "list_type": ("a list", "write it in brackets"),
    "dict_type": ("a mapping", "write `name: number` lines, for example {qa: 1.0}"),
}
_BOUNDS = {
    "greater_than": ("must be greater than {gt}", "gt"),
    "greater_than_equal": ("must be at least {ge}", "ge"),
    "less_than": ("must be less than {lt}", "lt"),
    "less_than_equal": ("must be at most {le}", "le"),
}


def plain_words(error: ValidationError, value_of: Callable[[str], Any], root: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """(dotted field, problem, remedy) of every error."""
    for item in error.errors(include_url=False):
        path = item["loc"][:-1] if item["type"] == "missing" else item["loc"]  # a missing element is a fault of the list it is missing from
        dotted = ".".join(str(part) for part in path)
        yield dotted, *_words(item["type"], item["msg"], item.get("ctx", {}), value_of(dotted), _meaning(root, path))


def _words(kind: str, message: str, context: dict[str, Any], value: Any, meaning: str) -> tuple[str, str]:
    if kind in _KINDS:
        wanted, remedy = _KINDS[kind]
        return f"{_show(value)} is not {wanted}", remedy
    if kind in _BOUNDS:
        text, bound = _BOUNDS[kind]
        return f"{_show(value)} {text.format(**{bound: _short(context[bound])})}", meaning
    if kind == "literal_error":
        return f"{_show(value)} is not one of its values", f"use {context['expected']}"
    if kind in ("too_long", "too_short", "missing"):
        return f"{_show(value)} has the wrong number of elements", meaning
    return f"{_show(value)} does not fit: {message}", meaning


def _meaning(root: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """What the schema says about a field, to remind of its meaning; else its default."""
    section: Any = root
    owner, field, name = None, None, ""
    for part in path:
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            break
        owner, field, name = section, fields[part], str(part)
        section = field.annotation
    if owner is None or field is None:
        return ""
    return meaning_of(owner, name) or f"the default is {field.get_default(call_default_factory=True)}"


def _short(number: Any) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)
