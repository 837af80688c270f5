"""What a low-precision teacher is captured with, and logits that are not finite."""

import math

import numpy as np
import pytest
import torch

from kd_plugin.cache.targets import Sampled, TopK, TopP
from kd_plugin.capturing.extract import candidates, extract, from_logits
from kd_plugin.capturing.generating import uniforms
from kd_plugin.divergence.listed import with_sampled_token
from kd_plugin.divergence.projection import exact_logits
from kd_plugin.errors import NonFiniteError
from kd_plugin.signals import OutputHead, SparseSignal
from kd_plugin.teachers.replies import read_entries

ALL_TARGETS = [TopK(4), TopK(1), TopP(0.9, 16), Sampled(5)]


def operands(dtype, n=200, size=4096, width=64, spread=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator)
    return hidden.to(dtype), (spread * torch.randn(size, width, generator=generator)).to(dtype)


def shaped(products, head):
    """The formula, in float64."""
    logits = (products + (0.0 if head.bias is None else head.bias.double())) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def numbers_of(targets, n):
    return uniforms(0, "rows", n, targets.draws) if isinstance(targets, Sampled) else None


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-3, 3, 4096)},
    "scale": {"logit_scale": 0.125},
    "softcap": {"softcap": 12.0},
    "all": {"bias": torch.linspace(-3, 3, 4096), "logit_scale": 2.0, "softcap": 30.0},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("targets", [TopK(8), TopK(64), TopP(0.9, 20), Sampled(50)], ids=str)
def test_what_is_kept_is_that_of_the_teachers_own_operands(name, dtype, targets):
    """Off by no more than the rounding to float16 in which it is stored, whatever the dtype of the product."""
    hidden, weight = operands(dtype)
    given = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in HEADS[name].items()}
    head = OutputHead(weight, **given)
    temperature = 1.3
    true = (shaped(hidden.double() @ weight.double().T, head) / temperature).log_softmax(-1)
    found = extract(hidden, head, targets, temperature=temperature, uniforms=numbers_of(targets, len(hidden)))
    rows = np.repeat(np.arange(len(hidden)), found.counts)
    expected = true[rows, found.ids.astype(np.int64)].numpy()
    assert np.abs(found.logprobs - expected).max() < 2.0**-11 * np.abs(expected).max() + 2e-3
    mass = np.bincount(rows, np.exp(expected), len(hidden))
    np.testing.assert_allclose(np.exp(found.tail_logmass), 1 - mass, atol=2e-3)
    if isinstance(targets, TopK):
        best = true.topk(targets.k).indices.numpy()
        assert (np.sort(found.ids.reshape(best.shape), 1) == np.sort(best, 1)).all()


@pytest.mark.parametrize(("spread", "shift"), [(0.02, 0.0), (2.0, 0.0), (0.02, 40.0), (0.0, 3.0)])
def test_flat_steep_and_shifted_logits(spread, shift):
    """Where rounding leaves too many in doubt, the whole row is projected again."""
    hidden, weight = operands(torch.bfloat16, n=40, spread=spread)
    hidden = torch.cat([hidden, torch.ones(40, 1).bfloat16()], 1)
    weight = torch.cat([weight, torch.full((4096, 1), shift).bfloat16()], 1)
    true = (hidden.double() @ weight.double().T).log_softmax(-1)
    found = extract(hidden, OutputHead(weight), TopK(16))
    logprobs = np.take_along_axis(true.numpy(), found.ids.reshape(40, 16).astype(np.int64), 1)
    best = true.topk(16).values.numpy()
    np.testing.assert_allclose(logprobs, best, atol=1e-5)
    np.testing.assert_allclose(found.logprobs.reshape(40, 16), best, atol=2.0**-11 * np.abs(best).max() + 2e-3)


def test_a_product_that_overflows_float16_is_none():
    hidden = torch.full((3, 8), 100.0).half()
    weight = torch.cat([torch.full((1, 8), 90.0), torch.full((1, 8), 89.9), torch.zeros(800, 8)]).half()
    true = (hidden.double() @ weight.double().T).log_softmax(-1)
    found = extract(hidden, OutputHead(weight), TopK(1))
    assert found.ids.tolist() == [0, 0, 0]
    np.testing.assert_allclose(found.logprobs, true[:, 0], atol=1e-3)


def test_draws_follow_the_likeliest_tokens_without_rounding():
    """Two tokens that bfloat16 cannot tell apart (20.03 and 20.0) are drawn as often as their logits say."""
    weight = torch.zeros(1000, 2)
    weight[0], weight[1] = torch.tensor([20.0, 0.03125]), torch.tensor([20.0, -0.03125])
    hidden = torch.ones(1, 2).bfloat16().repeat(400, 1)
    found = extract(hidden, OutputHead(weight.bfloat16()), Sampled(100), uniforms=uniforms(0, "x", 400, 100))
    first = found.draws[found.ids == 0].sum() / 40_000
    expected = 1 / (1 + math.exp(-0.0625))
    assert first == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_exact_logits_round_nothing(dtype):
    hidden, weight = operands(dtype, n=7, size=3100)
    head = OutputHead(weight, torch.linspace(-1, 1, 3100).to(dtype), vocab_size=3000, logit_scale=0.5, softcap=8.0)
    whole = head.real_rows()
    true = shaped(hidden.double() @ whole.weight.double().T, whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = exact_logits(head, hidden)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), true, atol=2e-5, rtol=0)


@pytest.mark.parametrize("targets", ALL_TARGETS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [3, 64, 259, 1000])
@pytest.mark.parametrize("where", ["all", "one"])
def test_logits_that_are_not_finite_are_one_clear_error(targets, value, size, where):
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    logits[1, 0 if where == "one" else slice(None)] = value
    if where == "one" and value == -math.inf:
        assert from_logits(logits, targets, uniforms=numbers_of(targets, 3)).counts.min() > 0  # one token masked
        return
    with pytest.raises(NonFiniteError, match="at 1 of 3 positions"):
        from_logits(logits, targets, uniforms=numbers_of(targets, 3))


@pytest.mark.parametrize("targets", ALL_TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_states_that_are_not_finite_are_one_clear_error(targets, dtype, value):
    hidden, weight = operands(dtype, n=5)
    hidden[2, 3] = value
    with pytest.raises(NonFiniteError, match="at 1 of 5 positions"):
        extract(hidden, OutputHead(weight), targets, uniforms=numbers_of(targets, 5))


def test_a_written_token_without_probability_where_all_are_listed():
    """``top_k="all"``: the server clamps -inf to -9999, and there is no rest that it could be part of."""
    half = math.log(0.5)
    entry = {"0": {"logprob": half}, "1": {"logprob": half}, "2": {"logprob": -9999.0}, "3": {"logprob": -9999.0}}
    listed = read_entries([entry], [2], 4, 4)
    assert listed.tail_logmass.tolist() == [-math.inf] and listed.next_logprobs.tolist() == [-math.inf]
    tensors = [torch.tensor(x) for x in (listed.ids, listed.logprobs, listed.tail_logmass)]
    found = with_sampled_token(SparseSignal(*tensors, None, torch.tensor(listed.next_logprobs)), torch.tensor([2]))
    assert not found.logprobs.isnan().any()
    assert found.logprobs.exp().sum() == pytest.approx(1.0) and found.tail_logmass.tolist() == [-math.inf]


@pytest.mark.parametrize("tail", [-math.inf, -50.0, math.log(0.25), 0.0])
@pytest.mark.parametrize("written", [-math.inf, -700.0, math.log(0.25), math.log(0.125), 0.0])
@pytest.mark.parametrize("token", [0, 3])
def test_a_written_token_of_any_probability_leaves_no_nan(tail, written, token):
    logprobs = torch.tensor([[math.log(0.5), math.log(0.25)]], dtype=torch.float64)
    signal = SparseSignal(
        torch.tensor([[0, 1]]),
        logprobs,
        torch.tensor([tail], dtype=torch.float64),
        None,
        torch.tensor([written], dtype=torch.float64),
    )
    found = with_sampled_token(signal, torch.tensor([token]))
    assert not found.logprobs.isnan().any() and not found.tail_logmass.isnan().any()
    assert found.tail_logmass <= tail


def test_more_candidates_than_tokens_that_are_wanted():
    assert all(candidates(k) > k for k in (1, 24, 64, 1000))
