"""The elementwise part of the panel loss, on one chunk of logits at a time, step by step in reused buffers.

``compiled/`` does the same by functions that a compiler fuses, where that pays.

For every divergence the gradient in the student's logits z is q·(a − ⟨q, a⟩), with a per teacher and summed over
teachers before it is applied, so that a further teacher costs one projection and a few passes:

    reverse_kl   a = log q − log p
    jsd          a = (1−β)·(log q − log m)          m = β·p + (1−β)·q
    skew_kl      a = −(1−α)·p/m                     m = α·p + (1−α)·q
    forward_kl   the limit a = −p/q, where the product −q·a = p is summed directly: Σ w·q − Σ w·p

Values are sums of p or q times differences of log-probabilities, never differences of two entropies, so that equal
distributions give 0 and nearly equal ones keep their digits.

On CPU what is not kept for the whole chunk is worked through in blocks of rows that stay in a core's cache.

Shape suffixes: R positions of a chunk, B of a block, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kd_plugin.divergence.projection import Workspace, chunks
from kd_plugin.divergence.spec import Block, Compared, Divergence

_BLOCK_ELEMENTS_CPU = 768 * 1024  # 3 MiB in float32: a few such pieces fit the caches


class Tiles:
    """Buffers and state of one chunk: the student's distribution, and a summed over the teachers so far.

    Call :meth:`start`; for each teacher :meth:`take` and :meth:`add`; then :meth:`gradient`.

    Args:
        workspace: where the buffers live.
        dtype: of all buffers.
        need_grad: whether :meth:`gradient` will be called.
    """

    def __init__(self, workspace: Workspace, dtype: torch.dtype, need_grad: bool) -> None:
        self._workspace, self._dtype, self._need_grad = workspace, dtype, need_grad
        whole = workspace.device.type != "cpu"
        self._block = workspace.rows if whole else max(1, _BLOCK_ELEMENTS_CPU // workspace.vocab_size)

    def start(self, logits_RV: Tensor, multiplier: float, teachers: int) -> Tensor:
        """Begin a chunk.

        Args:
            logits_RV: the student's logits over the temperature; its memory is taken over.
            multiplier: factor of the gradient (logit scale over temperature).
            teachers: how many will be added.

        Returns:
            (R,) entropy in nats.
        """
        self._rows, self._teachers, self._multiplier = logits_RV.shape[0], teachers, multiplier
        self._logq_RV = torch.log_softmax(logits_RV, -1, out=self.buffer("logq"))
        self._q_RV = torch.exp(self._logq_RV, out=logits_RV)
        self._a_RV: Tensor | None = None  # Σ w·a
        self._direct_RV: Tensor | None = None  # −Σ w·q·a of the divergences that are direct, as the forward KL
        self._factor_R1 = logits_RV.new_zeros(self._rows, 1)  # −Σ w·⟨q, a⟩

        def entropy(block: slice) -> Tensor:
            return torch.mul(self._q_RV[block], self._logq_RV[block], out=self._small("logp", block)).sum(-1).neg_()

        return self._by_block(entropy)

    def take(self, logits_RV: Tensor) -> None:
        """Take in a teacher's logits (R, V), whose memory is taken over."""
        self._logits_RV = logits_RV

    def teacher_entropy(self) -> Tensor:
        """(R,) entropy in nats of the teacher that was taken in last, which stays as it is."""

        def entropy(block: slice) -> Tensor:
            logp_BV = self._logp(block)
            return torch.exp(logp_BV, out=self._small("scratch", block)).mul_(logp_BV).sum(-1).neg_()

        return self._by_block(entropy)

    def value(self, divergence: Divergence) -> Tensor:
        """(R,) divergence in nats of the teacher that was taken in last, which stays as it is."""
        return self._by_block(lambda block: self._compare(block, self._small("spare", block), divergence).value_B)

    def mix_into(self, mixed_RV: Tensor, share_R: Tensor) -> None:
        """Add the teacher that was taken in last to a mixture of log-probabilities.

        Args:
            mixed_RV: (R, V) the mixture, added to; -inf before the first teacher.
            share_R: this teacher's share in it at each position.
        """
        log_share_R1 = share_R.log().unsqueeze(-1)
        for block in self._blocks():
            logp_BV = self._logp(block).add_(log_share_R1[block])
            torch.logaddexp(mixed_RV[block], logp_BV, out=mixed_RV[block])

    def add(self, weight_R: Tensor, divergence: Divergence) -> Tensor:
        """Compare with the teacher that was taken in last, and use it up.

        Args:
            weight_R: its weight at each position.
            divergence: which divergence.

        Returns:
            (R,) divergence in nats, before weighting.
        """
        if not self._need_grad:
            return self._by_block(lambda block: self._compare(block, self._logits_RV[block], divergence).value_B)
        weight_R = weight_R * self._multiplier
        total_RV, first = self._total(divergence)
        values, means = [], []
        for block in self._blocks():
            found = self._compare(block, self._logits_RV[block], divergence)
            weight_B1 = (weight_R[block] * found.sign).unsqueeze(-1)
            if first:
                torch.mul(found.part_BV, weight_B1, out=total_RV[block])
            else:
                total_RV[block].addcmul_(found.part_BV, weight_B1)
            values.append(found.value_B)
            means.append(found.mean_B)
        self._factor_R1 = self._factor_R1 - (weight_R * torch.cat(means)).unsqueeze(-1)
        return torch.cat(values)

    def _total(self, divergence: Divergence) -> tuple[Tensor, bool]:
        """Where the gradient of one more teacher goes, (R, V), and whether it is the first there."""
        direct = divergence.kind.direct(divergence)
        total_RV = self._direct_RV if direct else self._a_RV
        if total_RV is not None:
            return total_RV, False
        alone = self._teachers == 1  # then it may lie where the logits were
        total_RV = self._logits_RV if alone else self.buffer("direct" if direct else "a_sum")
        if direct:
            self._direct_RV = total_RV
        else:
            self._a_RV = total_RV
        return total_RV, True

    def _compare(self, block: slice, spare_BV: Tensor, divergence: Divergence) -> Compared:
        """Compare one block of the teacher that was taken in last; ``spare_BV`` is memory to write to."""
        found = Block(
            self._q_RV[block], self._logq_RV[block], self._logp(block), spare_BV, lambda: self._small("scratch", block)
        )
        return divergence.kind.compare(found, divergence)

    def rescale(self, factor_R: Tensor) -> None:
        """Multiply the weights of all teachers so far."""
        if not self._need_grad:
            return
        factor_R1 = factor_R.unsqueeze(-1)
        for total_RV in (self._a_RV, self._direct_RV):
            if total_RV is not None:
                total_RV.mul_(factor_R1)
        self._factor_R1 = self._factor_R1 * factor_R1

    def gradient(self, out_RV: Tensor | None = None) -> Tensor:
        """(R, V) gradient of Σ w·D in the student's projection; ends the chunk and overwrites its buffers.

        Where ``out_RV`` is given it is copied there, in the dtype of that.
        """
        for block in self._blocks():
            q_BV, factor_B1 = self._q_RV[block], self._factor_R1[block]
            if self._a_RV is None:
                q_BV.mul_(factor_B1)
            else:
                torch.mul(self._a_RV[block].add_(factor_B1), q_BV, out=q_BV)
            if self._direct_RV is not None:
                q_BV.sub_(self._direct_RV[block])
        return self._q_RV if out_RV is None else out_RV.copy_(self._q_RV)

    def _logp(self, block: slice) -> Tensor:
        """(B, V) log-probabilities of the teacher that was taken in last; the next call overwrites them."""
        return torch.log_softmax(self._logits_RV[block], -1, out=self._small("logp", block))

    def _blocks(self) -> Iterator[slice]:
        return chunks(self._rows, self._block)

    def _by_block(self, of: Callable[[slice], Tensor]) -> Tensor:
        return torch.cat([of(block) for block in self._blocks()])

    def room(self, name: str, rows: int) -> Tensor:
        """Return memory for logits (rows, V) that :meth:`start` or :meth:`take` is given."""
        return self._workspace.get(name, rows, self._dtype)

    def buffer(self, name: str) -> Tensor:
        """Return (R, V) memory of that name, with whatever it holds."""
        return self._workspace.get(name, self._rows, self._dtype)

    def _small(self, name: str, block: slice) -> Tensor:
        return self._workspace.get(name, block.stop - block.start, self._dtype, longest=self._block)
