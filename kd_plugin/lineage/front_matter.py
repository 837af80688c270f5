"""YAML that may come from strangers, and the front matter of cards: found, read within bounds, changed in place.

Before the loader builds anything, a file is looked at event by event, which needs no recursion: bytes, depth, nodes,
and numbers that cost time are bounded. To change a card, its front matter is taken apart by its top-level keys, which
begin in the first column; nothing is parsed and written again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kd_plugin.errors import ConfigError

MAX_BYTES = 1 << 20
_MAX_DEPTH = 64  # libyaml's composer recurses in C, and deep nesting ends the process
_MAX_EVENTS = 100_000  # a card with a thousand results has 20,000
_MAX_NUMBER = 64  # characters; YAML 1.1 reads 1:1:1... as one number to the base of 60, in quadratic time
_NUMBER = re.compile(r"[-+]?[\d.][\d_.,:eE+-]*|[-+]?0[bxo][\da-fA-F_]*")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# The hub takes a byte-order mark, blank lines and other line ends before and inside; what it reads must not be hidden.
# Two expressions, since one for both marks takes cubic time where a card has many blank lines.
_BEGUN = re.compile(r"\A\ufeff?\s*---[ \t]*[\r\n]")
_ENDED = re.compile(r"[\r\n]---[ \t]*(?:\r?\n|\r|\Z)")
_QUOTED = r"""(?P<quote>["'])(?P<quoted>[^"'\n]*)(?P=quote)"""
_PLAIN = r"""(?P<plain>[^\s#"'\[\]{}&*!|>%@`?:,-][^\n:#]*?)"""
_KEY = re.compile(rf"^(?:{_QUOTED}|{_PLAIN})[ \t]*:(?=\s|$)")


def parse_yaml(raw: bytes, where: str) -> Any:
    """Parse YAML: bounded, no tags beyond the plain ones, no aliases, no key twice.

    Args:
        raw: the file.
        where: what messages call it.

    Raises:
        ConfigError: it is too large, too deep, malformed (with line and column), uses aliases, or says a key twice.
    """
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_BYTES} bytes; that is no lineage declaration.")
    try:
        text = raw.decode("utf-8")
        _require_shallow_lines(text, where)
        _require_plain(yaml.parse(text, Loader=_LOADER), where)
        return yaml.load(text, Loader=_LOADER)  # a safe loader either way
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise ConfigError(f"{where} is not valid YAML at {place}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}.") from error
    except (LookupError, AttributeError, TypeError) as error:  # how PyYAML meets `!!bool x` and `!!int ''`
        raise ConfigError(f"{where} is not valid YAML: a value does not fit its tag ({error}).") from error


def _require_shallow_lines(text: str, where: str) -> None:
    """Refuse lines that open many levels at once, at which the scanner itself takes quadratic time."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[{\]}]", text):  # an upper bound: brackets inside strings count too
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    opened = max((len(run.group()) // 2 for run in re.finditer(r"(?:[-?][ \t]+){2,}", text)), default=0)
    if max(deepest, opened) > _MAX_DEPTH:
        raise ConfigError(f"{where} is nested deeper than {_MAX_DEPTH} levels; that is no declaration.")


def _require_plain(events: Iterator[Any], where: str) -> None:
    """Follow the events of a file, and refuse what a declaration does not need."""
    # For each open mapping the keys so far, and whether a key comes next; None for a sequence
    open_nodes: list[tuple[set[str], list[bool]] | None] = []
    for number, event in enumerate(events):
        if number > _MAX_EVENTS:
            raise ConfigError(f"{where} holds more than {_MAX_EVENTS} nodes; that is no declaration.")
        if isinstance(event, yaml.AliasEvent):
            # An alias can make a small file stand for billions of nodes, and no declaration needs one.
            raise ConfigError(f"{where} uses YAML aliases (*name), which are not read here; write the value out.")
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            open_nodes.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        if open_nodes and (mapping := open_nodes[-1]) is not None:
            keys, (is_key,) = mapping
            mapping[1][0] = not is_key
            if is_key and isinstance(event, yaml.ScalarEvent):
                if event.value in keys:
                    again = f", again in line {event.start_mark.line + 1}" if event.start_mark else ""
                    raise ConfigError(f"{where} says {event.value[:80]!r} twice{again}; say it once.")
                keys.add(event.value)
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > _MAX_NUMBER and event.implicit[0] and _NUMBER.fullmatch(event.value):
                raise ConfigError(f"{where} holds a number of {len(event.value)} characters; that is no declaration.")
            continue
        open_nodes.append((set(), [True]) if isinstance(event, yaml.MappingStartEvent) else None)
        if len(open_nodes) > _MAX_DEPTH:
            raise ConfigError(f"{where} is nested deeper than {_MAX_DEPTH} levels; that is no declaration.")


@dataclass(frozen=True)
class Front:
    """The front matter of a card.

    Attributes:
        yaml: what is between the marks, without blank lines at either end.
        end: where the card goes on behind the second mark.
    """

    yaml: str
    end: int


def find_front(text: str) -> Front | None:
    """Return the front matter of a card, or None where there is none, or no end of it."""
    begun = _BEGUN.match(text)
    ended = _ENDED.search(text, begun.end()) if begun else None
    if begun is None or ended is None:
        return None
    return Front(text[begun.end() : ended.start()].strip("\r\n"), ended.end())


def front_of(text: str) -> str | None:
    """Return the YAML between the marks, or None where there is none, or no end of it."""
    front = find_front(text)
    return None if front is None else front.yaml


def has_begun(text: str) -> bool:
    """Whether front matter begins, be it that it never ends."""
    return _BEGUN.match(text) is not None


def with_keys(front: str, values: Mapping[str, Any], *, drop: Sequence[str] = (), add_tag: str | None = None) -> str:
    """Return front matter with some keys in the place of those of the same name, or behind the others.

    Args:
        front: YAML between the marks; its top level is a mapping, or it is empty.
        values: keys to write.
        drop: keys to leave out.
        add_tag: to be among ``tags``, whatever form those have.

    Returns:
        YAML that ends with a line break.
    """
    blocks = _blocks(front)
    found = {key for key, _ in blocks}
    written: list[str] = []
    for key, text in blocks:
        if key in drop and key not in values:
            # Comments and blank lines behind it belong to what comes next
            written.append("".join(re.findall(r"^(?:[ \t]*#.*|[ \t]*)(?:\n|\Z)", text, re.MULTILINE)))
        elif key is not None and key in values and _says(text, key, values[key]):
            written.append(text if text.endswith("\n") else f"{text}\n")
        elif key is not None and key in values:
            written.append(_dumped(key, values[key]) + _trailing(text))
        elif key == "tags" and add_tag is not None:
            written.append(_with_tag(text, add_tag))
        else:
            written.append(text if text.endswith("\n") or not text else f"{text}\n")
    written += [_dumped(key, value) for key, value in values.items() if key not in found]
    if add_tag is not None and "tags" not in found:
        written.append(_dumped("tags", [add_tag]))
    return "".join(written)


def _says(text: str, key: str, value: Any) -> bool:
    """Whether a block says this value already, in whatever words."""
    try:
        return bool(yaml.safe_load(text) == {key: value})
    except yaml.YAMLError:
        return False


def _blocks(front: str) -> list[tuple[str | None, str]]:
    """Cut front matter into its top-level keys with what belongs to them; what comes before the first has no key."""
    blocks: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in front.splitlines(keepends=True):
        key = _KEY.match(line)
        if key is not None:
            blocks.append((key["quoted"] if key["quote"] else key["plain"].strip(), []))
        blocks[-1][1].append(line)
    return [(key, "".join(lines)) for key, lines in blocks if lines]


def _dumped(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120)


def _trailing(text: str) -> str:
    """Return the comments and blank lines at the end of a block, which are about what comes next."""
    match = re.search(r"(?:^(?:#.*|[ \t]*)\n)+\Z", text if text.endswith("\n") else f"{text}\n", re.MULTILINE)
    return "" if match is None or match.start() == 0 else match[0]


def _with_tag(text: str, tag: str) -> str:
    """Put a tag behind those that a block lists, in the form that it has; a single tag becomes a list."""
    block = text if text.endswith("\n") else f"{text}\n"
    present = yaml.load(block, Loader=yaml.BaseLoader)["tags"]  # strings alone: 1.10 stays 1.10
    listed = present if isinstance(present, list) else [present] if present else []
    if tag in listed:
        return block
    trailing = _trailing(block)
    body = block.removesuffix(trailing) if trailing else block
    items = re.findall(r"^([ \t]*)-(?=[ \t]|$)", body, re.MULTILINE)
    if isinstance(present, list) and items:
        return f"{body}{items[0]}- {tag}\n{trailing}"
    return _dumped("tags", [*listed, tag]) + trailing
