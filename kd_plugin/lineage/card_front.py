"""Writing some keys into the front matter of a card and leaving every other byte of it as its author wrote it.

The text is taken apart by its top-level keys, which begin in the first column; nothing is parsed and written again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_QUOTED = r"""(?P<quote>["'])(?P<quoted>[^"'\n]*)(?P=quote)"""
_PLAIN = r"""(?P<plain>[^\s#"'\[\]{}&*!|>%@`?:,-][^\n:#]*?)"""
_KEY = re.compile(rf"^(?:{_QUOTED}|{_PLAIN})[ \t]*:(?=\s|$)")


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
