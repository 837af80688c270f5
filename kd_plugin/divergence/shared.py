"""Teachers that share one output head, projected together.

The gradient of Σ wᵢ·KL(q ‖ pᵢ) in the student's logits is q·(a − ⟨q, a⟩) with a = Σ wᵢ·(log q − log pᵢ), and what is
constant over the vocabulary drops out of it. Each log pᵢ is zᵢ less such a constant, its log-normaliser. So only
Σ wᵢ·zᵢ matters, and where all zᵢ come from one head without a soft-cap this is a single projection, of the weighted
mean of the hidden states. As a distribution it is the normalised geometric mean g of the pᵢ, and
Σ wᵢ·KL(q ‖ pᵢ) = W·KL(q ‖ g) + a part that does not depend on the student and is never negative.

Shape suffixes: n positions of a group, H hidden width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kd_plugin.divergence.groups import PanelGroup, TeacherTerm
from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.spec import Divergence
from kd_plugin.signals import HiddenSignal, OutputHead


def merged_by_head(group: PanelGroup, divergence: Divergence) -> PanelGroup:
    """Replace the teachers of ``group`` that share a head by one with the same gradient.

    Args:
        group: a group of a loss whose values nobody reads.
        divergence: of the terms that have none of their own.

    Returns:
        The group itself where nothing can be merged: another combining or divergence, a soft-cap, heads or
        temperatures that differ.
    """
    if not MODES[group.combining].merges:
        return group
    alike: dict[object, list[TeacherTerm]] = {}
    for term in group.terms:
        mergeable = (term.divergence or divergence).name == "reverse_kl" and term.signal.head.softcap is None
        key = (head_identity(term.signal.head), term.temperature) if mergeable else id(term)
        alike.setdefault(key, []).append(term)
    if len(alike) == len(group.terms):
        return group
    return replace(group, terms=tuple(_merged(terms) for terms in alike.values()))


def _merged(terms: list[TeacherTerm]) -> TeacherTerm:
    if len(terms) == 1:
        return terms[0]
    dtype = torch.promote_types(terms[0].signal.hidden.dtype, torch.float32)
    total_nH = torch.zeros_like(terms[0].signal.hidden, dtype=dtype)
    total_n = torch.zeros(len(terms[0].signal), dtype=dtype, device=total_nH.device)
    for term in terms:
        if term.weights is None:
            total_nH += term.signal.hidden
            total_n += 1.0
        else:
            weight_n1 = term.weights.to(dtype).unsqueeze(-1)
            total_nH += torch.where(weight_n1 != 0, term.signal.hidden * weight_n1, 0.0)
            total_n += term.weights
    mean_nH = total_nH / torch.where(total_n == 0, 1.0, total_n).unsqueeze(-1)
    hidden_nH = mean_nH.to(terms[0].signal.hidden.dtype)
    return replace(terms[0], signal=HiddenSignal(hidden_nH, terms[0].signal.head), weights=total_n)


def head_identity(head: OutputHead) -> tuple[object, ...]:
    """Return what two heads must have in common to be one: the same tensors, read the same way."""
    return id(head.weight), id(head.bias), head.vocab_size, head.logit_scale, head.softcap
