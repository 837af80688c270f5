"""Which corrections a panel accepts: a majority of the others, and what happens where they are split evenly."""

import itertools

import pytest

from kd_plugin.text.correcting import CorrectingPanel, elected
from kd_plugin.text.correction import Candidate, CorrectionSettings
from kd_plugin.text.teaching import Case, Correction, Evaluation
from tests.text_teachers import ScriptedTeacher

GOOD, BAD, NOTHING = Evaluation(1.0), Evaluation(0.0), Evaluation(None, problem="no verdict")


def candidate(teacher, **votes):
    return Candidate(teacher, Correction("text"), {name: (BAD, GOOD)[good] for name, good in votes.items()})


def accepted(written, evaluations):
    return [one.teacher for one in elected(written, evaluations, 0.7) if one.accepted]


@pytest.mark.parametrize("others", [1, 2, 3, 4, 5])
def test_more_than_half_of_the_others_is_enough_and_less_than_half_never(others):
    names = [f"o{n}" for n in range(others)]
    for votes in itertools.product([True, False], repeat=others):
        found = accepted(
            [candidate("a", **dict(zip(names, votes, strict=True)))], {"a": BAD, **dict.fromkeys(names, BAD)}
        )
        even = 2 * sum(votes) == others  # nobody finds the response good, and nobody else wrote
        assert found == (["a"] if 2 * sum(votes) > others or even else [])


def test_an_even_split_yields_to_a_majority():
    written = [candidate("a", b=True, liar=False), candidate("b", a=True, liar=True)]
    assert accepted(written, {"a": BAD, "b": BAD, "liar": BAD}) == ["b"]


def test_two_of_three_outvote_a_liar_who_rejects_what_is_right():
    written = [
        candidate("a", b=True, liar=False),
        candidate("b", a=True, liar=False),
        candidate("liar", a=False, b=False),
    ]
    assert accepted(written, {"a": BAD, "b": BAD, "liar": BAD}) == ["a", "b"]


def test_corrections_that_split_the_panel_differently_are_no_majority():
    """One honest teacher is wrong, and the liar stands behind that."""
    written = [candidate("a", b=True, liar=False), candidate("b", a=False, liar=True)]
    assert accepted(written, {"a": BAD, "b": BAD, "liar": BAD}) == []


def test_a_response_that_as_many_find_good_is_not_replaced():
    written = [candidate("liar", a=True, b=False)]
    assert accepted(written, {"a": GOOD, "b": GOOD, "liar": BAD}) == []
    assert accepted(written, {"a": BAD, "b": GOOD, "liar": BAD}) == ["liar"]


def test_a_vote_that_says_nothing_is_no_approval_and_alone_nobody_decides():
    one = Candidate("a", Correction("text"), {"b": NOTHING, "c": GOOD})
    assert accepted([one], {}) == ["a"]
    assert accepted([Candidate("a", Correction("text"), {"b": NOTHING})], {}) == []
    assert accepted([Candidate("a", Correction("text"), {})], {}) == []


def test_the_panel_asks_and_accepts_so():
    def liar(case):  # approves of what is wrong, the student's response too
        return float(case.row["answer"] not in case.response)

    panel = {
        "liar": ScriptedTeacher(says=lambda row: "a lie", score=liar),
        "a": ScriptedTeacher(),
        "b": ScriptedTeacher(),
    }
    cases = [Case("q", "wrong", {"answer": "7"}, tuple(panel))]
    (outcome,) = CorrectingPanel(panel, CorrectionSettings()).correct(cases)
    assert outcome.text == "7" and outcome.chosen.teacher == "a"
