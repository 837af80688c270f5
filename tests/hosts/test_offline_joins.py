"""Which targets a row of the trainer gets: rows that repeat, rows that capture or training cuts."""

import pytest
from datasets import Dataset

from kd_plugin.cache import Generation, Sampled, TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import DataError
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.equivalence.test_offline_packing import require_same, step
from tests.hosts.runs import settings
from tests.tiny import byte_tokenizer

ROWS = [{"prompt": f"{i}?", "completion": f" answer {i} {'y' * (3 * i % 11)}"} for i in range(6)]
REPEATED = [ROWS[0], ROWS[1], ROWS[0], ROWS[2], ROWS[0]]
TEXTS = Dataset.from_list([{"text": f"the text of row {i} {'z' * (5 * i % 13)}"} for i in range(6)])


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


def build(directory, cache, student, dataset=None, **kwargs):
    return OfflineKDTrainer(
        model=student,
        args=OfflineKDConfig(**settings(directory, **{"shuffle_dataset": False, **kwargs})),
        train_dataset=dataset,
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
    )


@pytest.mark.parametrize("targets", [TopK(16), Sampled(8)], ids=["top_k", "sampled"])
def test_each_of_the_rows_that_repeat_keeps_its_own_targets(targets, teacher, tmp_path, student_dir):
    cache = capture(REPEATED, teacher, tmp_path / "cache", targets=targets, shard_rows=2, progress=False)
    own = build(tmp_path / "own", cache, student_dir)
    assert own.train_dataset["teacher_index"] == cache.dataset()["teacher_index"]
    taken = [i for row in own.train_dataset["teacher_index"] for i in row if i >= 0]
    assert sorted(taken) == list(range(cache.tokens))
    joined = build(tmp_path / "joined", cache, student_dir, Dataset.from_list(REPEATED))
    assert len(joined.train_dataset) == len(REPEATED)


def test_several_completions_a_prompt_train_as_the_recipe_says(teacher, tmp_path, student_dir):
    """At a low temperature the teacher writes the same completion several times."""
    write = Generation(n=3, max_new_tokens=4, temperature=0.01, keep_unfinished=True)
    cache = capture([{"prompt": "a?"}], teacher, tmp_path / "c", targets=Sampled(6), generate=write, progress=False)
    assert len(set(cache.dataset()["example_id"])) < len(cache) == 3
    trainer = build(tmp_path / "run", cache, student_dir, max_steps=1)
    trainer.train()
    assert trainer.train_dataset["teacher_index"] == cache.dataset()["teacher_index"]


def test_rows_that_repeat_in_a_panel_of_caches_take_the_twins_in_turn(
    teacher, tmp_path, other_teacher_dir, student_dir
):
    other = LocalTeacher(other_teacher_dir, dtype="float32")
    first = capture(REPEATED, teacher, tmp_path / "a", targets=TopK(4), progress=False)
    second = capture(REPEATED, other, tmp_path / "b", targets=TopK(4), progress=False)
    rows = build(tmp_path / "run", [first, second], student_dir).train_dataset
    assert rows["teacher_index"] == first.dataset()["teacher_index"]
    assert rows["teacher_index_1"] == second.dataset()["teacher_index"]


def test_rows_of_another_cache_are_still_refused_where_rows_repeat(teacher, tmp_path, student_dir):
    cache = capture(REPEATED, teacher, tmp_path / "a", targets=TopK(4), progress=False)
    rows = cache.dataset().map(lambda row: {"teacher_index": [-1 if i < 0 else i + 60 for i in row["teacher_index"]]})
    with pytest.raises(DataError, match="was not made from"):
        build(tmp_path / "run", cache, student_dir, rows)


def targets_by_token(rows):
    return [list(zip(row["input_ids"], row["teacher_index"], strict=True)) for row in rows]


@pytest.mark.parametrize("max_length", [20, 12])
@pytest.mark.parametrize("kind", ["prompts", "texts"])
def test_the_cut_of_capture_and_an_equal_or_shorter_one_of_training_join(
    kind, max_length, teacher, tmp_path, student_dir
):
    rows = TEXTS if kind == "texts" else Dataset.from_list(ROWS)
    cut = capture(rows, teacher, tmp_path / "cut", targets=TopK(16), max_length=20, progress=False)
    whole = capture(rows, teacher, tmp_path / "whole", targets=TopK(16), progress=False)
    assert any(len(row["input_ids"]) > 20 for row in whole.dataset())
    run = step(tmp_path / "a", cut, student_dir, rows, max_length=max_length)
    require_same(run, step(tmp_path / "b", whole, student_dir, rows, max_length=max_length))
    packed = step(tmp_path / "c", cut, student_dir, rows, max_length=max_length, packing=True)
    require_same(packed, run)


def test_caches_that_were_cut_differently_teach_one_row_together(teacher, tmp_path, other_teacher_dir, student_dir):
    other = LocalTeacher(other_teacher_dir, dtype="float32")
    cut = capture(TEXTS, teacher, tmp_path / "cut", targets=TopK(4), max_length=20, progress=False)
    whole = capture(TEXTS, other, tmp_path / "whole", targets=TopK(4), progress=False)
    for dataset in (TEXTS, None):
        rows = build(tmp_path / "run", [cut, whole], student_dir, dataset).train_dataset
        assert rows["input_ids"] == whole.dataset()["input_ids"]
        assert rows["teacher_index_1"] == whole.dataset()["teacher_index"]
        assert [row[:20] for row in rows["teacher_index"]] == cut.dataset()["teacher_index"]
        assert all(i == -1 for row in rows["teacher_index"] for i in row[20:])


def test_a_cache_of_version_1_joins_as_before(tmp_path, student_dir):
    """Its rows are the first three of `prompt_rows`."""
    import shutil

    from tests.core.cache_help import prompt_rows
    from tests.core.test_cache_versions import VERSION_1

    shutil.copytree(VERSION_1, tmp_path / "old")
    cache = TeacherCache(tmp_path / "old")
    joined = build(tmp_path / "run", cache, student_dir, Dataset.from_list(prompt_rows(3)))
    assert joined.train_dataset["teacher_index"] == cache.dataset()["teacher_index"]
