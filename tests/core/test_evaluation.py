"""Evaluating a model on one's own questions: what is asked, counted, kept, compared and shown."""

import json

import pyarrow.parquet as pq
import pytest

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, DataError, ServerError
from kd_plugin.evaluation import compare, evaluate, load_evaluation, load_tasks
from kd_plugin.evaluation.page import write_page
from kd_plugin.text import LocalWriter, ServerWriter
from tests.scripted_writer import Script, scripted_writer


@pytest.fixture
def questions(tmp_path):
    """Ten questions, ``i + i``."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + {i}", "answer": str(2 * i)}) + "\n" for i in range(10)))
    return path


def knows(most):
    """A model that is right about questions up to a number, the second time that it is asked one of them."""
    seen = {}

    def write(body):
        asked = body["messages"][-1]["content"]
        first = int(asked.split()[0])
        seen[asked] = seen.get(asked, 0) + 1
        if first < most or (first == most and seen[asked] == 2):
            return {"content": f"It is {2 * first}.", "reasoning_content": "<b>I</b> add."}
        return {"content": "No <idea>.", "finish_reason": "length"}

    return write


def tasks(questions, **settings):
    own = {"rows": str(questions), "verify": "contains", "completions": 2, **settings}
    return {"tasks": {"sums": own}}


def writer(url, **options):
    return ServerWriter(url, **{"license": "mit", "name": "scripted", **options})


def test_what_is_counted_and_kept(questions, tmp_path):
    with scripted_writer(Script(write=knows(6))) as (url, script):
        found = evaluate(writer(url), tasks(questions), tmp_path / "out", progress=False)
    result = found.results["sums"]
    assert len(script.log) == 20 and {body["temperature"] for _, body in script.log} == {0.6}
    assert result.questions == 10 and result.answers == 2
    assert result.accuracy.value == pytest.approx(0.65) and result.pass_at[2].value == pytest.approx(0.7)
    assert result.unfinished == pytest.approx(0.35) and sum(result.reasons.values()) == 7
    kept = pq.read_table(tmp_path / "out" / "sums" / "responses.parquet").to_pylist()
    assert [(one["row"], one["sample"]) for one in kept] == [(row, sample) for row in range(10) for sample in (0, 1)]
    assert kept[0]["response"] == "It is 0." and kept[0]["reasoning"] == "<b>I</b> add." and kept[0]["passed"]
    assert load_evaluation(tmp_path / "out") == found


def test_an_interruption_loses_no_answer_and_asks_none_again(questions, tmp_path):
    script = Script(write=knows(6), faults=[None] * 7 + [401] * 50)
    with scripted_writer(script) as (url, _):
        with pytest.raises(ServerError):
            evaluate(writer(url, max_concurrency=1), tasks(questions), tmp_path / "out", progress=False)
        with pytest.raises(DataError, match="holds no finished evaluation"):
            load_evaluation(tmp_path / "out")
        script.faults.clear()
        found = evaluate(writer(url), tasks(questions), tmp_path / "out", progress=False)
    assert sum(script.answered.values()) == 20 and found.results["sums"].accuracy.value == pytest.approx(0.65)


def test_another_question_is_another_evaluation(questions, tmp_path):
    with scripted_writer(Script(write=knows(6))) as (url, _):
        evaluate(writer(url), tasks(questions), tmp_path / "out", progress=False)
        with pytest.raises(ConfigError, match="max_new_tokens"):
            evaluate(writer(url), tasks(questions, max_new_tokens=7), tmp_path / "out", progress=False)


def test_two_models_are_compared_question_by_question(questions, tmp_path):
    found = []
    for most in (9, 2):
        with scripted_writer(Script(write=knows(most))) as (url, _):
            out = tmp_path / str(most)
            found.append(evaluate(writer(url), tasks(questions), out, progress=False))
    gap = compare(*found)["sums"]
    assert gap.value == pytest.approx(0.7) and gap.low > 0.2
    with scripted_writer(Script(write=knows(9))) as (url, _):
        colder = evaluate(writer(url), tasks(questions, sampling_top_k=5), tmp_path / "cold", progress=False)
    with pytest.raises(ConfigError, match=r"asked in two ways: sampling_top_k is 0 in .* and 5 in"):
        compare(found[0], colder)


def test_a_model_here_answers_too(questions, tmp_path, teacher_dir):
    local = LocalWriter(teacher_dir, license="mit")
    given = tasks(questions, max_new_tokens=4, limit=3)
    found = evaluate(local, given, tmp_path / "out", progress=False)
    assert found.results["sums"].questions == 3 and found.results["sums"].tokens > 0
    again = evaluate(local, given, tmp_path / "again", progress=False)
    assert again.results["sums"].pass_at == found.results["sums"].pass_at


def test_the_page_shows_what_was_wrong_and_runs_nothing(questions, tmp_path):
    with scripted_writer(Script(write=knows(6))) as (url, _):
        found = evaluate(writer(url), tasks(questions), tmp_path / "out", progress=False)
    page = write_page(found).read_text()
    assert "No &lt;idea&gt;." in page and "<script" not in page and "http" not in page
    assert page.index("7 + 7") < page.index("0 + 0")  # the wrong ones first


def test_the_command(questions, tmp_path, capsys):
    tasks_file = tmp_path / "tasks.yaml"
    tasks_file.write_text(f"verify: contains\ncompletions: 2\ntasks:\n  sums: {questions}\n")
    for most in (2, 9):
        with scripted_writer(Script(write=knows(most))) as (url, _):
            model = json.dumps({"url": url, "license": "mit"})
            words = ["--model", model, "--tasks", str(tasks_file), "--output_dir", str(tmp_path / str(most))]
            more = ["--baseline", str(tmp_path / "2"), "--name", "new"] if most == 9 else []
            assert main(["evaluate", *words, *more]) == 0
    said = capsys.readouterr().out
    assert "sums: pass@1 0.250 [" in said and "10 questions, 2 answers each" in said
    assert "a real difference" in said and (tmp_path / "9" / "page.html").is_file()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "expected `tasks`"),
        ({"tasks": {}}, "expected `tasks`"),
        ({"tasks": {"a": {"row": "x"}}}, "Did you mean .rows"),
        ({"tasks": {"a": 3}}, "expected a file of questions"),
        ({"tasks": {"a": {}}}, "`rows` is missing"),
        ({"tasks": {"../a": "x.jsonl"}}, "leave out slashes"),
        ({"tasks": {"a": {"rows": "x.jsonl", "sampling_temperature": 0, "completions": 4}}}, "would be the same one"),
        ({"tasks": {"a": {"rows": "x.jsonl", "limit": 0}}}, "limit is 0"),
        ({"complitions": 2, "tasks": {"a": "x.jsonl"}}, "completions"),
    ],
)
def test_wrong_tasks_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        load_tasks(given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["tasks"].update({"../secret": c["tasks"]["sums"]}), "leave out slashes"),
        (lambda c: c["tasks"]["sums"]["pass_at"]["1"].update(value="0.9"), "expected float"),
        (lambda c: c["tasks"]["sums"]["pass_at"]["1"].update(value=float("nan")), "expected float"),
        (lambda c: c["tasks"]["sums"].update(answers=None), "expected int"),
        (lambda c: c["tasks"]["sums"].pop("asked"), "'asked' is missing"),
        (lambda c: c.update(tasks=["sums"]), "is not as"),
    ],
)
def test_results_that_a_stranger_wrote_are_refused(change, words, questions, tmp_path):
    with scripted_writer(Script(write=knows(6))) as (url, _):
        evaluate(writer(url), tasks(questions), tmp_path / "out", progress=False)
    path = tmp_path / "out" / "results.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        load_evaluation(tmp_path / "out")


def test_a_question_that_is_asked_twice_is_two_questions(questions, tmp_path):
    questions.write_text(questions.read_text() * 2)
    with scripted_writer(Script(write=lambda body: "It is 0.")) as (url, script):
        found = evaluate(writer(url), tasks(questions, completions=1), tmp_path / "out", progress=False)
    assert len(script.log) == 20 and found.results["sums"].questions == 20
    assert found.results["sums"].accuracy.value == pytest.approx(0.1)  # 0 + 0, twice of twenty
