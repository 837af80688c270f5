"""A row has the same tokens and the same trained positions here as in TRL's SFTTrainer."""

import pytest
from datasets import Dataset

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.capturing.rows import Rows
from kd_plugin.capturing.tokenization import Tokenization
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.inputs import load_rows
from kd_plugin.teachers import LocalTeacher

trl = pytest.importorskip("trl")

USER, SYSTEM = {"role": "user", "content": "What is up?"}, {"role": "system", "content": "Be brief."}
ANSWER, LONG = {"role": "assistant", "content": "The sky."}, {"role": "assistant", "content": "The sky. " * 12}

FORMS = {
    "text": [{"text": "One fish two fish."}, {"text": "red fish<|im_end|>"}, {"text": "blue " * 30}],
    "messages": [{"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, LONG, USER, ANSWER]}],
    "prompt_completion": [
        {"prompt": "Q: x? A:", "completion": " y"},
        {"prompt": "Q", "completion": "z<|im_end|>"},
        {"prompt": "a " * 40, "completion": "cut"},  # nothing to train on within max_length
    ],
    "chat_completion": [
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": [LONG]},
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
    ],
    "conversations": [{"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}]}],
    "tokenized": [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}],
    "labelled": [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}],
    "bare_ids": [{"input_ids": [5, 6, 7, 8]}],
}


@pytest.mark.parametrize("completion_only", [None, False])
@pytest.mark.parametrize("max_length", [None, 70])
@pytest.mark.parametrize("form", FORMS)
def test_rows_equal_those_of_sft_trainer(student_dir, tokenizer, tmp_path, form, max_length, completion_only):
    # Only here does TRL ask for a completion mask to be switched on by hand
    chosen = True if form == "tokenized" and completion_only is None else completion_only
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_length=max_length,
        completion_only_loss=chosen,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        student_dir, args=arguments, train_dataset=Dataset.from_list(FORMS[form]), processing_class=tokenizer
    )
    expected = [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in trainer.train_dataset]
    tokenization = Tokenization(tokenizer, 259, max_length, completion_only)
    rows = Rows(Dataset.from_list(FORMS[form]))
    made = [tokenization(rows[i]) for i in range(len(rows))]
    assert [(e.input_ids.tolist(), e.completion_mask.tolist()) for e in made if e is not None] == expected
    assert expected


def test_a_dataset_prepared_by_sft_trainer_is_found_whole(student_dir, tokenizer, teacher_dir, tmp_path):
    rows = Dataset.from_list(FORMS["chat_completion"])
    cache = capture(rows, LocalTeacher(teacher_dir), tmp_path / "c", targets=TopK(4), progress=False)
    arguments = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    prepared = trl.SFTTrainer(student_dir, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset
    for row in prepared:
        index = cache.teacher_index(row["input_ids"])
        assert [i >= 0 for i in index[:-1]] == [label != -100 for label in row["labels"][1:]]


def test_completion_only_needs_a_completion(tokenizer):
    with pytest.raises(DataError, match="no prompt, so completion_only=True"):
        Tokenization(tokenizer, 259, completion_only=True)({"text": "x"})
    with pytest.raises(DataError, match="both be strings or both"):
        Tokenization(tokenizer, 259)({"prompt": "x", "completion": [ANSWER]})
    with pytest.raises(DataError, match="3 entries for 2"):
        Tokenization(tokenizer, 259)({"input_ids": [1, 2], "completion_mask": [1, 1, 1]})


def test_the_fingerprint_is_of_the_rows_and_not_of_the_way_they_came(tmp_path):
    rows = FORMS["text"]
    dataset = Dataset.from_list(rows)
    assert (
        Rows(rows).fingerprint()
        == Rows(dataset).fingerprint()
        == Rows(dataset.add_column("x", [1, 2, 3])).fingerprint()
    )
    assert Rows(rows).fingerprint() != Rows(rows[::-1]).fingerprint()


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "directory", "saved"])
def test_rows_come_from_files(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    dataset = Dataset.from_list(FORMS["messages"])
    path = tmp_path / f"rows.{kind}"
    if kind in ("json", "jsonl"):
        dataset.to_json(path)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "saved":
        dataset.save_to_disk(path)
    else:
        path.mkdir()
        dataset.to_parquet(path / "train-00000.parquet")
    loaded = load_rows(str(path))
    assert Rows(loaded).fingerprint() == Rows(dataset).fingerprint()


def test_files_that_are_no_rows_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"\.json, \.jsonl, \.parquet"):
        load_rows(str(tmp_path / "x.csv"))
    (tmp_path / "x.json").write_text("{not json")
    with pytest.raises(DataError, match=r"x\.json, line 1, column 2: not valid JSON"):
        load_rows(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(str(tmp_path / "nothing"))


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        Tokenization(endless, 259)({"text": "x"})
