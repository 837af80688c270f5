"""Vocabularies that share a part: every form of the loss against the formulas over shared tokens and the rest."""

import math

import pytest
import torch
from torch import Tensor

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence, fused_sparse_divergence
from kd_plugin.divergence.listed import listed_from, logprobs_of, with_sampled_token
from kd_plugin.divergence.reference import divergence_from_logits, from_logprobs, outcome_logprobs
from kd_plugin.divergence.sampled import fused_sampled_divergence
from kd_plugin.errors import ConfigError, VocabularyError
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.vocab import SharedTokens, Vocabulary
from tests.core.test_divergence_oracle import DIVERGENCES, assert_gradients, ids_of

N, H = 11, 6
PREFIX = SharedTokens(((0, 17),), 20, 23)  # both have tokens of their own, at the end
HOLES = SharedTokens(((0, 3), (5, 9), (12, 16)), 18, 21)
SUPERSET = SharedTokens(((0, 19),), 19, 22)  # the teacher has all of the student's tokens
SUBSET = SharedTokens(((0, 16),), 20, 16)  # and the student more than the teacher
SHARED = {"prefix": PREFIX, "holes": HOLES, "superset": SUPERSET, "subset": SUBSET}


def sides(shared: SharedTokens, seed: int = 0, softcap: float | None = 7.0):
    """A student's leaves and head, and a teacher's signal, each over its own vocabulary."""
    torch.manual_seed(seed)
    hidden, weight = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((N, H), (shared.student_size, H))
    )
    head = OutputHead(weight, None, shared.student_size, softcap=softcap, logit_scale=0.8)
    theirs = OutputHead(
        torch.randn(shared.teacher_size + 2, H + 3, dtype=torch.float64),
        torch.randn(shared.teacher_size + 2, dtype=torch.float64),
        shared.teacher_size,
    )
    return [hidden, weight], head, HiddenSignal(torch.randn(N, H + 3, dtype=torch.float64), theirs, shared)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
@pytest.mark.parametrize("form", ["plain", "passes", "accelerator"], indirect=True)
def test_fused_equals_the_oracle_over_shared_tokens_and_the_rest(form, divergence, temperature, name):
    shared = SHARED[name]
    leaves, head, signal = sides(shared)
    weights = torch.rand(N, dtype=torch.float64)
    weights[2] = 0.0
    found = fused_panel_divergence(
        leaves[0], head, [PanelGroup(None, (TeacherTerm(signal, weights),))], divergence, temperature, _rows=4
    )
    oracle = divergence_from_logits(
        head.logits(leaves[0]), signal.head.logits(signal.hidden), divergence, temperature, shared
    )
    assert bool(torch.isfinite(oracle).all())
    assert_gradients(found.loss_sum, weights @ oracle, leaves)
    torch.testing.assert_close(found.divergences[0][0], oracle.where(weights != 0, 0.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["superset", "prefix", "holes"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_without_mass_beyond_it_is_the_plain_loss(divergence, name):
    """A teacher of more tokens, none of which it gives a probability, and a student whose own have none."""
    shared = SHARED[name]
    leaves, _, signal = sides(shared, softcap=None)
    common = shared.ids()
    bias = torch.randn(shared.student_size, dtype=torch.float64)
    bias[shared.rest(shared.student_size)] = -1e6
    theirs = signal.head.bias.clone()
    theirs[shared.rest(shared.teacher_size + 2)] = -1e6
    own = OutputHead(leaves[1], bias, shared.student_size, logit_scale=0.8)
    signal = HiddenSignal(signal.hidden, OutputHead(signal.head.weight, theirs, shared.teacher_size), shared)
    found = fused_panel_divergence(leaves[0], own, [PanelGroup(None, (TeacherTerm(signal),))], divergence)
    plain_head = OutputHead(leaves[1][common], bias[common], len(common), logit_scale=0.8)
    plain_teacher = HiddenSignal(signal.hidden, OutputHead(signal.head.weight[common], theirs[common]))
    plain = fused_panel_divergence(leaves[0], plain_head, [PanelGroup(None, (TeacherTerm(plain_teacher),))], divergence)
    assert_gradients(found.loss_sum, plain.loss_sum, leaves)


@pytest.mark.parametrize(
    ("divergence", "estimator"),
    [(d, e) for d in DIVERGENCES for e in ("fused", "mixture", "listed")] + [(Divergence("reverse_kl"), "sampled")],
    ids=str,
)
def test_what_the_teacher_cannot_say_is_not_free(divergence, estimator):
    """A student with tokens that its teacher has not gives them up, by whatever it is compared."""
    if estimator == "sampled" and divergence.name != "reverse_kl":
        pytest.skip("the sampled token estimates the reverse KL alone")
    shared = SUBSET
    rest = shared.rest(shared.student_size)
    torch.manual_seed(3)
    logits = torch.randn(N, shared.student_size, dtype=torch.float64)
    logits[:, rest] += 2.0
    logits.requires_grad_()
    eye = OutputHead(torch.eye(shared.student_size, dtype=torch.float64))
    theirs = OutputHead(torch.randn(shared.teacher_size, H, dtype=torch.float64))
    signal = HiddenSignal(torch.randn(N, H, dtype=torch.float64), theirs, shared)
    before = logits.detach().softmax(-1)[:, rest].sum(-1)
    assert float(before.min()) > 0.1
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(150):
        if estimator == "sampled":
            loss = torch.zeros((), dtype=torch.float64)
            for token in range(shared.student_size):  # its mean over what the student may write
                tokens = torch.full((N,), token)
                share = logits.detach().softmax(-1)[:, token]
                said = logprobs_of(signal, tokens, 1.0)
                loss = loss + fused_sampled_divergence(logits, eye, tokens, said, weights=share, shared=shared).loss_sum
        elif estimator == "listed":
            listed = listed_from(signal, shared.teacher_size, torch.zeros(N, 0, dtype=torch.int64), 1.0)
            loss = fused_sparse_divergence(logits, eye, listed, divergence).loss_sum
        else:
            terms = (TeacherTerm(signal),) * (2 if estimator == "mixture" else 1)
            group = PanelGroup(None, terms, "mixture" if estimator == "mixture" else "weighted_kl")
            loss = fused_panel_divergence(logits, eye, [group], divergence).loss_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = logits.detach().softmax(-1)[:, rest].sum(-1)
    assert float((after / before).max()) < 0.1


@pytest.mark.parametrize("combining", ["weighted_kl", "mixture", "confidence"])
def test_teachers_of_several_vocabularies_are_combined(combining):
    """Beside one of the student's own tokens; a mixture is compared over what all of them share."""
    leaves, head, first = sides(PREFIX)
    torch.manual_seed(5)
    plain = HiddenSignal(torch.randn(N, H, dtype=torch.float64), OutputHead(torch.randn(20, H, dtype=torch.float64)))
    other = SharedTokens(((0, 9), (10, 20)), 20, 20)
    second = HiddenSignal(plain.hidden + 1.0, OutputHead(torch.randn(20, H, dtype=torch.float64)), other)
    signals = [first, plain, second]
    if combining == "mixture":
        whole = SharedTokens(((0, 20),), 20, 20)
        all_of = [s.shared or whole for s in signals]
        signals = [HiddenSignal(s.hidden, s.head, one.within(all_of)) for s, one in zip(signals, all_of, strict=True)]
        assert signals[1].shared.runs == ((0, 9), (10, 17))
    weights = [torch.rand(N, dtype=torch.float64) + 0.1 for _ in signals]
    divergence = Divergence("jsd", beta=0.4)
    terms = tuple(TeacherTerm(s, w) for s, w in zip(signals, weights, strict=True))
    found = fused_panel_divergence(leaves[0], head, [PanelGroup(None, terms, combining)], divergence, _rows=5)
    student = head.logits(leaves[0])
    theirs = [s.head.logits(s.hidden) for s in signals]
    if combining == "mixture":
        folded = [outcome_logprobs(z.log_softmax(-1), s.shared, 0.0) for z, s in zip(theirs, signals, strict=True)]
        total = torch.stack(weights).sum(0)
        shares = [(w / total).log().unsqueeze(-1) for w in weights]
        mixed = torch.stack([p + share for p, share in zip(folded, shares, strict=True)]).logsumexp(0)
        oracle = total @ from_logprobs(
            outcome_logprobs(student.log_softmax(-1), signals[0].shared, 0.0), mixed, divergence
        )
    else:
        if combining == "confidence":
            logps = [
                z.log_softmax(-1) if s.shared is None else outcome_logprobs(z.log_softmax(-1), s.shared, 0.0)
                for z, s in zip(theirs, signals, strict=True)
            ]
            entropies = [torch.special.entr(p.exp()).sum(-1) for p in logps]
            scores = torch.stack([w.log() - e for w, e in zip(weights, entropies, strict=True)]).softmax(0)
            weights = list(scores * torch.stack(weights).sum(0))
        oracle = sum(
            w @ divergence_from_logits(student, z, divergence, shared=s.shared)
            for w, z, s in zip(weights, theirs, signals, strict=True)
        )
    assert_gradients(found.loss_sum, oracle, leaves)


def test_a_mixture_over_different_outcomes_is_refused():
    leaves, head, first = sides(PREFIX)
    other = HiddenSignal(first.hidden, first.head, SharedTokens(((0, 16),), 20, 23))
    group = PanelGroup(None, (TeacherTerm(first), TeacherTerm(other)), "mixture")
    with pytest.raises(ConfigError, match="share different tokens with the student"):
        fused_panel_divergence(leaves[0], head, [group], Divergence("reverse_kl"))


def coarse(logits: Tensor, ids: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return torch.cat([logp.gather(1, ids), logp.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_listed_tokens_are_shared_ones_and_the_rest_joins_the_tail(divergence, name):
    shared = SHARED[name]
    leaves, head, signal = sides(shared)
    theirs = signal.head.logits(signal.hidden)
    ids = theirs.topk(6, -1).indices
    logp = coarse(theirs, ids)
    given = SparseSignal(ids, logp[:, :-1], logp[:, -1]).over(shared)
    found = fused_sparse_divergence(leaves[0], head, given, divergence)
    expected = []
    for n in range(N):
        listed = [i for i in ids[n].tolist() if i in shared]
        expected.append(
            from_logprobs(
                coarse(head.logits(leaves[0])[n : n + 1], torch.tensor([listed])),
                coarse(theirs[n : n + 1], torch.tensor([listed])),
                divergence,
            )
        )
    assert_gradients(found.loss_sum, torch.cat(expected).sum(), leaves)
    mass = [sum(logp[n, k].exp() for k in range(6) if ids[n, k] not in shared) for n in range(N)]
    torch.testing.assert_close(given.rest_mass, torch.stack([torch.as_tensor(m).double() for m in mass]))
    # The same list from hidden states: six shared tokens at most, and what the student asks about
    further = torch.randint(shared.student_size, (N, 2))
    own = listed_from(signal, 3, further, 1.0)
    for n in range(N):
        listed = own.ids[n][own.logprobs[n] > -math.inf].tolist()
        assert len(set(listed)) == len(listed) and all(i in shared for i in listed)
        assert {i for i in further[n].tolist() if i in shared} <= set(listed)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_a_list_of_every_token_equals_the_fused_loss(divergence, name):
    shared = SHARED[name]
    leaves, head, signal = sides(shared)
    theirs = signal.head.logits(signal.hidden).log_softmax(-1)
    every = torch.arange(shared.teacher_size).expand(N, -1)
    given = SparseSignal(every, theirs, torch.full((N,), -math.inf, dtype=torch.float64)).over(shared)
    found = fused_sparse_divergence(leaves[0], head, given, divergence)
    fused = fused_panel_divergence(leaves[0], head, [PanelGroup(None, (TeacherTerm(signal),))], divergence)
    assert_gradients(found.loss_sum, fused.loss_sum, leaves, rtol=1e-8)


def test_draws_of_other_tokens_are_left_out():
    drawn = SparseSignal(
        torch.tensor([[1, 18, 4], [17, 18, 0]]),
        torch.tensor([[-1.0, -1.5, -2.0], [-0.5, -1.0, -math.inf]]),
        torch.full((2,), -math.inf),
        torch.tensor([[2, 1, 1], [3, 1, 0]]),
    )
    found = drawn.over(PREFIX)
    assert found.draws.tolist() == [[2, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(found.rest_mass, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(found.logprobs[0, 0], torch.tensor(-1.0 - math.log(0.75)))


@pytest.mark.parametrize("name", SHARED)
def test_the_sampled_token_estimates_the_reverse_kl_over_the_outcomes(name):
    """Its mean over all tokens that the student may draw, weighed by their probability, is the exact gradient."""
    shared = SHARED[name]
    leaves, head, signal = sides(shared)
    student, size = head.logits(leaves[0]), shared.student_size
    oracle = divergence_from_logits(student, signal.head.logits(signal.hidden), Divergence("reverse_kl"), shared=shared)
    value, gradients = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
    for token in range(size):
        tokens = torch.full((N,), token)
        share = student.detach().softmax(-1)[:, token]
        found = fused_sampled_divergence(
            leaves[0], head, tokens, logprobs_of(signal, tokens, 1.0), weights=share, shared=shared, _rows=4
        )
        value += found.loss_sum.detach()
        for total, part in zip(gradients, torch.autograd.grad(found.loss_sum, leaves), strict=True):
            total += part
    if name == "superset":  # the teacher's mass beyond is in each log-ratio
        assert shared.teacher_has_rest and not shared.student_has_rest
    torch.testing.assert_close(value, oracle.sum().detach(), rtol=1e-9, atol=1e-10)
    for total, exact in zip(gradients, torch.autograd.grad(oracle.sum(), leaves), strict=True):
        torch.testing.assert_close(total, exact, rtol=1e-8, atol=1e-10)


def test_a_sampled_token_that_is_not_shared_is_not_listed():
    listed = SparseSignal(
        torch.tensor([[1, 2], [1, 2]]),
        torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]),
        torch.full((2,), math.log(1 - math.exp(-1) - math.exp(-2))),
        sampled_token_logprobs=torch.tensor([-3.0, -3.0]),
        shared=PREFIX,
    )
    found = with_sampled_token(listed, torch.tensor([5, 18]))
    assert found.ids[0].tolist() == [1, 2, 5] and found.logprobs[0, 2] == -3.0
    assert found.logprobs[1, 2] == -math.inf and found.tail_logmass[1] == listed.tail_logmass[1]


def vocabulary(tokens: list[str], added: set[str] = frozenset(), **kwargs) -> Vocabulary:
    return Vocabulary({token: i for i, token in enumerate(tokens)}, {}, added=frozenset(added), **kwargs)


BASE = [f"t{i}" for i in range(10)]


def test_what_vocabularies_share():
    own = vocabulary(BASE)
    assert own.shared_with(vocabulary(BASE)) is None
    larger = own.shared_with(vocabulary([*BASE, "<think>", "</think>"]))
    assert larger.runs == ((0, 10),) and not larger.student_has_rest and larger.teacher_has_rest
    differing = own.shared_with(vocabulary([*BASE[:4], "x", *BASE[5:]]))
    assert differing.runs == ((0, 4), (5, 10)) and differing.rest(10) == [4] and 4 not in differing and 9 in differing
    assert differing.readable([1, 2, 3, 4, 5]) == 3 and differing.readable([1, 2]) == 2
    padded = own.shared_with(vocabulary([*BASE, "x"]).within(8))  # a head that is shorter than its tokenizer
    assert padded.runs == ((0, 8),) and padded.student_has_rest and not padded.teacher_has_rest


def test_an_added_token_under_another_id_is_not_shared_and_a_merged_one_is_another_tokenizer():
    mine = vocabulary([*BASE, "<a>", "<b>"], {"<a>", "<b>"})
    swapped = vocabulary([*BASE, "<b>", "<a>"], {"<a>", "<b>"})
    shared = mine.shared_with(swapped)
    assert shared.runs == ((0, 10),) and mine.moved(swapped) == ["<a>", "<b>"]
    with pytest.raises(VocabularyError, match=r"2 ids differ, first: id 3 is 't3' for the student and 't4'"):
        vocabulary(BASE).shared_with(vocabulary([*BASE[:3], "t4", "t3", *BASE[5:]]))
    with pytest.raises(VocabularyError, match="7 ids differ"):
        vocabulary(BASE).shared_with(vocabulary([*BASE[:3], *(f"u{i}" for i in range(7))]))
