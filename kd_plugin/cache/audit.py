"""Reading every byte of a cache, and saying all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from kd_plugin.cache.manifest import read_manifest
from kd_plugin.cache.mapped import Mapped
from kd_plugin.cache.mapping import mapped_directory, verify_shard
from kd_plugin.cache.store import card, gather
from kd_plugin.errors import CacheCorruptionError


def problems(directory: Path, mapped_dir: str | Path | None = None) -> list[str]:
    """Compare every file of a cache with what was written.

    Args:
        directory: the cache, finished or not.
        mapped_dir: where its memory-mapped form is kept, if not in the cache.

    Returns:
        One sentence a problem: the file, the rows that are lost, and how to redo just those.

    Raises:
        CacheError: there is no cache.
        CacheCorruptionError: the manifest or the record of a unit is damaged, so that nothing else can be judged.
    """
    written = read_manifest(directory)
    manifest = gather(directory, written)
    found = [f"The record of unit {u.index} is missing or differs." for u in written.units if u not in manifest.units]
    for unit in manifest.units:
        found += _caught(lambda unit=unit: verify_shard(directory, unit))  # type: ignore[misc]
    known = {Path(unit.file).name for unit in manifest.units}
    # While a capture runs, a shard has its name a moment before its record has.
    if manifest.complete:
        found += [f"{path} belongs to no unit of this cache. Move it away." for path in _strangers(directory, known)]
    readme = directory / "README.md"
    if written.finished is not None and (not readme.is_file() or readme.read_bytes() != card(manifest)):
        found.append(f"{readme} is missing or was changed. Run the same capture again.")
    mapped = mapped_directory(directory, manifest, mapped_dir)
    if mapped.exists():
        found += _caught(lambda: Mapped(mapped, manifest).verify())
    return found


def _caught(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except CacheCorruptionError as error:
        return [str(error)]
    return []


def _strangers(directory: Path, known: set[str]) -> Iterator[Path]:
    return (path for path in sorted((directory / "data").iterdir()) if path.name not in known)
