"""The panel's loss of a micro-batch, whatever each teacher gave; every host calls this.

Shape suffixes: N scored positions, n positions of a group, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.divergence.across.byte_marginals import fused_byte_divergence
from kd_plugin.divergence.fused import fused_panel_divergence
from kd_plugin.divergence.listed import (
    listed_from,
    logprobs_of,
    student_signal,
    top_tokens,
    with_sampled_token,
)
from kd_plugin.divergence.reference import IMPOSSIBLE
from kd_plugin.divergence.sampled import Matching, fused_sampled_divergence
from kd_plugin.divergence.sparse import fused_sparse_divergence
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import AskedTeacher, GroupTerms, RowScores, group_terms, panel_group
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal, shared_mask
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.vocab import SharedTokens


@dataclass(frozen=True)
class TeacherDivergence:
    """What one teacher's divergence from the student was, at the n positions that it scored. Detached.

    Attributes:
        teacher: its name.
        positions: (n,) int64 among the N, or None for all.
        divergence: (n,) nats before weighting; the estimate that its estimator gives.
        weights: (n,) the weights that were used, those of ``confidence`` included.
    """

    teacher: str
    positions: Tensor | None
    divergence: Tensor
    weights: Tensor


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of a micro-batch; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, in nats.
        entropy: (N,) nats, of the student's distribution. Detached.
        by_teacher: one a teacher and group of positions; none without values.
    """

    loss_sum: Tensor
    entropy: Tensor
    by_teacher: tuple[TeacherDivergence, ...]


def panel_loss(
    panel: TeacherPanel,
    scores: Sequence[RowScores],
    student_hidden: Tensor,
    student_head: OutputHead,
    tokens: Tensor,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    step: int = 0,
    values: bool = True,
    behaviour_logprobs: Tensor | None = None,
) -> MicroBatchLoss:
    """Return the panel's loss of a micro-batch.

    Args:
        panel: the teachers, and how they are combined.
        scores: what they said, one a row.
        student_hidden: (N, H) last hidden states at the scored positions, row by row.
        student_head: the student's head, as autograd knows it.
        tokens: (N,) int64 tokens that are scored.
        divergence: for teachers without one of their own.
        temperature: for teachers without one of their own.
        step: optimizer step, for weights with a schedule.
        values: False leaves out each teacher's divergence, and may make the loss a lower bound; the gradient stays.
        behaviour_logprobs: (N,) nats of the tokens where they were drawn, for ``sampled``; None if by this student.

    Raises:
        ConfigError: a teacher gave a signal that its estimator cannot use.
        NonFiniteError: on CPU only, the loss is NaN or infinite.
    """
    groups = group_terms(panel, scores, student_hidden.device, step)
    run = _Run(panel, student_hidden, student_head, tokens, divergence, temperature, values, behaviour_logprobs)
    parts = [run.exact(groups), run.listed(groups), run.sampled(groups), run.chunks(groups), run.bytes(groups)]
    present = [part for part in parts if part is not None]
    if not present:  # nothing was scored: a loss with a graph all the same
        empty = fused_panel_divergence(student_hidden, student_head, [], divergence, temperature)
        present = [MicroBatchLoss(empty.loss_sum, empty.entropy, ())]
    entropy = present[0].entropy
    for part in present[1:]:
        entropy = torch.where(entropy == 0.0, part.entropy, entropy)
    total = present[0].loss_sum
    for part in present[1:]:
        total = total + part.loss_sum
    return MicroBatchLoss(total, entropy, tuple(one for part in present for one in part.by_teacher))


class _SampledAlike(NamedTuple):
    """What teachers have in common whose sampled tokens one pass compares."""

    temperature: float
    ratio_bounds: tuple[float, float]
    shared: SharedTokens | None


@dataclass(frozen=True)
class _Run:
    """The arguments that all three estimators share."""

    panel: TeacherPanel
    hidden: Tensor
    head: OutputHead
    tokens: Tensor
    divergence: Divergence
    temperature: float
    values: bool
    behaviour: Tensor | None

    def exact(self, groups: Sequence[GroupTerms]) -> MicroBatchLoss | None:
        """All teachers with full distributions, in one pass over the positions."""
        chosen = [(g, [t for t in g.terms if self._estimator(t.teacher).name == "exact"]) for g in groups]
        chosen = [(group, terms) for group, terms in chosen if terms]
        if not chosen:
            return None
        for _, terms in chosen:
            for term in terms:
                if not isinstance(term.signal, HiddenSignal):
                    raise ConfigError(
                        f"Teacher {term.teacher!r} gives {type(term.signal).__name__}; estimator='exact' needs a "
                        "teacher in this process, which gives hidden states. Use estimator='topk_tail' or 'sampled'."
                    )
        found = fused_panel_divergence(
            self.hidden,
            self.head,
            [panel_group(self.panel, group, terms) for group, terms in chosen],
            self.divergence,
            self.temperature,
            values=self.values,
        )
        by_teacher = [
            TeacherDivergence(term.teacher, group.positions, value, weight)
            for (group, terms), values, weights in zip(chosen, found.divergences, found.weights, strict=True)
            for term, value, weight in zip(terms, values, weights, strict=False)  # no values: nothing to pair
        ]
        return MicroBatchLoss(found.loss_sum, found.entropy, tuple(by_teacher))

    def listed(self, groups: Sequence[GroupTerms]) -> MicroBatchLoss | None:
        """All lists of tokens, one pass for each divergence, temperature and vocabulary among them."""
        alike: dict[tuple[object, ...], list[tuple[str, Tensor | None, SparseSignal, Tensor]]] = {}
        for group in groups:
            for term in group.terms:
                estimator = self._estimator(term.teacher)
                if estimator.name == "topk_tail":
                    divergence, temperature = self._compared(term.teacher)
                    signal, is_known = self._as_list(term, group.positions, estimator, temperature)
                    key = (divergence, temperature, signal.draws is not None, signal.shared)
                    weights = term.weights if is_known is None else term.weights * is_known
                    alike.setdefault(key, []).append((term.teacher, group.positions, signal, weights))
        total, entropy, by_teacher = None, self._zeros(), []
        for asked in alike.values():
            divergence, temperature = self._compared(asked[0][0])
            where = torch.cat([self._indices(positions) for _, positions, _, _ in asked])
            found = fused_sparse_divergence(
                self.hidden.index_select(0, where),
                self.head,
                SparseSignal.joined([signal for _, _, signal, _ in asked]),
                divergence,
                temperature=temperature,
                weights=torch.cat([weights for _, _, _, weights in asked]),
            )
            total = found.loss_sum if total is None else total + found.loss_sum
            entropy.index_copy_(0, where, found.entropy.to(entropy.dtype))
            values = found.kd.split([len(signal) for _, _, signal, _ in asked])
            by_teacher += [TeacherDivergence(n, p, v, w) for (n, p, _, w), v in zip(asked, values, strict=True)]
        return None if total is None else MicroBatchLoss(total, entropy, tuple(by_teacher) if self.values else ())

    def sampled(self, groups: Sequence[GroupTerms]) -> MicroBatchLoss | None:
        """All teachers that are asked about the sampled token alone, one pass for those that are compared alike."""
        alike: dict[_SampledAlike, list[tuple[GroupTerms, list[tuple[str, Tensor, Tensor]]]]] = {}
        for group in groups:
            asked: dict[_SampledAlike, list[tuple[str, Tensor, Tensor]]] = {}
            for term in group.terms:
                estimator = self._estimator(term.teacher)
                if estimator.name == "sampled" and not isinstance(term.signal, ChunkSignal):
                    _, temperature = self._compared(term.teacher)
                    sampled, is_known = self._sampled(term.signal, group.positions, temperature, term.teacher)
                    key = _SampledAlike(temperature, estimator.ratio_bounds, term.signal.shared)
                    weights = term.weights if is_known is None else term.weights * is_known
                    asked.setdefault(key, []).append((term.teacher, sampled, weights))
            for key, terms in asked.items():
                alike.setdefault(key, []).append((group, terms))
        total, entropy, by_teacher = None, self._zeros(), []
        for key, parts in alike.items():
            where = torch.cat([self._indices(group.positions) for group, _ in parts])
            weights = torch.cat([torch.stack([w for _, _, w in terms]).sum(0) for _, terms in parts])
            weighed = [
                torch.stack([torch.where(w != 0, w * sampled, 0.0) for _, sampled, w in terms]).sum(0)
                for _, terms in parts
            ]
            found = fused_sampled_divergence(
                self.hidden.index_select(0, where),
                self.head,
                self.tokens.index_select(0, where),
                torch.cat(weighed) / torch.where(weights == 0, 1.0, weights),
                temperature=key.temperature,
                weights=weights,
                behaviour_logprobs=None if self.behaviour is None else self.behaviour.index_select(0, where),
                ratio_bounds=key.ratio_bounds,
                shared=key.shared,
            )
            total = found.loss_sum if total is None else total + found.loss_sum
            entropy.index_copy_(0, where, found.entropy.to(entropy.dtype))
            own = found.logprobs.split([len(terms[0][1]) for _, terms in parts])
            by_teacher += [
                TeacherDivergence(name, group.positions, torch.where(w != 0, logq - sampled, 0.0), w)
                for (group, terms), logq in zip(parts, own, strict=True)
                for name, sampled, w in terms
            ]
        return None if total is None else MicroBatchLoss(total, entropy, tuple(by_teacher) if self.values else ())

    def chunks(self, groups: Sequence[GroupTerms]) -> MicroBatchLoss | None:
        """All teachers that are compared by the probabilities of chunks of tokens, one pass for each."""
        total, entropy, by_teacher = None, self._zeros(), []
        for group in groups:
            for term in group.terms:
                estimator, (divergence, temperature) = self._estimator(term.teacher), self._compared(term.teacher)
                is_matched = estimator.name == "chunk_likelihood"
                if not is_matched and not (estimator.name == "sampled" and isinstance(term.signal, ChunkSignal)):
                    continue
                where = self._indices(group.positions)
                if isinstance(term.signal, ChunkSignal):
                    chunks: Sequence[int] | None = term.signal.places.sizes
                    said, weights = term.signal.chunk_logprobs(temperature, term.teacher), term.weights
                else:
                    said, is_known = self._sampled(term.signal, group.positions, temperature, term.teacher)
                    chunks, weights = None, term.weights if is_known is None else term.weights * is_known
                found = fused_sampled_divergence(
                    self.hidden.index_select(0, where),
                    self.head,
                    self.tokens.index_select(0, where),
                    said,
                    temperature=temperature,
                    weights=weights,
                    behaviour_logprobs=None if self.behaviour is None else self.behaviour.index_select(0, where),
                    ratio_bounds=estimator.ratio_bounds,
                    shared=term.signal.shared,
                    chunks=chunks,
                    matching=Matching(divergence, estimator.tau) if is_matched else None,
                )
                total = found.loss_sum if total is None else total + found.loss_sum
                entropy.index_copy_(0, where, found.entropy.to(entropy.dtype))
                by_teacher.append(TeacherDivergence(term.teacher, group.positions, found.values, weights))
        return None if total is None else MicroBatchLoss(total, entropy, tuple(by_teacher) if self.values else ())

    def bytes(self, groups: Sequence[GroupTerms]) -> MicroBatchLoss | None:
        """All teachers that are compared byte by byte, one pass for each."""
        total, entropy, by_teacher = None, self._zeros(), []
        for group in groups:
            for term in group.terms:
                if self._estimator(term.teacher).name != "byte_marginals":
                    continue
                divergence, temperature = self._compared(term.teacher)
                where = self._indices(group.positions)
                said = term.signal
                if not (isinstance(said, ChunkSignal) and isinstance(said.signal, HiddenSignal)):
                    raise ConfigError(
                        f"Teacher {term.teacher!r} gives {type(said).__name__}; estimator='byte_marginals' needs the "
                        "hidden states of a teacher that reads tokens of its own. Use estimator='exact' or 'topk_tail'."
                    )
                found = fused_byte_divergence(
                    self.hidden.index_select(0, where),
                    self.head,
                    said.signal,
                    said.byte_steps(self.tokens.index_select(0, where)),
                    divergence,
                    temperature=temperature,
                    weights=term.weights,
                )
                total = found.loss_sum if total is None else total + found.loss_sum
                entropy.index_copy_(0, where, found.entropy.to(entropy.dtype))
                by_teacher.append(TeacherDivergence(term.teacher, group.positions, found.values, term.weights))
        return None if total is None else MicroBatchLoss(total, entropy, tuple(by_teacher) if self.values else ())

    def _as_list(
        self, term: AskedTeacher, positions: Tensor | None, estimator: Estimator, at: float
    ) -> tuple[SparseSignal, Tensor | None]:
        """Return tokens and log-probabilities of a signal, the sampled token among them, and where it says something.

        None stands for everywhere.
        """
        signal, tokens = term.signal, self.tokens if positions is None else self.tokens.index_select(0, positions)
        if isinstance(signal, ChunkSignal):
            return signal.listed(tokens, estimator.top_k, at, term.teacher)
        if isinstance(signal, SparseSignal):
            if signal.draws is not None or signal.sampled_token_logprobs is None:
                return signal, None
            return with_sampled_token(signal, tokens), None
        further = tokens.unsqueeze(-1)
        count = estimator.top_k if estimator.student_top_k is None else estimator.student_top_k
        if count:
            hidden = self.hidden if positions is None else self.hidden.index_select(0, positions)
            further = torch.cat([top_tokens(student_signal(hidden, self.head), count), further], -1)
        return listed_from(signal, estimator.top_k, further, at), None

    def _sampled(
        self, signal: HiddenSignal | SparseSignal, positions: Tensor | None, temperature: float, name: str
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities of the sampled tokens, and which of them are known; None for all."""
        tokens = self.tokens if positions is None else self.tokens.index_select(0, positions)
        if isinstance(signal, HiddenSignal):
            return logprobs_of(signal, tokens, temperature), None
        if signal.sampled_token_logprobs is None:
            raise ConfigError(
                f"Teacher {name!r} does not tell the log-probability of the sampled token, which estimator='sampled' "
                "needs. Use estimator='topk_tail'."
            )
        if signal.shared is None:
            return signal.sampled_token_logprobs, None
        is_shared = shared_mask(signal.shared, tokens)
        if signal.shared.teacher_has_rest:
            return signal.sampled_token_logprobs, is_shared  # the mass of its rest is not told
        return torch.where(is_shared, signal.sampled_token_logprobs, math.log(IMPOSSIBLE)), None

    def _estimator(self, name: str) -> Estimator:
        return self.panel.own[name].estimator or self.panel.estimator

    def _compared(self, name: str) -> tuple[Divergence, float]:
        own = self.panel.own[name]
        return own.divergence or self.divergence, own.temperature_or(self.temperature)

    def _indices(self, positions: Tensor | None) -> Tensor:
        return torch.arange(len(self.hidden), device=self.hidden.device) if positions is None else positions

    def _zeros(self) -> Tensor:
        dtype = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        return torch.zeros(len(self.hidden), dtype=dtype, device=self.hidden.device)
