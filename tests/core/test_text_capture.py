"""A capture of text: what is asked, in which form it comes out, and what is refused before anything is asked."""

import datasets
import pytest

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.text import LocalWriter, capture_text, load_text
from tests.core.text_help import number_of, right, writer
from tests.core.text_worker import questions

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_the_dataset_is_in_trls_form_with_reasoning_apart(writing, tmp_path):
    url, script = writing
    script.write = lambda body: right(body) if number_of(body) % 3 else "no idea"
    out = tmp_path / "text"
    found = capture_text(questions(10), writer(url), out, verify="contains", progress=False)
    assert found.rows == 6 and found.dropped == {"wrong answer": 4} and found.complete
    rows = datasets.load_dataset(str(out))["train"]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "What is 1+1?"}],
        "completion": [{"role": "assistant", "content": "<think>\n1 twice\n</think>\n\nIt is 2"}],
        "response": "It is 2",
        "reasoning": "1 twice",
        "teacher_name": "teacher",
        "generated_by": "teacher",
        "score": 1.0,
        "row": 1,
        "sample": 0,
        "domain": "odd",
    }
    answers = datasets.load_dataset("parquet", data_files=str(out / "answers/*.parquet"))["train"]
    assert len(answers) == 10 and answers[0]["why_not"] == "wrong answer"
    asked = len(script.log)
    for reasoning, content in (("drop", "It is 2"), ("field", "It is 2")):
        capture_text(questions(10), writer(url), out, verify="contains", reasoning=reasoning, progress=False)
        (message,) = load_text(out)[0]["completion"]
        assert message["content"] == content and message.get("reasoning_content") == (
            "1 twice" if reasoning == "field" else None
        )
    assert len(script.log) == asked  # selecting again asks nobody


def test_several_texts_a_prompt_have_seeds_of_their_own_and_keep_takes_the_shortest(writing, tmp_path):
    url, script = writing
    script.write = lambda body: f"<think>{'h' * (body['seed'] % 50)}</think>It is {2 * number_of(body)}"
    found = capture_text(questions(5), writer(url), tmp_path / "a", completions=4, keep=1, progress=False)
    assert found.rows == 5 and sum(found.dropped.values()) == 15
    seeds = {(number_of(body), body["seed"]) for _, body in script.log}
    assert len(seeds) == 20
    kept = {row["row"]: len(row["reasoning"]) for row in load_text(tmp_path / "a")}
    assert kept == {i: min(seed % 50 for n, seed in seeds if n == i) for i in range(5)}


def test_conversations_are_asked_as_they_are_up_to_the_user(writing, tmp_path):
    url, script = writing
    script.write = lambda body: "fine"
    user, old = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "old"}
    rows = [{"messages": [user, old, {"role": "user", "content": "more"}, old]}]
    capture_text(rows, writer(url), tmp_path / "a", system="be kind", progress=False)
    assert [m["content"] for m in script.log[0][1]["messages"]] == ["be kind", "hello", "old", "more"]
    with pytest.raises(DataError, match="row 0 has no prompt"):
        capture_text([{"text": "x"}], writer(url), tmp_path / "b", progress=False)
    with pytest.raises(DataError, match="without one of the user"):
        capture_text([{"messages": [old]}], writer(url), tmp_path / "c", progress=False)


def test_what_cannot_be_is_refused_before_the_first_request(writing, tmp_path):
    url, script = writing
    for options, match in (
        ({"verify": "contain"}, "Did you mean 'contains'"),
        ({"completions": 0}, "completions=0"),
        ({"reasoning": "thing"}, "Did you mean 'think'"),
        ({"overlap": 0.0}, "overlap=0"),
        ({"per_group": 3}, "balance names no columns"),
        ({"completion": 2}, "Did you mean 'completions'"),
        ({"ceiling": -1.0}, "ceiling=-1"),
        ({"vote": {"bye": "x"}}, "vote: unknown key 'bye'"),
    ):
        with pytest.raises(ConfigError, match=match):
            capture_text(questions(2), writer(url), tmp_path / "x", progress=False, **options)
    with pytest.raises(ConfigError, match="have the same name"):
        capture_text(questions(2), [writer(url), writer(url)], tmp_path / "x", progress=False)
    assert not script.log
    (tmp_path / "x").mkdir(exist_ok=True)
    (tmp_path / "x/other.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds .other\.txt. and no capture"):
        capture_text(questions(2), writer(url), tmp_path / "x", progress=False)
    capture_text(questions(2), writer(url), tmp_path / "y", progress=False)
    for rows, options, key in (
        (questions(3), {}, "count: 3 against 2"),
        (questions(2), {"sampling_temperature": 0.1}, "sampling_temperature: 0.1 against 0.6"),
        (questions(2), {"completions": 2}, "completions: 2 against 1"),
    ):
        with pytest.raises(ConfigError, match=f"asks something else: {key}"):
            capture_text(rows, writer(url), tmp_path / "y", progress=False, **options)


def test_a_model_in_this_process_writes_as_a_server_does(teacher_dir, tmp_path):
    found = capture_text(
        questions(5), LocalWriter(teacher_dir, license="mit", batch_size=2, dtype="float32"), tmp_path / "a",
        max_new_tokens=6, completions=2, keep_unfinished=True, min_characters=0, deduplicate=False, progress=False,
    )  # fmt: skip
    assert found.usage["teacher"]["written"] <= 60 and found.usage["teacher"]["read"] > 0
    whole = load_text(tmp_path / "a").to_list()
    capture_text(
        questions(5), LocalWriter(teacher_dir, license="mit", batch_size=5, dtype="float32"), tmp_path / "b",
        max_new_tokens=6, completions=2, keep_unfinished=True, min_characters=0, deduplicate=False, progress=False,
    )  # fmt: skip
    assert [r["response"] for r in load_text(tmp_path / "b")] == [r["response"] for r in whole]
