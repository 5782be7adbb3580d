"""Options: dataclass fields with a default, a type, a range and one sentence.

Checks, dictionaries, recipes and --helpfull all derive from these fields.
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from tarflow_jax.errors import UserError

REQUIRED = dataclasses.MISSING
_LIMITS: tuple[tuple[str, Any], ...] = (("choices", ()), ("low", -math.inf), ("high", math.inf))
_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def option(
    default: Any, text: str, *, choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf
) -> Any:
    """Declares an option: its default (or REQUIRED), one sentence, and its choices or its range, bounds included."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


class Options:
    """Base of frozen dataclasses of options: checks every value, reads and writes dictionaries.

    Integers become floats where the field is one, and lists become tuples. Raises UserError, naming the field.
    """

    group: ClassVar[str]  # in a recipe and in messages

    def __post_init__(self) -> None:
        for name, (field, kind) in _fields(type(self)).items():
            object.__setattr__(self, name, self._checked(field, kind))

    def _checked(self, field: dataclasses.Field[Any], kind: Any) -> Any:
        given, expected = getattr(self, field.name), _described(kind)
        choices, low, high = (field.metadata.get(*limit) for limit in _LIMITS)
        try:
            value = _converted(given, kind)
        except (TypeError, OverflowError):
            value = None
        fits = value is not None and all(
            low <= number <= high and -math.inf < number < math.inf
            for number in (value if isinstance(value, tuple) else (value,))
            if isinstance(number, float | int)
        )
        if choices:
            fits, expected = value in choices, f"one of {', '.join(choices)}"
        elif low > -math.inf:
            expected += f" from {low:g}" + (f" to {high:g}" if high < math.inf else "")
        elif kind is float:
            expected = "a finite number"
        if not fits:
            raise UserError(f"{self.group}.{field.name} is {given!r}; expected {expected}")
        return value

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `from_dict` is its inverse."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """From a dictionary, as read from JSON; raises UserError for unknown, missing or impossible fields."""
        if not isinstance(fields, Mapping):
            raise UserError(f"{cls.group} is {fields!r}; expected an object with the fields {', '.join(_fields(cls))}")
        known = _fields(cls)
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise UserError(
                    f"unknown {cls.group} field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
                )
        missing = [name for name, (field, _) in known.items() if field.default is REQUIRED and name not in fields]
        if missing:
            raise UserError(f"{cls.group} lacks {', '.join(missing)}")
        return cls(**fields)


def defaults(cls: type) -> dict[str, Any]:
    """Every option of a dataclass with its default; zero or an empty string where it has none."""
    found = {}
    for name, (field, kind) in _fields(cls).items():
        if "help" in field.metadata:
            found[name] = _zero(kind) if field.default is REQUIRED else field.default
        elif dataclasses.is_dataclass(field.default):
            found[name] = defaults(type(field.default))
    return found


def described(cls: type) -> Iterator[tuple[str, Any, str]]:
    """(name, default, sentence) of every option; those of a dataclass within it as "name.option"."""
    for name, (field, _) in _fields(cls).items():
        if "help" in field.metadata:
            yield name, defaults(cls)[name], field.metadata["help"]
        elif dataclasses.is_dataclass(field.default):
            yield from ((f"{name}.{inner}", *rest) for inner, *rest in described(type(field.default)))


def _fields(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass and their types, by name."""
    kinds = typing.get_type_hints(cls)
    return {field.name: (field, kinds[field.name]) for field in dataclasses.fields(cls)}


def _converted(value: Any, kind: Any) -> Any:
    """The value as `kind` holds it; raises TypeError if it does not fit."""
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        for each in arguments:
            try:
                return _converted(value, each)
            except TypeError:
                continue
    elif arguments and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) == len(value):
            return tuple(map(_converted, value, arguments))
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        nested: Any = kind
        return nested.from_dict(value) if issubclass(nested, Options) else nested(**value)
    elif kind in (int, float) and not isinstance(value, bool):
        if isinstance(value, numbers.Integral if kind is int else numbers.Real):
            return kind(value)
    elif not arguments and isinstance(value, kind):
        return value
    raise TypeError


def _described(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_described, arguments))
    if arguments:
        return "whole numbers" if arguments[-1] is Ellipsis else f"{len(arguments)} whole numbers"
    return _KINDS.get(kind, f"a {kind.__name__}")


def _zero(kind: Any) -> Any:
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return _zero(arguments[0])
    return tuple(map(_zero, arguments)) if arguments else kind()
