"""What another tokenizer costs at the size of a real vocabulary, beside the exact loss of the same tokenizer.

    python -m tests.benchmarks.across_tokenizers_cost --smollm2 DIR [--tokenizers DIR --teachers llama-bpe qwen2]
    python -m tests.benchmarks.across_tokenizers_cost --smollm2 DIR --step [--tokenizers DIR --teachers gpt-2 llama-bpe]

The first measures the loss alone. The text is this repository's README, as a response in SmolLM2's tokens; hidden
states are random, of width 576, as SmolLM2-135M's. Seconds are medians of the loss with its gradient in hidden states
and head, interleaved; finding where tokens lie is part of it. The teacher of bytes has as many positions as the text
has bytes.

``--step`` measures whole on-policy steps with SmolLM2's weights as student: generation, scoring, the student's passes,
loss and optimizer. Every teacher has the student's body; one of another tokenizer has random embeddings of its own, so
that what it says means nothing and what it costs is right. In each round all are given the same rollouts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.across.byte_marginals import fused_byte_divergence
from kd_plugin.rollouts.in_process import InProcessEngine, Sampling
from kd_plugin.rollouts.rows import assembled
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.teachers import LocalTeacher
from kd_plugin.views.align import align
from kd_plugin.views.aligned import Aligned
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.views.projection import Projection
from kd_plugin.views.tokens import TokenText
from tests.benchmarks.across_tokenizers import Step, cpu_clock
from tests.tiny import byte_tokenizer

WIDTH = 576
ASKED = (
    "Question: Why is the sky blue, and why is it red in the evening?\nAnswer:",
    "Question: How do I write a function in Python that reverses a list?\nAnswer:",
    "Question: What should I see in Lisbon in two days?\nAnswer:",
    "Question: A train leaves at 9:40 and arrives at 11:05. How long does it take?\nAnswer:",
)


def timed(call: Any, clock: Callable[[], float]) -> tuple[float, Any]:
    begin = clock()
    found = call()
    return clock() - begin, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="directory of SmolLM2's tokenizer, for --step of its weights")
    parser.add_argument("--tokenizers", type=Path, help="directory of python -m tests.tokenizers")
    parser.add_argument("--teachers", nargs="*", default=[], help="their tokenizers, beside one of bytes")
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread, on a busy machine")
    parser.add_argument("--step", action="store_true", help="measure whole steps")
    parser.add_argument("--only", nargs="*", default=["byte_marginals"], help="estimators of whole steps")
    parser.add_argument("--rows", type=int, default=8, help="rollouts of a whole step")
    parser.add_argument("--tokens", type=int, default=48, help="of each of them, at most")
    options = parser.parse_args()
    own = AutoTokenizer.from_pretrained(options.smollm2)
    tokenizers = {"bytes": byte_tokenizer()}
    tokenizers |= {name: AutoTokenizer.from_pretrained(options.tokenizers / name) for name in options.teachers}
    clock = cpu_clock() if options.cpu else time.perf_counter
    if options.step:
        print(steps(options, own, tokenizers, clock))
    else:
        losses(options, own, tokenizers, clock)


def steps(options: argparse.Namespace, own: Any, tokenizers: dict[str, Any], clock: Callable[[], float]) -> str:
    """Measure whole steps, every teacher and estimator in each round; return Markdown."""
    student = AutoModelForCausalLM.from_pretrained(options.smollm2, dtype=torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-9)
    teachers = {"the student's": LocalTeacher(copy.deepcopy(student), tokenizer=own)}
    body = teachers["the student's"].model
    teachers |= {name: teacher_of_body(body, tokenizer) for name, tokenizer in tokenizers.items()}
    runs = [("the student's", "exact"), *((name, estimator) for name in tokenizers for estimator in options.only)]
    all_of = {(t, e): Step(student, own, teachers[t], e, teachers[t].tokenizer is not own, clock) for t, e in runs}
    sampling = Sampling(options.tokens, 1.0, draws="uniform")
    engine = InProcessEngine(student, own, sampling, device=torch.device("cpu"), seed=0)
    prompts = [ASKED[row % len(ASKED)] for row in range(options.rows)]
    seconds: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for turn in range(options.rounds + 1):
        ids = [own(prompt)["input_ids"] for prompt in prompts]
        generating, written = timed(lambda ids=ids: [one.ids for one in engine.generate(ids)], clock)
        batch = assembled(ids, written, end_tokens=[own.eos_token_id], pad_token_id=0, device=torch.device("cpu"))
        for key, step in all_of.items():
            optimizer.zero_grad()
            parts = step.backward(batch, prompts)
            parts["optimizer"], _ = timed(optimizer.step, clock)
            found = {**parts, "step": generating + sum(parts.values()), "generation": generating}
            print(turn, *key, {part: round(took, 2) for part, took in found.items()}, file=sys.stderr, flush=True)
            if turn:
                seconds[key].append(found)
    return step_table(seconds, teachers, sum(len(one.tokens) for one in batch.responses))


def teacher_of_body(body: Any, tokenizer: Any) -> LocalTeacher:
    """Return a teacher that shares a model's layers, with random embeddings for the tokens of another tokenizer."""
    config = copy.deepcopy(body.config)
    config.vocab_size, config.bos_token_id, config.pad_token_id = len(tokenizer), None, None
    config.eos_token_id, config.num_hidden_layers = tokenizer.eos_token_id, 0
    model = type(body)(config)
    model.base_model.layers, config.num_hidden_layers = body.base_model.layers, body.config.num_hidden_layers
    return LocalTeacher(model, tokenizer=tokenizer)


def step_table(
    seconds: dict[tuple[str, str], list[dict[str, float]]], teachers: dict[str, LocalTeacher], tokens: int
) -> str:
    """Return Markdown: medians of the parts in seconds, and of the step relative to the exact loss's in its round."""
    first = next(iter(seconds.values()))
    generation = statistics.median(one["generation"] for one in first)
    rows = [f"{tokens} generated tokens in {generation:.2f} s"]
    rows.append(
        "| teacher's tokenizer | tokens | estimator | scoring | loss | student and optimizer | step | relative |"
    )
    rows.append("|---|---:|---|---:|---:|---:|---:|---:|")
    for (name, estimator), parts in seconds.items():
        part = {key: statistics.median(one[key] for one in parts) for key in parts[0]}
        relative = [one["step"] / base["step"] for one, base in zip(parts, first, strict=True)]
        rows.append(
            f"| {name} | {teachers[name].vocabulary.size:,} | `{estimator}` | {part['scoring']:.2f} | "
            f"{part['loss']:.2f} | {part['student'] + part['optimizer']:.2f} | {part['step']:.2f} | "
            f"{statistics.median(relative):.2f} ({min(relative):.2f} to {max(relative):.2f}) |"
        )
    return "\n".join(rows)


def losses(options: argparse.Namespace, own: Any, tokenizers: dict[str, Any], clock: Callable[[], float]) -> None:
    """Measure the loss alone, and print Markdown."""
    ids = own(Path("README.md").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids = ids[: options.positions]
    student = TokenText(own, "the student")
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(ids), WIDTH, generator=draw).requires_grad_()
    weight = (torch.randn(len(own), WIDTH, generator=draw) / 24).requires_grad_()

    def gradients(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, [hidden, weight])

    same = HiddenSignal(torch.randn(len(ids), WIDTH, generator=draw), OutputHead(weight.detach().roll(1, 0)))
    group = [PanelGroup(None, (TeacherTerm(same),))]
    calls = {
        "smollm2, `exact`": lambda: gradients(
            fused_panel_divergence(hidden, OutputHead(weight), group, Divergence()).loss_sum
        )
    }
    for name, tokenizer in tokenizers.items():
        teacher = TokenText(tokenizer, name)
        found = align(ids, student, teacher, ended=False, teacher_end=tokenizer.eos_token_id)
        head = OutputHead(torch.randn(len(tokenizer), WIDTH, generator=draw) / 24)
        projection = Projection(student, teacher, (tokenizer.eos_token_id, own.eos_token_id))
        aligned = Aligned.of(found, range(len(ids)), projection)
        said = HiddenSignal(torch.randn(len(aligned.asked), WIDTH, generator=draw), head)
        signal = ChunkSignal(said, (aligned,))

        def over_bytes(signal: Any = signal, said: HiddenSignal = said) -> None:
            steps = signal.byte_steps(torch.tensor(ids))
            gradients(fused_byte_divergence(hidden, OutputHead(weight), said, steps, Divergence()).loss_sum)

        calls[f"{name} ({len(said)} positions), `byte_marginals`"] = over_bytes
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(options.rounds + 1):
        for name, call in calls.items():
            took, _ = timed(call, clock)
            if turn:
                seconds[name].append(took)
    base = statistics.median(seconds["smollm2, `exact`"])
    print(f"{len(ids)} positions\n| teacher and loss | s | relative |\n|---|---:|---:|")
    for name, all_of in seconds.items():
        print(f"| {name} | {statistics.median(all_of):.2f} | {statistics.median(all_of) / base:.2f} |")


if __name__ == "__main__":
    main()
