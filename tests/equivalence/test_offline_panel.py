"""Several caches at once are the weighted sum of training on each."""

import pytest
from datasets import Dataset

from kd_plugin.cache import Sampled, TeacherCache, TopK
from kd_plugin.cache.joint import JointCache
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import flip
from tests.equivalence.test_offline_packing import COMPLETIONS, require_same, step
from tests.hosts.runs import assert_same

FIRST, SECOND = COMPLETIONS.select(range(5)), COMPLETIONS.select(range(5, 12))


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher_dir, other_teacher_dir):
    directory = tmp_path_factory.mktemp("caches")
    plan = {
        "a": (teacher_dir, COMPLETIONS, TopK(16)),
        "b": (other_teacher_dir, COMPLETIONS, Sampled(20)),
        "first": (teacher_dir, FIRST, TopK(16)),
        "second": (other_teacher_dir, SECOND, TopK(8)),
    }
    return {
        name: str(capture(rows, LocalTeacher(t, dtype="float32"), directory / name, targets=kept, progress=False).path)
        for name, (t, rows, kept) in plan.items()
    }


def combined(runs, shares):
    loss = sum(share * run[0] for share, run in zip(shares, runs, strict=True))
    names = runs[0][1]
    return loss, {n: sum(share * run[1][n] for share, run in zip(shares, runs, strict=True)) for n in names}


@pytest.mark.parametrize("shape", [{}, {"packing": True, "max_length": 96}], ids=["padded", "packed"])
def test_weighted_sum_of_separate_runs(shape, caches, tmp_path, student_dir):
    runs = [step(tmp_path / n, caches[n], student_dir, COMPLETIONS) for n in ("a", "b")]
    joint = step(tmp_path / "ab", {caches["a"]: 3.0, caches["b"]: 1.0}, student_dir, COMPLETIONS, **shape)
    require_same(joint, combined(runs, [0.75, 0.25]))
    assert joint[2].train_dataset.column_names.count("teacher_index_1") == 1


def test_a_list_weighs_equally_and_takes_the_rows_of_the_caches(caches, tmp_path, student_dir):
    runs = [step(tmp_path / n, caches[n], student_dir, COMPLETIONS) for n in ("a", "b")]
    opened = [TeacherCache(caches["a"]), caches["b"]]
    trainer_rows = step(tmp_path / "ab", opened, student_dir, None)
    require_same(trainer_rows, combined(runs, [0.5, 0.5]))


def test_caches_over_different_rows_each_teach_their_own(caches, tmp_path, student_dir):
    runs = [
        step(tmp_path / "first", caches["first"], student_dir, FIRST),
        step(tmp_path / "second", caches["second"], student_dir, SECOND),
    ]
    tokens = [TeacherCache(caches[n]).tokens for n in ("first", "second")]
    shares = [count / sum(tokens) for count in tokens]
    for rows in (COMPLETIONS, None):
        joint = step(tmp_path / f"both-{rows is None}", [caches["first"], caches["second"]], student_dir, rows)
        require_same(joint, combined(runs, shares))


def test_the_cross_entropy_counts_once(caches, tmp_path, student_dir):
    plain = step(tmp_path / "a", caches["a"], student_dir, COMPLETIONS, kd_weight=0.0, ce_weight=1.0)
    joint = step(tmp_path / "b", [caches["a"], caches["b"]], student_dir, COMPLETIONS, kd_weight=0.0, ce_weight=1.0)
    require_same(joint, plain)


def test_both_caches_stand_in_the_lineage(caches, tmp_path, student_dir):
    trainer = step(tmp_path / "run", [caches["a"], caches["b"]], student_dir, COMPLETIONS)[2]
    trainer.save_model(str(tmp_path / "out"))
    text = (tmp_path / "out" / "lineage.json").read_text()
    assert all(TeacherCache(caches[n]).manifest.content_digest in text for n in ("a", "b"))


def test_bad_panels(caches, tmp_path, student_dir):
    a = caches["a"]
    with pytest.raises(ConfigError, match="names 2 caches, 1 different"):
        step(tmp_path, [a, a], student_dir, COMPLETIONS)
    with pytest.raises(ConfigError, match="expected numbers of at least 0, not all 0"):
        step(tmp_path, {a: 0.0}, student_dir, COMPLETIONS)
    new = Dataset.from_list([*COMPLETIONS, {"prompt": "new?", "completion": " yes"}])
    with pytest.raises(DataError, match=r"1 of 13 rows of the train dataset are not in the teacher cache.*/a, .*/b"):
        step(tmp_path, [a, caches["b"]], student_dir, new)


def test_rows_of_another_cache_are_refused(caches, tmp_path, student_dir):
    rows = TeacherCache(caches["second"]).dataset()
    with pytest.raises(DataError, match="was not made from"):
        step(tmp_path, caches["a"], student_dir, rows, completion_only_loss=True)
    own = TeacherCache(caches["a"]).dataset().shuffle(seed=1)
    run = step(tmp_path / "own", caches["a"], student_dir, own, completion_only_loss=True)
    reference = step(tmp_path / "joined", caches["a"], student_dir, COMPLETIONS)
    assert run[0] == pytest.approx(reference[0], rel=1e-4)
    assert_same(run[1], reference[1])


def test_caches_put_together_by_merge_train_as_both(caches, tmp_path, student_dir, capsys):
    out = tmp_path / "panel"
    arguments = ["cache", "merge", str(out), caches["a"], caches["b"], "--weights", "3", "1"]
    assert main(arguments) == 0
    assert main(["cache", "verify", str(out)]) == 0 and main(["cache", "info", str(out)]) == 0
    assert "weight 3" in capsys.readouterr().out
    together = step(tmp_path / "run", str(out), student_dir, COMPLETIONS)
    require_same(together, step(tmp_path / "both", {caches["a"]: 3, caches["b"]: 1}, student_dir, COMPLETIONS))
    assert main(arguments) == 2 and "is not empty" in capsys.readouterr().err
    flip(out / "members.json", 40)
    assert main(["cache", "verify", str(out)]) == 1 and "members.json" in capsys.readouterr().err


def test_caches_put_together_by_an_earlier_version_are_read(caches, tmp_path, capsys):
    """Their record had the name that a checkpoint gives to the description of its panel."""
    out = tmp_path / "panel"
    assert main(["cache", "merge", str(out), caches["a"], caches["b"]]) == 0
    (out / "members.json").rename(out / "panel.json")
    assert main(["cache", "verify", str(out)]) == 0 and len(JointCache.open(str(out)).members) == 2
    flip(out / "panel.json", 40)
    assert main(["cache", "verify", str(out)]) == 1 and "panel.json" in capsys.readouterr().err


def test_caches_that_do_not_go_together(caches, tmp_path, capsys):
    assert main(["cache", "merge", str(tmp_path / "p"), caches["first"], caches["second"]]) == 2
    assert "5 are only in the first, 7 only in the second" in capsys.readouterr().err
    assert main(["cache", "merge", str(tmp_path / "p"), caches["a"], caches["b"], "--weights", "1"]) == 2
    assert "1 weights [1.0] for 2 caches" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
