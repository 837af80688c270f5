"""The fused and the sparse form against autograd through the formulas on full logits in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence, fused_sparse_divergence
from kd_plugin.divergence.reference import divergence_from_logits, from_logprobs
from kd_plugin.divergence.spec import KINDS, Kind
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal

N, V, ROWS, H, H_TEACHER = 13, 50, 54, 8, 12
DIVERGENCES = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", beta=0.3),
    Divergence("skew_kl", alpha=0.2),
    Divergence("skew_kl", alpha=0.0),
]
assert {divergence.name for divergence in DIVERGENCES} == set(KINDS), "a divergence that no test compares"
HEADS = [
    dict(bias=bias, softcap=softcap, logit_scale=scale, vocab_size=vocab)
    for bias, softcap, scale, vocab in itertools.product((False, True), (None, 5.0), (1.0, 0.3), (V, None))
]
FORMS = ["plain", "passes", "accelerator", pytest.param("compiled", marks=pytest.mark.slow)]
in_all_forms = pytest.mark.parametrize("form", FORMS, indirect=True)
ids_of = lambda value: value.name if isinstance(value, Divergence) else "-".join(map(str, value.values()))  # noqa: E731


def student(bias: bool, seed: int = 0, vocab_size: int | None = V, **head) -> tuple[list[Tensor], OutputHead]:
    """Leaves that need a gradient, and the head over them; ROWS rows of which ``vocab_size`` are tokens."""
    torch.manual_seed(seed)
    rows = ROWS if vocab_size else V
    shapes = [(N, H), (rows, H), (rows,)]
    hidden, weight, offset = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)
    leaves = [hidden, weight, offset] if bias else [hidden, weight]
    return leaves, OutputHead(weight, offset if bias else None, vocab_size, **head)


def teacher(seed: int, count: int = N, width: int = H_TEACHER) -> HiddenSignal:
    torch.manual_seed(seed)
    weight = torch.randn(V + 1, width, dtype=torch.float64)
    head = OutputHead(weight, torch.randn(V + 1, dtype=torch.float64), V, logit_scale=0.6, softcap=9.0)
    return HiddenSignal(torch.randn(count, width, dtype=torch.float64), head)


def assert_gradients(loss: Tensor, oracle: Tensor, leaves: list[Tensor], rtol: float = 1e-9) -> None:
    """Same value and gradients, after a factor that backward must apply."""
    torch.testing.assert_close(loss, oracle, rtol=rtol, atol=1e-11)
    got, expected = torch.autograd.grad(loss * 1.7, leaves), torch.autograd.grad(oracle * 1.7, leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_a_formula_alone_is_a_divergence(divergence, monkeypatch):
    """The form that a new divergence starts with: its gradient is autograd's, through its formula."""
    leaves, own = student(bias=True)
    groups = [PanelGroup(None, (TeacherTerm(teacher(1), torch.rand(N).double()), TeacherTerm(teacher(2))))]
    written = fused_panel_divergence(leaves[0], own, groups, divergence).loss_sum
    expected = torch.autograd.grad(written, leaves)
    for method in ("compare", "direct"):
        monkeypatch.setattr(type(divergence.kind), method, getattr(Kind, method))
    found = fused_panel_divergence(leaves[0], own, groups, divergence).loss_sum
    torch.testing.assert_close(found, written, rtol=1e-9, atol=1e-11)
    for a, b in zip(torch.autograd.grad(found, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@in_all_forms
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head", HEADS, ids=ids_of)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_fused_panel_equals_oracle(form, divergence, head, temperature):
    leaves, own = student(**head)
    signals = [teacher(1), teacher(2, width=H)]
    weights = [torch.rand(N, dtype=torch.float64), torch.rand(N, dtype=torch.float64)]
    weights[0][3] = 0.0
    logits = own.logits(leaves[0])
    parts = [divergence_from_logits(logits, s.head.logits(s.hidden), divergence, temperature) for s in signals]
    oracle = sum((w * part).sum() for w, part in zip(weights, parts, strict=True))
    terms = tuple(TeacherTerm(s, w) for s, w in zip(signals, weights, strict=True))
    loss = fused_panel_divergence(leaves[0], own, [PanelGroup(None, terms)], divergence, temperature, _rows=5)
    assert_gradients(loss.loss_sum, oracle, leaves)
    for got, part, weight in zip(loss.divergences[0], parts, weights, strict=True):
        torch.testing.assert_close(got, torch.where(weight != 0, part, 0.0).detach())
    logq = torch.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(loss.entropy, -(logq.exp() * logq).sum(-1).detach())
    assert not loss.entropy.requires_grad and not loss.divergences[0][0].requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head", HEADS[::3], ids=ids_of)
@pytest.mark.parametrize("listed", [5, V])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_sparse_bucket_equals_oracle(divergence, listed, head, temperature):
    leaves, own = student(**head)
    dense = torch.log_softmax(teacher(1).head.logits(teacher(1).hidden), -1)
    target = top_k(dense, listed)
    weights = torch.rand(N, dtype=torch.float64)
    labels = torch.randint(0, V, (N,))
    labels[2] = -100
    logits = own.logits(leaves[0])
    logq = torch.log_softmax(logits / temperature, -1)
    if listed == V:  # all is listed, so the dense divergence itself is the oracle
        expected = from_logprobs(logq, dense, divergence)
    else:
        expected = from_logprobs(coarse(logq, target.ids[:, :listed]), coarse_of(target, listed), divergence)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    oracle = 0.6 * (weights * expected).sum() + 0.7 * nll.sum()
    got = fused_sparse_divergence(
        leaves[0], own, target, divergence, temperature=temperature, weights=weights, labels=labels,
        kd_weight=0.6, ce_weight=0.7, _rows=5,
    )  # fmt: skip
    assert_gradients(got.loss_sum, oracle, leaves)
    torch.testing.assert_close(got.kd, expected.detach())
    torch.testing.assert_close(got.nll, nll.detach())
    torch.testing.assert_close(got.entropy, -(logq.exp() * logq).sum(-1).detach())
    assert torch.equal(got.is_top1, logits.argmax(-1) == labels)


@pytest.mark.parametrize("tail", ["keep", "renormalise"])
@pytest.mark.parametrize("labelled", [False, True])
def test_sparse_other_tails_equal_their_formula(tail, labelled):
    leaves, own = student(bias=True, softcap=5.0)
    target = top_k(torch.log_softmax(teacher(1).head.logits(teacher(1).hidden), -1), 5)
    logits = own.logits(leaves[0])
    logq = torch.log_softmax(logits, -1).gather(1, target.ids[:, :5])
    logp = target.logprobs[:, :5]
    if tail == "renormalise":
        logp = torch.log_softmax(logp, -1)
    oracle = (logp.exp() * (logp - logq)).sum()
    labels = torch.arange(N) if labelled else None
    if labelled:
        oracle = oracle + 0.5 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    got = fused_sparse_divergence(
        leaves[0], own, target, Divergence("forward_kl"), tail=tail, labels=labels, ce_weight=0.5, _rows=4
    )
    assert_gradients(got.loss_sum, oracle, leaves)
    assert (got.nll is None) is (got.is_top1 is None) is (not labelled)


def top_k(logp: Tensor, listed: int) -> SparseSignal:
    """Top tokens, with two entries of padding when not all are listed; padding ids are no token at all."""
    values, ids = logp.topk(listed, -1)
    if listed == logp.shape[1]:
        return SparseSignal(ids, values, torch.full((len(ids),), -math.inf, dtype=logp.dtype))
    padding = torch.full((len(ids), 2), -math.inf, dtype=logp.dtype)
    rest = logp.scatter(1, ids, -math.inf).logsumexp(-1)
    return SparseSignal(torch.cat([ids, torch.full((len(ids), 2), -1)], 1), torch.cat([values, padding], 1), rest)


def coarse(logq: Tensor, ids: Tensor) -> Tensor:
    """Listed log-probabilities, and the rest's as one more outcome."""
    rest = logq.masked_fill(torch.zeros_like(logq, dtype=torch.bool).scatter(1, ids, True), -math.inf)
    return torch.cat([logq.gather(1, ids), rest.logsumexp(-1, keepdim=True)], 1)


def coarse_of(target: SparseSignal, listed: int) -> Tensor:
    return torch.cat([target.logprobs[:, :listed], target.tail_logmass[:, None]], 1)


@in_all_forms
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_routed_groups_equal_one_loss_a_group(form, divergence):
    leaves, own = student(bias=True)
    first, second = torch.tensor([7, 0, 3, 12]), torch.tensor([1, 2, 10])
    groups = [
        PanelGroup(first, (TeacherTerm(teacher(1, 4)),)),
        PanelGroup(second, (TeacherTerm(teacher(2, 3)), TeacherTerm(teacher(3, 3), torch.rand(3).double()))),
    ]
    logits = own.logits(leaves[0])
    oracle = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for term in group.terms:
            logits_of = term.signal.head.logits(term.signal.hidden)
            part = divergence_from_logits(logits[group.positions], logits_of, divergence)
            oracle = oracle + (part if term.weights is None else part * term.weights).sum()
    loss = fused_panel_divergence(leaves[0], own, groups, divergence, _rows=2)
    assert_gradients(loss.loss_sum, oracle, leaves)
    outside = [i for i in range(N) if i not in {*first.tolist(), *second.tolist()}]
    assert torch.equal(loss.entropy[outside], torch.zeros(len(outside), dtype=torch.float64))
    assert (loss.entropy[first] > 0).all()


@pytest.mark.parametrize("form", ["fused", "sparse"])
def test_tied_weight_gets_both_gradients(form):
    """A tied weight also receives gradient through the embedding; autograd must add the two."""
    torch.manual_seed(0)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, V, (N,))
    hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight))
    signal = teacher(1)
    logits = hidden @ weight.T
    oracle = divergence_from_logits(logits, signal.head.logits(signal.hidden), Divergence("forward_kl")).sum()
    if form == "fused":
        groups = [PanelGroup(None, (TeacherTerm(signal),))]
        loss = fused_panel_divergence(hidden, OutputHead(weight), groups, Divergence("forward_kl"))
    else:
        target = top_k(torch.log_softmax(signal.head.logits(signal.hidden), -1), V)
        loss = fused_sparse_divergence(hidden, OutputHead(weight), target, Divergence("forward_kl"))
    expected = torch.autograd.grad(oracle, weight, retain_graph=True)[0]
    untied = hidden.detach() @ weight.T
    through_head = divergence_from_logits(untied, signal.head.logits(signal.hidden), Divergence("forward_kl")).sum()
    head_alone = torch.autograd.grad(through_head, weight)[0]
    got = torch.autograd.grad(loss.loss_sum, weight)[0]
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, head_alone)


def test_rows_beyond_the_vocabulary_get_zero_gradient():
    (hidden, weight, bias), own = student(bias=True)
    loss = fused_panel_divergence(hidden, own, [PanelGroup(None, (TeacherTerm(teacher(1)),))], Divergence())
    loss.loss_sum.backward()
    assert weight.grad.shape == (ROWS, H) and bias.grad.shape == (ROWS,)
    assert (weight.grad[V:] == 0).all() and (bias.grad[V:] == 0).all() and (weight.grad[:V] != 0).any()


@in_all_forms
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 100])
def test_chunk_size_does_not_matter(form, rows):
    (hidden, weight), own = student(bias=False)
    groups = [PanelGroup(None, (TeacherTerm(teacher(1)), TeacherTerm(teacher(2))))]
    whole = fused_panel_divergence(hidden, own, groups, Divergence("jsd"))
    cut = fused_panel_divergence(hidden, own, groups, Divergence("jsd"), _rows=rows)
    assert_gradients(cut.loss_sum, whole.loss_sum, [hidden, weight], rtol=1e-12)


@in_all_forms
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_near_the_oracle(form, divergence, autocast):
    """bf16 has 8 bits: logits of size 4 are off by up to 2^-7, so values and gradients by about a percent.

    The oracle sees the same bf16-rounded inputs, in float64; 3% of the norm leaves room for the rounding of logits
    and of the gradient tile, and none for a wrong term.
    """
    leaves, _ = student(bias=True, softcap=5.0)
    signals = [teacher(1), teacher(2)]
    low = [leaf.detach().bfloat16() for leaf in leaves]
    teachers = [s.hidden.bfloat16() for s in signals]
    heads = [OutputHead(s.head.weight.bfloat16(), None, V, 0.6, 9.0) for s in signals]
    exact = [leaf.double().requires_grad_() for leaf in low]
    logits = OutputHead(exact[1], exact[2], V, softcap=5.0).logits(exact[0])
    oracle = torch.zeros((), dtype=torch.float64)
    for hidden, head in zip(teachers, heads, strict=True):
        wide = OutputHead(head.weight.double(), None, V, 0.6, 9.0)
        oracle = oracle + divergence_from_logits(logits, wide.logits(hidden.double()), divergence).sum()
    inputs = [(leaf.float() if autocast else leaf).requires_grad_() for leaf in low]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = tuple(TeacherTerm(HiddenSignal(h, head)) for h, head in zip(teachers, heads, strict=True))
        head = OutputHead(inputs[1], inputs[2], V, softcap=5.0)
        loss = fused_panel_divergence(inputs[0], head, [PanelGroup(None, terms)], divergence, _rows=4)
    assert loss.loss_sum.dtype == torch.float32
    assert loss.loss_sum.item() == pytest.approx(oracle.item(), rel=0.03)
    got, expected = torch.autograd.grad(loss.loss_sum, inputs), torch.autograd.grad(oracle, exact)
    for a, b, leaf in zip(got, expected, inputs, strict=True):
        assert a.dtype == leaf.dtype
        assert (a.double() - b).norm() < 0.03 * b.norm()


def test_sparse_bfloat16_stays_near_the_oracle():
    """As above: 3% of the norm covers 8-bit logits and gradient tiles."""
    leaves, _ = student(bias=True)
    target = top_k(torch.log_softmax(teacher(1).head.logits(teacher(1).hidden), -1), 5)
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in low]
    divergence = Divergence("reverse_kl")
    got = fused_sparse_divergence(low[0], OutputHead(low[1], low[2], V), target, divergence)
    oracle = fused_sparse_divergence(exact[0], OutputHead(exact[1], exact[2], V), target, divergence)
    assert got.loss_sum.item() == pytest.approx(oracle.loss_sum.item(), rel=0.03)
    expected = torch.autograd.grad(oracle.loss_sum, exact)
    for a, b in zip(torch.autograd.grad(got.loss_sum, low), expected, strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() < 0.03 * b.norm()
