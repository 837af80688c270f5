"""Settings: declared once, as a frozen dataclass beside what they configure, each with one sentence of help.

The core takes such a dataclass whole, and so do most hosts. Two hosts need another form of the same declaration. TRL's
parser wants a mutable dataclass with flat fields: :func:`mutable` makes a base for one. A Lightning class has flat
keyword arguments: it declares ``**fields``, builds the dataclass from them, and :func:`takes` puts the fields into its
signature and its docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from kd_plugin.errors import ConfigError, nearest

Class = TypeVar("Class", bound=type)
Settings = TypeVar("Settings")
Taker = TypeVar("Taker", bound=Callable[..., Any])
_PLAIN: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
}  # fmt: skip


def option(*, default: Any = MISSING, factory: Any = MISSING, help: str) -> Any:
    """Declare a field of settings.

    Args:
        default: its default.
        factory: makes the default, where that is mutable.
        help: one sentence, which every ``--help``, docstring and commented configuration shows.
    """
    return field(default=default, default_factory=factory, metadata={"help": help})


def other_default(cls: type, name: str, default: Any) -> Any:
    """Declare a field that settings inherit with another default; what it means, and its help, stay where they are."""
    one = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field(default=default, kw_only=one.kw_only, metadata=one.metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(option, other_default, field))
def settings(cls: Class) -> Class:
    """Make a class a frozen dataclass whose docstring lists its fields with their help."""
    made: Any = dataclass(frozen=True)(cls)
    _document(made, "Attributes", dataclasses.fields(made))
    return made  # type: ignore[no-any-return]


def mutable(group: type) -> Any:
    """Return a dataclass with the fields and the methods of frozen settings that a mutable dataclass can extend.

    Its values are checked where :func:`part_of` makes the frozen settings of them.
    """
    hints = get_type_hints(group)
    fields = [
        (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))  # type: ignore[call-overload]
        for f in dataclasses.fields(group)  # type: ignore[arg-type]
    ]
    body = {
        name: value
        for cls in reversed(group.__mro__[:-1])
        for name, value in vars(cls).items()
        if not name.startswith("__") and callable(value)
    }
    made = dataclasses.make_dataclass(group.__name__, fields, namespace={**body, "__doc__": group.__doc__})
    made.__module__ = group.__module__
    return made


def mappings(*groups: type) -> list[str]:
    """Return the fields that may be a mapping: what TRL's parser must read as JSON."""
    found = []
    for group in groups:
        found += [
            name
            for name, hint in get_type_hints(group).items()
            if any(get_origin(one) is dict for one in get_args(hint))
        ]
    return found


def part_of(cls: type[Settings], source: Any) -> Settings:
    """Make settings of an object that has their fields as attributes, such as a host's configuration.

    Raises:
        ConfigError: what the settings refuse.
    """
    return cls(**values_of(cls, vars(source)))


def values_of(cls: type, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of ``source`` that are fields of ``cls``."""
    return {f.name: source[f.name] for f in dataclasses.fields(cls) if f.name in source}  # type: ignore[arg-type]


def built(cls: type[Settings], fields: Mapping[str, Any]) -> Settings:
    """Make settings of keyword arguments.

    Raises:
        ConfigError: an unknown name, naming the nearest, or what the settings refuse.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            raise ConfigError(f"Unknown setting {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    return cls(**fields)


def require_types(cls: type, given: Mapping[str, Any]) -> None:
    """Refuse values that are not of the types of a dataclass's fields, where these are plain: numbers, text, booleans.

    Raises:
        ConfigError: names the field, what it takes, and what was found.
    """
    hints = get_type_hints(cls)
    for name, value in given.items():
        kinds = get_args(hints[name]) or (hints[name],)
        fitting = (type(value), float) if type(value) is int else (type(value),)
        if all(kind in _PLAIN for kind in kinds) and not set(fitting) & set(kinds):
            expected = " or ".join(_PLAIN[kind] for kind in kinds)
            raise ConfigError(f"{name}: expected {expected}, found {str(value)[:60]!r}.")


def require_known(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a value that is none of the names that are known.

    Raises:
        ConfigError: names the nearest.
    """
    if value not in known:
        raise ConfigError(
            f"Unknown {name} {value!r}; expected one of {', '.join(known)}." + nearest(str(value), list(known))
        )


def takes(group: type) -> Callable[[Taker], Taker]:
    """Show the ``**fields`` of a class or a function as the fields of ``group``, in its signature and its docstring.

    ``inspect.signature``, pydoc and the commands then teach every field. The signature of a class's ``__init__`` stays
    as it is written, because Lightning reads the arguments of ``save_hyperparameters`` by it.
    """

    def mark(taker: Taker) -> Taker:
        own = list(inspect.signature(vars(taker)["__init__"] if isinstance(taker, type) else taker).parameters.values())
        named = [p for p in own[isinstance(taker, type) :] if p.kind is not p.VAR_KEYWORD]
        hints = get_type_hints(group)
        fields = [f for f in dataclasses.fields(group) if f.name not in {p.name for p in named}]  # type: ignore[arg-type]
        added = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
            for f in fields
        ]
        shown: Any = inspect.Signature([*named, *added])
        described = inspect.cleandoc(taker.__doc__ or "")
        taker.__signature__ = _Signature(vars(taker)["__init__"], shown) if isinstance(taker, type) else shown  # type: ignore[attr-defined]
        _document(taker, "Args", [f for f in dataclasses.fields(group) if f"\n    {f.name}: " not in described])  # type: ignore[arg-type]
        return taker

    return mark


class _Signature:
    """The signature of a class, not of its instances, nor of a subclass with an ``__init__`` of its own."""

    def __init__(self, init: Callable[..., Any], signature: inspect.Signature) -> None:
        self._init, self._signature = init, signature

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None or owner.__init__ is not self._init:  # type: ignore[misc]
            raise AttributeError("__signature__")
        return self._signature


def _default(one: dataclasses.Field[Any]) -> Any:
    if one.default_factory is not MISSING:
        return one.default_factory()
    return inspect.Parameter.empty if one.default is MISSING else one.default


def _document(of: Any, section: str, fields: Sequence[dataclasses.Field[Any]]) -> None:
    """Write the help of some fields into a docstring, at the end of a section."""
    lines = [
        line
        for one in fields
        for line in textwrap.wrap(
            f"{one.name}: {one.metadata.get('help', '')}", 112, initial_indent="    ", subsequent_indent="        "
        )
    ]
    text, title = inspect.cleandoc(of.__doc__ or ""), f"\n\n{section}:"
    if title not in text:
        before, raises, after = text.partition("\n\nRaises:")
        text = before + title + raises + after
    before, title, after = text.partition(title)
    own, blank, rest = after.partition("\n\n")
    of.__doc__ = before + title + "\n".join([own, *lines]) + blank + rest
