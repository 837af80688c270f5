"""Keeping some rollouts of a run with what the panel said of them, for ``kd-plugin trace``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_plugin.panel.loss import Judgement
from kd_plugin.panel.scoring import Correction
from kd_plugin.panel.trace import ROLLOUTS, Written, append_rollouts, rollout_rows
from kd_plugin.signals import OutputHead


class RolloutSaver:
    """Writes rows of a step into ``output_dir/rollouts``, one file a step and rank.

    Args:
        output_dir: of the run.
        rank: of this process.
        rows: at most so many of a step, the first of a generation batch: micro-batches have them by length.
        top_k: tokens that each teacher would have written, kept with a row.
        tokenizer: the student's.
    """

    def __init__(self, output_dir: str | Path, *, rank: int, rows: int, top_k: int, tokenizer: Any) -> None:
        self._directory = Path(output_dir, ROLLOUTS)
        self._rank = rank
        self._rows = rows
        self._top_k = top_k
        self._tokenizer = tokenizer
        self._saved = (-1, 0)  # step, rows

    def save(
        self,
        step: int,
        prompts: tuple[Tensor, Tensor],
        written: Sequence[Written],
        corrections: Sequence[Correction],
        hidden: Tensor,
        head: OutputHead,
        tokens: Tensor,
        judgements: Sequence[Judgement],
    ) -> None:
        """Keep the rows of a micro-batch that the step has room for. Waits for the device.

        Args:
            step: optimizer step, from 1.
            prompts: (B, P) ids and their mask.
            written: B responses.
            corrections: one a row.
            hidden: (N, H) the student's, detached, at the scored positions.
            head: the student's.
            tokens: (N,) written there.
            judgements: what the loss made of the corrections.
        """
        path = self._directory / f"step-{step:08d}-rank-{self._rank}.jsonl"
        if self._saved[0] != step:
            self._saved = (step, 0)
            path.unlink(missing_ok=True)  # of the same step before a resume
        chosen = [row for row, one in enumerate(written) if one.number < self._rows]
        chosen = chosen[: self._rows - self._saved[1]]
        if not chosen:
            return
        decode = self._tokenizer.decode
        named = list(written)
        for row in chosen:
            ids, used = prompts[0][row].tolist(), prompts[1][row].tolist()
            text = decode([token for token, is_used in zip(ids, used, strict=True) if is_used])
            named[row] = dataclasses.replace(named[row], prompt=text)
        rows = rollout_rows(
            corrections,
            named,
            hidden,
            head,
            tokens,
            judgements,
            decode=lambda token: decode([token]),
            top_k=self._top_k,
            step=step,
            chosen=chosen,
        )
        append_rollouts(path, rows)
        self._saved = (step, self._saved[1] + len(rows))
