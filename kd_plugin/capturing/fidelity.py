"""What each setting of a capture would keep of the teacher, measured on a few sequences before money is spent.

The yardstick is the gradient that a student gets: from the stored targets, against the one from the teacher's full
distribution. Each setting is stored and read as a capture would, in a directory that is gone afterwards.

Shape suffixes: N positions, H width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from kd_plugin.cache.manifest import Part, Settings
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.schema import CapturedRow, Example, to_table
from kd_plugin.cache.store import Store
from kd_plugin.cache.targets import Sampled, Targets, TopK, describe
from kd_plugin.capturing.capture import CaptureSettings, prepare
from kd_plugin.capturing.engines import batches, padded_examples, random_numbers
from kd_plugin.capturing.extract import extract
from kd_plugin.capturing.work import Progress
from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.listed import Tail
from kd_plugin.divergence.sparse import fused_sparse_divergence
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.teachers import LocalTeacher
from kd_plugin.teachers.base import missing_members

SETTINGS: tuple[Targets, ...] = (
    *(TopK(k) for k in (8, 16, 32, 64, 128)),
    *(Sampled(draws) for draws in (12, 25, 50, 100, 200)),
)
_FORWARD_KL = Divergence("forward_kl")
# The loss of some positions from the student's hidden states (N, H), its head, and where the batch's targets begin
_Loss = Callable[[Tensor, OutputHead, int], Any]


@dataclass(frozen=True)
class Measurement:
    """What one setting keeps.

    Attributes:
        targets: the setting.
        bytes: of a position on disk, without its input token.
        listed: tokens listed at a position, on average.
        mass: probability of the listed tokens under the teacher, on average.
        target_kl: mean KL(target ‖ teacher) in nats of the stored target taken for itself: the share of draws, or
            the listed tokens scaled to one. Of sampled targets it is their noise, which averages out in training.
        student_kl: mean forward KL in nats of the student, as the loss on these targets reports it.
        cosine: between the student's whole gradient from these targets and the exact one.
        norm_ratio: of the norms of these two gradients.
    """

    targets: Targets
    bytes: float
    listed: float
    mass: float
    target_kl: float
    student_kl: float
    cosine: float
    norm_ratio: float

    @property
    def name(self) -> str:
        """The setting in words, such as ``top_k 64``."""
        each = isinstance(self.targets, Sampled) and self.targets.logprobs == "each"
        values = [str(value) for value in describe(self.targets).values() if value != "mean"]
        return " ".join([*values, "each"] if each else values)


@dataclass(frozen=True)
class Fidelity:
    """Measurements of several settings over the same positions.

    Attributes:
        sequences: probed.
        positions: probed. The gradient is the sum over all of them; of sampled targets it gets closer to the exact
            one with every position more, of truncated ones it does not.
        student_kl: mean forward KL in nats, student to teacher, over the full vocabulary.
        measurements: one a setting.
    """

    sequences: int
    positions: int
    student_kl: float
    measurements: tuple[Measurement, ...]

    def recommend(self, budget_bytes: float) -> Measurement:
        """Return the setting of at most ``budget_bytes`` a position whose gradient points closest to the exact one.

        Raises:
            ConfigError: no setting is that small; names the smallest.
        """
        fitting = [found for found in self.measurements if found.bytes <= budget_bytes]
        if not fitting:
            smallest = min(self.measurements, key=lambda found: found.bytes)
            raise ConfigError(
                f"No setting fits into {budget_bytes:g} bytes a position; the smallest, {smallest.name}, takes "
                f"{smallest.bytes:.1f}. Raise the budget, or probe fewer draws."
            )
        return max(fitting, key=lambda found: (found.cosine, -found.bytes))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [{**vars(found), "targets": describe(found.targets)} for found in self.measurements]
        return {**vars(self), "measurements": rows}


def fidelity(
    dataset: Any,
    teacher: LocalTeacher,
    student: nn.Module | Callable[[], nn.Module],
    *,
    settings: Sequence[Targets] = SETTINGS,
    sequences: int = 200,
    max_length: int | None = 512,
    completion_only: bool | None = None,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    batch_tokens: int = 4096,
    seed: int = 0,
    tokenizer: Any = None,
    lineage: Mapping[str, Any] | str | Path | None = None,
    progress: bool = True,
) -> Fidelity:
    """Measure what ``settings`` would keep of ``teacher``, on rows spread evenly over ``dataset``.

    Takes a forward pass of the teacher, and for each setting and once more a forward and a backward pass of the
    student; two copies of its gradient are in memory.

    Args:
        dataset: as for :func:`~kd_plugin.capturing.capture.capture`.
        teacher: a teacher in this process: the exact gradient needs its full distribution.
        student: the model that will be trained, in float32 for figures that rounding does not blur; or a function
            that loads it, which is called after the teacher's terms and the rows have been checked.
        settings: what to compare.
        sequences: rows to probe.
        max_length: tokens kept from the start of a row.
        completion_only: as for ``capture``.
        temperature: likewise.
        tail: what training will do with what top-k leaves out.
        batch_tokens: tokens of a forward pass, padding included.
        seed: of the draws.
        tokenizer: the student's, to be compared with the teacher's; None takes it to be the same.
        lineage: as for ``capture``.
        progress: show how far it is, on standard error.

    Raises:
        LicenseRefusedError, VocabularyError, NonFiniteError: as ``capture``.
        ConfigError: the teacher gives no full distribution, or a number is out of range.
        DataError: no row has anything to score.
    """
    if missing_members(teacher) or "hidden" not in teacher.capabilities.gives:
        raise ConfigError(
            f"{type(teacher).__name__} does not give its full distribution, which fidelity compares with. Probe with "
            "a teacher in this process (LocalTeacher), such as a smaller one of the same family."
        )
    if sequences < 1 or not settings:
        raise ConfigError(f"sequences={sequences} and {len(settings)} settings: expected at least one of both.")
    if tail not in get_args(Tail):
        raise ConfigError(f"Unknown tail {tail!r}; expected one of {', '.join(get_args(Tail))}.")
    asked = CaptureSettings(
        targets=settings[0], temperature=temperature, max_length=max_length, completion_only=completion_only, seed=seed,
        lineage=lineage,  # type: ignore[arg-type]
    )  # fmt: skip
    prepared = prepare(dataset, teacher, asked, tokenizer)
    rows = prepared.job.rows
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(sequences, len(rows))).astype(int)).tolist()
    examples = [e for i in chosen if (e := prepared.job.tokenization(rows.slice(i, 1)[0], f"row {i}")) is not None]
    if not examples:
        raise DataError(f"None of the {len(chosen)} probed rows has a token to score: all were cut or masked away.")
    # In the order of the batches, so that a batch's targets lie together
    grouped = [[examples[i] for i in batch] for batch in batches([len(e.input_ids) for e in examples], batch_tokens)]
    with (
        tempfile.TemporaryDirectory(prefix="kd-plugin-fidelity-") as scratch,
        Progress(len(examples) * (len(settings) + 2), 0, progress, "fidelity") as bar,
    ):
        model = student if isinstance(student, nn.Module) else student()
        probe = _Probe(teacher, model, grouped, temperature, bar)
        caches = probe.store(Path(scratch), prepared.settings, settings, prepared.lineage)
        exact_kl, exact = probe.gradient(probe.exact_loss)
        found = tuple(_measure(cache, exact, *probe.gradient(probe.loss_on(cache, tail))) for cache in caches)
    return Fidelity(len(examples), probe.positions, exact_kl, found)


class _Probe:
    """The teacher's hidden states at the probed positions, and the student's gradient from what is made of them."""

    def __init__(
        self,
        teacher: LocalTeacher,
        student: nn.Module,
        grouped: Sequence[Sequence[Example]],
        temperature: float,
        bar: Progress,
    ) -> None:
        self.student = student.to(teacher.head.weight.device).train(False)
        self.teacher, self.grouped, self.temperature, self.bar = teacher, grouped, temperature, bar
        self.positions = sum(len(e.scored) for batch in grouped for e in batch)
        self.hidden: list[Tensor] = []
        for batch in grouped:
            # They wait on the host: of a large teacher all of them may be gigabytes
            self.hidden.append(teacher.score(*padded_examples(batch, teacher.head.weight.device)).hidden.cpu())
            bar.advance(len(batch), _tokens(batch))
        self.starts = np.cumsum([0, *(len(hidden) for hidden in self.hidden)]).tolist()

    def store(
        self, directory: Path, like: Settings, settings: Sequence[Targets], lineage: Mapping[str, Any]
    ) -> list[TeacherCache]:
        """Write a small cache of each setting."""
        caches = []
        count = sum(len(batch) for batch in self.grouped)
        for number, targets in enumerate(settings):
            own = replace(like, targets=targets, shard_rows=count, passed=())
            part = Part("probe", count, 0)
            store = Store.create_or_join(directory / str(number), own, [part], lineage, {})
            captured = [
                row
                for hidden, batch in zip(self.hidden, self.grouped, strict=True)
                for row in self._extracted(hidden, batch, own)
            ]
            entries = sum(len(row.targets.ids) for row in captured)
            tokens = sum(_tokens(batch) for batch in self.grouped)
            store.commit(
                0, to_table(captured, (), targets), input_tokens=tokens, tokens=self.positions, entries=entries
            )
            store.finish()
            caches.append(TeacherCache(store.directory, verify=False))
        return caches

    def gradient(self, loss: _Loss) -> tuple[float, list[Tensor]]:
        """Return the mean loss a position, and the gradient of the sum in every parameter."""
        self.student.zero_grad(set_to_none=True)
        self.student.requires_grad_(True)
        total, first = 0.0, 0
        for batch in self.grouped:
            ids, mask, positions = padded_examples(batch, self.device)
            states = self.student.base_model(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
            head = OutputHead.from_model(self.student, self.teacher.vocabulary.size)
            summed = loss(states.flatten(0, 1).index_select(0, positions), head, first).loss_sum
            summed.backward()
            total, first = total + float(summed.detach()), first + len(positions)
            self.bar.advance(len(batch), _tokens(batch))
        gradient = [p.grad for p in self.student.parameters() if p.grad is not None]
        self.student.zero_grad(set_to_none=True)
        return total / self.positions, gradient

    @property
    def device(self) -> torch.device:
        return self.teacher.head.weight.device

    def exact_loss(self, hidden_NH: Tensor, head: OutputHead, first: int) -> Any:
        """Forward KL over the whole vocabulary."""
        signal = HiddenSignal(self.hidden[self.starts.index(first)].to(hidden_NH.device), self.teacher.head)
        group = PanelGroup(positions=None, terms=(TeacherTerm(signal),))
        return fused_panel_divergence(hidden_NH, head, [group], _FORWARD_KL, temperature=self.temperature)

    def loss_on(self, cache: TeacherCache, tail: Tail) -> _Loss:
        """Return the loss that training on ``cache`` has."""
        sampled = isinstance(cache.manifest.settings.targets, Sampled)

        def loss(hidden_NH: Tensor, head: OutputHead, first: int) -> Any:
            signal = cache.signal(torch.arange(first, first + len(hidden_NH))).to(hidden_NH.device)
            return fused_sparse_divergence(
                hidden_NH, head, signal, _FORWARD_KL, temperature=self.temperature, tail="bucket" if sampled else tail
            )

        return loss

    def _extracted(self, hidden: Tensor, batch: Sequence[Example], settings: Settings) -> list[CapturedRow]:
        found = extract(
            hidden.to(self.device),
            self.teacher.head,
            settings.targets,
            temperature=settings.temperature,
            uniforms=random_numbers(batch, settings),
        )
        return [CapturedRow(e, t) for e, t in zip(batch, found.split([len(e.scored) for e in batch]), strict=True)]


def _measure(
    cache: TeacherCache, exact: Sequence[Tensor], student_kl: float, gradient: Sequence[Tensor]
) -> Measurement:
    def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return float(sum(torch.sum(a * b, dtype=torch.float64) for a, b in zip(left, right, strict=True)))

    signal = cache.signal(torch.arange(cache.tokens))
    norm, exact_norm = dot(gradient, gradient) ** 0.5, dot(exact, exact) ** 0.5
    return Measurement(
        targets=cache.manifest.settings.targets,
        bytes=target_bytes(cache) / cache.tokens,
        listed=sum(unit.entries for unit in cache.manifest.units) / cache.tokens,
        mass=float(-torch.expm1(signal.tail_logmass.double()).mean()),
        target_kl=_target_kl(signal),
        student_kl=student_kl,
        cosine=dot(gradient, exact) / max(norm * exact_norm, 1e-300),
        norm_ratio=norm / max(exact_norm, 1e-300),
    )


def _target_kl(signal: SparseSignal) -> float:
    listed = signal.logprobs > -torch.inf
    logprobs = signal.logprobs.double().where(listed, 0.0)
    if signal.draws is None:
        return float(-logprobs.exp().where(listed, 0.0).sum(-1).log().mean())
    weight = signal.draws.double() / signal.draws.sum(-1, keepdim=True)
    return float((weight * (weight.clamp(min=1e-12).log() - logprobs)).sum(-1).mean())


def target_bytes(cache: TeacherCache) -> int:
    """Return the bytes of the columns that hold targets, compressed, their pages' headers included."""
    total = 0
    for unit in cache.manifest.units:
        metadata = pq.read_metadata(cache.path / unit.file)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                name = column.path_in_schema.split(".")[0]
                if name.startswith("target_") or name in ("mean_logprob", "tail_logmass"):
                    total += column.total_compressed_size
    return total


def _tokens(batch: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in batch)
