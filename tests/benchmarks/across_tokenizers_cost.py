"""What the loss over bytes costs at the size of a real vocabulary, beside the exact loss of the same tokenizer.

    python -m tests.benchmarks.across_tokenizers_cost --smollm2 DIR [--tokenizers DIR --teachers llama-bpe qwen2]

The text is this repository's README, as a response in SmolLM2's tokens; hidden states are random, of width 576, as
SmolLM2-135M's. Seconds are medians of the loss with its gradient in hidden states and head, interleaved; finding where
tokens lie is part of it. The teacher of bytes has as many positions as the text has bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.across.byte_marginals import fused_byte_divergence
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.views.align import align
from kd_plugin.views.aligned import Aligned
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.views.projection import Projection
from kd_plugin.views.tokens import TokenText
from tests.tiny import byte_tokenizer

WIDTH = 576


def timed(call: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="directory of SmolLM2's tokenizer")
    parser.add_argument("--tokenizers", type=Path, help="directory of python -m tests.tokenizers")
    parser.add_argument("--teachers", nargs="*", default=[])
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    own = AutoTokenizer.from_pretrained(options.smollm2)
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
    tokenizers = {"bytes": byte_tokenizer()}
    tokenizers |= {name: AutoTokenizer.from_pretrained(options.tokenizers / name) for name in options.teachers}
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
            took, _ = timed(call)
            if turn:
                seconds[name].append(took)
    base = statistics.median(seconds["smollm2, `exact`"])
    print(f"{len(ids)} positions\n| teacher and loss | s | relative |\n|---|---:|---:|")
    for name, all_of in seconds.items():
        print(f"| {name} | {statistics.median(all_of):.2f} | {statistics.median(all_of) / base:.2f} |")


if __name__ == "__main__":
    main()
