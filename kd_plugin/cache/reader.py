"""Reading a teacher cache, and comparing every byte of it with what was written."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_plugin.cache.files import seal
from kd_plugin.cache.manifest import Manifest, kept_tokens, read_manifest
from kd_plugin.cache.mapped_read import Mapped
from kd_plugin.cache.mapped_write import build, mapped_directory, verify_shard
from kd_plugin.cache.schema import example_id
from kd_plugin.cache.store import card, gather
from kd_plugin.cache.targets import Sampled, describe
from kd_plugin.cache.templates import pinned_tokenizer
from kd_plugin.errors import CacheCorruptionError, CacheError, ConfigError, DataError, VocabularyError
from kd_plugin.lineage.data import CACHE, with_origin
from kd_plugin.lineage.sources import Source
from kd_plugin.signals import SparseSignal
from kd_plugin.vocab import SharedTokens, Vocabulary

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
_LOOKED_AT = 4096  # targets whose mass on tokens that are not shared is said
_HASHED_AT_OPENING = 4 << 30  # bytes of shards: a few seconds; beyond it their sizes are compared


class TeacherCache:
    """What a teacher said about a dataset, stored by :func:`~kd_plugin.capturing.capture.capture`.

    Opening verifies the manifest, the records of the units and the shards (whole up to 4 GiB, beyond that their
    sizes; :meth:`verify` reads everything). The first use of the data builds a memory-mapped form, from shards
    that are verified as they are read; each of its blocks is verified when first touched. So no changed byte is
    ever trained on.

    Args:
        path: the directory.
        verify: False leaves the shards unread at opening; the data that is used is verified in any case.
        allow_partial: take a cache whose capture did not finish, with the units that it has.
        mapped_dir: where the memory-mapped form is kept; None keeps it in the cache.

    Raises:
        CacheError: no cache, an interrupted one (says how much is missing), or an empty one.
        CacheCorruptionError: a file is not as it was written; says which, what is lost, and how to redo just that.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        verify: bool = True,
        allow_partial: bool = False,
        mapped_dir: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._mapped_dir = mapped_dir
        self._cut: int | None = None
        self._shared: SharedTokens | None = None
        self.manifest = _read_whole(self.path, allow_partial)
        if not self.manifest.tokens:
            raise CacheError(f"{self.path} holds no targets: all rows were dropped, or no unit is finished yet.")
        if verify:
            self._verify_shards(whole=sum(unit.bytes for unit in self.manifest.units) <= _HASHED_AT_OPENING)

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return self.manifest.rows

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files themselves.
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}

    @property
    def tokens(self) -> int:
        """Number of targets: scored positions of all examples."""
        return self.manifest.tokens

    @property
    def source(self) -> Source:
        """These outputs as an ancestor of what is trained on them."""
        settings = self.manifest.settings
        outputs = {
            "digest": self.manifest.content_digest,
            "rows": self.manifest.rows,
            "tokens": self.manifest.tokens,
            "created": self.manifest.created,
            "finished": self.manifest.finished,
            "sampling": {**describe(settings.targets), "temperature": settings.temperature, "seed": settings.seed},
            **({} if settings.view is None else {"view": settings.view}),
        }
        record = {**self.manifest.lineage, "outputs": outputs}
        return Source(name=self.path.name, kind="teacher_outputs", ref=str(self.path), record=record)

    def dataset(self) -> Dataset:
        """Return the examples, ready for training.

        Columns: ``input_ids``, ``completion_mask``, ``teacher_index`` (per token: at position t the number of the
        target for token t+1, -1 where there is none), ``example_id``, and ``text`` and ``domain`` where captured.
        Any shuffling, selection, filtering, truncation or packing that treats ``teacher_index`` like
        ``input_ids`` keeps each target with its token.
        """
        import datasets

        rows = datasets.Dataset.from_file(str(self._mapped.rows_path()))
        return with_origin(rows, f"{CACHE}{self.manifest.content_digest}")

    def teacher_index(self, input_ids: Sequence[int], twin: int = 0) -> list[int]:
        """Return the ``teacher_index`` column of a sequence that was tokenized elsewhere.

        Args:
            input_ids: L token ids of the whole row. What the capture cut off by its ``max_length`` is found by what it
                kept; a cut that training makes comes after this call.
            twin: where rows of the cache have the same tokens, number of the one whose targets are taken. Positions at
                which it has none, since another completion mask left them out, take those of the others.

        Returns:
            L numbers, -1 where there is no target. Takes constant time.

        Raises:
            DataError: the cache has no such sequence; names it by its length and its ends.
        """
        found = self.find_index(input_ids, twin)
        if found is None:
            ids = [int(token) for token in input_ids]
            shown = ", ".join(map(str, ids if len(ids) <= 8 else [*ids[:4], "...", *ids[-4:]]))
            raise DataError(
                f"{self.path} holds no row with these {len(ids)} tokens: [{shown}]. Was it captured from other rows, "
                "or is it tokenized in another way: another chat template, one end token more, a cut before this call?"
            )
        return found

    def find_index(self, input_ids: Sequence[int], twin: int = 0) -> list[int] | None:
        """Return what :meth:`teacher_index` returns; None when the cache has no such sequence."""
        kept = self.manifest.settings.max_length
        rows = self.teacher_indices_of(example_id(input_ids[:kept]))
        if not rows:
            return None
        first = twin % len(rows)
        index, *others = rows[first:] + rows[:first]
        for other in others:
            index = [own if own >= 0 else found for own, found in zip(index, other, strict=True)]
        return index + [-1] * (len(input_ids) - len(index))

    def teacher_indices_of(self, example_id: str) -> list[list[int]]:
        """Return the ``teacher_index`` column of each example of this id: several where rows have the same tokens."""
        return self._mapped.teacher_indices(bytes.fromhex(example_id))

    def dated(self, tokenizer: Any) -> Any:
        """Return ``tokenizer`` with a chat template that prints the time which the capture printed.

        Render conversations with it to find them by :meth:`teacher_index`. Where the template prints no time it is the
        same tokenizer; the given one is left as it is.
        """
        return pinned_tokenizer(tokenizer, self.manifest.settings.rendered_at)

    def signal(self, teacher_index: Tensor) -> SparseSignal:
        """Gather targets.

        Args:
            teacher_index: (N,) int64 on the CPU, numbers from the column of that name, without the -1.

        Returns:
            N targets on the CPU; K is the largest count among them, padded as :class:`SparseSignal` says.

        Raises:
            DataError: a number is out of range.
            CacheCorruptionError: a byte that was read differs from what was written.
        """
        signal = self._mapped.signal(teacher_index)
        signal = signal if signal.draws is not None else _undo_rounding(signal)
        if self._shared is not None:
            return signal.over(self._shared)
        return signal if self._cut is None else signal.within(self._cut)

    def within(self, vocab_size: int) -> TeacherCache:
        """Return this cache with targets of the first ``vocab_size`` tokens alone, for a head that has no more rows."""
        if vocab_size >= self.manifest.vocab_size:
            return self
        other = copy.copy(self)
        other._cut = vocab_size
        return other

    @cached_property
    def tokens_kept(self) -> Vocabulary | None:
        """What its token ids mean; None where it was captured before that was kept."""
        found = kept_tokens(self.path, self.manifest.settings.tokenizer)
        return None if found is None else found.within(self.manifest.vocab_size)

    def shared_with(self, student: Vocabulary) -> SharedTokens | None:
        """Return what these targets share with a student's vocabulary; None where both have the same tokens.

        Raises:
            VocabularyError: too little, or it is not known what the ids mean.
        """
        settings = self.manifest.settings
        if student.fingerprint == settings.tokenizer:
            return None
        if self.tokens_kept is None:
            raise VocabularyError(
                f"{self.path} was captured with another tokenizer: it has {settings.vocab_size} token ids with "
                f"fingerprint {settings.tokenizer[:12]}, the student has {student.needed} with fingerprint "
                f"{student.fingerprint[:12]}. Stored token ids would mean other tokens. Train a student of the "
                f"teacher's tokenizer ({settings.teacher or 'unnamed teacher'}), or capture again, with a teacher of "
                "the student's or with student_tokenizer."
            )
        try:
            return student.shared_with(self.tokens_kept, "student", f"capture {self.path}")
        except VocabularyError as error:
            raise VocabularyError(
                f"{self.path} was captured with another tokenizer. {error} To teach a student with another tokenizer, "
                "capture again with student_tokenizer."
            ) from error

    def for_vocabulary(self, student: Vocabulary) -> TeacherCache:
        """Return this cache with targets of those tokens alone that a student has, its head's rows counted.

        Raises:
            VocabularyError: see :meth:`shared_with`.
        """
        shared = self.shared_with(student)
        return self.within(student.size) if shared is None else self.over(shared)

    def over(self, shared: SharedTokens) -> TeacherCache:
        """Return this cache with targets of shared tokens alone; see :meth:`SparseSignal.over`."""
        other = copy.copy(self)
        other._shared = shared
        return other

    @property
    def shared(self) -> SharedTokens | None:
        """What :meth:`over` was given."""
        return self._shared

    def require_compatible(self, vocabulary: Vocabulary, *, temperature: float = 1.0) -> None:
        """Refuse a student that these targets cannot teach; warn where only the chat template differs.

        Args:
            vocabulary: of the student.
            temperature: of the loss.

        Raises:
            VocabularyError: the student's token ids mean other tokens. A head with fewer rows is no reason:
                :meth:`within` cuts the targets to it.
            ConfigError: another temperature than was captured.
        """
        settings = self.manifest.settings
        shared = self.shared_with(vocabulary)
        if shared is not None:
            signal = self.signal(torch.arange(min(self.tokens, _LOOKED_AT))).over(shared)
            assert signal.rest_mass is not None
            mass = float(signal.rest_mass.mean())
            logger.warning(
                f"{self.path} and the student share {shared.count} token ids; the student has "
                f"{shared.student_size - shared.count} more and the teacher {shared.teacher_size - shared.count}, with "
                f"{mass:.4f} of its mass at the first {len(signal)} targets. All that are not shared are one outcome."
            )
        if temperature != settings.temperature:
            kind = "sampled" if isinstance(settings.targets, Sampled) else "truncated"
            raise ConfigError(
                f"temperature={temperature}, but {self.path} was captured at {settings.temperature} and its targets "
                f"are {kind}: the distribution at another temperature cannot be recovered from them. Use "
                f"temperature={settings.temperature}, or capture again at {temperature}."
            )
        if vocabulary.template_fingerprint != settings.chat_template:
            warnings.warn(
                f"{self.path} was captured with another chat template than the student's. Conversations that are "
                "rendered with the student's template will not be found in the cache, and the student may learn "
                "turn markers that it never sees in use. Set the tokenizer's chat_template to the teacher's, "
                "train on the cache's own rows, or capture again with student_tokenizer and "
                "`view: {chat_template: own}`, so that each reads its own template.",
                stacklevel=2,
            )

    def verify(self) -> None:
        """Read every byte of the cache and compare it with what was written.

        Raises:
            CacheCorruptionError: names each file that differs, what is lost, and how to redo just that.
        """
        found = problems(self.path, self._mapped_dir)
        if found:
            raise CacheCorruptionError("\n".join(found))

    @cached_property
    def _mapped(self) -> Mapped:
        directory = mapped_directory(self.path, self.manifest, self._mapped_dir)
        if not directory.exists():
            build(self.path, self.manifest, directory)
        return Mapped(directory, self.manifest)

    def _verify_shards(self, whole: bool) -> None:
        for unit in self.manifest.units:
            verify_shard(self.path, unit, whole=whole)


def _read_whole(path: Path, allow_partial: bool) -> Manifest:
    """Read the manifest and the records of the units, which must agree."""
    manifest = read_manifest(path)
    gathered = gather(path, manifest)
    if manifest.units:
        for unit in manifest.units:
            record = path / "units" / f"{unit.index:05d}.json"
            if not record.is_file():
                raise CacheCorruptionError(f"{record} is missing. Run the same capture again: that unit is done anew.")
        if seal(gathered.to_json()) != seal(manifest.to_json()):
            raise CacheCorruptionError(
                f"The records in {path / 'units'} do not match manifest.json. Run the same capture again."
            )
    if not gathered.complete and not allow_partial:
        missing = gathered.missing_units
        rows = sum(gathered.rows_of(index)[2] for index in missing)
        raise CacheError(
            f"{path} is not finished: {len(missing)} of {gathered.unit_count} units are missing ({rows} of "
            f"{sum(part.rows for part in gathered.parts)} dataset rows). Run the same capture again to go on, or "
            "pass allow_partial=True to train on what is there."
        )
    return gathered


def _undo_rounding(signal: SparseSignal) -> SparseSignal:
    """Give the listed tokens together exactly the mass that the tail leaves.

    Rounding to float16 moves each log-probability by up to 2^-11 of itself. What all of a position's moves have in
    common would make the target's mass differ from one and bias the loss; the tail is stored in float32, so that part
    is known and taken back.
    """
    logprobs = signal.logprobs
    listed = torch.log1p(-signal.tail_logmass.exp().clamp(max=1.0))
    # Log-probabilities are at most 0: exp needs no shift, which saves two passes over what training reads most
    excess = logprobs.exp().sum(dim=1).log() - listed
    # Next to nothing listed: the mass itself is rounding, and there is nothing to take back
    excess = torch.where(listed > -7.0, excess, 0.0)
    return replace(signal, logprobs=logprobs - excess[:, None])


def problems(directory: Path, mapped_dir: str | Path | None = None) -> list[str]:
    """Compare every file of a cache with what was written.

    Args:
        directory: the cache, finished or not.
        mapped_dir: where its memory-mapped form is kept, if not in the cache.

    Returns:
        One sentence a problem: the file, the rows that are lost, and how to redo just those.

    Raises:
        CacheError: there is no cache.
        CacheCorruptionError: the manifest or the record of a unit is damaged, so that nothing else can be checked.
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
    found += _caught(lambda: kept_tokens(directory, manifest.settings.tokenizer))
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
