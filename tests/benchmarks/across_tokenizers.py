"""Teachers with other tokenizers teach a student arithmetic: each estimator, its gain, and what a step costs.

    python -m tests.benchmarks.across_tokenizers --smollm2 DIR --out results.jsonl      # hours on a busy core
    python -m tests.benchmarks.across_tokenizers --quick                                # two steps: checks that it runs
    python -m tests.benchmarks.across_tokenizers --table results.jsonl                  # the table of what was run
    python -m tests.benchmarks.across_tokenizers --bias                                 # bias and variance, enumerated

Everything is trained from scratch on the problems of reasoning-gym's ``chain_sum`` (two terms of one digit). One
teacher for each tokenizer: bytes, byte-level BPE of 500 tokens trained on the task's text, and SmolLM2's. The student
starts from answers in the right form with a random number, so near zero. Every run makes the same number of updates on
its own rollouts; accuracy is that of greedy answers to all problems, by reasoning-gym's own scorer. The gain of an
estimator is compared with that of the teacher with the student's tokenizer and the exact reverse KL.

``uld`` is the rank-sorted loss of Boizard et al. (arXiv 2402.12030) at the ends of chunks, here alone: it does not know
which token is which.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_plugin.divergence import Divergence, fused_sparse_divergence
from kd_plugin.divergence.sampled import Matching, fused_sampled_divergence
from kd_plugin.panel import Estimator, TeacherPanel, panel_loss, score_rows
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.scoring import RowScores, scored_positions
from kd_plugin.panel.viewing import readers_of
from kd_plugin.rollouts.in_process import InProcessEngine, Sampling
from kd_plugin.rollouts.rows import Rollouts, assembled
from kd_plugin.signals import OutputHead, SparseSignal
from kd_plugin.teachers import LocalTeacher
from kd_plugin.views import View
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.vocab import Vocabulary
from tests.tiny import SPECIALS, byte_tokenizer

LEARNING_RATE = 3e-3
ROWS = 32  # rollouts of an update
LONGEST = 32  # tokens of a response in the finest tokenizer


@dataclass(frozen=True)
class Problem:
    """One problem: what is asked, how an answer reads, and the entry that scores it."""

    prompt: str
    answer: str
    entry: dict[str, Any]

    def text(self, answer: str | None = None) -> str:
        value = self.answer if answer is None else answer
        return f" {value}, because {self.prompt} makes {value}."


def problems() -> list[Problem]:
    """Return all different problems of two one-digit terms."""
    found = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=3000, seed=7
    )
    unique = {entry["metadata"]["expression"]: entry for entry in found}
    return [Problem(expression, entry["answer"], entry) for expression, entry in sorted(unique.items())]


def score(problem: Problem, response: str) -> bool:
    """Return whether the final number is right, by the scorer of reasoning-gym."""
    said = re.search(r"makes (-?\d+)\.", response)
    dataset = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)
    return said is not None and dataset.score_answer(said[1], problem.entry) == 1.0


def bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def fresh(tokenizer: Any, seed: int, hidden: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def pretrain(model: nn.Module, tokenizer: Any, rows: list[tuple[str, str]], steps: int, seed: int) -> None:
    """Fit rows of prompt and response by cross-entropy on the responses."""
    draw, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=3e-3)
    encoded = [
        (tokenizer(p)["input_ids"], [*tokenizer(r, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        for p, r in rows
    ]
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps * 0.9)
        chosen = draw.sample(encoded, min(48, len(encoded)))
        width = max(len(p) + len(r) for p, r in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (p, r) in enumerate(chosen):
            ids[i, : len(p) + len(r)] = torch.tensor([*p, *r])
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def generated(model: Any, tokenizer: Any, prompts: list[str], *, temperature: float, seed: int) -> list[list[int]]:
    sampling = Sampling(LONGEST, temperature, draws="uniform")
    engine = InProcessEngine(model, tokenizer, sampling, device=torch.device("cpu"), seed=seed)
    return [one.ids for one in engine.generate([tokenizer(prompt)["input_ids"] for prompt in prompts])]


def accuracy(model: Any, tokenizer: Any, asked: list[Problem]) -> float:
    found = generated(model, tokenizer, [one.prompt for one in asked], temperature=0.0, seed=0)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    return sum(map(score, asked, texts)) / len(asked)


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

    def loss(self, batch: Rollouts, prompts: list[str]) -> tuple[Tensor, int]:
        ids, start = batch.input_ids, batch.completion_start
        scores = score_rows(
            self.panel, [self.panel.assign({})] * len(prompts), ids, batch.attention_mask, start,
            [range(len(one.tokens)) for one in batch.responses], rows_at_once=ROWS, vocabulary=self.vocabulary,
            rows=[{"prompt": prompt} for prompt in prompts], readers=self.readers,
        )  # fmt: skip
        out = self.student.base_model(input_ids=ids, attention_mask=batch.attention_mask).last_hidden_state
        hidden = out[:, start - 1 : -1]
        where = scored_positions(scores, hidden.shape[1], hidden.device)
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)
        head = OutputHead.from_model(self.student, len(self.tokenizer))
        if self.name == "uld":
            return uld(scores, hidden, head), len(where)
        tokens = ids[:, start:].reshape(-1).index_select(0, where)
        return panel_loss(self.panel, scores, hidden, head, tokens, divergence=Divergence()).loss_sum, len(where)


def run(step: Step, asked: list[Problem], updates: int, seed: int) -> dict[str, float]:
    """Train; return accuracy before and after, and seconds of an update and of its scoring, loss and backward pass."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(step.student.parameters(), lr=LEARNING_RATE)
    before, seconds, ours = accuracy(step.student, step.tokenizer, asked), [], []
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (update + 1) / 10) * (1 - 0.9 * update / updates)
        prompts = [draw.choice(asked).prompt for _ in range(ROWS)]
        begin = time.perf_counter()
        batch = step.rollouts(prompts, seed * 10_000 + update)
        middle = time.perf_counter()
        total, count = step.loss(batch, prompts)
        optimizer.zero_grad()
        (total / max(count, 1)).backward()
        nn.utils.clip_grad_norm_(step.student.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        ours.append(time.perf_counter() - middle)
    after = accuracy(step.student, step.tokenizer, asked)
    return {
        "before": before, "after": after, "step": statistics.median(seconds), "loss": statistics.median(ours),
    }  # fmt: skip


ACROSS = ("sampled", "topk_tail", "chunk_likelihood", "chunk_likelihood_tau10", "uld")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="directory of SmolLM2's tokenizer; without it that teacher is left out")
    parser.add_argument("--student", default="bpe", choices=("bpe", "bytes"), help="the student's tokenizer")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500, help="of the teachers' own training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="estimators across tokenizers")
    parser.add_argument("--teachers", nargs="*", help="tokenizers of the teachers; the student's own is the reference")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bias", action="store_true", help="print the table of bias and spread, and run nothing else")
    parser.add_argument("--table", type=Path, nargs="*", help="print the table of these files, and run nothing")
    options = parser.parse_args()
    if options.bias:
        print(bias())
        return
    if options.table:
        print(table([json.loads(line) for path in options.table for line in path.read_text().splitlines()]))
        return
    asked = problems()
    if options.quick:
        options.updates, options.steps, options.seeds, asked = 2, 3, 1, asked[:8]
    tokenizers: dict[str, Any] = {"bytes": byte_tokenizer(), "bpe": bpe([one.prompt + one.text() for one in asked])}
    if options.smollm2:
        tokenizers["smollm2"] = AutoTokenizer.from_pretrained(options.smollm2)
    teachers = {}
    for name, tokenizer in tokenizers.items():
        if options.teachers and name not in options.teachers:
            continue
        model = fresh(tokenizer, seed=100, hidden=48 if name == "smollm2" else 64)
        rows = [(one.prompt, one.text()) for one in asked]
        pretrain(model, tokenizer, rows, options.steps, seed=0)
        teachers[name] = LocalTeacher(model, tokenizer=tokenizer)
        print(f"teacher {name}: {accuracy(model, tokenizer, asked):.3f}", file=sys.stderr, flush=True)
    own = tokenizers[options.student]
    numbers = [str(n) for n in range(-9, 19)]
    for seed in range(options.seeds):
        draw = random.Random(seed)
        start = fresh(own, seed)
        rows = [(one.prompt, one.text(draw.choice(numbers))) for one in asked for _ in range(4)]
        pretrain(start, own, rows, max(options.steps // 3, 2), seed)
        same = ("exact", "sampled", "topk_tail") if options.student in teachers else ()
        runs = [(options.student, name) for name in same]
        runs += [(t, e) for t in teachers if t != options.student for e in options.only or ACROSS]
        for teacher, estimator in runs:
            student = fresh(own, seed)
            student.load_state_dict(start.state_dict())
            step = Step(student, own, teachers[teacher], estimator, own=teacher != options.student)
            found = {"student": options.student, "teacher": teacher, "estimator": estimator, "seed": seed}
            found |= run(step, asked, options.updates, seed)
            print(json.dumps(found), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")


def bias(seeds: int = 20, letters: int = 3, pairs: int = 2) -> str:
    """Return Markdown: bias and spread of each estimator against the KL over chunks, over all texts there are.

    The student writes letters and the teacher pairs of them, both with random distributions after each text. Nothing
    is trained and nothing is drawn.
    """
    texts = list(itertools.product(range(letters), repeat=2 * pairs))
    states = sorted({text[:n] for text in texts for n in range(2 * pairs)})
    at = {state: i for i, state in enumerate(states)}
    numbers: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(states), letters, generator=draw, dtype=torch.float64).requires_grad_()
        logp = torch.randn(len(states), letters, letters, generator=draw, dtype=torch.float64).flatten(1)
        logp = logp.log_softmax(-1).view(len(states), letters, letters)
        logq = logits.log_softmax(-1)
        reached = {(): torch.ones((), dtype=torch.float64)}
        for state in sorted(states, key=len):
            for letter in range(letters):
                reached[(*state, letter)] = reached[state] * logq[at[state], letter].exp().detach()
        exact = torch.zeros((), dtype=torch.float64)
        for state in (one for one in states if len(one) % 2 == 0):
            pair = torch.stack([logq[at[state], a] + logq[at[(*state, a)]] for a in range(letters)])
            exact = exact + reached[state] * (pair.exp() * (pair - logp[at[state]])).sum()
        (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
        head = OutputHead(torch.eye(letters, dtype=torch.float64))
        found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for text in texts:
            places = [at[text[:n]] for n in range(2 * pairs)]
            said, listed = torch.zeros(2 * pairs, dtype=torch.float64), []
            for k in range(0, 2 * pairs, 2):
                table_of = logp[places[k]]
                said[k] = table_of[text[k], text[k + 1]]
                listed += [table_of.logsumexp(1), table_of[text[k]].log_softmax(-1)]
            for name in ("sampled", "chunk_likelihood, tau 1", "chunk_likelihood, tau 10", "topk_tail"):
                leaf = logits.detach()[places].requires_grad_()
                if name == "topk_tail":
                    ids = torch.arange(letters).expand(2 * pairs, letters)
                    none = torch.full((2 * pairs,), -torch.inf, dtype=torch.float64)
                    signal = SparseSignal(ids, torch.stack(listed), none)
                    loss = fused_sparse_divergence(leaf, head, signal, Divergence()).loss_sum
                else:
                    tau = float(name.split()[-1]) if "tau" in name else None
                    matching = None if tau is None else Matching(Divergence(), tau)
                    chunks = torch.arange(2 * pairs) // 2
                    loss = fused_sampled_divergence(
                        leaf, head, torch.tensor(text), said, chunks=chunks, matching=matching
                    ).loss_sum
                gradient = torch.zeros_like(expected).index_add_(
                    0, torch.tensor(places), *torch.autograd.grad(loss, leaf)
                )
                found[name].append((reached[text], gradient))
        for name, parts in found.items():
            mean = sum(q * g for q, g in parts)
            spread = sum(q * (g - mean).square().sum() for q, g in parts).sqrt() / expected.norm()
            cosine = (mean * expected).sum() / mean.norm() / expected.norm()
            numbers[name].append((float((mean - expected).norm() / expected.norm()), float(spread), float(cosine)))
    lines = ["| estimator | bias / norm | std of one text / norm | cosine of the mean |", "|---|---|---|---|"]
    for name, rows in numbers.items():
        off, spread, cosine = (statistics.mean(column) for column in zip(*rows, strict=True))
        lines.append(f"| {name} | {off:.3f} | {spread:.2f} | {cosine:.4f} |")
    return "\n".join(lines)


def table(found: list[dict[str, Any]]) -> str:
    """Return Markdown: gains over the start relative to the exact loss of the same tokenizer, and costs."""
    by_run: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        by_run[one["student"], one["teacher"], one["estimator"]].append(one)
    lines = ["| student | teacher | estimator | accuracy before | after | share of the gain | step | loss |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (student, teacher, estimator), rows in by_run.items():
        reference = {one["seed"]: one for one in by_run[student, student, "exact"]}
        shares = [
            (one["after"] - one["before"]) / (reference[one["seed"]]["after"] - reference[one["seed"]]["before"])
            for one in rows
            if one["seed"] in reference
        ]
        costs = [
            statistics.mean(one[key] / reference[one["seed"]][key] for one in rows if one["seed"] in reference)
            for key in ("step", "loss")
        ]
        before, after = ([one[key] for one in rows] for key in ("before", "after"))
        spread = f" ({min(shares):.2f} to {max(shares):.2f})"
        lines.append(
            f"| {student} | {teacher} | `{estimator}` | {statistics.mean(before):.2f} | {statistics.mean(after):.2f} | "
            f"{statistics.mean(shares):.2f}{spread} | {costs[0]:.2f} | {costs[1]:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
