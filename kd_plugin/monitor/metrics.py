"""What is logged of the panel and the student: entropies, agreement, supports, disagreement, time; means over tokens.

Full distributions are compared at a few positions and at logging steps only; sums stay on the device until then.

Shape suffixes: S compared positions, V vocabulary, K tokens of a support.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from kd_plugin.panel.loss import TeacherDivergence
from kd_plugin.panel.scoring import GroupTerms
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal, shared_mask
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.vocab import SharedTokens

SUPPORT = 16  # K
_PAIRS_BY_NAME = 6  # of more than four teachers only the mean disagreement is logged


class PanelTally:
    """Sums over the compared positions since the last log.

    Args:
        names: the teachers.
        positions: at most so many positions of a group are compared, spread evenly over it.
    """

    def __init__(self, names: Sequence[str], positions: int) -> None:
        self.names = tuple(names)
        self.positions = positions
        self._pairs = list(combinations(range(len(names)), 2))
        self._sums: Tensor | None = None  # (teachers + pairs, 4): count, then what :meth:`read` names
        self._rest: Tensor | None = None  # (teachers, 3): count, mass of the rest of the teacher and of the student

    @torch.no_grad()
    def add(self, groups: Sequence[GroupTerms], student_hidden: Tensor, student_head: OutputHead) -> None:
        """Compare the student and its teachers at some positions of a micro-batch; waits for nothing.

        It gathers nothing: heads are plain tensors, since ranks have different groups.

        Args:
            groups: who scored which of the N positions, and what they said.
            student_hidden: (N, H).
            student_head: its head.
        """
        rows = len(self.names) + len(self._pairs)
        if self._sums is None:
            self._sums = torch.zeros(rows, 4, dtype=torch.float32, device=student_hidden.device)
            self._rest = torch.zeros(len(self.names), 3, dtype=torch.float32, device=student_hidden.device)
        assert self._rest is not None
        sampled = [(group, self._sample(group, student_hidden)) for group in groups if group.terms]
        empty = torch.zeros(0, dtype=torch.int64, device=student_hidden.device)
        where = torch.cat([empty, *(places for _, (_, places) in sampled)])
        # Projected once, for all groups together
        whole = _View.of(HiddenSignal(student_hidden.index_select(0, where), student_head))
        begin = 0
        for group, (chosen, _) in sampled:
            student = whole.part(begin, len(chosen))
            begin += len(chosen)
            views = {}
            for term in group.terms:
                at = self.names.index(term.teacher)
                if isinstance(term.signal, ChunkSignal):
                    continue  # of tokens of its own: neither its entropy nor its support is the student's to compare
                views[at] = _View.of(_selected(term.signal, chosen))
                self._sums[at] += views[at].against(student)
                if views[at].shared is not None:
                    self._rest[at] += views[at].rest_against(student)
            for number, (first, second) in enumerate(self._pairs):
                if first in views and second in views:
                    self._sums[len(self.names) + number] += views[first].between(views[second])

    def _sample(self, group: GroupTerms, student_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of a group's positions are compared, in the group and among the N."""
        size = len(student_hidden) if group.positions is None else len(group.positions)
        chosen = torch.linspace(0, max(size - 1, 0), min(size, self.positions)).round().long()
        chosen = chosen.to(student_hidden.device, non_blocking=True)
        return chosen, chosen if group.positions is None else group.positions.index_select(0, chosen)

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the means since the last call; waits for the device once.

        Args:
            reduce: sums a tensor over all ranks; called on every rank.
            device: where a rank that compared nothing has its zeros.
        """
        rows = len(self.names) + len(self._pairs)
        sums, self._sums = self._sums, None
        rest, self._rest = self._rest, None
        size = 4 * rows
        both = torch.zeros(size + 3 * len(self.names), device=device)
        if sums is not None and rest is not None:
            both = torch.cat([sums.flatten(), rest.flatten()])
        both = reduce(both)
        found = both[:size].view(rows, 4).tolist()
        metrics = {}
        for name, (count, theirs, own) in zip(self.names, both[size:].view(-1, 3).tolist(), strict=True):
            if count:
                metrics[f"rest_mass/{name}"] = theirs / count
                metrics[f"student_rest_mass/{name}"] = own / count
        for name, (count, entropy, agreement, overlap) in zip(self.names, found, strict=False):
            if count:
                metrics[f"entropy/{name}"] = entropy / count
                metrics[f"agreement/{name}"] = agreement / count
                metrics[f"support_overlap/{name}"] = overlap / count
        pairs = found[len(self.names) :]
        total = sum(row[0] for row in pairs)
        if total:
            metrics["disagreement"] = sum(row[2] for row in pairs) / total
        if len(self._pairs) <= _PAIRS_BY_NAME:
            for (first, second), (count, divergence, differ, dense) in zip(self._pairs, pairs, strict=True):
                pair = f"{self.names[first]}|{self.names[second]}"
                if count:
                    metrics[f"disagreement/{pair}"] = differ / count
                if dense:
                    metrics[f"jensen_shannon/{pair}"] = divergence / dense
        return metrics


class DivergenceTally:
    """Each teacher's divergence and tokens, and the whole loss, since the last log; sums stay on the device.

    Args:
        names: the teachers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: Tensor | None = None  # (teachers + 1, 2): nats, count; the last row is the loss

    @property
    def counted(self) -> bool:
        """Whether this rank counted anything since the last log; a step is counted by all ranks or by none."""
        return self._sums is not None

    def add(self, loss_sum: Tensor, entropy: Tensor, by_teacher: Sequence[TeacherDivergence]) -> None:
        """Count a micro-batch; see :class:`~kd_plugin.panel.loss.MicroBatchLoss`."""
        if self._sums is None:
            self._sums = entropy.new_zeros((len(self.names) + 1, 2))
        for one in by_teacher:
            row = self._sums[self.names.index(one.teacher)]
            row[0] += one.divergence.sum()
            row[1] += one.divergence.numel()
        self._sums[-1, 0] += loss_sum.detach()
        self._sums[-1, 1] += entropy.numel()

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> tuple[dict[str, float], float | None]:
        """Return the metrics since the last call, and the mean loss in nats per token; waits for the device once.

        Args:
            reduce: sums a tensor over all ranks; called on every rank.
            device: where a rank that counted nothing has its zeros.
        """
        sums, self._sums = self._sums, None
        empty = torch.zeros((len(self.names) + 1, 2), device=device)
        *totals, (loss, count) = reduce(empty if sums is None else sums).tolist()
        metrics = {}
        for name, (divergence, tokens) in zip(self.names, totals, strict=True):
            if tokens:
                metrics[f"divergence/{name}"] = divergence / tokens
            metrics[f"tokens/{name}"] = tokens
        return metrics, loss / count if count else None


class _View:
    """A distribution at S positions, in full or as the tokens that are listed."""

    def __init__(
        self,
        entropy: Tensor,
        support: Tensor,
        logprobs: Tensor | None,
        shared: SharedTokens | None = None,
        rest_mass: Tensor | None = None,
    ) -> None:
        self.entropy = entropy  # (S,) nats
        self.support = support  # (S, K) ids, the likeliest first; -1 where fewer are listed, or the student has it not
        self.logprobs = logprobs  # (S, V), or None
        self.shared = shared  # of a teacher of another vocabulary, with
        self.rest_mass = rest_mass  # (S,) its probability of tokens that the student does not share

    @classmethod
    def of(cls, signal: HiddenSignal | SparseSignal) -> _View:
        if isinstance(signal, SparseSignal):
            return cls._of_list(signal)
        logprobs = signal.head.logits(signal.hidden).float().log_softmax(-1)
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
        support = logprobs.topk(min(SUPPORT, logprobs.size(1)), -1).indices
        if signal.shared is None:
            return cls(entropy, support, logprobs)
        support = support.masked_fill(~shared_mask(signal.shared, support), -1)
        return cls(entropy, support, logprobs, signal.shared, _rest_mass(logprobs, signal.shared))

    @classmethod
    def _of_list(cls, signal: SparseSignal) -> _View:
        """Take the rest for one token, a lower bound of the entropy; mean surprise where tokens were drawn."""
        logprobs = signal.logprobs.float()
        if signal.draws is not None:
            draws = signal.draws.float()
            surprise = torch.where(draws > 0, -draws * logprobs, 0.0)
            entropy = surprise.sum(-1) / draws.sum(-1).clamp(min=1.0)
        else:
            entropy = torch.special.entr(logprobs.exp()).sum(-1)
            entropy = entropy + torch.special.entr(signal.tail_logmass.float().exp())
        best, order = logprobs.topk(min(SUPPORT, logprobs.size(1)), -1)
        ids = signal.ids.gather(1, order).masked_fill(best == -torch.inf, -1)
        return cls(entropy, ids, None, signal.shared, signal.rest_mass)

    def part(self, begin: int, count: int) -> _View:
        """Return ``count`` positions from ``begin`` on."""
        rows = slice(begin, begin + count)
        logprobs = None if self.logprobs is None else self.logprobs[rows]
        return _View(self.entropy[rows], self.support[rows], logprobs)

    def against(self, student: _View) -> Tensor:
        """Return (4,) count, entropy, agreement of the first token, and share of this support in the student's."""
        listed = self.support >= 0
        shared = (self.support.unsqueeze(-1) == student.support.unsqueeze(-2)).any(-1) & listed
        overlap = shared.sum(-1) / listed.sum(-1).clamp(min=1)
        return self._sums(self.entropy, (self.support[:, 0] == student.support[:, 0]).float(), overlap)

    def rest_against(self, student: _View) -> Tensor:
        """Return (3,) count, and the mass of tokens that are not shared, of this side and of the student."""
        assert self.shared is not None and self.rest_mass is not None and student.logprobs is not None
        own = _rest_mass(student.logprobs, self.shared)
        return torch.stack([torch.ones_like(own), self.rest_mass.float(), own], dim=1).sum(0)

    def between(self, other: _View) -> Tensor:
        """Return (4,) count, Jensen-Shannon divergence in nats, disagreement of the first token, dense count."""
        differ = ((self.support[:, 0] != other.support[:, 0]) | (self.support[:, 0] < 0)).float()
        if self.logprobs is None or other.logprobs is None or self.shared != other.shared:
            return self._sums(torch.zeros_like(differ), differ, torch.zeros_like(differ))
        middle = 0.5 * (self.logprobs.exp() + other.logprobs.exp())
        divergence = torch.special.entr(middle).sum(-1) - 0.5 * (self.entropy + other.entropy)
        return self._sums(divergence.clamp(min=0.0), differ, torch.ones_like(differ))

    @staticmethod
    def _sums(*columns: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(columns[0]), *columns], dim=1).float().sum(0)


def _rest_mass(logprobs: Tensor, shared: SharedTokens) -> Tensor:
    """(S,) probability of the tokens that are not shared, from (S, V) log-probabilities of one side."""
    ids = torch.arange(logprobs.shape[1], device=logprobs.device)
    return logprobs.masked_fill(shared_mask(shared, ids), -torch.inf).exp().sum(-1)


def _selected(signal: HiddenSignal | SparseSignal, chosen: Tensor) -> HiddenSignal | SparseSignal:
    if isinstance(signal, HiddenSignal):
        return replace(signal, hidden=signal.hidden.index_select(0, chosen))
    return signal.select(chosen)


class Stopwatch:
    """Seconds that each teacher took since the last log; on an accelerator by its own events, read at the log."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, float | tuple[torch.Event, torch.Event]]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block under ``name``."""
        if self._device.type == "cpu":
            begin = time.perf_counter()
            yield
            self._spans.append((name, time.perf_counter() - begin))
            return
        events = tuple(torch.Event(device=self._device, enable_timing=True) for _ in range(2))
        events[0].record()
        yield
        events[1].record()
        self._spans.append((name, (events[0], events[1])))

    def read(self) -> dict[str, float]:
        """Return the seconds of each name, and forget them; waits for what is still being timed."""
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = {}
        for name, span in spans:
            if not isinstance(span, float):
                span[1].synchronize()
                span = span[0].elapsed_time(span[1]) / 1000.0
            seconds[name] = seconds.get(name, 0.0) + span
        return seconds


class TokenMeans:
    """Sums and counts of an evaluation; they stay on the device until :meth:`read`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[tuple[Tensor, Tensor | int]]] = defaultdict(list)

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add a batch's sum over ``count`` tokens of this rank."""
        self._sums[name].append((total.detach(), count))

    def read(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, float | None]:
        """Return the mean of each quantity over the tokens of all ranks, None over no token; a collective call.

        Args:
            gather: returns the lists of all ranks as one.
        """
        own = {
            name: (sum(float(total) for total, _ in parts), sum(int(count) for _, count in parts))
            for name, parts in self._sums.items()
        }
        ranks = gather([own])
        found: dict[str, float | None] = {}
        for name in dict.fromkeys(name for sums in ranks for name in sums):
            total, count = (sum(sums.get(name, (0.0, 0))[i] for sums in ranks) for i in range(2))
            found[name] = total / count if count else None
        return found
