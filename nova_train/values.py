"""Text and YAML as typed values: what a recipe, a flag or a resolved config gives, read by the type hint of its key.

"1e-5" is a float where a float is wanted, "null" is None where None is allowed, one value is a list of one where a list
is wanted; "60GiB" is a number of bytes. What does not fit is a `ConfigError` that names key and value.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import yaml

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


class ConfigError(ValueError):
    """A recipe or flag that cannot be used; the message names the key, the value and what was expected."""


def parse_bytes(value: str | int, where: str) -> int:
    """Bytes of 64000000000, "80GB" (powers of 1000) or "60GiB" (powers of 1024).

    Raises:
        ConfigError: text that is no size, or one below a byte; `where` opens the message.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)", str(value).strip())
    if match is not None and match[2].lower() in ("k", "m", "g", "t"):
        number, letter = match[1], match[2].upper()
        raise ConfigError(
            f"{where} {value!r} has two meanings: give {number}{letter}iB (powers of 1024) or {number}{letter}B "
            "(powers of 1000)"
        )
    if match is None or match[2].lower() not in UNITS:
        raise ConfigError(f"{where} must be a size such as 60GiB, 80GB or 64000000000 (bytes), got {value!r}")
    size = int(Fraction(match[1]) * UNITS[match[2].lower()])
    if size < 1:
        raise ConfigError(f"{where} must be at least one byte, got {value!r}")
    return size


def parse_yaml(text: str) -> Any:
    """Safe YAML in which a key that stands twice is an error.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=_RecipeLoader)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that `hint` names.

    Raises:
        ConfigError: what was expected; `where` opens the message.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, hint, arguments, where)
    if origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
        raise _wrong(value, _described(hint), where)
    if origin in (list, tuple):
        items = _as_sequence(value, arguments[0], where)
        coerced = [coerce(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(items)]
        return coerced if origin is list else tuple(coerced)
    if origin is dict or hint is dict:
        parsed = _parse_text(value, where) if isinstance(value, str) else value
        if not isinstance(parsed, dict) or not all(isinstance(key, str) for key in parsed):
            raise _wrong(value, "a mapping with text as keys", where)
        inner = arguments[1] if arguments else Any
        return {key: coerce(item, inner, f"{where}.{key}") for key, item in parsed.items()}
    if hint is bool:
        return _as_bool(value, where)
    if hint in (int, float):
        return _as_number(value, hint, where)
    if hint is str:
        if not isinstance(value, str):
            raise _wrong(value, "text (in quotes if it looks like a number)", where)
        return value
    raise TypeError(f"{where}: no rule for the type hint {hint!r}")


def _coerce_union(value: Any, hint: Any, arguments: tuple[Any, ...], where: str) -> Any:
    members = [member for member in arguments if member is not type(None)]
    if len(members) < len(arguments) and (value is None or value in ("null", "none", "None", "~")):
        return None
    if len(members) == 1 and value is not None:
        return coerce(value, members[0], where)
    for member in members:
        try:
            return coerce(value, member, where)
        except ConfigError:
            continue
    raise _wrong(value, _described(hint), where)


def _as_sequence(value: Any, item: Any, where: str) -> Sequence[Any]:
    if isinstance(value, str) and value.startswith("["):
        value = _parse_text(value, where)
    elif isinstance(value, str) and item in (int, float):
        value = value.split()
    if isinstance(value, (list, tuple)):
        return value
    if value is None or value is True or isinstance(value, dict):
        raise _wrong(value, "a list", where)
    return [value]


def _as_bool(value: Any, where: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _wrong(value, "true or false", where)
    return value


def _as_number(value: Any, hint: type, where: str) -> int | float:
    expected = _WORDS[hint]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _wrong(value, expected, where)
    try:
        number = int(value) if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", str(value)) else float(value)
    except ValueError:
        raise _wrong(value, expected, where) from None
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise _wrong(value, expected, where)
    return hint(number)


def _parse_text(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {text!r}") from error


_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", types.NoneType: "null"}
_PLURALS = {int: "whole numbers", float: "finite numbers", str: "texts"}


def _described(hint: Any) -> str:
    """The hint in words: "auto, a whole number or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin in (list, tuple):
        return f"a list of {_PLURALS.get(arguments[0], _described(arguments[0]))}"
    if origin in (typing.Union, types.UnionType):
        words = [_described(member) for member in arguments]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    return _WORDS.get(hint, str(hint))


def _wrong(value: Any, expected: str, where: str) -> ConfigError:
    return ConfigError(f"{where}: expected {expected}, got {value!r} ({type(value).__name__})")


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (plain PyYAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int)) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, (str, int)):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)
