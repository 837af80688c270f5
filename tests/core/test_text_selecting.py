"""What of a captured text is kept, and why the rest is not."""

import json
from collections import Counter

import pytest

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.text import capture_text, load_text, text_source
from kd_plugin.text.voting import Vote
from tests.core.text_help import number_of, right, writer
from tests.core.text_worker import questions
from tests.scripted_writer import Script, scripted_writer

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_length_limits_unfinished_refused_and_equal_answers(writing, tmp_path):
    url, script = writing
    script.faults = [400]
    words = {1: {"content": "cut", "finish_reason": "length"}, 2: "x" * 50, 3: "", 4: f"<think>{'y' * 50}</think>ok"}
    script.write = lambda body: words.get(number_of(body), right(body))
    rows = [*questions(6), {"prompt": " what is  5+5?", "answer": "10", "domain": "odd"}]
    limits = {"max_characters": 40, "max_reasoning_characters": 40, "progress": False}
    found = capture_text(rows, writer(url, max_concurrency=1), tmp_path / "a", **limits)
    assert found.rows == 1 and found.dropped == {
        "refused by the server": 1, "unfinished": 1, "too long": 1, "empty": 1, "reasoning too long": 1,
        "same prompt": 1,
    }  # fmt: skip
    again = capture_text(
        rows, writer(url), tmp_path / "a", keep_unfinished=True, deduplicate=False, min_characters=4, progress=False
    )
    assert again.rows == 3 and again.dropped["too short"] == 2  # "cut" and "ok"
    script.write = lambda body: "all the same"
    same = capture_text(questions(3), writer(url), tmp_path / "b", completions=3, progress=False)
    assert same.rows == 3 and same.dropped == {"same answer": 6}


def test_groups_are_balanced_by_domain_and_by_difficulty(writing, tmp_path):
    url, script = writing
    rows = [{**row, "domain": "rare" if i < 3 else "common"} for i, row in enumerate(questions(20))]
    found = capture_text(rows, writer(url), tmp_path / "a", balance=["domain"], progress=False)
    assert Counter(r["domain"] for r in load_text(tmp_path / "a")) == {"rare": 3, "common": 3}
    assert found.dropped == {"beyond balance": 14}
    assert capture_text(rows, writer(url), tmp_path / "a", balance=["domain"], per_group=5, progress=False).rows == 8
    first = [r["row"] for r in load_text(tmp_path / "a")]
    capture_text(rows, writer(url), tmp_path / "a", balance=["domain"], per_group=5, progress=False)
    assert [r["row"] for r in load_text(tmp_path / "a")] == first
    script.write = lambda body: right(body) if number_of(body) < 4 or body["seed"] % 4 == 0 else "no"
    hard = capture_text(
        questions(40), writer(url), tmp_path / "b", completions=4, verify="contains", deduplicate=False,
        balance=["pass_rate"], progress=False,
    )  # fmt: skip
    right_by_row = Counter(r["row"] for r in load_text(tmp_path / "b"))
    assert hard.dropped["beyond balance"] > 0 and len(right_by_row) > 1
    with pytest.raises(ConfigError, match="no column 'topic'"):
        capture_text(rows, writer(url), tmp_path / "c", balance=["topic"], progress=False)


def test_the_panel_votes_and_the_outvoted_are_dropped(tmp_path):
    pytest.importorskip("math_verify")
    with scripted_writer(Script(write=right)) as (one, _), scripted_writer(Script(write=right)) as (two, _):
        lies = Script(write=lambda body: f"It is {2 * number_of(body) + (number_of(body) % 2)}")
        with scripted_writer(lies) as (three, _):
            panel = [writer(url, name=name) for url, name in ((one, "a"), (two, "b"), (three, "liar"))]
            found = capture_text(questions(6), panel, tmp_path / "v", vote=True, progress=False)
    assert found.dropped == {"outvoted": 3, "same answer": 6} or found.dropped["outvoted"] == 3
    assert {r["teacher_name"] for r in load_text(tmp_path / "v")} >= {"a"}
    record = text_source(tmp_path / "v").record
    assert len([n for n in record["nodes"] if n["kind"] == "model"]) == 3


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ([("a", "4"), ("b", "4"), ("c", "5")], [True, True, False]),
        ([("a", "4"), ("b", "5"), ("c", "6")], [False] * 3),
        ([("a", "4"), ("b", "5")], [False] * 2),
        ([("a", "4"), ("a", "4"), ("a", "5")], [True, True, False]),
        # Each teacher has one vote, however much it writes
        ([("a", "5"), ("a", "5"), ("a", "5"), ("b", "4"), ("b", "9"), ("b", "4"), ("c", "4")], [0, 0, 0, 1, 0, 1, 1]),
        ([("a", "no answer"), ("b", "4"), ("c", "4")], [False, True, True]),
        ([("a", "no"), ("b", "no"), ("c", "4")], [False] * 3),
    ],
)
def test_a_vote_is_of_teachers_and_not_of_texts(answers, kept):
    vote = Vote.of({"by": r"(\d+)"})
    assert [reason is None for reason in vote.outcome(answers)] == [bool(k) for k in kept]


def test_a_vote_that_cannot_be_is_refused():
    for given, match in (({"by": "("}, "regular expression"), ({"by": "x"}, "no group"), ({"share": 2}, "share is 2")):
        with pytest.raises(ConfigError, match=match):
            Vote.of(given)


def test_evaluation_items_are_found_listed_and_dropped(writing, tmp_path):
    url, script = writing
    evaluation = [{"question": "If a farmer has 12 cows and buys 7 more cows at the market on Monday, how many?"}]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, evaluation)) + "\n")
    near = "If the farmer has 12 cows and buys 7 more cows at the market on Tuesday, how many?"
    other = "If a farmer has 31 cows and sells 4 more cows at the market on Monday, how many?"
    inside = "Say something."
    script.write = lambda b: evaluation[0]["question"] if "Say" in b["messages"][-1]["content"] else "fine"
    rows = [{"prompt": text} for text in (near, other, inside)]
    options = {"decontaminate": [str(tmp_path / "eval.jsonl")], "ngram": 5, "progress": False}
    found = capture_text(rows, writer(url), tmp_path / "a", **options)
    assert found.rows == 1 and found.dropped == {"contaminated": 2} and found.contaminated == 2
    assert [r["row"] for r in load_text(tmp_path / "a")] == [1]
    listed = [json.loads(line) for line in (tmp_path / "a/contaminated.jsonl").read_text().splitlines()]
    assert [(one["row"], one["item"], one["overlap"] == 1.0) for one in listed] == [(0, 0, False), (2, 0, True)]
    with pytest.raises(DataError, match="has no column"):
        capture_text(
            rows,
            writer(url),
            tmp_path / "b",
            decontaminate=[{"dataset": str(tmp_path / "eval.jsonl"), "columns": ["x"]}],
        )
