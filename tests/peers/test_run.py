"""The run itself: it knows archives, and no difference passes unnoticed."""

import subprocess
import tarfile

import pytest

from tests.peers.run import DIFFERENCES, TESTS, as_table, unexplained, unpack
from tests.peers.tokenizers import FAMILIES, build, learn_merges

PASSED, FAILED = {"outcome": "passed", "why": ""}, {"outcome": "failed", "why": "ValueError: no"}
FOUND = {
    "trl": {"f.py::T::test_a": PASSED, "f.py::T::test_b[x]": PASSED, "f.py::T::test_b[y]": PASSED},
    "kd_plugin": {"f.py::T::test_a": PASSED, "f.py::T::test_b[x]": FAILED, "f.py::T::test_b[y]": FAILED},
}


def test_a_difference_without_a_reason_is_a_problem():
    assert unexplained(FOUND, {"f.py::T::test_b": "known"}) == []
    assert unexplained(FOUND, {"f.py::T::test_b[x]": "known"}) == [
        "f.py::T::test_b[y]: passed with TRL, failed with ours: ValueError: no"
    ]


def test_a_reason_without_a_difference_is_a_problem():
    reasons = {"f.py::T::test_b": "known", "f.py::T::test_a": "was so once", "f.py::T::test_gone": "renamed"}
    problems = unexplained(FOUND, reasons)
    assert [problem.split(":: ")[0].split(": ")[0] for problem in problems] == ["f.py::T::test_a", "f.py::T::test_gone"]
    assert [p.split(": ")[0] for p in unexplained(FOUND, reasons, partial=True)] == ["f.py::T::test_a"]


def test_a_test_that_one_side_does_not_run_differs():
    found = {"trl": FOUND["trl"], "kd_plugin": {"f.py::T::test_a": PASSED}}
    assert len(unexplained(found, {})) == 2
    assert "| f.py::T::test_b[x] | passed | not run |" in as_table(found)


def test_every_reason_names_a_test_of_the_files_that_run():
    names = [line.split('"')[1] for line in DIFFERENCES.read_text().splitlines() if line.startswith('"')]
    assert names and len(names) == len(set(names))
    for name in names:
        file, owner, test = name.split("::")
        assert owner in TESTS[file] and test.startswith("test_")


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "trl" / "tests").mkdir(parents=True)
    for name in TESTS:
        (tmp_path / "trl" / "tests" / name).write_text("")
    return tmp_path / "trl"


def test_a_checkout_an_archive_and_a_bare_git_directory_are_taken(checkout, tmp_path):
    with tarfile.open(tmp_path / "trl.tar.gz", "w:gz") as archive:
        archive.add(checkout, "trl-1.16.0")
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(checkout), str(tmp_path / "bare")], check=True)
    for i, source in enumerate((checkout, tmp_path / "trl.tar.gz", tmp_path / "bare")):
        unpack(source, tmp_path / f"out{i}")
        assert (tmp_path / f"out{i}" / "tests" / "test_sft_trainer.py").is_file()


def test_what_is_no_archive_of_trl_is_refused(checkout, tmp_path):
    with pytest.raises(SystemExit, match="no checkout, git directory or archive"):
        unpack(tmp_path / "nothing", tmp_path / "out")
    (checkout / "tests" / "test_sft_trainer.py").unlink()
    with pytest.raises(SystemExit, match=r"no tests/test_sft_trainer.py: an archive of TRL's repository is needed"):
        unpack(checkout, tmp_path / "out")


def test_tokens_that_tests_name_by_number_are_those_tokens():
    tokenizer = build(FAMILIES["microsoft/Phi-3.5-mini-instruct"], learn_merges(["red and green and blue"] * 3))
    assert tokenizer.decode([10924, 32007, 322, 7933]) == "Blue<|end|> and green"
    assert len(tokenizer) == 32011 and tokenizer("and green").input_ids != tokenizer(" and green").input_ids
    assert tokenizer.decode(tokenizer("Ein ß, a 字.").input_ids) == "Ein ß, a 字."
