"""Bias, variance and gradient cosine of each estimator against the exact divergence, on a real student's rollouts.

    python -m tests.benchmarks.estimators --model DIR           # about fifteen minutes on 2 cores
    python -m tests.benchmarks.estimators --model DIR --quick   # few tokens, two draws: checks that it runs

DIR is SmolLM2-135M-Instruct, such as ``kd-plugin demo`` leaves in its models directory. The teacher is that model; the
student is the same with one of its 30 layers left out, so that both write sensible English and differ. The student
writes answers to the demo's general prompts, drawn from its whole distribution. Gradients are those of all its
parameters, in float32, of the mean loss of a batch.

For ``sampled`` the contexts are held fixed and the next tokens drawn anew, many times: the scatter of those gradients
is the estimator's variance at this batch size, and the distance of their mean from the exact gradient its bias, which
the finite number of draws blurs by scatter / sqrt(draws). The others depend on no draw but the written token.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd_plugin.demo.prompts import GENERAL, questions
from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence, fused_sparse_divergence
from kd_plugin.divergence.listed import listed_from, logprobs_of, student_signal, top_tokens
from kd_plugin.divergence.sampled import fused_sampled_divergence
from kd_plugin.signals import HiddenSignal, OutputHead

LEFT_OUT = 15  # the layer of the teacher that the student lacks
CHUNK = 1 << 22


@dataclass
class Batch:
    """Rollouts, and what the teacher says of them; N scored positions."""

    input_ids: Tensor
    mask: Tensor
    positions: Tensor
    written: Tensor
    teacher: HiddenSignal


class Bench:
    """A student, a batch of its rollouts, and the gradient of any loss on it."""

    def __init__(self, ref: str, rows: int, new_tokens: int) -> None:
        torch.manual_seed(0)
        self.tokenizer = AutoTokenizer.from_pretrained(ref, padding_side="left")
        teacher = AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float32).eval()
        self.student = AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float32).eval()
        layers = [layer for i, layer in enumerate(self.student.model.layers) if i != LEFT_OUT]
        self.student.model.layers = torch.nn.ModuleList(layers)
        for position, layer in enumerate(layers):
            layer.self_attn.layer_idx = position
        self.student.config.num_hidden_layers = len(layers)
        self.batch = self._write(teacher, rows, new_tokens)

    @torch.no_grad()
    def _write(self, teacher: torch.nn.Module, rows: int, new_tokens: int) -> Batch:
        chats = [question.prompt for question in questions("train", GENERAL, rows)]
        prompt = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        ids = self.student.generate(
            **prompt, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new_tokens
        )
        start = prompt["input_ids"].shape[1]
        ended = (ids[:, start:] == self.tokenizer.eos_token_id).cumsum(1)
        used = (ended == 0) | ((ids[:, start:] == self.tokenizer.eos_token_id) & (ended == 1))
        mask = torch.cat([prompt["attention_mask"], used.long()], 1)
        columns = torch.arange(ids.numel()).reshape(ids.shape)[:, start - 1 : -1]
        hidden = teacher.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        positions = columns[used]
        signal = HiddenSignal(
            hidden.reshape(-1, hidden.shape[-1])[positions], OutputHead.from_model(teacher, len(self.tokenizer))
        )
        return Batch(ids, mask, positions, ids[:, start:][used], signal)

    def gradient(self, loss_of: Callable[[Tensor, OutputHead], Tensor]) -> tuple[float, Tensor]:
        """Return the mean loss of the batch and its gradient in all parameters, flat."""
        self.student.zero_grad(set_to_none=True)
        hidden = self.student.base_model(
            input_ids=self.batch.input_ids, attention_mask=self.batch.mask
        ).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1])[self.batch.positions]
        head = OutputHead.from_model(self.student, len(self.tokenizer))
        loss = loss_of(chosen, head) / len(chosen)
        loss.backward()
        return float(loss.detach()), torch.cat(
            [p.grad.flatten() for p in self.student.parameters() if p.grad is not None]
        )

    def exact(self, name: str) -> Callable[[Tensor, OutputHead], Tensor]:
        group = [PanelGroup(None, (TeacherTerm(self.batch.teacher),))]
        return lambda hidden, head: fused_panel_divergence(hidden, head, group, Divergence(name)).loss_sum

    def topk_tail(self, name: str, k: int, student_k: int) -> Callable[[Tensor, OutputHead], Tensor]:
        def loss(hidden: Tensor, head: OutputHead) -> Tensor:
            further = self.batch.written.unsqueeze(-1)
            if student_k:
                further = torch.cat([top_tokens(student_signal(hidden, head), student_k), further], -1)
            target = listed_from(self.batch.teacher, k, further, 1.0)
            return fused_sparse_divergence(hidden, head, target, Divergence(name)).loss_sum

        return loss

    def sampled(self, differentiated: bool = False) -> Callable[[Tensor, OutputHead], Tensor]:
        """Draw a token at every position from the student; ``differentiated`` is what nobody should use."""

        def loss(hidden: Tensor, head: OutputHead) -> Tensor:
            with torch.no_grad():
                parts = [head.logits(part).softmax(-1).multinomial(1)[:, 0] for part in hidden.split(64)]
            tokens = torch.cat(parts)
            if differentiated:  # d/dθ (log q - log p) = ∇ log q: as if every advantage were 1
                reference = logprobs_of(student_signal(hidden, head), tokens, 1.0) - 1.0
            else:
                reference = logprobs_of(self.batch.teacher, tokens, 1.0)
            return fused_sampled_divergence(hidden, head, tokens, reference).loss_sum

        return loss


@dataclass
class Row:
    """One line of the table; see :func:`measure`."""

    label: str
    value: float
    bias: float
    noise: float
    scatter: float
    cosine: float


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product, summed in float64: a float32 sum over all parameters is off by percents."""
    pairs = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)


def measure(bench: Bench, label: str, exact: tuple[float, Tensor], loss: Callable, draws: int) -> Row:
    """Compare one estimator with the exact gradient g.

    Returns:
        Its mean value in nats; |mean gradient - g| / |g| and what of that the number of draws explains; the scatter
        of one gradient around the mean, relative to |g|; and the mean cosine of one gradient with g.
    """
    g = exact[1]
    size, mean, squares, cosines, value = math.sqrt(dot(g, g)), torch.zeros_like(g), 0.0, 0.0, 0.0
    for _ in range(draws):
        found, gradient = bench.gradient(loss)
        square = dot(gradient, gradient)
        value += found / draws
        cosines += dot(gradient, g) / (math.sqrt(square) * size) / draws
        squares += square / draws
        mean.add_(gradient, alpha=1.0 / draws)
    bias = math.sqrt(sum(dot(a - b, a - b) for a, b in zip(mean.split(CHUNK), g.split(CHUNK), strict=True))) / size
    scatter = math.sqrt(max(squares - dot(mean, mean), 0.0) * draws / (draws - 1)) / size if draws > 1 else 0.0
    return Row(label, value, bias, scatter / math.sqrt(draws), scatter, cosines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.tokens, options.draws = 2, 4, 2
    started = time.perf_counter()
    bench = Bench(options.model, options.rows, options.tokens)
    print(f"{len(bench.batch.positions)} positions of {options.rows} rollouts; {options.draws} draws of `sampled`.\n")
    print("| divergence | estimator | value (nats) | bias / norm | of it from few draws | scatter / norm | cosine |")
    print("|---|---|---|---|---|---|---|")
    for name in ("reverse_kl", "forward_kl"):
        exact = bench.gradient(bench.exact(name))
        print(f"| `{name}` | `exact` | {exact[0]:.4f} | 0 | | 0 | 1 |", flush=True)
        plans: list[tuple[str, Callable, int]] = []
        if name == "reverse_kl":
            plans += [
                ("`sampled`", bench.sampled(), options.draws),
                ("log-ratio differentiated (not offered)", bench.sampled(differentiated=True), options.draws // 4 or 1),
            ]
        for k in (8, 64, 512):
            plans += [
                (f"`topk_tail`, {k} and the written token", bench.topk_tail(name, k, 0), 1),
                (f"`topk_tail`, {k} of each side", bench.topk_tail(name, k, k), 1),
            ]
        for label, loss, draws in plans:
            row = measure(bench, label, exact, loss, draws)
            noise = f"{row.noise:.3f}" if draws > 1 else ""
            print(
                f"| `{name}` | {label} | {row.value:.4f} | {row.bias:.3f} | {noise} | {row.scatter:.3f} | "
                f"{row.cosine:.4f} |",
                flush=True,
            )
    print(f"\nTook {time.perf_counter() - started:.0f} s.", file=sys.stderr)


if __name__ == "__main__":
    main()
