"""YAML that may come from strangers, read within bounds: bytes, depth, nodes, and numbers that cost time.

The file is looked at event by event, which needs no recursion, before the loader builds anything of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from kd_plugin.errors import ConfigError

MAX_BYTES = 1 << 20
_MAX_DEPTH = 64  # libyaml's composer recurses in C, and deep nesting ends the process
_MAX_EVENTS = 100_000  # a card with a thousand results has 20,000
_MAX_NUMBER = 64  # characters; YAML 1.1 reads 1:1:1... as one number to the base of 60, in quadratic time
_NUMBER = re.compile(r"[-+]?[\d.][\d_.,:eE+-]*|[-+]?0[bxo][\da-fA-F_]*")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
