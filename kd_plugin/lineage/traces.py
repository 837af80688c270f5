"""Traces of a lineage record that is not there: a card, a NOTICE or a bill of materials that this package wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugin.lineage.record import BOM, NOTICE, RECORD

SECTION_BEGIN, SECTION_END = "<!-- kd-plugin lineage: begin -->", "<!-- kd-plugin lineage: end -->"
NOTICE_HEADER = "NOTICE of the license lineage of this checkpoint, written by kd-plugin."
BOM_TOOL = "kd-plugin"
SIGNATURE = "lineage.sig"
_READ = 1 << 20  # bytes of a file that are looked at


def traces_in(directory: Path, card: Mapping[str, Any], text: str) -> str | None:
    """Return the name of a file that says that a record belongs to these weights, or None.

    A copy that leaves the record behind keeps nothing of what the record said, so its own badge says too little.

    Args:
        directory: weights, or rows.
        card: front matter of its card.
        text: the whole card.
    """
    block = card.get("distillation")
    if (isinstance(block, Mapping) and "lineage" in block) or SECTION_BEGIN in text:
        return "README.md"
    for name, mark in ((NOTICE, NOTICE_HEADER), (BOM, f'"{BOM_TOOL}"')):
        path = directory / name
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if mark.encode() in file.read(_READ):
                    return name
    for name in (SIGNATURE, RECORD):
        if (directory / name).is_symlink() or (directory / name).exists():
            return name
    return None
