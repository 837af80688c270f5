"""How good a student gets from stored targets: 50 draws, and top-12, against the teacher's full distribution.

python -m tests.benchmarks.offline_quality --model DIR --output OUT --plot docs/offline-quality.png

DIR is SmolLM2-135M-Instruct. The student keeps 19 of its 30 layers (96M parameters) and is trained in float32, one
pass over paragraphs of the standard library's docstrings; every run of a seed sees the same batches in the same order.
`full` takes the teacher's whole distribution from its hidden states, which is what a live teacher gives. The draws are
others with each seed. Each run ends as a line of OUT/runs.jsonl, and a run that is there is not repeated.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kd_plugin.cache import Sampled, TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.capturing.fidelity import target_bytes
from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.sparse import fused_sparse_divergence
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.teachers import LocalTeacher
from tests.benchmarks.fidelity import student_of
from tests.benchmarks.prose import paragraphs

FORWARD_KL = Divergence("forward_kl")
ROWS_A_STEP, WARMUP_STEPS, LEARNING_RATE = 4, 10, 3e-4
HELD_OUT_ROWS, MEASURED_EVERY = 32, 20
METHODS = {"full": None, "50 draws": Sampled(50), "top-12": TopK(12)}


@dataclass(frozen=True)
class Batch:
    """Rows of text (B, L), padded on the right, and the positions whose next token is scored (N,) in (B * L)."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    rows: list[int]


class Text:
    """Paragraphs as tokens, and the teacher's hidden states at each of their positions."""

    def __init__(self, texts: list[str], teacher: LocalTeacher) -> None:
        self.texts, self.teacher = texts, teacher
        self.tokens = [
            torch.tensor(teacher.tokenizer(t)["input_ids"] + [teacher.tokenizer.eos_token_id]) for t in texts
        ]
        self.hidden = [
            teacher.score(ids[None], torch.ones_like(ids[None]), torch.arange(len(ids) - 1)).hidden
            for ids in self.tokens
        ]

    def batch(self, rows: list[int]) -> Batch:
        """Pad ``rows``."""
        length = max(len(self.tokens[r]) for r in rows)
        ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
        for i, r in enumerate(rows):
            ids[i, : len(self.tokens[r])], mask[i, : len(self.tokens[r])] = self.tokens[r], 1
        positions = torch.cat([i * length + torch.arange(len(self.tokens[r]) - 1) for i, r in enumerate(rows)])
        return Batch(ids, mask, positions, rows)

    def exact_loss(self, hidden: Tensor, head: OutputHead, batch: Batch) -> Tensor:
        """Summed forward KL over the whole vocabulary."""
        signal = HiddenSignal(torch.cat([self.hidden[r] for r in batch.rows]), self.teacher.head)
        group = PanelGroup(positions=None, terms=(TeacherTerm(signal),))
        return fused_panel_divergence(hidden, head, [group], FORWARD_KL).loss_sum


class Stored:
    """The loss on a cache of the training text."""

    def __init__(self, cache: TeacherCache, text: Text) -> None:
        self.cache = cache
        self.index = [cache.teacher_index(ids.tolist()) for ids in text.tokens]

    def loss(self, hidden: Tensor, head: OutputHead, batch: Batch) -> Tensor:
        """Summed forward KL, as stored targets see it."""
        index = torch.tensor([i for r in batch.rows for i in self.index[r][:-1]])
        return fused_sparse_divergence(hidden, head, self.cache.signal(index), FORWARD_KL).loss_sum


def states(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, OutputHead]:
    """Return the student's hidden states (N, H) at the scored positions, and its head."""
    hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.positions), OutputHead.from_model(model)


@torch.no_grad()
def held_out_kl(model: torch.nn.Module, text: Text) -> float:
    """Mean forward KL in nats a token, over the whole vocabulary."""
    total, count = 0.0, 0
    for first in range(0, len(text.texts), 8):
        batch = text.batch(list(range(first, min(first + 8, len(text.texts)))))
        total += float(text.exact_loss(*states(model, batch), batch))
        count += len(batch.positions)
    return total / count


def train(student: Path, loss, text: Text, held_out: Text, seed: int) -> list[tuple[int, float]]:
    """Train once over ``text``; return (tokens seen, held-out KL) along the way."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    order = torch.randperm(len(text.texts)).tolist()
    groups = [order[i : i + ROWS_A_STEP] for i in range(0, len(order) - ROWS_A_STEP + 1, ROWS_A_STEP)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * max(0.05, 1 - step / len(groups))
    )
    curve, tokens = [(0, held_out_kl(model, held_out))], 0
    for step, rows in enumerate(groups, start=1):
        batch = text.batch(rows)
        (loss(*states(model, batch), batch) / len(batch.positions)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        tokens += len(batch.positions)
        if step % MEASURED_EVERY == 0 or step == len(groups):
            curve.append((tokens, held_out_kl(model, held_out)))
    return curve


def plot(runs: list[dict], path: Path) -> None:
    """Draw the held-out KL of each method, one line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(METHODS):
        for run in (r for r in runs if r["method"] == method):
            label = method if run["seed"] == runs[0]["seed"] else None
            axes.plot(*zip(*run["curve"], strict=True), "o-", markersize=3, color=f"C{number}", label=label)
    axes.set(xlabel="tokens trained on", ylabel="held-out KL(teacher ‖ student), nats a token")
    axes.legend()
    figure.savefig(path, dpi=110)


def report(runs: list[dict]) -> None:
    """Print a line a method."""
    final = {m: [r["curve"][-1][1] for r in runs if r["method"] == m] for m in METHODS}
    for method, values in final.items():
        if values and final["full"]:
            stored = next(r["bytes"] for r in runs if r["method"] == method)
            ratio = statistics.mean(values) / statistics.mean(final["full"])
            each = ", ".join(f"{v:.4f}" for v in values)
            print(f"{method}: {each} nats a token, {ratio:.4f} of full; {stored:.1f} bytes a position")


def main() -> None:
    """Run what is missing, and report all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=int, default=280, help="paragraphs to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = arguments.output / "runs.jsonl"
    runs = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    teacher = LocalTeacher(arguments.model, license="apache-2.0", dtype="float32")
    student = student_of(arguments.model, arguments.output / "student")
    texts = paragraphs()
    chosen = texts[:: max(1, len(texts) // (arguments.rows + HELD_OUT_ROWS))][: arguments.rows + HELD_OUT_ROWS]
    every = max(2, len(chosen) // HELD_OUT_ROWS)
    held_out = Text([t for i, t in enumerate(chosen) if i % every == 0][:HELD_OUT_ROWS], teacher)
    text = Text([t for i, t in enumerate(chosen) if i % every], teacher)
    print(f"{sum(map(len, text.tokens))} tokens to train on, {sum(map(len, held_out.tokens))} held out", flush=True)
    rows = [{"input_ids": ids.tolist(), "completion_mask": [1] * len(ids)} for ids in text.tokens]
    for seed in arguments.seeds:
        for method, targets in METHODS.items():
            if any((r["method"], r["seed"], r["rows"]) == (method, seed, arguments.rows) for r in runs):
                continue
            loss, size = text.exact_loss, 4.0 * teacher.vocabulary.size
            if targets is not None:
                directory = arguments.output / f"{method.replace(' ', '-')}-{seed}-{arguments.rows}"
                cache = capture(rows, teacher, directory, targets=targets, seed=seed, batch_tokens=1024)
                loss, size = Stored(cache, text).loss, target_bytes(cache) / cache.tokens
            began = time.perf_counter()
            curve = train(student, loss, text, held_out, seed)
            seconds = time.perf_counter() - began
            runs.append({"method": method, "seed": seed, "rows": arguments.rows, "bytes": size, "curve": curve})
            print(f"seed {seed}, {method}: {curve[0][1]:.3f} to {curve[-1][1]:.4f} in {seconds:.0f} s", flush=True)
            with record.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    report(runs)
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
