"""Graphs, empty batches, NaN, refusals, and what else a trainer relies on."""

import math

import pytest
import torch

from kd_plugin.divergence import (
    Divergence,
    PanelGroup,
    TeacherTerm,
    fused,
    fused_panel_divergence,
    fused_sparse_divergence,
    require_finite,
)
from kd_plugin.errors import ConfigError, NonFiniteError, VocabularyError
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal

N, V, H = 6, 20, 4


def leaves(count: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, H, requires_grad=True), torch.randn(V, H, requires_grad=True)


def teacher(count: int = N) -> HiddenSignal:
    torch.manual_seed(1)
    return HiddenSignal(torch.randn(count, 7), OutputHead(torch.randn(V, 7)))


def sparse(count: int = N, listed: int = 3, draws: torch.Tensor | None = None) -> SparseSignal:
    torch.manual_seed(2)
    logp = torch.log_softmax(torch.randn(count, V), -1)
    values, ids = logp.topk(listed)
    return SparseSignal(ids, values, torch.log1p(-values.exp().sum(-1)), draws)


def panel(hidden, weight, weights=None, divergence=Divergence(), **kwargs):  # noqa: B008
    groups = [PanelGroup(None, (TeacherTerm(teacher(len(hidden)), weights),))]
    return fused_panel_divergence(hidden, OutputHead(weight), groups, divergence, **kwargs)


def cached(hidden, weight, divergence=Divergence("forward_kl"), **kwargs):  # noqa: B008
    return fused_sparse_divergence(hidden, OutputHead(weight), sparse(len(hidden)), divergence, **kwargs)


def nothing_selected():
    hidden, weight = leaves(0)
    yield "panel without positions", hidden, weight, panel(hidden, weight)
    yield "cache without positions", hidden, weight, cached(hidden, weight)
    hidden, weight = leaves()
    yield "no groups", hidden, weight, fused_panel_divergence(hidden, OutputHead(weight), [], Divergence())
    yield "zero weights", hidden, weight, panel(hidden, weight, torch.zeros(N))
    yield "zero weights, cache", hidden, weight, cached(hidden, weight, weights=torch.zeros(N))
    empty = PanelGroup(torch.empty(0, dtype=torch.int64), (TeacherTerm(teacher(0)),))
    yield "an empty group", hidden, weight, fused_panel_divergence(hidden, OutputHead(weight), [empty], Divergence())


@pytest.mark.parametrize("case", nothing_selected(), ids=lambda case: case[0])
def test_nothing_selected_gives_zero_with_a_graph(case):
    _, hidden, weight, loss = case
    assert loss.loss_sum.item() == 0.0 and loss.loss_sum.requires_grad
    grads = torch.autograd.grad(loss.loss_sum, [hidden, weight])
    assert all(
        (grad == 0).all() and grad.shape == leaf.shape for grad, leaf in zip(grads, [hidden, weight], strict=True)
    )


@pytest.mark.parametrize("loss_of", [panel, cached])
def test_nan_in_a_used_position_raises(loss_of):
    hidden, weight = leaves()
    with torch.no_grad():
        hidden[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match="is not finite: 1 of 1 values"):
        loss_of(hidden, weight)


def test_require_finite_names_the_place():
    require_finite(torch.ones(3), "the loss")
    with pytest.raises(NonFiniteError, match="the loss at step 3 is not finite: 2 of 3 values, the first is inf"):
        require_finite(torch.tensor([1.0, math.inf, math.nan]), "the loss at step 3")


def test_unused_positions_cannot_inject_nan():
    hidden, weight = leaves()
    weights = torch.ones(N)
    weights[[1, 4]] = 0.0
    keep = weights != 0
    signal = teacher()
    with torch.no_grad():
        hidden[1], signal.hidden[4] = math.nan, math.inf
    term = TeacherTerm(signal, weights)
    loss = fused_panel_divergence(hidden, OutputHead(weight), [PanelGroup(None, (term,))], Divergence())
    alone = TeacherTerm(HiddenSignal(signal.hidden[keep], signal.head))
    few = fused_panel_divergence(hidden[keep], OutputHead(weight), [PanelGroup(None, (alone,))], Divergence())
    torch.testing.assert_close(loss.loss_sum, few.loss_sum)
    grad, few_grad = (torch.autograd.grad(part.loss_sum, weight)[0] for part in (loss, few))
    torch.testing.assert_close(grad, few_grad)
    assert (loss.entropy[~keep] == 0).all() and (loss.divergences[0][0][~keep] == 0).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_unused_targets_cannot_inject_nan(tail):
    hidden, weight = leaves()
    target = sparse()
    target.logprobs[1], target.tail_logmass[1] = -math.inf, math.nan
    weights = torch.ones(N)
    weights[1] = 0.0
    labels = torch.arange(N)
    loss = fused_sparse_divergence(
        hidden,
        OutputHead(weight),
        target,
        Divergence("forward_kl"),
        tail=tail,
        weights=weights,
        labels=labels,
        ce_weight=1.0,
    )
    assert loss.kd[1] == 0 and loss.nll[1] > 0  # its label still counts
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(loss.loss_sum, [hidden, weight]))
    with pytest.raises(NonFiniteError):
        fused_sparse_divergence(hidden, OutputHead(weight), target, Divergence("forward_kl"), tail=tail)


@pytest.mark.parametrize("loss_of", [panel, cached])
def test_only_needed_gradients_are_formed(loss_of, monkeypatch):
    """A LoRA student's head is frozen: no (V, H) sum may be made."""
    hidden, weight = leaves()
    frozen = weight.detach()
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(a) or zeros(*a, **k))
    loss_of(hidden, frozen).loss_sum.backward()
    assert not any(a and a[0] == frozen.shape for a in made)
    expected = torch.autograd.grad(loss_of(hidden, weight).loss_sum, hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert any(a and a[0] == weight.shape for a in made)  # the monitor does see the sum where one is needed


@pytest.mark.parametrize("loss_of", [panel, cached])
def test_no_grad_gives_the_same_value_without_a_graph(loss_of, monkeypatch):
    hidden, weight = leaves()
    expected = loss_of(hidden, weight)
    monkeypatch.setattr("kd_plugin.divergence.gradient.StudentGradient.add", None)  # calling it would fail
    with torch.no_grad():
        loss = loss_of(hidden, weight)
    assert not loss.loss_sum.requires_grad
    torch.testing.assert_close(loss.loss_sum, expected.loss_sum.detach())
    torch.testing.assert_close(loss.entropy, expected.entropy)


@pytest.mark.parametrize("loss_of", [panel, cached])
def test_second_backward_is_refused(loss_of):
    hidden, weight = leaves()
    loss = loss_of(hidden, weight).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="retain_graph"):
        loss.backward()


@pytest.mark.parametrize("loss_of", [panel, cached])
def test_double_backward_is_refused(loss_of):
    hidden, weight = leaves()
    (grad,) = torch.autograd.grad(loss_of(hidden, weight).loss_sum * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("loss_of", [panel, cached])
def test_compiled_function_agrees(loss_of):
    hidden, weight = leaves()
    step = lambda h, w: loss_of(torch.tanh(h), w).loss_sum * 2.0  # noqa: E731
    eager = torch.autograd.grad(step(hidden, weight), [hidden, weight])
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager")(hidden, weight), [hidden, weight])
    torch.testing.assert_close(compiled, eager)


def test_head_is_projected_once_whatever_the_number_of_teachers(monkeypatch):
    calls = []
    original = fused.Projector.__call__
    monkeypatch.setattr(
        fused.Projector, "__call__", lambda self, h: calls.append(self.weight_VH.shape[1]) or original(self, h)
    )
    hidden, weight = leaves()
    terms = tuple(TeacherTerm(teacher()) for _ in range(3))
    fused_panel_divergence(hidden, OutputHead(weight), [PanelGroup(None, terms)], Divergence())
    assert calls.count(H) == 1 and calls.count(7) == 3


def test_sampled_targets_take_the_forward_kl_only():
    hidden, weight = leaves()
    target = sparse(draws=torch.ones(N, 3))
    with pytest.raises(ConfigError, match="reverse_kl cannot be computed from sampled targets"):
        fused_sparse_divergence(hidden, OutputHead(weight), target, Divergence("reverse_kl"))
    with pytest.raises(ConfigError, match="have no tail"):
        fused_sparse_divergence(hidden, OutputHead(weight), target, Divergence("forward_kl"), tail="keep")


@pytest.mark.parametrize("tail", ["keep", "renormalise"])
def test_tails_without_the_rest_take_the_forward_kl_only(tail):
    with pytest.raises(ConfigError, match=r'defined for forward_kl only, got jsd.*Use tail="bucket"'):
        cached(*leaves(), divergence=Divergence("jsd"), tail=tail)


def test_refusals_say_what_was_seen():
    hidden, weight = leaves()
    with pytest.raises(ConfigError, match=r"shape \(2, 3, 4\); expected \(positions, width\)"):
        fused_panel_divergence(torch.ones(2, 3, 4), OutputHead(weight), [], Divergence())
    with pytest.raises(ConfigError, match=r"temperature is 0\.0"):
        panel(hidden, weight, temperature=0.0)
    with pytest.raises(ConfigError, match="The student's head has 20 rows and a teacher of the panel has 21"):
        other = HiddenSignal(torch.ones(N, 3), OutputHead(torch.ones(V + 1, 3)))
        fused_panel_divergence(hidden, OutputHead(weight), [PanelGroup(None, (TeacherTerm(other),))], Divergence())
    with pytest.raises(ConfigError, match=r"hidden states have shape \(5, 7\) for 6 positions"):
        fused_panel_divergence(hidden, OutputHead(weight), [PanelGroup(None, (TeacherTerm(teacher(5)),))], Divergence())
    with pytest.raises(ConfigError, match=r"weights have shape \(3,\); expected \(6,\)"):
        panel(hidden, weight, torch.ones(3))
    with pytest.raises(ConfigError, match="expected int64 row numbers"):
        mask = PanelGroup(torch.ones(N, dtype=torch.bool), (TeacherTerm(teacher()),))
        fused_panel_divergence(hidden, OutputHead(weight), [mask], Divergence())
    with pytest.raises(ConfigError, match=r"labels has shape \(2,\)"):
        cached(hidden, weight, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(VocabularyError, match="A label id is 20, but the student's vocabulary ends at 19"):
        cached(hidden, weight, labels=torch.full((N,), V))
    with pytest.raises(ConfigError, match="Unknown tail 'drop'"):
        cached(hidden, weight, tail="drop")


@pytest.mark.parametrize("loss_of", [panel, cached])
def test_autocast_rounds_products_but_not_sums(loss_of):
    hidden, weight = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(hidden, weight)
    values = loss.divergences[0][0] if loss_of is panel else loss.kd
    assert loss.loss_sum.dtype == torch.float32
    torch.testing.assert_close(loss.loss_sum.detach(), values.sum(), rtol=1e-6, atol=0.0)
    assert not torch.equal(loss.loss_sum, loss_of(hidden, weight).loss_sum)  # autocast did reach the products
