"""Every loss in bfloat16 and float16 against the same loss in float64 on the CPU, over the same rounded inputs.

The float64 form is the one that ``tests/core/test_divergence_oracle.py`` holds to the formulas. 3% of a norm is what
eight bits leave; float16 has eleven.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence, fused_sparse_divergence
from kd_plugin.divergence.sampled import Matching, fused_sampled_divergence
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from tests.gpu.report import Place, Table, form

LIMIT = {torch.bfloat16: 0.03, torch.float16: 0.01}
DIVERGENCES = (Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("jsd"), Divergence("skew_kl"))
HEADS = {"plain": {}, "soft-capped, scaled": {"softcap": 20.0, "logit_scale": 0.7}}


@dataclass(frozen=True)
class Inputs:
    """Tensors of one problem, rounded to the dtype that is tested."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teachers: tuple[tuple[Tensor, Tensor], ...]
    weights: Tensor
    tokens: Tensor
    listed: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype, n: int, vocab: int, width: int) -> Inputs:
        torch.manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape) * scale).to(dtype)

        teachers = tuple((normal(n, width + 8), normal(vocab, width + 8, scale=2 * width**-0.5)) for _ in range(3))
        return cls(
            normal(n, width), normal(vocab, width, scale=2 * width**-0.5), normal(vocab), teachers, torch.rand(n),
            torch.randint(0, vocab, (n,)), torch.rand(n, vocab).topk(8).indices,
        )  # fmt: skip

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        teachers = tuple((moved(hidden), moved(weight)) for hidden, weight in self.teachers)
        rest = (self.hidden, self.weight, self.bias, self.weights, self.tokens, self.listed)
        hidden, weight, bias, weights, tokens, listed = map(moved, rest)
        return Inputs(hidden, weight, bias, teachers, weights, tokens, listed)


Loss = Callable[[Inputs, OutputHead, Tensor], Tensor]


def panel(divergence: Divergence, teachers: int, combining: str, routed: bool = False) -> Loss:
    """Return the panel's loss of some teachers."""

    def loss(inputs: Inputs, head: OutputHead, hidden: Tensor) -> Tensor:
        n = len(hidden)
        if routed:
            parts = torch.arange(n, device=hidden.device).chunk(3)
            groups = [
                PanelGroup(at, (TeacherTerm(HiddenSignal(h[at], OutputHead(w))),))
                for at, (h, w) in zip(parts, inputs.teachers, strict=True)
            ]
        else:
            terms = tuple(
                TeacherTerm(HiddenSignal(h, OutputHead(w)), inputs.weights) for h, w in inputs.teachers[:teachers]
            )
            groups = [PanelGroup(None, terms, combining)]
        return fused_panel_divergence(hidden, head, groups, divergence).loss_sum

    return loss


def cached(inputs: Inputs, head: OutputHead, hidden: Tensor) -> Tensor:
    """The loss of cached targets, with labels."""
    logprobs = torch.linspace(-1.5, -4.0, 8, dtype=inputs.weights.dtype, device=hidden.device).expand(len(hidden), 8)
    target = SparseSignal(inputs.listed, logprobs, torch.log1p(-logprobs.exp().sum(-1)))
    divergence = Divergence("forward_kl")
    return fused_sparse_divergence(hidden, head, target, divergence, labels=inputs.tokens, ce_weight=0.5).loss_sum


def drawn(inputs: Inputs, head: OutputHead, hidden: Tensor) -> Tensor:
    """The loss of cached draws: the listed tokens were drawn so often."""
    counts = torch.arange(1, 9, device=hidden.device).expand(len(hidden), 8)
    logprobs = (counts.to(inputs.weights.dtype) / 36).log()
    target = SparseSignal(inputs.listed, logprobs, torch.full_like(inputs.weights, -math.inf), counts)
    return fused_sparse_divergence(hidden, head, target, Divergence("forward_kl"), weights=inputs.weights).loss_sum


def sampled(inputs: Inputs, head: OutputHead, hidden: Tensor) -> Tensor:
    """The loss of the sampled token."""
    teacher = torch.full_like(inputs.weights, math.log(1e-3))
    return fused_sampled_divergence(hidden, head, inputs.tokens, teacher, weights=inputs.weights).loss_sum


def chunked(matching: Matching | None) -> Loss:
    """Return the loss of chunks of sampled tokens, of a teacher that cuts text in other places."""

    def loss(inputs: Inputs, head: OutputHead, hidden: Tensor) -> Tensor:
        teacher = torch.full_like(inputs.weights, -3.0)
        sizes = [3] * (len(hidden) // 3) + [1] * (len(hidden) % 3)
        return fused_sampled_divergence(hidden, head, inputs.tokens, teacher, chunks=sizes, matching=matching).loss_sum

    return loss


def losses() -> dict[str, Loss]:
    """All losses by name."""
    found: dict[str, Loss] = {}
    for divergence in DIVERGENCES:
        for teachers, combining in ((1, "weighted_kl"), (3, "weighted_kl"), (3, "mixture"), (3, "confidence")):
            found[f"{divergence.name}, {combining}, {teachers}"] = panel(divergence, teachers, combining)
        found[f"{divergence.name}, routed, 3"] = panel(divergence, 1, "weighted_kl", routed=True)
    others = {"cached targets and labels": cached, "cached draws": drawn, "sampled token": sampled}
    others["chunks of sampled tokens"] = chunked(None)
    others["likelihoods of chunks"] = chunked(Matching(Divergence("reverse_kl"), tau=5.0))
    return {**found, **others}


def computed(loss: Loss, inputs: Inputs, head_settings: dict[str, float]) -> list[Tensor]:
    """Loss, and gradients of hidden states, head and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.bias)]
    value = loss(inputs, OutputHead(leaves[1], leaves[2], **head_settings), leaves[0])
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def run(place: Place) -> Table:
    """Compare each loss in each dtype; the head has an odd number of tokens."""
    table = Table(
        "Correctness: difference from float64, of the norm", ("loss", "head", "dtype", "loss off", "gradients off")
    )
    n, vocab, width = place.pick((301, 4099, 256), (13, 1031, 16))  # type: ignore[misc]
    for dtype, limit in LIMIT.items():
        inputs = Inputs.draw(dtype, n, vocab, width)
        for head, settings in HEADS.items():
            for name, loss in losses().items():
                with form(compiled=False):
                    expected = computed(loss, inputs.to("cpu", torch.float64), settings)
                with form(compiled=place.is_gpu):
                    got = [t.cpu().double() for t in computed(loss, inputs.to(place.device, dtype), settings)]
                value, *gradients = [
                    float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)
                ]  # fmt: skip
                table.rows.append((name, head, str(dtype)[6:], f"{value:.1e}", f"{max(gradients):.1e}"))
                if not max(value, *gradients) <= limit:
                    table.failed.append(f"{name} in {dtype} with a {head} head is off by more than {limit}.")
    return table
