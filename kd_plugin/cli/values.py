"""Values of settings from YAML nodes and from words, as the type of the setting asks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from enum import Enum
from types import GenericAlias
from typing import Any, get_args, get_origin

import yaml

from kd_plugin.errors import UsageError, nearest

_TRUE, _FALSE, _NULL = ("true", "yes", "on"), ("false", "no", "off"), ("", "~", "null")
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_TEXT = "tag:yaml.org,2002:str"
_SHOWN, _LISTED = 60, 12  # characters of a wrong value that a message shows; words that it lists


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type; a sequence is a list, and a mapping a dictionary."""
    if get_origin(hint) in (Sequence, Mapping):
        return (GenericAlias(list if get_origin(hint) is Sequence else dict, get_args(hint)),)
    if get_origin(hint) is None or get_origin(hint) in (list, dict, tuple) or not get_args(hint):
        return (hint,)
    if type(None) not in get_args(hint) and "Literal" in str(get_origin(hint)):
        return (hint,)
    return tuple(kind for one in get_args(hint) for kind in kinds_of(one))


def value_of(node: yaml.Node, hint: Any, where: str) -> Any:
    """Return the value of a YAML node as its type asks; what is written decides, not what YAML would make of it.

    Raises:
        UsageError: it is of another type.
    """
    kinds = kinds_of(hint)
    if Any in kinds or object in kinds:
        return _plain(node)
    if any(_is_enum(kind) for kind in kinds):  # transformers writes `SchedulerType | str`, and takes its words alone
        kinds = tuple(kind for kind in kinds if kind is not str)
    if isinstance(node, yaml.MappingNode):
        for kind in kinds:
            if kind is dict or get_origin(kind) is dict:
                inner = (get_args(kind) or (Any, Any))[1]
                return {str(_plain(k)): value_of(v, inner, f"{where}.{_plain(k)}") for k, v in node.value}
    elif isinstance(node, yaml.SequenceNode):
        for kind in kinds:
            if kind is list or get_origin(kind) in (list, tuple):
                inner = (get_args(kind) or (Any,))[0]
                items = [value_of(item, inner, f"{where}[{i}]") for i, item in enumerate(node.value)]
                return tuple(items) if get_origin(kind) is tuple else items
    else:
        found = _scalar(node.value, kinds, quoted=getattr(node, "style", None) in ("'", '"', "|", ">"))
        if found is not _scalar:
            return found
    shown = textwrap.shorten(str(_plain(node)), _SHOWN, placeholder="…")
    words = [str(one.value) for kind in kinds if _is_enum(kind) for one in kind]
    raise UsageError(f"{where}: expected {_expected(kinds)}, found {shown!r}.{nearest(shown, words)}")


def value_of_words(words: Any, hint: Any, where: str) -> Any:
    """Return the value of an option: of its one word, which may be YAML where that is asked for, or of several.

    Raises:
        UsageError: it is of another type, or no YAML.
    """
    kinds = kinds_of(hint)
    nested = any(kind in (dict, list, Any) or get_origin(kind) in (dict, list, tuple) for kind in kinds)
    if isinstance(words, list):
        if len(words) > 1:
            nodes: list[yaml.Node] = [yaml.ScalarNode(_TEXT, word) for word in words]
            return value_of(yaml.SequenceNode("tag:yaml.org,2002:seq", nodes), hint, where)
        (words,) = words
    if nested and words.lstrip()[:1] in ("{", "["):
        try:
            node: Any = yaml.compose(words, yaml.SafeLoader)
            return value_of(node, hint, where)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or error
            raise UsageError(f"{where}: neither YAML nor JSON ({reason}): {words[:_SHOWN]!r}.") from error
    if Any in kinds:
        return yaml.safe_load(words)
    of_one = yaml.ScalarNode(_TEXT, words)
    if nested and str not in kinds and not any(_is_scalar(kind) for kind in kinds if kind is not type(None)):
        return value_of(yaml.SequenceNode("tag:yaml.org,2002:seq", [of_one]), hint, where)
    return value_of(of_one, hint, where)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is_scalar(kind: Any) -> bool:
    return kind in _SCALARS or _is_enum(kind)


def _scalar(text: str, kinds: Sequence[Any], *, quoted: bool) -> Any:
    """Return a scalar as the first kind that it can be; this function itself if it can be none."""
    folded = text.lower()
    if not quoted:
        if type(None) in kinds and (folded in _NULL or (folded == "none" and str not in kinds)):
            return None
        for kind in kinds:
            false_too = kind is bool or (not isinstance(kind, type) and False in get_args(kind))
            if false_too and folded in (*_TRUE, *_FALSE):
                return folded in _TRUE
        for kind in (int, float):
            if kind in kinds:
                try:
                    return kind(text)
                except ValueError:
                    continue
    for kind in kinds:
        if kind is str or (not isinstance(kind, type) and text in get_args(kind)):
            return text
        if _is_enum(kind) and text in {one.value for one in kind}:
            return kind(text)
    return _scalar


def _plain(node: yaml.Node) -> Any:
    """Return what YAML itself makes of a node."""
    return yaml.safe_load(yaml.serialize(node))


def _expected(kinds: Sequence[Any]) -> str:
    said = []
    for kind in kinds:
        if kind in _SCALARS:
            said.append(_SCALARS[kind])
        elif kind is dict or get_origin(kind) is dict:
            said.append("a mapping {key: value}")
        elif kind is list or get_origin(kind) in (list, tuple):
            said.append("a list [a, b]")
        elif _is_enum(kind):
            listed = [str(one.value) for one in kind]
            said.append("one of " + ", ".join(listed[:_LISTED]) + ", ..." * (len(listed) > _LISTED))
        else:
            said += [repr(value) for value in get_args(kind)] or [str(kind)]
    return " or ".join(dict.fromkeys(said))
