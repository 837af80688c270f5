"""Rollouts with the score that each token got: kept as JSON lines, shown as one self-contained HTML page.

Shape suffixes: N scored positions of a micro-batch, n of a row, K tokens.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_plugin.divergence.listed import logprobs_of, top_tokens
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.panel.batches import MicroBatch
from kd_plugin.panel.loss import TeacherDivergence
from kd_plugin.panel.scoring import Signal
from kd_plugin.signals import HiddenSignal, OutputHead, TextSignal, shared_mask
from kd_plugin.views.chunks import ChunkSignal

ROLLOUTS = "rollouts"  # directory below output_dir
_KEYS = {"step", "row", "prompt", "domain", "truncated", "tokens", "scored", "student", "correction", "teachers"}
_TEACHER_KEYS = {"weight", "divergence", "logprob", "top"}


@torch.no_grad()
def rollout_rows(
    batch: MicroBatch,
    student_hidden: Tensor,
    student_head: OutputHead,
    tokens: Tensor,
    by_teacher: Sequence[TeacherDivergence],
    *,
    decode: Callable[[Sequence[int]], str],
    top_k: int,
    step: int,
    chosen: Sequence[int],
) -> list[dict[str, Any]]:
    """Return some rows of a micro-batch with all that was said of them. Waits for the device.

    Args:
        batch: the micro-batch, with gathered heads.
        student_hidden: (N, H) at the scored positions, row by row.
        student_head: the student's, gathered.
        tokens: (N,) that are scored.
        by_teacher: what the loss made of the scores.
        decode: the text of some tokens.
        top_k: K, tokens that each teacher finds likeliest.
        step: optimizer step.
        chosen: numbers of the rows in the micro-batch.

    Returns:
        One mapping a row, JSON-ready; numbers are nats, but for the probabilities in ``top``.
    """
    scores = batch.scores
    ends = list(itertools.accumulate(len(row_scores.positions) for row_scores in scores))
    spans = {row: slice(ends[row] - len(scores[row].positions), ends[row]) for row in chosen}
    names = dict.fromkeys(name for row in chosen for name in scores[row].signals)
    said = {name: _values(by_teacher, name, tokens) for name in names}
    found = []
    for row in chosen:
        row_scores, response = scores[row], batch.responses[row]
        span = spans[row]
        student = logprobs_of(HiddenSignal(student_hidden[span], student_head), tokens[span], 1.0).tolist()
        teachers: dict[str, dict[str, Any]] = {}
        for name, signal in row_scores.signals.items():
            divergence, weight = (_numbers(column[span]) for column in said[name])
            logprobs, top = _token_view(_listed(signal), tokens[span], top_k, lambda token: decode([token]))
            teachers[name] = {"weight": weight, "divergence": divergence, "logprob": logprobs, "top": top}
            if name in row_scores.prompts:
                teachers[name]["read"] = row_scores.prompts[name]
        total = [
            round(sum((t["weight"][i] or 0.0) * (t["divergence"][i] or 0.0) for t in teachers.values()), 4)
            for i in range(len(row_scores.positions))
        ]
        found.append(
            {
                "step": step,
                "row": response.number,
                "prompt": decode(batch.input_ids[row, : batch.starts[row]].tolist()),
                "domain": row_scores.assignment.domain,
                "truncated": response.truncated,
                "tokens": [decode([token]) for token in response.tokens],
                "scored": list(row_scores.positions),
                "student": [round(value, 4) for value in student],
                "correction": total,
                "teachers": teachers,
            }
        )
    return found


def append_rollouts(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_rollouts(place: Path) -> list[dict[str, Any]]:
    """Read saved rollouts: a file, a directory of such files, or a run's ``output_dir``; in the order of steps.

    Raises:
        ConfigError: there are none.
        DataError: a line is no rollout.
    """
    if place.is_dir():
        inside = place / ROLLOUTS if (place / ROLLOUTS).is_dir() else place
        files = sorted(inside.glob("*.jsonl"))
    else:
        files = [place] if place.is_file() else []
    rows = [row for file in files for row in _lines(file)]
    if not rows:
        raise ConfigError(
            f"{str(place)!r} holds no saved rollouts. Set save_rollouts to a number of rows when training with a "
            "teacher panel; they go to output_dir/rollouts, in Lightning to default_root_dir/rollouts."
        )
    return sorted(rows, key=lambda row: (row["step"], row["row"]))


def page(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return the page: HTML with its style, script and data inside, which asks no other machine for anything."""
    # `<` alone could end the element early; the two separators are line ends in older scripts
    data = json.dumps({"title": title, "rollouts": list(rows)}, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    template = resources.files("kd_plugin.monitor").joinpath("trace.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    return before + data + after


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                good = row.keys() >= _KEYS and all(t.keys() >= _TEACHER_KEYS for t in row["teachers"].values())
                good = good and isinstance(row["step"], int) and isinstance(row["tokens"], list)
            except (ValueError, AttributeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}, is no saved rollout: {error}.") from error
            if not good:
                raise DataError(
                    f"{path}, line {number}, is no saved rollout: expected the keys {', '.join(sorted(_KEYS))}."
                )
            yield row


def _values(by_teacher: Sequence[TeacherDivergence], name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return one teacher's (N,) divergences and weights; NaN where it did not score."""
    both = tuple(torch.full((len(tokens),), math.nan, device=tokens.device) for _ in range(2))
    for one in by_teacher:
        if one.teacher == name:
            where = torch.arange(len(tokens), device=tokens.device) if one.positions is None else one.positions
            for column, values in zip(both, (one.divergence, one.weights), strict=True):
                column.index_copy_(0, where, values.float())
    return both[0], both[1]


def _listed(signal: Signal | TextSignal) -> Signal:
    """Return a correction as a list of its tokens."""
    return signal.as_list() if isinstance(signal, TextSignal) else signal


def _token_view(
    signal: Signal, tokens: Tensor, top_k: int, decode: Callable[[int], str]
) -> tuple[list[float | None], list[list[tuple[str, float]]]]:
    """Return a teacher's log-probability of each sampled token, and its own first K tokens with probabilities."""
    if isinstance(signal, ChunkSignal):  # what it says in its own tokens, said in the student's
        said, is_known = signal.listed(tokens, 4 * top_k, 1.0, "teacher")
        signal = replace(said, logprobs=said.logprobs.masked_fill(~is_known.unsqueeze(-1), -math.inf))
    if isinstance(signal, HiddenSignal):
        ids = top_tokens(signal, top_k)
        written = logprobs_of(signal, tokens, 1.0)
        columns = [logprobs_of(signal, ids[:, k].contiguous(), 1.0) for k in range(ids.size(1))]
        logprobs = torch.stack(columns, 1) if columns else signal.hidden.new_zeros((len(tokens), 0))
    else:
        logprobs, order = signal.logprobs.float().topk(min(top_k, signal.logprobs.size(1)), -1)
        ids = signal.ids.gather(1, order)
        listed = (signal.ids == tokens.unsqueeze(-1)) & (signal.logprobs > -math.inf)
        known = torch.where(listed, signal.logprobs.float(), math.nan).nan_to_num(nan=-math.inf).amax(-1)
        written = known.masked_fill(known == -math.inf, math.nan)
        if signal.sampled_token_logprobs is not None:
            written = signal.sampled_token_logprobs.float()
    top = [
        [(decode(i), round(math.exp(p), 4)) for i, p in zip(row_ids, row, strict=True) if p > -math.inf]
        for row_ids, row in zip(ids.tolist(), logprobs.tolist(), strict=True)
    ]
    if signal.shared is not None:
        written = written.masked_fill(~shared_mask(signal.shared, tokens), math.nan)
    return _numbers(written), top


def _numbers(values: Tensor) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


class RolloutSaver:
    """Writes rows of a step into ``output_dir/rollouts``, one file a step and rank.

    Args:
        output_dir: of the run.
        rank: of this process.
        rows: at most so many of a step, the first of a generation batch: micro-batches have them by length.
        top_k: tokens that each teacher finds likeliest, kept with a row.
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
        batch: MicroBatch,
        hidden: Tensor,
        head: OutputHead,
        tokens: Tensor,
        by_teacher: Sequence[TeacherDivergence],
    ) -> None:
        """Keep the rows of a micro-batch that the step has room for. Waits for the device.

        Args:
            step: optimizer step, from 1.
            batch: the micro-batch, with gathered heads.
            hidden: (N, H) the student's, detached, at the scored positions.
            head: the student's, gathered.
            tokens: (N,) that are scored.
            by_teacher: what the loss made of the scores.
        """
        path = self._directory / f"step-{step:08d}-rank-{self._rank}.jsonl"
        if self._saved[0] != step:
            self._saved = (step, 0)
            path.unlink(missing_ok=True)  # of the same step before a resume
        chosen = [row for row, one in enumerate(batch.responses) if one.number < self._rows]
        chosen = chosen[: self._rows - self._saved[1]]
        if not chosen:
            return
        decode = self._tokenizer.decode
        rows = rollout_rows(
            batch, hidden, head, tokens, by_teacher, decode=decode, top_k=self._top_k, step=step, chosen=chosen
        )
        append_rollouts(path, rows)
        self._saved = (step, self._saved[1] + len(rows))
