"""Bias and spread of each estimator across tokenizers, against the KL over chunks, over all texts there are.

python -m tests.benchmarks.across_tokenizers_bias
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from kd_plugin.divergence import Divergence, fused_sparse_divergence
from kd_plugin.divergence.across.byte_marginals import fused_byte_divergence
from kd_plugin.divergence.across.sorted_tokens import SortedTokens
from kd_plugin.divergence.sampled import Matching, fused_sampled_divergence
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.views.covers import Side, Spans, Texts, byte_steps


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
                    loss = fused_sampled_divergence(
                        leaf, head, torch.tensor(text), said, chunks=[2] * pairs, matching=matching
                    ).loss_sum
                gradient = torch.zeros_like(expected).index_add_(
                    0, torch.tensor(places), *torch.autograd.grad(loss, leaf)
                )
                found[name].append((reached[text], gradient))
        for name, parts in found.items():
            numbers[name].append(compared(parts, expected))
    return shown(numbers)


def bias_of_pairs(seeds: int = 20, letters: int = 3) -> str:
    """The other way round: the student writes one pair of letters, and the teacher letters."""
    names = [bytes(pair) for pair in itertools.product(range(97, 97 + letters), repeat=2)]
    mine = SortedTokens(names, None)
    theirs = SortedTokens([bytes([97 + i]) for i in range(letters)], None)
    spans = Spans(np.array([1]), np.array([3]), np.ones(1, bool))  # behind the space before a text
    spans_t = Spans(np.arange(1, 3), np.arange(2, 4), np.ones(2, bool))
    numbers: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, len(names), generator=draw, dtype=torch.float64).requires_grad_()
        logp = torch.randn(1 + letters, letters, generator=draw, dtype=torch.float64).log_softmax(-1)
        pairs = (logp[0][:, None] + logp[1:]).flatten()
        logq = logits.log_softmax(-1)[0]
        (expected,) = torch.autograd.grad((logq.exp() * (logq - pairs)).sum(), logits, retain_graph=True)
        head, head_t = (OutputHead(torch.eye(n, dtype=torch.float64)) for n in (len(names), letters))
        for name in ("byte_marginals", "sampled", "chunk_likelihood, tau 1", "chunk_likelihood, tau 10"):
            parts = []
            for token, text in enumerate(names):
                leaf = logits.detach().requires_grad_()
                if name == "byte_marginals":
                    ids = [text[0] - 97, text[1] - 97]
                    sides = Side(mine, np.array([token]), spans), Side(theirs, np.array(ids), spans_t)
                    steps = byte_steps(Texts.of([text]), *sides)
                    said = HiddenSignal(logp[[0, 1 + ids[0]]], head_t)
                    loss = fused_byte_divergence(leaf, head, said, steps, Divergence()).loss_sum
                else:
                    tau = float(name.split()[-1]) if "tau" in name else None
                    matching = None if tau is None else Matching(Divergence(), tau)
                    loss = fused_sampled_divergence(
                        leaf, head, torch.tensor([token]), pairs[token : token + 1], matching=matching
                    ).loss_sum
                parts.append((logq[token].exp().detach(), torch.autograd.grad(loss, leaf)[0]))
            numbers[name].append(compared(parts, expected))
    return shown(numbers)


def compared(parts: list[tuple[Tensor, Tensor]], expected: Tensor) -> tuple[float, float, float]:
    """Return bias and spread of gradients by their probabilities, and the cosine of their mean."""
    mean = sum(q * g for q, g in parts)
    spread = sum(q * (g - mean).square().sum() for q, g in parts).sqrt() / expected.norm()
    cosine = (mean * expected).sum() / mean.norm() / expected.norm()
    return float((mean - expected).norm() / expected.norm()), float(spread), float(cosine)


def shown(numbers: dict[str, list[tuple[float, float, float]]]) -> str:
    """Return Markdown of the means."""
    lines = ["| estimator | bias / norm | std of one text / norm | cosine of the mean |", "|---|---|---|---|"]
    for name, rows in numbers.items():
        off, spread, cosine = (statistics.mean(column) for column in zip(*rows, strict=True))
        lines.append(f"| {name} | {off:.3f} | {spread:.2f} | {cosine:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(bias())
    print(bias_of_pairs())
