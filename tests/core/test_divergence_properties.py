"""What must hold for any distributions: signs, zeros, symmetry, limits, linearity; and the sampled estimator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence, fused_sparse_divergence
from kd_plugin.divergence.reference import divergence_from_logits, from_logprobs
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal

seeds = st.integers(0, 10_000)
divergences = st.one_of(
    st.sampled_from([Divergence("forward_kl"), Divergence("reverse_kl")]),
    st.floats(0.01, 0.99).map(lambda beta: Divergence("jsd", beta=beta)),
    st.floats(0.0, 0.99).map(lambda alpha: Divergence("skew_kl", alpha=alpha)),
)


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def fused(seed: int, divergence: Divergence, scale: float, weights=None, same: bool = False):
    hidden, weight = draw(seed, 5, 6), draw(seed + 1, 17, 6, scale=scale)
    signal = HiddenSignal(
        hidden if same else draw(seed + 2, 5, 6), OutputHead(weight if same else draw(seed + 3, 17, 6))
    )
    return fused_panel_divergence(
        hidden, OutputHead(weight), [PanelGroup(None, (TeacherTerm(signal, weights),))], divergence
    )


@settings(max_examples=60, deadline=None)
@given(seeds, divergences, st.floats(0.1, 20.0))
def test_never_negative(seed, divergence, scale):
    assert (fused(seed, divergence, scale).divergences[0][0] >= -1e-12).all()


@settings(max_examples=60, deadline=None)
@given(seeds, divergences, st.floats(0.1, 20.0))
def test_equal_distributions_give_zero(seed, divergence, scale):
    value = fused(seed, divergence, scale, same=True).divergences[0][0]
    assert value.abs().max() < 1e-14 if divergence.name in ("jsd", "skew_kl") else (value == 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_of_a_model_to_itself_is_exactly_zero(name, dtype):
    hidden, weight = draw(0, 9, 8).to(dtype).requires_grad_(), draw(1, 100, 8, scale=3.0).to(dtype).requires_grad_()
    signal = HiddenSignal(hidden.detach(), OutputHead(weight.detach()))
    groups = [PanelGroup(None, (TeacherTerm(signal),))]
    loss = fused_panel_divergence(hidden, OutputHead(weight), groups, Divergence(name))
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == 0.0
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@settings(max_examples=40, deadline=None)
@given(seeds, divergences, st.floats(-3.0, 3.0))
def test_linear_in_weights(seed, divergence, factor):
    weights = draw(seed + 9, 5)
    one, scaled = fused(seed, divergence, 1.0, weights), fused(seed, divergence, 1.0, weights * factor)
    torch.testing.assert_close(scaled.loss_sum, one.loss_sum * factor, atol=1e-12, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_jsd_is_symmetric_at_one_half_and_bounded(seed):
    p, q = (torch.log_softmax(draw(seed + i, 4, 11, scale=3.0), -1) for i in (0, 1))
    half = Divergence("jsd", beta=0.5)
    torch.testing.assert_close(from_logprobs(p, q, half), from_logprobs(q, p, half))
    assert (from_logprobs(p, q, half) <= math.log(2) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_jsd_tends_to_the_kls(seed):
    """JSD/β → KL(p ‖ q) as β → 0, JSD/(1−β) → KL(q ‖ p) as β → 1."""
    p, q = draw(seed, 4, 11), draw(seed + 1, 4, 11)
    near = 1e-7
    low = divergence_from_logits(q, p, Divergence("jsd", beta=near)) / near
    high = divergence_from_logits(q, p, Divergence("jsd", beta=1 - near)) / near
    torch.testing.assert_close(low, divergence_from_logits(q, p, Divergence("forward_kl")), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(high, divergence_from_logits(q, p, Divergence("reverse_kl")), rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 10))
def test_bucket_never_exceeds_the_dense_divergence(seed, listed):
    """Merging outcomes loses information (data processing inequality), so the bucket is a lower bound."""
    hidden, weight = draw(seed, 4, 6), draw(seed + 1, 11, 6)
    logp = torch.log_softmax(draw(seed + 2, 4, 11), -1)
    values, ids = logp.topk(listed)
    target = SparseSignal(ids, values, logp.scatter(1, ids, -math.inf).logsumexp(-1))
    for name in ("forward_kl", "reverse_kl", "jsd"):
        kd = fused_sparse_divergence(hidden, OutputHead(weight), target, Divergence(name)).kd
        dense = divergence_from_logits(hidden @ weight.T, logp, Divergence(name))
        assert (kd <= dense + 1e-12).all() and (kd >= -1e-12).all()


def test_targets_shifted_by_one_position_change_the_loss():
    hidden, weight = draw(0, 12, 6), draw(1, 11, 6, scale=2.0)
    logp = torch.log_softmax(hidden @ weight.T, -1)  # the student's own distribution: aligned, the loss is zero
    ids = torch.arange(11).expand(12, 11)
    nothing = torch.full((12,), -math.inf, dtype=torch.float64)
    losses = [
        fused_sparse_divergence(hidden, OutputHead(weight), SparseSignal(ids, rows, nothing), Divergence("forward_kl"))
        for rows in (logp, logp.roll(1, 0))
    ]
    assert losses[0].loss_sum.abs() < 1e-12 and losses[1].loss_sum > 1.0


def test_student_tail_mass_keeps_its_digits_when_tiny():
    """Unlisted mass of e^-60 is invisible in 1 - Σ q in float32; its logarithm must still be right."""
    weight = torch.tensor([[0.0], [-60.0], [-61.0]])
    target = SparseSignal(torch.tensor([[0]]), torch.tensor([[math.log(0.9)]]), torch.tensor([math.log(0.1)]))
    got = fused_sparse_divergence(torch.ones(1, 1), OutputHead(weight), target, Divergence("forward_kl"))
    rest = -60.0 + math.log1p(math.exp(-1.0))
    assert got.kd.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - rest), rel=1e-6)


def test_sampled_targets_are_unbiased():
    """The mean gradient over many draws approaches that of the forward KL, within its own standard error."""
    count, vocab = 4000, 12
    hidden, weight = draw(0, 1, 6), draw(1, vocab, 6)
    logp = torch.log_softmax(draw(2, 1, vocab, scale=1.5), -1)
    exact_leaf = weight.clone().requires_grad_()
    divergence_from_logits(hidden @ exact_leaf.T, logp, Divergence("forward_kl")).sum().backward()
    drawn = torch.multinomial(
        logp.exp().expand(count, -1), 5, replacement=True, generator=torch.Generator().manual_seed(3)
    )
    counts = torch.zeros(count, vocab, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )
    target = SparseSignal(
        torch.arange(vocab).expand(count, vocab),
        torch.where(counts > 0, logp, -math.inf),
        torch.zeros(count, dtype=torch.float64),
        counts,
    )
    leaf = weight.clone().requires_grad_()
    loss = fused_sparse_divergence(
        hidden.expand(count, -1).contiguous(), OutputHead(leaf), target, Divergence("forward_kl")
    )
    (loss.loss_sum / count).backward()
    # a count has variance n·p·(1−p), so a row's mean gradient has error of about |h|·sqrt(p(1−p) / (5·count))
    error = hidden.norm() * (logp.exp() * (1 - logp.exp()) / (5 * count)).sqrt()[0]
    assert ((leaf.grad - exact_leaf.grad).norm(dim=1) < 4 * error).all()
    assert loss.kd.mean().item() == pytest.approx(
        divergence_from_logits(hidden @ weight.T, logp, Divergence("forward_kl")).item(), rel=0.1
    )
