"""Options: dataclass fields with a default, a type, a range and a one-sentence description.

Checks, dictionaries, recipes and --helpfull all derive from these fields.
"""

import dataclasses
import difflib
import inspect
import math
import numbers
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import jax

from tarflow_jax.errors import UserError


def option(default: Any, text: str = "", *, choices: tuple[Any, ...] = (), low: float = 0) -> Any:
    """Declares an option with a default, a one-sentence description, choices, and a lower bound."""
    if choices:
        text += f" One of {', '.join(map(str, choices))}."
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, "low": low})


def required(text: str, *, low: float) -> Any:
    """Declares a number from `low`, above 0, that has to be set; its default, 0, is rejected."""
    return option(0, text, low=low)


class Options:
    """Base class of frozen dataclasses of options; checks every value and converts to and from dictionaries.

    Integers become floats in float fields, and lists become tuples. Raises UserError naming the invalid field.
    """

    group: ClassVar[str]  # name in recipes and error messages

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            limits = {key: field.metadata[key] for key in ("choices", "low") if key in field.metadata}
            value = getattr(self, field.name)
            value = checked(f"{self.group}.{field.name}", value, kinds[field.name], **limits)
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary that JSON can hold; `from_dict` is its inverse."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Builds options from a dictionary, as read from JSON; raises UserError for unknown or invalid fields."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if not isinstance(fields, Mapping):
            raise UserError(f"{cls.group} is {fields!r}; expected an object with the fields {', '.join(known)}")
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"unknown {cls.group} field {name!r}{hint}")
        return cls(**fields)


def checked(name: str, value: Any, kind: Any, *, choices: tuple[Any, ...] = (), low: float = 0) -> Any:
    """Validates a value and converts it to the type `kind`, such as 1 to 1.0 for float.

    Raises UserError, naming it, if it is of another type, not among the choices, not finite, or below `low`.
    """

    def error(expected: str) -> UserError:
        return UserError(f"{name} is {shown(value)}; expected {expected}")

    try:
        result = _converted(value, kind)
    except (TypeError, OverflowError):
        raise error(re.sub(r"(\w+[.])+", "", inspect.formatannotation(kind))) from None
    if choices and result not in choices:
        raise error(f"one of {', '.join(map(str, choices))}")
    for number in result if isinstance(result, tuple) else (result,):
        if isinstance(number, int | float) and not math.isfinite(number):
            raise error("a finite number")
        if isinstance(number, int | float) and number < low:
            raise error(f"a number from {low:g}")
    return result


def shown(value: Any) -> str:
    """Formats a value for an error message, in one line."""
    return " ".join(repr(value).split())[:200]


def described(cls: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, default, description) of every option; options of a nested dataclass are named "field.option"."""
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            yield field.name, field.default, field.metadata["help"]
        elif dataclasses.is_dataclass(field.default):
            for name, default, text in described(field.default):
                yield f"{field.name}.{name}", default, text


def _converted(value: Any, kind: Any) -> Any:
    """Converts a value to the type `kind`; raises TypeError if it does not fit."""
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        for each in arguments:
            try:
                return _converted(value, each)
            except TypeError:
                continue
    elif arguments:
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(values)
        elif len(values) == 1:  # one number stands for all
            values *= len(arguments)
        if len(arguments) == len(values):
            return tuple(map(_converted, values, arguments))
    elif isinstance(value, Mapping) and inspect.isclass(kind) and issubclass(kind, Options):
        return kind.from_dict(value)
    elif kind in (int, float):
        if getattr(value, "shape", None) == () and not isinstance(value, jax.core.Tracer):  # a scalar array
            value = value.item()
        if isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise TypeError
