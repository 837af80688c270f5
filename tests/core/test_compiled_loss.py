"""The panel loss by compiled passes: when it is used, that it gives the same, and that it is compiled once."""

import logging
import math

import pytest
import torch
from torch._dynamo.utils import counters

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused, fused_panel_divergence
from kd_plugin.divergence.compiled import first_use
from kd_plugin.divergence.compiled import tiles as compiled
from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead
from tests.core.test_divergence_oracle import DIVERGENCES, assert_gradients, ids_of

passes = pytest.mark.parametrize("form", ["passes", "accelerator"], indirect=True)
N, V, H = 21, 2100, 6  # two whole blocks of tokens and a part of one


def leaves(dtype=torch.float64, vocab=V):
    torch.manual_seed(0)
    return torch.randn(N, H, dtype=dtype, requires_grad=True), torch.randn(vocab, H, dtype=dtype, requires_grad=True)


def terms(count, rows=N, dtype=torch.float64, vocab=V):
    torch.manual_seed(1)
    return tuple(
        TeacherTerm(
            HiddenSignal(torch.randn(rows, H, dtype=dtype), OutputHead(torch.randn(vocab, H, dtype=dtype))),
            torch.rand(rows, dtype=dtype),
        )
        for _ in range(count)
    )


def loss(groups, divergence=None, dtype=torch.float64, rows=None, vocab=V):
    """Loss, details and gradients."""
    hidden, weight = leaves(dtype, vocab)
    found = fused_panel_divergence(hidden, OutputHead(weight), groups, divergence or Divergence("jsd"), _rows=rows)
    details = [
        found.entropy,
        *(v for group in found.divergences for v in group),
        *(w for g in found.weights for w in g),
    ]
    return [found.loss_sum.detach(), *torch.autograd.grad(found.loss_sum, [hidden, weight]), *details]


def in_form(monkeypatch, said, *args, **kwargs):
    monkeypatch.setenv("KD_PLUGIN_COMPILE", said)
    return loss(*args, **kwargs)


@passes
@pytest.mark.parametrize("rows", [1, 4, 8, None])
@pytest.mark.parametrize("combining", [name for name, mode in MODES.items() if not mode.one_teacher])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_every_way_to_combine_equals_step_by_step(form, divergence, combining, rows, monkeypatch):
    """A last chunk of one row runs step by step; 21 rows by 4 and 8 have chunks of different lengths."""
    groups = [PanelGroup(None, terms(3), combining, 0.7)]
    plain, fused_ = (in_form(monkeypatch, said, groups, divergence, rows=rows) for said in "01")
    for a, b in zip(fused_, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@passes
def test_teachers_with_temperatures_and_divergences_of_their_own(form, monkeypatch):
    one, two, three, four = terms(4)
    mixed = (
        one,
        TeacherTerm(two.signal, two.weights, Divergence("forward_kl")),
        TeacherTerm(three.signal, three.weights, Divergence("skew_kl"), 2.0),
        TeacherTerm(four.signal, four.weights, Divergence("reverse_kl"), 2.0),
    )
    groups = [PanelGroup(None, mixed)]
    plain, fused_ = (in_form(monkeypatch, said, groups, rows=8) for said in "01")
    for a, b in zip(fused_, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@passes
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if not d.kind.covers_student(d)], ids=ids_of)
def test_a_teacher_without_mass_at_some_tokens(form, divergence):
    """log 0 is -inf: nothing is added there. The reverse KL is infinite, and left out."""
    hidden, weight = leaves()
    (term,) = terms(1)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[1500], bias[:1024] = -math.inf, -math.inf  # a token, and a whole block
    signal = HiddenSignal(term.signal.hidden, OutputHead(term.signal.head.weight, bias))
    groups = [PanelGroup(None, (TeacherTerm(signal),))]
    found = fused_panel_divergence(hidden, OutputHead(weight), groups, divergence)
    oracle = divergence_from_logits(hidden @ weight.T, signal.head.logits(signal.hidden), divergence).sum()
    assert_gradients(found.loss_sum, oracle, [hidden, weight])


@pytest.mark.parametrize("form", ["plain", "passes", "accelerator"], indirect=True)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
def test_large_logits(form, divergence, shift):
    """Logits of size 100, and a teacher's far from 0: the same in float64, and no overflow in float32."""
    hidden, weight = leaves()
    (term,) = terms(1)
    head = OutputHead(term.signal.head.weight * 30, torch.full((V,), shift, dtype=torch.float64))
    signal = HiddenSignal(term.signal.hidden, head)
    own = OutputHead(weight, logit_scale=30.0)
    groups = [PanelGroup(None, (TeacherTerm(signal),))]
    found = fused_panel_divergence(hidden, own, groups, divergence)
    oracle = divergence_from_logits(own.logits(hidden), head.logits(signal.hidden), divergence).sum()
    assert found.loss_sum.item() == pytest.approx(oracle.item(), rel=1e-9)
    got, expected = (torch.autograd.grad(value, [hidden, weight]) for value in (found.loss_sum, oracle))
    for a, b in zip(got, expected, strict=True):  # sums of up to 1e4, whose last digit is 2e-12
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    narrow = HiddenSignal(signal.hidden.float(), OutputHead(head.weight.float(), head.bias.float()))
    groups, leaf = [PanelGroup(None, (TeacherTerm(narrow),))], hidden.float().detach().requires_grad_()
    single = fused_panel_divergence(leaf, OutputHead(weight.float(), logit_scale=30.0), groups, divergence).loss_sum
    assert single.item() == pytest.approx(oracle.item(), rel=1e-3)
    if expected[0].norm() > 1e-3:  # else the models agree on one token, and what is left is rounding
        (grad,) = torch.autograd.grad(single, leaf)
        assert (grad - expected[0]).norm() < 5e-3 * expected[0].norm()


@passes
def test_empty_groups_and_positions_of_no_group(form, monkeypatch):
    nobody = PanelGroup(torch.empty(0, dtype=torch.int64), terms(1, rows=0))
    some = PanelGroup(torch.tensor([3, 20, 7]), terms(2, rows=3))
    one = PanelGroup(torch.tensor([11]), terms(1, rows=1))
    for groups in ([], [nobody], [nobody, some, one, PanelGroup(torch.tensor([1, 2]), ())]):
        plain, fused_ = (in_form(monkeypatch, said, groups) for said in "01")
        for a, b in zip(fused_, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@passes
@pytest.mark.parametrize("vocab", [V, 2101])
@pytest.mark.parametrize("kept", [4, 16, 64])
def test_gradient_tiles_that_are_kept(form, kept, vocab, monkeypatch):
    """Fewer and larger products, over chunks of several groups, give the same; a product of the head's is rare."""
    products = []
    real = fused.StudentGradient._add_weight
    monkeypatch.setattr(
        fused.StudentGradient, "_add_weight", lambda self, *args: (products.append(1), real(self, *args))[1]
    )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    groups = [PanelGroup(order[:13], terms(2, 13, vocab=vocab)), PanelGroup(order[13:], terms(1, 8, vocab=vocab))]
    settings = {"rows": 3, "vocab": vocab}
    plain = in_form(monkeypatch, "0", groups, **settings)
    at_once = len(products)
    monkeypatch.setattr(fused, "kept_rows", lambda rows, device, **_: kept)
    products.clear()
    fused_ = in_form(monkeypatch, "1", groups, **settings)
    for a, b in zip(fused_, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert at_once == 8 and len(products) == {4: 8, 16: 4, 64: 1}[kept]


def test_on_a_cpu_the_short_chunks_of_several_groups_are_one_product(monkeypatch):
    products = []
    real = fused.StudentGradient._add_weight
    monkeypatch.setattr(
        fused.StudentGradient, "_add_weight", lambda self, *args: (products.append(1), real(self, *args))[1]
    )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    groups = [PanelGroup(order[i::3], terms(1, 7)) for i in range(3)]
    together = in_form(monkeypatch, "0", groups)
    assert len(products) == 1
    monkeypatch.setattr(fused, "kept_rows", lambda rows, device, **_: 0)
    apart = in_form(monkeypatch, "0", groups)
    assert len(products) == 1 + 3
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_the_variable_says(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for said, on_cpu, on_cuda in (("", False, True), ("0", False, False), ("1", True, True)):
        monkeypatch.setenv("KD_PLUGIN_COMPILE", said)
        assert (compiled.wanted(cpu), compiled.wanted(cuda)) == (on_cpu, on_cuda)
    monkeypatch.setenv("KD_PLUGIN_COMPILE", "yes")
    with pytest.raises(ConfigError, match="KD_PLUGIN_COMPILE is 'yes'; expected 1 to compile the loss, 0"):
        compiled.wanted(cpu)


def broken(function, number):
    raise RuntimeError("Failed to find a C++ compiler\nand more")


def wrong(function, number):
    def off(*tensors, **static):
        found = function(*tensors, **static)
        return found if function.__name__ != "compared" else (found[0] + 0.5, found[1] + 0.5)

    return off


@pytest.mark.parametrize(("compiler", "why"), [(broken, "Failed to find a C"), (wrong, "it differs by")])
def test_a_compiler_that_fails_is_told_once_and_left_out(compiler, why, monkeypatch, caplog):
    monkeypatch.delenv("KD_PLUGIN_COMPILE", raising=False)
    monkeypatch.setattr(first_use, "_found", first_use._Found({}))
    monkeypatch.setattr(compiled, "_ready", {})
    monkeypatch.setattr(compiled, "_compiled", compiler)
    monkeypatch.setattr(compiled, "any_rows", lambda tensor: None)
    groups, divergence = [PanelGroup(None, terms(1))], Divergence("reverse_kl")
    plain = loss(groups, divergence)
    monkeypatch.setattr(first_use, "wanted", lambda device: True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for a, b in zip(loss(groups, divergence), plain, strict=True):
                assert torch.equal(a, b)
        loss([PanelGroup(None, terms(2))], divergence)
    assert len(caplog.records) == 1 and why in caplog.text and "KD_PLUGIN_COMPILE=0" in caplog.text
    monkeypatch.setattr(first_use, "_found", first_use._Found({}))
    monkeypatch.setenv("KD_PLUGIN_COMPILE", "1")
    with pytest.raises(ConfigError, match=f"{why}.*KD_PLUGIN_COMPILE=1 asks for it"):
        loss(groups, divergence)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compiled"], indirect=True)
def test_it_compiles_once_for_all_lengths_of_chunks(form, monkeypatch):
    """No graph breaks: `fullgraph` refuses them. Other lengths, and another caller's compilation, compile nothing."""
    monkeypatch.setattr(compiled, "_ready", {})
    groups, divergence = [PanelGroup(None, terms(2, dtype=torch.float32))], Divergence("reverse_kl")
    counters.clear()
    plain, fused_ = (in_form(monkeypatch, said, groups, divergence, torch.float32, rows=8) for said in "01")
    for a, b in zip(fused_, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    graphs, functions = counters["stats"]["unique_graphs"], len(compiled._ready)
    assert graphs == functions == 4  # statistics, a teacher added to the sum, the last one alone, the gradient
    for rows in (2, 5, 7, 13, None):
        in_form(monkeypatch, "1", groups, divergence, torch.float32, rows=rows)
    assert counters["stats"]["unique_graphs"] == graphs and len(compiled._ready) == functions
    assert not counters["graph_break"]
    step = torch.compile(lambda h: fused_panel_divergence(h.tanh(), head, groups, divergence).loss_sum, backend="eager")
    hidden, weight = leaves(torch.float32)
    head = OutputHead(weight)
    assert step(hidden).item() == pytest.approx(
        fused_panel_divergence(hidden.tanh(), head, groups, divergence).loss_sum.item(), rel=1e-5
    )
    assert len(compiled._ready) == functions
