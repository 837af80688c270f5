import time

import pytest
import torch

from kd_plugin.monitor.metrics import PanelTally, Stopwatch
from kd_plugin.panel.scoring import AskedTeacher, GroupTerms
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal

N, V, H = 7, 31, 8


def signal(seed, width=H):
    generator = torch.Generator().manual_seed(seed)
    head = OutputHead(torch.randn(V, width, generator=generator))
    return HiddenSignal(torch.randn(N, width, generator=generator), head)


def distribution(one):
    return one.head.logits(one.hidden).log_softmax(-1)


def read(tally):
    return tally.read(lambda sums: sums, torch.device("cpu"))


def group(*signals, positions=None):
    names = "abcdefgh"
    weights = torch.ones(len(signals[0]))
    return GroupTerms(positions, tuple(AskedTeacher(names[i], s, weights) for i, s in enumerate(signals)))


def test_entropy_agreement_overlap_and_disagreement_are_those_of_full_distributions():
    student, first, second = signal(0), signal(1), signal(2, width=12)
    tally = PanelTally(["a", "b"], positions=64)
    tally.add([group(first, second)], student.hidden, student.head)
    found = read(tally)
    q, p, r = (distribution(s) for s in (student, first, second))
    for name, logp in (("a", p), ("b", r)):
        assert found[f"entropy/{name}"] == pytest.approx(float(-(logp.exp() * logp).sum(-1).mean()), rel=1e-5)
        agree = (logp.argmax(-1) == q.argmax(-1)).float().mean()
        assert found[f"agreement/{name}"] == pytest.approx(float(agree))
        shared = [len(set(logp[i].topk(16).indices.tolist()) & set(q[i].topk(16).indices.tolist())) for i in range(N)]
        assert found[f"support_overlap/{name}"] == pytest.approx(sum(shared) / N / 16)
    middle = ((p.exp() + r.exp()) / 2).log()
    shannon = 0.5 * ((p.exp() * (p - middle)).sum(-1) + (r.exp() * (r - middle)).sum(-1))
    assert found["jensen_shannon/a|b"] == pytest.approx(float(shannon.mean()), rel=1e-5)
    differ = (p.argmax(-1) != r.argmax(-1)).float().mean()
    assert found["disagreement/a|b"] == found["disagreement"] == pytest.approx(float(differ))
    assert read(tally) == {}  # begins anew


def test_routed_groups_count_for_their_own_teacher():
    student, one = signal(0), signal(1)
    few = torch.tensor([1, 4])
    part = HiddenSignal(one.hidden[few], one.head)
    tally = PanelTally(["a", "b"], positions=64)
    tally.add([group(part, positions=few)], student.hidden, student.head)
    found = read(tally)
    q, p = distribution(student)[few], distribution(part)
    assert found["agreement/a"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert not any(key.endswith("/b") or "disagreement" in key for key in found)


def test_few_positions_are_compared_where_there_are_many():
    student, one = signal(0), signal(1)
    tally = PanelTally(["a"], positions=3)
    tally.add([group(one)], student.hidden, student.head)
    p = distribution(one)[[0, 3, 6]]
    assert read(tally)["entropy/a"] == pytest.approx(float(-(p.exp() * p).sum(-1).mean()), rel=1e-5)


def test_a_list_that_holds_all_tokens_counts_like_the_full_distribution():
    student, one = signal(0), signal(1)
    logprobs, ids = distribution(one).topk(V, -1)
    listed = SparseSignal(ids, logprobs, torch.full((N,), -torch.inf))
    for kind in (one, listed):
        tally = PanelTally(["a"], positions=64)
        tally.add([group(kind)], student.hidden, student.head)
        found = read(tally)
        if kind is one:
            expected = found
    assert found == pytest.approx(expected, rel=1e-5)


def test_nothing_scored_is_nothing_logged_and_the_head_is_projected_all_the_same():
    student = signal(0)
    projected = []

    class Head(OutputHead):
        def logits(self, hidden):
            projected.append(len(hidden))
            return super().logits(hidden)

    tally = PanelTally(["a"], positions=4)
    tally.add([], student.hidden[:0], Head(student.head.weight))
    assert projected == [0]  # under ZeRO-3 the others wait for this rank
    assert read(tally) == {}


def test_the_stopwatch_adds_up_by_name():
    clock = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        with clock(name):
            time.sleep(0.01)
    seconds = clock.read()
    assert seconds["a"] >= 0.02 and seconds["b"] >= 0.01 and clock.read() == {}
