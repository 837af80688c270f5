"""Every way to combine teachers against an oracle from full logits in float64."""

import pytest
import torch

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.reference import divergence_from_logits, from_logprobs
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead
from tests.core.test_divergence_oracle import DIVERGENCES, H, N, V, assert_gradients, ids_of, student, teacher

SHARPNESS = 0.3


def weights_of(count):
    torch.manual_seed(9)
    weights = [torch.rand(N, dtype=torch.float64) for _ in range(count)]
    weights[0][3] = 0.0
    for weight in weights:
        weight[5] = 0.0  # a position that no teacher judges
    return weights


def terms_of(signals, weights, **own):
    return tuple(TeacherTerm(s, w, **own) for s, w in zip(signals, weights, strict=True))


def mixture_oracle(logits, signals, weights, divergence, temperatures, temperature):
    logp = [torch.log_softmax(s.head.logits(s.hidden) / t, -1) for s, t in zip(signals, temperatures, strict=True)]
    total = sum(weights)
    used = total != 0
    shares = [w[used] / total[used] for w in weights]
    mixed = sum(share[:, None] * p[used].exp() for share, p in zip(shares, logp, strict=True)).log()
    values = from_logprobs(torch.log_softmax(logits[used] / temperature, -1), mixed, divergence)
    return (total[used] * values).sum()


def confidence_oracle(logits, signals, weights, divergences, temperatures):
    scores, values = [], []
    for s, w, d, t in zip(signals, weights, divergences, temperatures, strict=True):
        logp = torch.log_softmax(s.head.logits(s.hidden) / t, -1)
        scores.append(w.log() + (logp.exp() * logp).sum(-1) / SHARPNESS)
        values.append(divergence_from_logits(logits, s.head.logits(s.hidden), d, t))
    used = sum(weights) != 0
    chosen = torch.stack(scores)[:, used].softmax(0) * sum(weights)[used]
    return (chosen * torch.stack(values)[:, used]).sum(), chosen


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("own_temperatures", [(None, None, None), (None, 0.5, 1.5)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_mixture(divergence, own_temperatures, temperature):
    leaves, own = student(bias=True, softcap=5.0)
    signals = [teacher(1), teacher(2, width=H), teacher(3)]
    weights = weights_of(3)
    logits = own.logits(leaves[0])
    at = [t or temperature for t in own_temperatures]
    oracle = mixture_oracle(logits, signals, weights, divergence, at, temperature)
    terms = tuple(TeacherTerm(s, w, temperature=t) for s, w, t in zip(signals, weights, own_temperatures, strict=True))
    group = PanelGroup(None, terms, "mixture")
    loss = fused_panel_divergence(leaves[0], own, [group], divergence, temperature, _rows=5)
    assert_gradients(loss.loss_sum, oracle, leaves)
    for signal, t, weight, value in zip(signals, at, weights, loss.divergences[0], strict=True):
        expected = from_logprobs(
            torch.log_softmax(logits / temperature, -1),
            torch.log_softmax(signal.head.logits(signal.hidden) / t, -1),
            divergence,
        )
        torch.testing.assert_close(value, torch.where(weight != 0, expected, 0.0).detach())
    quiet = fused_panel_divergence(leaves[0], own, [group], divergence, temperature, values=False, _rows=5)
    again = mixture_oracle(own.logits(leaves[0]), signals, weights, divergence, at, temperature)
    assert_gradients(quiet.loss_sum, again, leaves)
    assert quiet.divergences == ((),)


@pytest.mark.parametrize("own", [{}, {"temperature": 1.5}, {"divergence": Divergence("forward_kl")}], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_confidence(divergence, own):
    leaves, head = student(bias=True, softcap=5.0)
    signals = [teacher(1), teacher(2, width=H), teacher(3)]
    weights = weights_of(3)
    terms = (*terms_of(signals[:2], weights[:2]), *terms_of(signals[2:], weights[2:], **own))
    divergences = [divergence, divergence, own.get("divergence", divergence)]
    temperatures = [1.0, 1.0, own.get("temperature", 1.0)]
    oracle, chosen = confidence_oracle(head.logits(leaves[0]), signals, weights, divergences, temperatures)
    group = PanelGroup(None, terms, "confidence", SHARPNESS)
    loss = fused_panel_divergence(leaves[0], head, [group], divergence, _rows=5)
    assert_gradients(loss.loss_sum, oracle, leaves)
    used = sum(weights) != 0
    torch.testing.assert_close(torch.stack(loss.weights[0])[:, used], chosen)
    assert (torch.stack(loss.weights[0])[:, ~used] == 0).all()


def test_confidence_weights_survive_entropies_far_apart_and_a_tiny_temperature():
    """exp(-entropy / sharpness) alone underflows in float32 here; the weights must still sum to one."""
    torch.manual_seed(0)
    weight = torch.randn(V, H)
    hidden = torch.randn(N, H, requires_grad=True)
    flat, sharp = torch.zeros(N, H), 50 * torch.randn(N, H)
    for order in ((flat, sharp), (sharp, flat)):
        terms = tuple(TeacherTerm(HiddenSignal(h, OutputHead(weight))) for h in order)
        group = PanelGroup(None, terms, "confidence", 0.01)
        loss = fused_panel_divergence(hidden, OutputHead(weight), [group], Divergence())
        sure = loss.weights[0][0 if order[0] is sharp else 1]
        torch.testing.assert_close(sure, torch.full((N,), 2.0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teachers_with_their_own_divergence_and_temperature(temperature):
    leaves, own = student(bias=True, softcap=5.0)
    signals = [teacher(1), teacher(2, width=H), teacher(3), teacher(4), teacher(5)]
    weights = weights_of(5)
    choices = [
        (Divergence("forward_kl"), None),
        (None, None),
        (Divergence("jsd", beta=0.3), 0.7),
        (Divergence("forward_kl"), 0.7),
        (Divergence("skew_kl", alpha=0.2), 3.0),
    ]
    logits, default = own.logits(leaves[0]), Divergence("reverse_kl")
    parts = [
        divergence_from_logits(logits, s.head.logits(s.hidden), d or default, t or temperature)
        for s, (d, t) in zip(signals, choices, strict=True)
    ]
    oracle = sum((w * part).sum() for w, part in zip(weights, parts, strict=True))
    terms = tuple(TeacherTerm(s, w, d, t) for s, w, (d, t) in zip(signals, weights, choices, strict=True))
    loss = fused_panel_divergence(leaves[0], own, [PanelGroup(None, terms)], default, temperature, _rows=5)
    assert_gradients(loss.loss_sum, oracle, leaves)
    for value, part, weight in zip(loss.divergences[0], parts, weights, strict=True):
        torch.testing.assert_close(value, torch.where(weight != 0, part, 0.0).detach())


@pytest.mark.parametrize("combining", MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_all_weight_on_one_teacher_is_that_teacher(divergence, combining):
    leaves, own = student(bias=False)
    signals = [teacher(1), teacher(2)]
    weights = [torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)]
    alone = fused_panel_divergence(leaves[0], own, [PanelGroup(None, (TeacherTerm(signals[0]),))], divergence)
    group = PanelGroup(None, terms_of(signals, weights), combining)
    loss = fused_panel_divergence(leaves[0], own, [group], divergence)
    assert_gradients(loss.loss_sum, alone.loss_sum, leaves)


class TestOneHead:
    """Teachers that share a head are projected together where nobody reads the values."""

    def signals(self, **head):
        torch.manual_seed(4)
        shared = OutputHead(torch.randn(V + 2, H, dtype=torch.float64), torch.randn(V + 2).double(), V, **head)
        return [HiddenSignal(torch.randn(N, H, dtype=torch.float64), shared) for _ in range(4)]

    def both(self, signals, divergence=None):
        leaves, own = student(bias=True)
        group = PanelGroup(None, terms_of(signals, weights_of(len(signals))))
        call = (leaves[0], own, [group], divergence or Divergence("reverse_kl"), 1.3)
        return leaves, fused_panel_divergence(*call), fused_panel_divergence(*call, values=False)

    def test_same_gradient_from_one_projection(self):
        leaves, exact, quiet = self.both(self.signals(logit_scale=0.7))
        expected = torch.autograd.grad(exact.loss_sum, leaves)
        for mine, theirs in zip(torch.autograd.grad(quiet.loss_sum, leaves), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert 0 <= quiet.loss_sum < exact.loss_sum

    @pytest.mark.parametrize("case", ["softcap", "other divergence", "other head"])
    def test_nothing_is_merged_where_the_constants_do_not_cancel(self, case):
        signals = self.signals(softcap=5.0 if case == "softcap" else None)
        if case == "other head":
            signals = [HiddenSignal(s.hidden, OutputHead(torch.randn(V, H).double())) for s in signals]
        _, exact, quiet = self.both(signals, Divergence("jsd") if case == "other divergence" else None)
        torch.testing.assert_close(quiet.loss_sum, exact.loss_sum)


def test_a_mixture_has_one_divergence():
    leaves, own = student(bias=False)
    group = PanelGroup(None, (TeacherTerm(teacher(1), divergence=Divergence("jsd")),), "mixture")
    with pytest.raises(ConfigError, match="one distribution of all teachers, which has one divergence"):
        fused_panel_divergence(leaves[0], own, [group], Divergence())


@pytest.mark.parametrize("change", [{"sharpness": 0.0}, {"temperature": -1.0}])
def test_numbers_that_cannot_divide(change):
    leaves, own = student(bias=False)
    term = TeacherTerm(teacher(1), temperature=change.get("temperature"))
    group = PanelGroup(None, (term,), "confidence", change.get("sharpness", 1.0))
    with pytest.raises(ConfigError, match="positive"):
        fused_panel_divergence(leaves[0], own, [group], Divergence())
