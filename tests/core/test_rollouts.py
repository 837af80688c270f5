"""Who writes the rollouts: the choice repeats, and interleaving keeps responses on the panel's support."""

from __future__ import annotations

import pytest
import torch

from kd_plugin.errors import NonFiniteError
from kd_plugin.rollouts.in_process import interleave
from kd_plugin.rollouts.rows import on_policy_rows

V, END = 11, 10


def teacher_logprobs(sequence: list[int]) -> torch.Tensor:
    """A distribution over the next token that depends on the whole prefix."""
    generator = torch.Generator().manual_seed(sum((i + 1) * t for i, t in enumerate(sequence)) + len(sequence))
    return torch.randn(V, generator=generator).mul(3).log_softmax(-1)


def judge(rows, prefixes, proposals):
    return [
        torch.stack([teacher_logprobs(prefix + proposal[:i]) for i in range(len(proposal))])
        for prefix, proposal in zip(prefixes, proposals, strict=True)
    ]


def student(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def propose(prefixes, count):
        proposals = []
        for _ in prefixes:
            drawn = torch.randint(V, (count,), generator=generator).tolist()
            proposals.append(drawn[: drawn.index(END) + 1] if END in drawn else drawn)
        return proposals

    return propose


def run(top_k: int, block: int = 4, length: int = 12, seed: int = 0, judge=judge, **ranks):
    prompts = [[1, 2], [3], [4, 5, 6]]
    written = interleave(
        prompts, student(seed), judge, max_new_tokens=length, block=block, top_k=top_k, end_tokens=[END],
        generator=torch.Generator().manual_seed(5), **ranks,
    )  # fmt: skip
    return prompts, written


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_token_is_among_the_panels_top_k(top_k, block):
    for prompt, response in zip(*run(top_k, block), strict=True):
        for i, token in enumerate(response.tokens):
            best = teacher_logprobs(prompt + list(response.tokens[:i])).topk(top_k).indices.tolist()
            assert token in best
        assert 1 <= len(response.tokens) <= 12
        assert END not in response.tokens[:-1]
        assert len(response.replaced) == len(response.tokens)


def test_top_1_is_the_panels_greedy_text():
    for prompt, response in zip(*run(1), strict=True):
        text: list[int] = []
        while len(text) < 12 and END not in text:
            text.append(int(teacher_logprobs(prompt + text).argmax()))
        assert list(response.tokens) == text


def test_with_the_whole_vocabulary_the_student_writes_alone():
    _, written = run(V, block=12)
    alone = student(0)([[], [], []], 12)
    assert [list(w.tokens) for w in written] == alone
    assert not any(any(w.replaced) for w in written)


def test_a_rank_that_is_done_takes_part_in_the_rounds_of_the_others():
    rounds = []

    def counted(*asked):
        rounds.append(len(asked[1]))
        return judge(*asked)

    _, alone = run(2, judge=counted)
    own = len(rounds)
    others = iter([0] * own + [2, 1, 0])  # rows that another rank still writes
    _, together = run(2, judge=counted, most=lambda count: max(count, next(others)))
    assert together == alone
    assert len(rounds) == 2 * own + 2 and rounds[-2:] == [1, 1]


def test_some_tokens_are_replaced_and_some_stand():
    flags = [flag for w in run(4, length=40)[1] for flag in w.replaced]
    assert True in flags and False in flags


def test_nothing_is_written_where_there_is_no_room():
    assert all(w.tokens == () for w in run(3, length=0)[1])


def test_the_same_step_gives_the_same_rows_and_another_step_others():
    first = on_policy_rows(64, 0.5, seed=3, step=7)
    assert first == on_policy_rows(64, 0.5, seed=3, step=7)
    assert first != on_policy_rows(64, 0.5, seed=3, step=8)
    assert first != on_policy_rows(64, 0.5, seed=3, step=7, rank=1)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_the_share_is_right_on_average(fraction):
    counts = [sum(on_policy_rows(5, fraction, seed=0, step=step)) for step in range(600)]
    assert set(counts) <= {int(5 * fraction), int(5 * fraction) + 1} or fraction in (0.0, 1.0)
    assert sum(counts) / (5 * 600) == pytest.approx(fraction, abs=0.02)


def listing(*listed: int, logprobs=None):
    """A panel that lists these tokens at every position, and gives the others no probability."""
    row = torch.full((V,), -torch.inf)
    row[list(listed)] = torch.tensor(logprobs or [-1.0 - 0.1 * i for i in range(len(listed))])
    return lambda rows, prefixes, proposals: [row.expand(len(proposal), V) for proposal in proposals]


@pytest.mark.parametrize("top_k", [1, 2, 3, V, 100])
@pytest.mark.parametrize("listed", [(4, 7), (7,), (END, 0, 3)], ids=["two", "all_but_one_unlisted", "three"])
def test_unlisted_tokens_never_stand_however_short_the_list(listed, top_k):
    _, written = run(top_k, judge=listing(*listed))
    for response in written:
        assert set(response.tokens) <= set(listed[:top_k])


def test_a_replacement_has_the_panels_probabilities_among_what_it_lists():
    _, written = run(25, length=600, judge=listing(4, 7, logprobs=[-0.2231, -1.6094]))  # 0.8 and 0.2
    put_in = [t for r in written for t, replaced in zip(r.tokens, r.replaced, strict=True) if replaced]
    assert len(put_in) > 1000
    assert put_in.count(4) / len(put_in) == pytest.approx(0.8, abs=0.05)


def test_ties_at_the_last_rank_all_stand():
    """Which of equals a sort puts first is arbitrary, and differs between devices."""
    _, written = run(2, judge=listing(*range(V), logprobs=[-0.5] + [-3.0] * (V - 1)))
    assert not any(any(response.replaced) for response in written)


def test_a_panel_that_lists_nothing_is_an_error():
    with pytest.raises(NonFiniteError, match="gives no token a probability"):
        run(3, judge=listing())
    with pytest.raises(NonFiniteError, match="NaN"):
        run(3, judge=lambda rows, prefixes, proposals: [torch.full((len(p), V), torch.nan) for p in proposals])
