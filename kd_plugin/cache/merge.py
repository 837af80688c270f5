"""Several caches in one directory: those of one teacher become one cache, those of several teachers are kept together.

The second kind holds a copy of each cache under ``members/`` and, written last, ``members.json``, which names them with
their digests and weights (``panel.json`` in earlier versions; it is read all the same). Training takes it where it
takes a cache; see :class:`~kd_plugin.cache.joint.JointCache`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from kd_plugin.cache.files import explained, fitting, publish_new, seal, sync, temporary_name, unseal
from kd_plugin.cache.manifest import Manifest, Part, keep_tokens, kept_tokens
from kd_plugin.cache.mapped_write import verify_shard
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.schema import read_row_groups
from kd_plugin.cache.store import Store
from kd_plugin.errors import CacheCorruptionError, CacheError, ConfigError
from kd_plugin.lineage.declared import joined_records

RECORD = "members.json"
_OLD_RECORD = "panel.json"  # the name that a checkpoint's description of its panel has
_FORMAT, _VERSION = "kd-plugin teacher caches together", 1
_SHARED = ("tokenizer", "vocab_size", "temperature")
_NOT_COPIED = shutil.ignore_patterns("mapped", "claims", "tmp")


def merge(caches: Sequence[str | Path], output_dir: str | Path) -> TeacherCache:
    """Join ``caches`` into a new one at ``output_dir``; the sources stay as they are.

    Interrupted, the same call goes on. Caches of several teachers over the same examples are put together by
    :func:`~kd_plugin.cache.merge.keep_together` instead.

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
    vocabulary = kept_tokens(opened[0].path, first.settings.tokenizer)
    if vocabulary is not None:
        keep_tokens(store.directory, vocabulary)
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


@dataclass(frozen=True)
class _Member:
    """A cache as the record names it: its directory below, its weight, and its content digest."""

    path: str
    weight: float
    digest: str


@dataclass(frozen=True)
class Together:
    """What such a directory holds.

    Attributes:
        members: directory of each cache, and its weight.
        digests: content digest of each.
    """

    members: dict[str, float]
    digests: dict[str, str]


def is_together(directory: str | Path) -> bool:
    """Whether ``directory`` holds several caches."""
    return _record(directory).is_file()


def _record(directory: str | Path) -> Path:
    root = Path(directory)
    old = root / _OLD_RECORD
    return old if old.is_file() and (root / "members").is_dir() else root / RECORD


def read_together(directory: str | Path) -> Together:
    """Read the record of a directory with several caches.

    Raises:
        CacheCorruptionError: it was changed.
        CacheError: it is of a later version, or was not written by kd-plugin.
    """
    root, record = Path(directory), _record(directory)
    values = unseal(record, "The caches under members/ are not affected: train on them directly, or merge again.")
    if (values.get("format"), values.get("version")) != (_FORMAT, _VERSION):
        raise CacheError(f"{record} is of a format that this kd-plugin does not read. Use a newer one.")
    listed = values.get("members")
    if not isinstance(listed, list) or not listed:
        raise CacheError(f"{record} names no caches. Merge again.")
    members = [_Member(**fitting(_Member, one, f"a cache of {record}")) for one in listed]
    if min(member.weight for member in members) < 0:
        raise CacheError(f"{record} has a weight below 0. Merge again.")
    weights = {str(root / member.path): float(member.weight) for member in members}
    return Together(weights, {str(root / member.path): member.digest for member in members})


def open_members(directory: str | Path, allow_partial: bool = False) -> dict[TeacherCache, float]:
    """Open the caches of a directory, each the one that was put there.

    Raises:
        CacheCorruptionError: the record or a cache was changed.
    """
    record = read_together(directory)
    opened = {}
    for path, weight in record.members.items():
        cache = TeacherCache(path, allow_partial=allow_partial)
        if cache.manifest.content_digest != record.digests[path]:
            raise CacheCorruptionError(f"{path} is not the cache that was merged here. Merge the caches again.")
        opened[cache] = weight
    return opened


def keep_together(
    caches: Sequence[TeacherCache], output_dir: str | Path, weights: Sequence[float] | None = None
) -> None:
    """Copy finished ``caches`` of several teachers over the same examples into a new directory.

    Args:
        caches: the caches; the sources stay as they are.
        output_dir: a new or empty directory.
        weights: one a cache; None weighs all equally.

    Raises:
        ConfigError: the caches cannot teach one student together, or are not over the same examples; the directory
            is in use; or the weights are not one a cache.
    """
    root = Path(output_dir)
    numbers = [1.0] * len(caches) if weights is None else [float(weight) for weight in weights]
    if len(numbers) != len(caches) or min(numbers) < 0 or not sum(numbers):
        raise ConfigError(
            f"{len(numbers)} weights {numbers} for {len(caches)} caches; expected one of at least 0 each."
        )
    _require_one_student(caches)
    if root.exists() and any(root.iterdir()):
        raise ConfigError(f"{root} is not empty. Nothing was changed; choose a new directory.")
    for cache in caches:
        cache.verify()
    with explained(f"Writing to {root}", "Remove what is there and merge again."):
        (root / "members").mkdir(parents=True, exist_ok=True)
        members = []
        for number, (cache, weight) in enumerate(zip(caches, numbers, strict=True)):
            path = f"members/{number}-{cache.path.resolve().name}"
            shutil.copytree(cache.path, root / path, ignore=_NOT_COPIED)
            members.append({"path": path, "weight": weight, "digest": cache.manifest.content_digest})
        temporary = temporary_name(root, RECORD)
        temporary.write_bytes(seal({"format": _FORMAT, "version": _VERSION, "members": members}))
        sync(temporary)
        publish_new(temporary, root / RECORD)


def _require_one_student(caches: Sequence[TeacherCache]) -> None:
    first, *others = caches
    held = set(first.dataset()["example_id"])
    for cache in others:
        mine, theirs = first.manifest.settings.to_json(), cache.manifest.settings.to_json()
        differing = [
            f"{name}: {mine[name]!r} against {theirs[name]!r}" for name in _SHARED if mine[name] != theirs[name]
        ]
        if differing:
            raise ConfigError(f"{first} and {cache} cannot teach one student together: {'; '.join(differing)}.")
        ids = set(cache.dataset()["example_id"])
        if ids != held:
            raise ConfigError(
                f"{first} and {cache} differ in their settings and are not over the same examples: {len(held - ids)} "
                f"are only in the first, {len(ids - held)} only in the second. One cache has one set of "
                "settings: give the trainer both, and each teaches its own examples."
            )
