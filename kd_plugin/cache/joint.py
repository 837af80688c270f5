"""Several caches read together: an offline panel of teachers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_plugin.cache.alignment import TargetFit, require_aligned
from kd_plugin.cache.joining import batch_targets, labels_of_targets, not_in_cache
from kd_plugin.cache.merge import is_together, open_members
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.schema import example_id
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lineage.data import CACHE, with_origin
from kd_plugin.lineage.sources import Source
from kd_plugin.vocab import SharedTokens, Vocabulary

if TYPE_CHECKING:
    from datasets import Dataset

Caches = TeacherCache | str | Path | Sequence[TeacherCache | str | Path] | Mapping[Any, float]

_CHECKED_ROWS = 32  # rows with numbers of their own that are compared with the cache


@dataclass(frozen=True)
class Member:
    """One of the caches.

    Attributes:
        cache: it.
        weight: of its divergence; the weights of all members sum to one.
        column: per-token column of the numbers of its targets.
    """

    cache: TeacherCache
    weight: float
    column: str


class JointCache:
    """One or several caches, joined by example: where several hold a token, it has several teachers.

    The loss of a position is the weighted sum of the divergences from the members that hold it, their weights scaled
    to sum to one there. So caches over the same examples teach together, and caches over different ones each teach
    their own.

    Args:
        members: the caches, each with its weight and a column of its own.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)

    @classmethod
    def open(cls, caches: Caches | None, *, allow_partial: bool = False) -> JointCache:
        """Open what a user names.

        Args:
            caches: a cache or its directory, a list of them (with equal weights), or a mapping from them to weights. A
                directory may hold several caches, as ``kd-plugin cache merge`` puts them together.
            allow_partial: take caches whose capture did not finish.

        Raises:
            ConfigError: no cache, one twice, or weights that are negative or all 0.
            CacheError: see :class:`TeacherCache`.
        """
        if caches is None:
            raise ConfigError(
                "No teacher cache is given. Make one with `kd-plugin capture` or kd_plugin.capture(...), and pass its "
                "directory as teacher_cache."
            )
        if isinstance(caches, TeacherCache | str | Path):
            caches = [caches]
        weights = dict(caches) if isinstance(caches, Mapping) else {_key(cache): 1.0 for cache in caches}
        named = list(weights) if isinstance(caches, Mapping) else list(caches)
        if not named or len(weights) != len(named):
            raise ConfigError(
                f"teacher_cache names {len(named)} caches, {len(weights)} different ones; expected one or more."
            )
        numbers = [float(weight) for weight in weights.values()]
        total = sum(numbers)
        if min(numbers) < 0 or not total > 0:
            raise ConfigError(
                f"The weights of the teacher caches are {numbers}; expected numbers of at least 0, not all 0."
            )
        opened: list[tuple[TeacherCache, float]] = []
        for cache, number in zip(named, numbers, strict=True):
            if isinstance(cache, TeacherCache):
                opened.append((cache, number / total))
            elif is_together(cache):
                held = open_members(cache, allow_partial)
                opened += [(c, weight / sum(held.values()) * number / total) for c, weight in held.items()]
            else:
                opened.append((TeacherCache(cache, allow_partial=allow_partial), number / total))
        return cls(
            [
                Member(cache, weight, "teacher_index" if not i else f"teacher_index_{i}")
                for i, (cache, weight) in enumerate(opened)
            ]
        )

    def __str__(self) -> str:
        return ", ".join(str(member.cache.path) for member in self.members)

    @property
    def columns(self) -> list[str]:
        """Per-token columns that a dataset must carry along."""
        return [member.column for member in self.members]

    @property
    def taught_columns(self) -> list[str]:
        """Those of :attr:`columns` whose targets have a weight."""
        return [member.column for member in self.members if member.weight > 0]

    @property
    def rendered_at(self) -> str | None:
        """The time that the chat template printed in the rows of all caches; None where it printed none.

        Raises:
            ConfigError: it printed different ones, so that no row has the tokens of all of them.
        """
        settings = {str(member.cache.path): member.cache.manifest.settings for member in self.members}
        times = {path: one.rendered_at for path, one in settings.items() if one.rendered_at is not None}
        if len(set(times.values())) > 1:
            listed = ", ".join(f"{path} {time}" for path, time in times.items())
            raise ConfigError(
                f"The chat template prints the date, and it printed others into each of the teacher caches: {listed}. "
                "A row has the tokens of one date alone. Capture with one date (capture(..., date=...)), or leave the "
                "dataset out to train on the caches' own rows."
            )
        return next(iter(times.values()), None)

    @property
    def digests(self) -> dict[str, float]:
        """The weight of each cache, by the digest of its content."""
        return {member.cache.manifest.content_digest: member.weight for member in self.members}

    @property
    def sources(self) -> list[Source]:
        """The caches as ancestors of what is trained on them."""
        return [member.cache.source for member in self.members]

    def require_compatible(self, vocabulary: Vocabulary, *, temperature: float = 1.0) -> None:
        """Refuse a student that one of the caches cannot teach; see :meth:`TeacherCache.require_compatible`."""
        for member in self.members:
            member.cache.require_compatible(vocabulary, temperature=temperature)

    def common(self, vocabulary: Vocabulary) -> Vocabulary:
        """Return a student's vocabulary, cut to the rows that every teacher's head had at the capture."""
        for member in self.members:
            if member.cache.shared_with(vocabulary) is None:
                vocabulary = vocabulary.within(member.cache.manifest.vocab_size)
        return vocabulary

    def for_student(self, vocabulary: Vocabulary, *, temperature: float) -> tuple[JointCache, Vocabulary]:
        """Return the same caches cut to the tokens that all heads have a row for, and those tokens.

        Args:
            vocabulary: the student's.
            temperature: of the student's softmax.

        Raises:
            VocabularyError: a cache cannot teach it.
            ConfigError: a cache was captured at another temperature.
        """
        self.require_compatible(vocabulary, temperature=temperature)
        common = self.common(vocabulary)
        fitted = [replace(member, cache=member.cache.for_vocabulary(common)) for member in self.members]
        return JointCache(fitted), common

    @property
    def shared(self) -> SharedTokens | None:
        """What the student shares with all caches; None where all have its tokens."""
        found = [member.cache.shared for member in self.members]
        first = next((one for one in found if one is not None), None)
        return None if first is None else first.within(found)

    def require_aligned(self, *, allow_misaligned: bool = False) -> dict[str, TargetFit]:
        """Refuse a cache whose targets are shifted, or warn of it; return what was measured of each."""
        return {
            str(member.cache.path): require_aligned(member.cache, allow_misaligned=allow_misaligned)
            for member in self.members
        }

    def dataset(self) -> Dataset:
        """Return the examples of all caches, each once, with the columns of :attr:`columns`."""
        import datasets

        if len(self.members) == 1:
            return self.members[0].cache.dataset()
        # A row that one cache keeps whole and another cut is one example: the longer form comes first
        taught = [member.cache for member in self.members if member.weight > 0]
        parts: list[Dataset] = []
        lengths: list[int | None] = []
        for cache in sorted(taught, key=lambda c: -(c.manifest.settings.max_length or sys.maxsize)):
            rows, length = cache.dataset(), cache.manifest.settings.max_length
            cut = [None if other == length else length for other in lengths]
            seen = {name for part, at in zip(parts, cut, strict=True) for name in _names(part, at)}
            lengths.append(length)
            parts.append(rows.select([i for i, name in enumerate(rows["example_id"]) if name not in seen]))
        shared = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
        twins = [twin for part in parts for twin in _occurrences(part["example_id"])]
        whole = datasets.concatenate_datasets([part.select_columns(shared) for part in parts])
        whole = with_origin(whole.add_column("twin", twins), *(f"{CACHE}{c.manifest.content_digest}" for c in taught))
        return whole.map(lambda row: self.indices(row["input_ids"], row["twin"]), remove_columns="twin")

    def indices(self, input_ids: Sequence[int], twin: int = 0) -> dict[str, list[int]]:
        """Return the columns of a whole row, before truncation: -1 where there is no target.

        Args:
            input_ids: see :meth:`TeacherCache.teacher_index`.
            twin: likewise.
        """
        found = {member.column: member.cache.find_index(input_ids, twin) for member in self.members}
        return {column: [-1] * len(input_ids) if index is None else index for column, index in found.items()}

    def require_own(self, rows: Iterable[Mapping[str, Any]], name: str) -> None:
        """Refuse rows whose ``teacher_index`` was made from another cache, as far as their ``example_id`` tells.

        Raises:
            DataError: a row is not in the cache, or has other numbers there.
        """
        for number, row in zip(range(_CHECKED_ROWS), rows, strict=False):
            for member in self.members:
                kept = member.cache.manifest.settings.max_length
                ids = row["input_ids"]
                cut = kept is not None and len(ids) > kept
                twins = member.cache.teacher_indices_of(example_id(ids[:kept]) if cut else row["example_id"])
                given = {i for i in row[member.column] if i >= 0}
                if not given <= {i for twin in twins for i in twin}:
                    raise DataError(
                        f"Row {number} of the {name} dataset has a column {member.column} that was not made from "
                        f"{member.cache.path}: the targets would belong to other tokens. Take the rows from this "
                        "cache's dataset(), or remove the column, so that rows are joined by their tokens."
                    )

    def missing(self, input_ids: Sequence[int], why: str = "") -> DataError:
        """Return the error for a sequence that no cache holds; ``why`` is a sentence of its cause, or nothing."""
        return not_in_cache(self, "Rows of a streamed dataset", f"the first starts {list(input_ids[:8])}", why)

    def targets(self, labels: Tensor | None, indices: Mapping[str, Sequence[Sequence[int]] | Tensor]) -> dict[str, Any]:
        """Gather the targets of a batch, as :func:`batch_targets` does.

        Args:
            labels: (B, L). None scores the positions that have a target of any member, and takes (B, L) ``indices``.
            indices: by name in :attr:`columns` that column of the batch, as :func:`batch_targets` takes it.

        Returns:
            The targets of the first member, and under ``others`` a list with those of each other one at the positions
            that it holds. ``weights`` are the members' own, scaled to sum to one over those that hold a position.
            ``taught`` is the number of positions that have a target.
        """
        if labels is None:
            labels = labels_of_targets(torch.stack([torch.as_tensor(indices[c]) for c in self.columns]).amax(0))
        found = [batch_targets(m.cache, labels, indices[m.column]) for m in self.members]
        weights_MN = torch.stack([t["weights"] * m.weight for t, m in zip(found, self.members, strict=True)])
        total_N = weights_MN.sum(0)
        weights_MN = weights_MN / torch.where(total_N > 0, total_N, 1.0)
        first, *others = [{**target, "weights": weights_N} for target, weights_N in zip(found, weights_MN, strict=True)]
        taught = int((total_N > 0).sum())
        if not others:
            return {**first, "taught": taught}
        return {**first, "taught": taught, "others": [_held(target) for target in others]}


def _held(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the positions that the member holds; labels count for the first member only."""
    held = target["weights"] > 0
    return {name: values[held] for name, values in target.items() if name != "labels"}


def _names(rows: Dataset, max_length: int | None) -> Iterator[str]:
    """Yield the id of each row as a capture with ``max_length`` would cut it; None cuts nothing."""
    if max_length is None:
        yield from rows["example_id"]
        return
    for batch in rows.select_columns(["example_id", "input_ids"]).iter(1000):
        for name, ids in zip(batch["example_id"], batch["input_ids"], strict=True):
            yield name if len(ids) <= max_length else example_id(ids[:max_length])


def _occurrences(names: Iterable[str]) -> Iterator[int]:
    """Yield for each name how often it came before."""
    counts: Counter[str] = Counter()
    for name in names:
        yield counts[name]
        counts[name] += 1


def _key(cache: TeacherCache | str | Path) -> Any:
    return cache if isinstance(cache, TeacherCache) else str(cache)
