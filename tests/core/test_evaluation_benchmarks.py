"""Known benchmarks by name, from local copies; and questions that were in the training data."""

import base64
import json
import pickle
import zlib

import pytest

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, DataError, MissingDependencyError
from kd_plugin.evaluation import evaluate, load_evaluation, load_tasks
from kd_plugin.evaluation.benchmarks import BENCHMARKS, benchmark_rows
from kd_plugin.evaluation.contamination import find_contaminated, without
from kd_plugin.verifying import make_verifier
from tests.core.test_evaluation import knows, questions, tasks, writer  # noqa: F401
from tests.scripted_writer import Script, scripted_writer

CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}, {"input": "4 5\n", "output": "9\n"}]


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def packed(value):
    """Return test cases as LiveCodeBench packs the private ones."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_a_coding_benchmark_is_read_and_its_programs_are_run(tmp_path):
    asked = {"question_content": "Add two numbers.", "public_test_cases": json.dumps(CASES[:1])}
    hidden = {**asked, "private_test_cases": packed(json.dumps(CASES[1:]))}
    function = {**asked, "public_test_cases": json.dumps([{**CASES[0], "testtype": "functional"}])}
    file = lines(tmp_path / "lcb.jsonl", {**asked, "private_test_cases": "[]"}, hidden, function)
    rows = benchmark_rows("lcb", file)
    assert [len(json.loads(row["tests"])) for row in rows] == [1, 2]  # functions need a harness of their own
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    with scripted_writer(Script(write=lambda body: program)) as (url, _):
        given = {"tasks": {"code": {"benchmark": "lcb", "rows": file, "completions": 1}}}
        found = evaluate(writer(url), given, tmp_path / "out", progress=False)
    assert found.results["code"].accuracy.value == 1.0 and found.results["code"].asked["benchmark"] == "lcb"


class Evil:
    def __reduce__(self):
        return print, ("run!",)


@pytest.mark.parametrize("value", [packed(Evil()), packed([1, 2]), "no base64 at all!", packed("no json")])
def test_packed_cases_run_nothing(value, tmp_path, capsys):
    row = {"question_content": "x", "public_test_cases": "[]", "private_test_cases": value}
    with pytest.raises(DataError, match="private_test_cases cannot be read"):
        benchmark_rows("lcb", lines(tmp_path / "lcb.jsonl", row))
    assert "run!" not in capsys.readouterr().out


LOCAL = {
    "aime24": ({"ID": "1", "Problem": "What is 1+1?", "Solution": "It is 2.", "Answer": 2}, "2"),
    "math_500": (
        {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "x", "level": 1,
         "unique_id": "a"}, "2",
    ),
    "gpqa": (
        {"Question": "Which?", "Correct Answer": "yes", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c",
         "Incorrect Answer 3": "d"}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_lm_evals_questions_from_a_local_copy(name, tmp_path):
    """Run where the extra ``benchmarks`` is installed; without it the error says so."""
    row, answer = LOCAL[name]
    file = lines(tmp_path / "copy.jsonl", row)
    try:
        rows = benchmark_rows(name, file)
    except MissingDependencyError as error:
        assert "kd-plugin[benchmarks]" in str(error)
        pytest.skip("lm-eval is not installed")
    (found,) = rows
    asked = row.get("Problem") or row.get("problem") or row["Question"]
    assert asked in found["prompt"]
    if answer is None:
        assert f"({found['answer']}) yes" in found["prompt"]
        assert list(benchmark_rows(name, file)) == [found]  # the order of the choices is always the same
    else:
        assert found["answer"] == answer


@pytest.mark.parametrize(
    "said", ["The answer is (B).", "So \\boxed{B}", "**Answer: B**", "(A) is wrong. Answer: \\text{B}"]
)
def test_a_choice_is_read_as_models_give_it(said):
    check = make_verifier(BENCHMARKS["gpqa"].verify)
    assert check.verify(said, {"answer": "B"}).passed and not check.verify(said, {"answer": "A"}).passed
    assert not check.verify("A cat Did Bite.", {"answer": "B"}).passed


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'aime24'"):
        load_tasks({"tasks": {"a": {"benchmark": "aime2"}}})
    assert set(BENCHMARKS) == {"aime24", "math_500", "gpqa", "lcb"}


@pytest.fixture
def problems(tmp_path):
    asked = [
        f"A farmer has {i + 3} sheep and {2 * i} goats on his farm near the river. How many animals does he have?"
        for i in range(5)
    ]
    lines(tmp_path / "own.jsonl", *[{"prompt": one, "answer": str(3 * i + 3)} for i, one in enumerate(asked)])
    copied = asked[1].replace("near the river", "by the river")
    training = [
        {"messages": [{"role": "user", "content": copied}, {"role": "assistant", "content": "6"}]},
        {"prompt": "A baker has 3 loaves and 2 rolls in his shop. How much bread is that?", "completion": "5"},
    ]
    lines(tmp_path / "training.jsonl", *training)
    return {"tasks": {"own": {"rows": str(tmp_path / "own.jsonl"), "verify": "contains", "completions": 1}}}


def test_questions_that_were_trained_on_are_counted_and_left_out(problems, tmp_path, capsys):
    def write(body):
        return "6" if " 4 sheep" in body["messages"][-1]["content"] else "?"

    with scripted_writer(Script(write=write)) as (url, _):
        (tmp_path / "tasks.json").write_text(json.dumps(problems))
        words = ["--model", json.dumps({"url": url, "license": "mit"}), "--tasks", str(tmp_path / "tasks.json")]
        words += ["--output_dir", str(tmp_path / "out"), "--training", str(tmp_path / "training.jsonl")]
        assert main(["evaluate", *words]) == 0
    said = capsys.readouterr().out
    assert "own: pass@1 0.200 [" in said
    assert "1 of 5 questions are in the training data; without them pass@1 0.000 [" in said
    (found,) = [json.loads(line) for line in (tmp_path / "out" / "contaminated.jsonl").read_text().splitlines()]
    assert found["source"] == "own" and found["item"] == 1 and found["overlap"] > 0.5
    whole = load_evaluation(tmp_path / "out")
    everything = find_contaminated(load_tasks(problems), [{"text": (tmp_path / "own.jsonl").read_text()}])
    assert without(whole, everything | {"own": []}) == {}
