"""Joining caches of one teacher and one set of settings that were captured from different data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from kd_plugin.cache.manifest import Manifest, Part
from kd_plugin.cache.mapping import verify_shard
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.schema import read_row_groups
from kd_plugin.cache.store import Store
from kd_plugin.errors import ConfigError
from kd_plugin.lineage.outputs import joined_records


def merge(caches: Sequence[str | Path], output_dir: str | Path) -> TeacherCache:
    """Join ``caches`` into a new one at ``output_dir``; the sources stay as they are.

    Interrupted, the same call goes on. Caches of several teachers over the same examples are put together by
    :func:`~kd_plugin.cache.together.keep_together` instead.

    Args:
        caches: at least two finished caches with the same settings.
        output_dir: a new or empty directory.

    Raises:
        ConfigError: fewer than two caches, other settings (names each), or the same data twice.
        CacheError: a cache is not finished, or the directory cannot be written.
        CacheCorruptionError: a shard is not as it was written.
    """
    opened = [TeacherCache(path, verify=False) for path in caches]
    if len(opened) < 2:
        raise ConfigError(f"merge needs at least two caches, got {len(opened)}.")
    first = opened[0].manifest
    for cache in opened[1:]:
        differences = first.settings.differences(cache.manifest.settings)
        if differences:
            raise ConfigError(
                f"{opened[0].path} and {cache.path} differ in {'; '.join(differences)}. One cache has one teacher and "
                "one set of settings: keep them together (kd-plugin cache merge), or give the trainer both."
            )
    parts: list[Part] = []
    plan: list[tuple[TeacherCache, int]] = []  # unit of the merged cache -> (source, its unit)
    for cache in opened:
        for part in cache.manifest.parts:
            if any(part.fingerprint == other.fingerprint for other in parts):
                raise ConfigError(f"{cache.path} holds data that another of the caches holds as well.")
            parts.append(part)
        plan += [(cache, unit.index) for unit in cache.manifest.units]
    parts = _renumbered(parts, first)
    lineage = joined_records(*(cache.manifest.lineage for cache in opened))
    store = Store.create_or_join(Path(output_dir), first.settings, parts, lineage, first.engine)
    if store.manifest.parts != tuple(parts):
        raise ConfigError(f"{output_dir} holds a merge of other caches. Nothing was changed; choose another directory.")
    for index in store.missing():
        cache, source = plan[index]
        unit = cache.manifest.units[source]
        path = verify_shard(cache.path, unit)
        groups = read_row_groups(path, first.settings.digest, unit.index, unit.rows_lost)
        store.commit(
            index,
            pa.concat_tables(groups),
            input_tokens=unit.input_tokens,
            tokens=unit.tokens,
            entries=unit.entries,
            dropped=unit.dropped,
        )
    store.finish()
    return TeacherCache(output_dir)


def _renumbered(parts: Sequence[Part], manifest: Manifest) -> list[Part]:
    numbered, unit = [], 0
    for part in parts:
        numbered.append(replace(part, first_unit=unit))
        unit += -(-part.rows // manifest.settings.shard_rows)
    return numbered
