"""Teachers with other tokenizers teach a student arithmetic: each estimator, its gain, and what a step costs.

    python -m tests.benchmarks.across_tokenizers --smollm2 DIR --work DIR      # an hour or two; goes on if stopped
    python -m tests.benchmarks.across_tokenizers --quick                       # two steps: checks that it runs
    python -m tests.benchmarks.across_tokenizers --smollm2 DIR --work DIR --cost      # what a step costs, interleaved
    python -m tests.benchmarks.across_tokenizers --table DIR/*.jsonl           # the tables of what was run

Everything is trained from scratch on the problems of reasoning-gym's ``chain_sum`` (two terms of one digit). One
teacher for each tokenizer: bytes, byte-level BPE of 500 tokens trained on the task's text, and SmolLM2's, each trained
until it is right on 98 of 100 problems, and then on texts with faults until all go on from those equally well. The
student starts from answers in the right form with a random number, so near zero. Every run makes the same number of
updates on its own rollouts; accuracy is that of greedy answers to all problems, by reasoning-gym's own scorer. The gain
of an estimator is compared with that of the teacher with the student's tokenizer and the exact reverse KL.

``uld`` is the rank-sorted loss of Boizard et al. (arXiv 2402.12030) at the ends of chunks, here alone: it does not know
which token is which.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from kd_plugin.divergence import Divergence
from kd_plugin.errors import DataError
from kd_plugin.panel import Estimator, TeacherPanel, panel_loss, score_rows
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.scoring import RowScores, scored_positions
from kd_plugin.panel.viewing import readers_of
from kd_plugin.rollouts.rows import Rollouts, assembled
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import LocalTeacher
from kd_plugin.views import View
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.vocab import Vocabulary
from tests.benchmarks.arithmetic import (
    Problem,
    accuracy,
    bpe,
    fresh,
    generated,
    problems,
    start_of,
    teacher_of,
)
from tests.tiny import byte_tokenizer

LEARNING_RATE = 3e-3
ROWS = 32  # rollouts of an update
START = 133  # steps in which a student learns the form of an answer


def uld(scores: list[RowScores], hidden: Tensor, head: OutputHead) -> Tensor:
    """Σ |sorted q − sorted p| at the beginning of each chunk (arXiv 2402.12030, equation 5)."""
    signal = ChunkSignal.joined([row.signals["t"] for row in scores])  # type: ignore[misc]
    chunks = signal.places.chunks
    first = torch.ones_like(chunks, dtype=torch.bool)
    first[1:] = chunks[1:] != chunks[:-1]
    at = (first & (chunks >= 0)).nonzero()[:, 0]
    logits = signal.signal.head.logits(signal.signal.hidden[signal.places.anchors[at]])  # type: ignore[union-attr]
    p = logits.softmax(-1).sort(-1, descending=True).values
    q = head.logits(hidden[at]).softmax(-1).sort(-1, descending=True).values
    width = max(p.shape[1], q.shape[1])
    p, q = (nn.functional.pad(x, (0, width - x.shape[1])) for x in (p, q))
    return (p - q).abs().sum()


@dataclass
class Step:
    """One student and one teacher: rollouts, their scores, and the loss."""

    student: Any
    tokenizer: Any
    teacher: LocalTeacher
    name: str
    own: bool
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        view = View(tokenizer="own") if self.own else None
        estimator = {
            "exact": Estimator(),
            "chunk_likelihood_tau10": Estimator("chunk_likelihood", tau=10.0),
            "uld": Estimator("sampled"),
        }.get(self.name) or Estimator(self.name)  # type: ignore[arg-type]
        self.panel = TeacherPanel({"t": self.teacher}, estimator=estimator, own={"t": OwnTerms(view=view)})
        self.vocabulary = Vocabulary.from_tokenizer(self.tokenizer)
        end = [self.tokenizer.eos_token_id]
        self.readers = readers_of(self.panel, self.tokenizer, self.vocabulary, pad_token_id=0, ends=end)

    def rollouts(self, prompts: list[str], seed: int) -> Rollouts:
        found = generated(self.student, self.tokenizer, prompts, temperature=1.0, seed=seed)
        return assembled(
            [self.tokenizer(prompt)["input_ids"] for prompt in prompts], found,
            end_tokens=[self.tokenizer.eos_token_id], pad_token_id=0, device=torch.device("cpu"),
        )  # fmt: skip

    def backward(self, batch: Rollouts, prompts: list[str]) -> dict[str, float]:
        """Form the mean loss's gradient; return the seconds of scoring, of the loss, and of the student's passes."""
        ids, start = batch.input_ids, batch.completion_start
        times = [self.clock()]
        scores = score_rows(
            self.panel, [self.panel.assign({})] * len(prompts), ids, batch.attention_mask, start,
            [range(len(one.tokens)) for one in batch.responses], rows_at_once=ROWS, vocabulary=self.vocabulary,
            rows=[{"prompt": prompt} for prompt in prompts], readers=self.readers,
        )  # fmt: skip
        times.append(self.clock())
        out = self.student.base_model(input_ids=ids, attention_mask=batch.attention_mask).last_hidden_state
        hidden = out[:, start - 1 : -1]
        where = scored_positions(scores, hidden.shape[1], hidden.device)
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)
        times.append(self.clock())
        leaf = hidden.detach().requires_grad_()
        head = OutputHead.from_model(self.student, len(self.tokenizer))
        tokens = ids[:, start:].reshape(-1).index_select(0, where)
        if self.name == "uld":
            total = uld(scores, leaf, head)
        else:
            total = panel_loss(self.panel, scores, leaf, head, tokens, divergence=Divergence()).loss_sum
        (total / max(len(where), 1)).backward()
        times.append(self.clock())
        hidden.backward(leaf.grad)
        times.append(self.clock())
        scoring, forward, loss, backward = (b - a for a, b in itertools.pairwise(times))
        return {"scoring": scoring, "loss": loss, "student": forward + backward}


def run(step: Step, asked: list[Problem], updates: int, every: int, seed: int) -> dict[str, Any]:
    """Train; return accuracy before, every so many updates and after, and the median seconds of an update's parts."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(step.student.parameters(), lr=LEARNING_RATE)
    before, seconds, curve = accuracy(step.student, step.tokenizer, asked), [], {}
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (update + 1) / 10) * (1 - 0.9 * update / updates)
        prompts = [draw.choice(asked).prompt for _ in range(ROWS)]
        begin = time.perf_counter()
        batch = step.rollouts(prompts, seed * 10_000 + update)
        optimizer.zero_grad()
        parts = {"rollouts": time.perf_counter() - begin, **step.backward(batch, prompts)}
        nn.utils.clip_grad_norm_(step.student.parameters(), 1.0)
        optimizer.step()
        tokens = sum(len(one.tokens) for one in batch.responses) / ROWS
        seconds.append({"step": time.perf_counter() - begin, **parts, "tokens": tokens})
        if (update + 1) % every == 0 or update + 1 == updates:
            curve[update + 1] = accuracy(step.student, step.tokenizer, asked)
    medians = {key: statistics.median(s[key] for s in seconds) for key in seconds[0]}
    return {"before": before, "after": curve[updates], "curve": curve, **medians}


ACROSS_ALONE = ("byte_marginals",)  # the same tokenizer as if it were another: what the estimator alone changes
SAME = ("exact", "sampled", "topk_tail")
ACROSS = ("byte_marginals", "topk_tail", "sampled", "chunk_likelihood", "chunk_likelihood_tau10", "uld")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="directory of SmolLM2's tokenizer; without it that teacher is left out")
    parser.add_argument("--student", default="bpe", choices=("bpe", "bytes"), help="the student's tokenizer")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--every", type=int, default=100, help="updates from one measurement of accuracy to the next")
    parser.add_argument("--steps", type=int, default=300, help="of the teachers' own training, as often as it takes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="directory of the teachers and of results, from which a run goes on")
    parser.add_argument("--same", nargs="*", default=SAME, help="estimators of the student's tokenizer")
    parser.add_argument("--only", nargs="*", default=ACROSS, help="estimators across tokenizers")
    parser.add_argument("--teachers", nargs="*", default=("bpe", "bytes", "smollm2"), help="their tokenizers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cost", action="store_true", help="a few interleaved steps of each, and their cost")
    parser.add_argument("--cpu", action="store_true", help="with --cost: CPU time of one thread, on a busy machine")
    parser.add_argument("--rounds", type=int, default=10, help="of --cost")
    parser.add_argument("--table", type=Path, nargs="*", help="print the tables of these files, and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for path in options.table for line in path.read_text().splitlines()]))
        return
    asked = problems()
    if options.quick:
        options.updates, options.steps, options.seeds, asked = 2, 3, [0], asked[:8]
    tokenizers: dict[str, Any] = {
        "bytes": byte_tokenizer(),
        "bpe": bpe([one.prompt + one.text() for one in problems()]),
    }
    if options.smollm2:
        tokenizers["smollm2"] = AutoTokenizer.from_pretrained(options.smollm2)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    own, teachers = tokenizers[options.student], {}
    for name in (name for name in options.teachers if name in tokenizers):
        teachers[name] = teacher_of(name, tokenizers[name], asked, options.work, options.steps)
    runs = [(options.student, e) for e in options.same if options.student in teachers]
    runs += [(t, e) for t in teachers if t != options.student for e in options.only]
    if options.cost:
        clock = cpu_clock() if options.cpu else time.perf_counter
        found = costs(runs, teachers, own, asked, start_of(own, asked, 0, START), options.rounds, clock)
        print(cost_table(found, options.student))
        return
    for seed in options.seeds:
        start = start_of(own, asked, seed, 2 if options.quick else START)
        for teacher, estimator in runs:
            name = f"{options.student}-{teacher}-{estimator}-{options.updates}-{seed}.jsonl"
            if options.work and (options.work / name).exists():
                continue
            step = step_of(own, start, teachers, teacher, estimator)
            found = {"student": options.student, "teacher": teacher, "estimator": estimator, "seed": seed}
            try:
                found |= run(step, asked, options.updates, options.every, seed)
            except DataError as error:  # the student left what can be compared
                found["stopped"] = str(error)
            print(json.dumps(found), flush=True)
            if options.work:
                (options.work / name).write_text(json.dumps(found) + "\n")


def step_of(
    own: Any,
    start: dict[str, Tensor],
    teachers: dict[str, LocalTeacher],
    teacher: str,
    name: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Step:
    """Return a student at its start, with its teacher."""
    student = fresh(own, 0)
    student.load_state_dict(start)
    is_own = teachers[teacher].tokenizer is not own or name in ACROSS_ALONE
    return Step(student, own, teachers[teacher], name, is_own, clock)


def cpu_clock() -> Callable[[], float]:
    """Return a clock that other processes do not disturb much: the CPU time of this one, on one thread."""
    torch.set_num_threads(1)
    return time.process_time


def costs(
    runs: list[tuple[str, str]],
    teachers: dict[str, LocalTeacher],
    own: Any,
    asked: list[Problem],
    start: Any,
    rounds: int,
    clock: Callable[[], float],
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Return the seconds of the parts of some steps on the same rollouts, every estimator in each round."""
    steps = {(t, e): step_of(own, start, teachers, t, e, clock) for t, e in runs}
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for turn in range(rounds + 2):
        prompts = [one.prompt for one in random.Random(turn).sample(asked, min(ROWS, len(asked)))]
        first = next(iter(steps.values()))
        begin = clock()
        batch = first.rollouts(prompts, turn)
        generating = clock() - begin
        for key, step in steps.items():
            parts = step.backward(batch, prompts)
            if turn > 1:
                found[key].append({**parts, "generation": generating, "step": generating + sum(parts.values())})
    return found


def cost_table(found: dict[tuple[str, str], list[dict[str, float]]], student: str) -> str:
    """Return Markdown: medians of the parts in milliseconds; a step relative to the exact loss's of its round."""
    medians = {
        key: {part: statistics.median(one[part] for one in rows) for part in rows[0]} for key, rows in found.items()
    }
    base = found[student, "exact"]
    lines = [
        "| teacher | estimator | generation, ms | scoring, ms | loss, ms | student, ms | step, ms | step, relative |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for (teacher, estimator), one in medians.items():
        parts = "".join(f" {1000 * one[p]:.1f} |" for p in ("generation", "scoring", "loss", "student", "step"))
        relative = [mine["step"] / theirs["step"] for mine, theirs in zip(found[teacher, estimator], base, strict=True)]
        lines.append(f"| {teacher} | `{estimator}` |{parts} {statistics.median(relative):.2f} |")
    return "\n".join(lines)


def table(found: list[dict[str, Any]]) -> str:
    """Return Markdown: shares of the gain that the exact loss of the same tokenizer gives, at equal updates."""
    by_run: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        by_run[one["student"], one["teacher"], one["estimator"]].append(one)
    counts = sorted({int(count) for one in found for count in one.get("curve", {})})
    heads = "".join(f" {count} |" for count in counts)
    lines = [f"| student | teacher | estimator | seeds | start |{heads} share of the gain at {counts} |"]
    lines.append("|---|---|---|---:|---:|" + "---:|" * len(counts) + "---|")
    for (student, teacher, estimator), rows in by_run.items():
        reference = {one["seed"]: one for one in by_run[student, student, "exact"]}
        ended = [one for one in rows if "curve" in one]
        stopped = "".join(f"; seed {one['seed']} stopped: {one['stopped']}" for one in rows if "stopped" in one)
        if not ended:
            lines.append(f"| {student} | {teacher} | `{estimator}` | 0{stopped} |")
            continue
        at = {count: statistics.mean(one["curve"][str(count)] for one in ended) for count in counts}
        shares = []
        for count in map(str, counts):
            of = [
                (one["curve"][count] - one["before"])
                / (reference[one["seed"]]["curve"][count] - reference[one["seed"]]["before"])
                for one in ended
                if one["seed"] in reference
            ]
            shares.append(f"{statistics.mean(of):.2f} ({min(of):.2f} to {max(of):.2f})" if of else "-")
        curve = "".join(f" {at[count]:.2f} |" for count in counts)
        before = statistics.mean(one["before"] for one in ended)
        who = f"| {student} | {teacher} | `{estimator}` | {len(ended)} |"
        lines.append(f"{who} {before:.2f} |{curve} {', '.join(shares)}{stopped} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
