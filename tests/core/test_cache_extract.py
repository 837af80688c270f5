"""The hot loop against plain formulas."""

import numpy as np
import pytest
import torch

from kd_plugin.cache.targets import Sampled, TopK, TopP
from kd_plugin.capturing.engines import batches
from kd_plugin.capturing.extract import extract, top_k
from kd_plugin.capturing.generating import uniforms
from kd_plugin.signals import OutputHead


@pytest.mark.parametrize("size", [50, 259, 1000, 8192, 8200, 49_152])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_the_narrowed_top_k_is_the_top_k(size, k):
    logits = torch.randn(9, size, generator=torch.Generator().manual_seed(size))
    values, ids = top_k(logits, k)
    expected = logits.topk(k)
    assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)


def test_top_k_where_the_largest_are_neighbours():
    logits = torch.zeros(1, 49_152)
    logits[0, 6_000:6_070] = torch.arange(70.0) + 1
    values, ids = top_k(logits, 64)
    assert ids[0].tolist() == list(range(6_069, 6_005, -1)) and values[0, 0] == 70


@pytest.mark.parametrize("targets", [TopK(3), TopP(0.9, 30), TopP(0.999, 4), Sampled(20)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scale_bias_softcap_and_temperature_come_before_the_softmax(targets, softcap):
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(
        torch.randn(40, 8, generator=generator),
        torch.randn(40, generator=generator),
        33,
        logit_scale=1.7,
        softcap=softcap,
    )
    hidden = torch.randn(6, 8, generator=generator)
    logits = (hidden.double() @ head.weight[:33].double().T + head.bias[:33].double()) * 1.7
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    live = (logits / 1.3).log_softmax(-1)
    found = extract(hidden, head, targets, temperature=1.3, uniforms=np.random.default_rng(0).random((6, 20)))
    rows = np.repeat(np.arange(6), found.counts)
    expected = live[rows, found.ids.astype(np.int64)].numpy()
    assert np.abs(found.logprobs - expected).max() < 2.0**-11 * np.abs(expected).max() + 1e-5
    mass = np.bincount(rows, np.exp(expected), 6)
    np.testing.assert_allclose(np.exp(found.tail_logmass), 1 - mass, rtol=1e-4, atol=1e-6)


def test_top_p_lists_the_fewest_tokens_that_reach_the_mass():
    logits = 3.0 * torch.randn(30, 500, generator=torch.Generator().manual_seed(1))
    found = extract(torch.eye(30), OutputHead(logits.T.contiguous()), TopP(0.9, 20))
    for row, (count, mass) in enumerate(zip(found.counts, 1 - np.exp(found.tail_logmass), strict=True)):
        p = logits[row].double().softmax(-1).sort(descending=True).values
        assert count == min(20, int((p.cumsum(0) < 0.9).sum()) + 1)
        assert mass == pytest.approx(float(p[:count].sum()), abs=1e-5)
    assert len(set(found.counts.tolist())) > 3


def test_a_tail_of_almost_nothing_is_exact():
    """One minus the listed mass would be rounding noise here."""
    logits = torch.full((1, 200), -20.0)
    logits[0, 17] = 10.0
    found = extract(torch.ones(1, 1), OutputHead(logits.T.contiguous()), TopK(1))
    assert found.tail_logmass[0] == pytest.approx(-30 + np.log(199), rel=1e-5)


@pytest.mark.parametrize("size", [10, 64, 259, 5000])
def test_draws_follow_the_distribution(size):
    """Chi-square over many draws at one position, with tokens of equal expectation pooled."""
    generator = torch.Generator().manual_seed(size)
    logits = 2.0 * torch.randn(1, size, generator=generator)
    draws = 30_000
    u = uniforms(0, "example", 1, draws)
    found = extract(torch.ones(1, 1), OutputHead(logits.T.contiguous()), Sampled(draws), uniforms=u)
    assert found.draws.astype(int).sum() == draws
    counts = np.zeros(size)
    counts[found.ids] = found.draws
    p = logits[0].double().softmax(-1).numpy()
    order = np.argsort(p)
    bins = np.searchsorted(np.cumsum(p[order]), np.linspace(0, 1, 21)[1:-1])
    groups = np.split(order, np.unique(bins))
    expected = np.array([p[g].sum() * draws for g in groups])
    seen = np.array([counts[g].sum() for g in groups])
    degrees = len(groups) - 1
    chi = ((seen - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi < degrees + 5 * np.sqrt(2 * degrees) + 5


def test_draws_are_unbiased_position_by_position():
    """The mean of counts/draws over many examples is the distribution, its tail included."""
    logits = torch.linspace(0, -8, 100)[None]
    head = OutputHead(logits.T.contiguous())
    rows, draws = 4_000, 20
    u = np.concatenate([uniforms(3, f"e{i}", 1, draws) for i in range(rows)])
    found = extract(torch.ones(rows, 1), head, Sampled(draws), uniforms=u)
    mean = np.bincount(found.ids, found.draws, 100) / (rows * draws)
    p = logits[0].double().softmax(-1).numpy()
    sigma = np.sqrt(p * (1 - p) / (rows * draws))
    assert (np.abs(mean - p) < 5 * sigma + 1e-9).all()


def test_no_token_of_probability_zero_is_drawn():
    logits = torch.full((1, 130), -torch.inf)
    logits[0, [5, 64, 129]] = torch.tensor([0.0, 1.0, 2.0])
    edge = np.array([[0.0, 1.0 - 2.0**-53, 0.5, 0.09003057, 0.33475912]])
    found = extract(torch.ones(1, 1), _head_of(logits), Sampled(5), uniforms=edge)
    assert set(found.ids.tolist()) <= {5, 64, 129}


def _head_of(logits: torch.Tensor) -> OutputHead:
    # -inf as a weight: 1 * -inf
    return OutputHead(logits.T.contiguous())


def test_uniforms_depend_on_seed_and_example_alone_and_are_stable():
    first = uniforms(0, "abc", 4, 3)
    assert np.array_equal(first, uniforms(0, "abc", 4, 3))
    assert np.array_equal(first[:2], uniforms(0, "abc", 2, 3))
    assert not np.array_equal(first, uniforms(1, "abc", 4, 3))
    assert not np.array_equal(first, uniforms(0, "abd", 4, 3))
    # Recorded once: another value on another machine or version would change every sampled cache
    np.testing.assert_array_equal(first[0], RECORDED)


RECORDED = np.array([0.2010589871945735, 0.014338086786135129, 0.17684952325707914])


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 100, 7, 30, 30, 1, 64]
    made = batches(lengths, 64)
    assert sorted(i for batch in made for i in batch) == list(range(7))
    assert all(len(b) * max(lengths[i] for i in b) <= 64 or len(b) == 1 for b in made)
    assert batches([], 64) == []
