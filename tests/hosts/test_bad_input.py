"""Each bad input is one clear error before training, with nothing overwritten."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
from datasets import Dataset

from kd_plugin.cache import TopK
from kd_plugin.cache.files import seal
from kd_plugin.capturing import capture
from kd_plugin.errors import (
    CacheCorruptionError,
    CacheError,
    ConfigError,
    DataError,
    LicenseRefusedError,
    VocabularyError,
)
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import prompts, settings
from tests.tiny import byte_tokenizer, save_tiny

CACHED_ROWS = Dataset.from_list([{"prompt": "a?", "completion": f" b{i}"} for i in range(8)])


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory, teacher_dir):
    directory = tmp_path_factory.mktemp("cache") / "cache"
    capture(CACHED_ROWS, LocalTeacher(teacher_dir), directory, targets=TopK(8), progress=False)
    return directory


@pytest.fixture(scope="module")
def interrupted_dir(tmp_path_factory, teacher_dir):
    """A capture of four units that was killed after two: their records, and no end."""
    whole, cut = (tmp_path_factory.mktemp("cache") / name for name in ("whole", "cut"))
    cache = capture(CACHED_ROWS, LocalTeacher(teacher_dir), whole, targets=TopK(8), shard_rows=2, progress=False)
    shutil.copytree(whole, cut)
    for unit in cache.manifest.units[2:]:
        (cut / unit.file).unlink()
        (cut / "units" / f"{unit.index:05d}.json").unlink()
    begun = replace(cache.manifest, units=(), finished=None)
    (cut / "manifest.json").write_bytes(seal(begun.to_json()))
    return cut


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


def panel(directory, student, teachers, dataset=None, **kwargs):
    return TeacherPanelTrainer(
        model=student,
        teacher_models=teachers,
        args=TeacherPanelConfig(**settings(directory, max_completion_length=4, **kwargs)),
        train_dataset=prompts() if dataset is None else dataset,
    )


def offline(directory, student, cache, dataset=None, processing_class=None, **kwargs):
    return OfflineKDTrainer(
        model=student,
        args=OfflineKDConfig(**settings(directory, **kwargs)),
        train_dataset=dataset,
        teacher_cache=cache,
        processing_class=processing_class or byte_tokenizer(),
    )


@pytest.mark.usefixtures("no_model_is_loaded")
class TestBeforeAnyModelIsLoaded:
    def test_vocabularies_that_differ(self, tmp_path, student_dir):
        swapped = tmp_path / "swapped"
        swapped.mkdir()
        byte_tokenizer(swap=("a", "b")).save_pretrained(swapped)
        (swapped / "README.md").write_text("---\nlicense: mit\n---\n")
        with pytest.raises(VocabularyError, match=r"2 ids differ, first: id \d+ is 'a' for the student and 'b' for"):
            panel(tmp_path / "run", student_dir, {"t": str(swapped)})

    def test_a_dataset_without_prompt(self, tmp_path, student_dir, teacher_dir):
        rows = Dataset.from_dict({"question": ["a"], "answer": ["b"]})
        with pytest.raises(DataError, match="no column 'prompt'; it has 'question', 'answer'"):
            panel(tmp_path, student_dir, {"t": teacher_dir}, rows)

    def test_teacher_id_that_names_no_teacher(self, tmp_path, student_dir, teacher_dir):
        rows = prompts(teacher_id=["math"] * 23 + ["mth"])
        with pytest.raises(DataError, match=r"'mth' names no teacher.*there are 'math', 'code'.*Did you mean 'math'"):
            panel(tmp_path, student_dir, {"math": teacher_dir, "code": teacher_dir}, rows)

    def test_several_teachers_and_no_teacher_id(self, tmp_path, student_dir, teacher_dir):
        with pytest.raises(DataError, match="Add a column 'teacher_id' holding one of 'math', 'code'"):
            panel(tmp_path, student_dir, {"math": teacher_dir, "code": teacher_dir})

    def test_a_teacher_that_never_ends_where_the_student_ends(self, tmp_path, student_dir, teacher_dir, caplog):
        other = tmp_path / "other"
        shutil.copytree(teacher_dir, other)
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = "<|endoftext|>"
        tokenizer.save_pretrained(other)
        (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
        with pytest.raises(VocabularyError, match=r"ends its responses with token id 2, and teacher 't' with \[0\]"):
            panel(tmp_path / "run", student_dir, {"t": str(other)})
        with pytest.raises(AssertionError, match="a model was loaded"):  # past the check
            panel(tmp_path / "run", student_dir, {"t": str(other)}, allow_other_eos=True)
        (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
        with pytest.raises(AssertionError, match="a model was loaded"):
            panel(tmp_path / "run", student_dir, {"t": str(other)})
        assert "differ in their end-of-sequence token" in caplog.text and "lengths can explode" in caplog.text

    def test_no_teacher(self, tmp_path, student_dir):
        with pytest.raises(ConfigError, match="No teacher is given"):
            panel(tmp_path, student_dir, None)

    @pytest.mark.parametrize(
        "declared",
        [
            {"model": "gpt-4o", "endpoint": "https://api.openai.com/v1"},
            {"model": "claude-opus-4"},
            {"endpoint": "https://api.anthropic.com"},
        ],
    )
    def test_a_closed_api_as_teacher(self, declared, tmp_path, student_dir, teacher_dir):
        lineage = {"teachers": {"t": declared}}
        with pytest.raises(LicenseRefusedError) as refused:
            panel(tmp_path / "run", student_dir, {"t": teacher_dir}, lineage=lineage)
        message = str(refused.value)
        assert "OpenAI" in message or "Anthropic" in message
        assert "compet" in message  # the clause
        assert "override" in message.lower() or "choose" in message.lower()  # the way out
        assert not (tmp_path / "run").exists()

    def test_a_teacher_without_a_license(self, tmp_path, student_dir, teacher_dir):
        bare = tmp_path / "bare"
        shutil.copytree(teacher_dir, bare)
        (bare / "README.md").unlink()
        with pytest.raises(LicenseRefusedError, match=r"license: apache-2.0|license.*own"):
            panel(tmp_path / "run", student_dir, {"t": str(bare)})

    def test_a_cache_made_with_another_tokenizer(self, tmp_path, student_dir, cache_dir):
        with pytest.raises(VocabularyError, match="tokenizer"):
            offline(tmp_path, student_dir, str(cache_dir), processing_class=byte_tokenizer(swap=("a", "b")))

    def test_a_temperature_that_was_not_captured(self, tmp_path, student_dir, cache_dir):
        with pytest.raises(ConfigError, match="temperature"):
            offline(tmp_path, student_dir, str(cache_dir), temperature=2.0)

    def test_no_cache_at_that_place(self, tmp_path, student_dir):
        with pytest.raises(CacheError, match="nowhere"):
            offline(tmp_path, student_dir, str(tmp_path / "nowhere"))

    def test_a_cache_with_a_flipped_byte(self, tmp_path, student_dir, cache_dir):
        damaged = tmp_path / "damaged"
        shutil.copytree(cache_dir, damaged)
        shard = next(iter(sorted(damaged.rglob("*.parquet"))))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        before = {p: p.read_bytes() for p in damaged.rglob("*") if p.is_file()}
        with pytest.raises(CacheCorruptionError, match=shard.name):
            offline(tmp_path / "run", student_dir, str(damaged))
        assert {p: p.read_bytes() for p in before} == before


@pytest.mark.usefixtures("no_model_is_loaded")
class TestCachesThatDoNotFit:
    def test_another_vocabulary_size(self, tmp_path, student_dir, cache_dir):
        larger = byte_tokenizer()
        larger.add_tokens(["<new>"])
        with pytest.raises(AssertionError, match="a model was loaded"):  # it shares all of the cache's: past the check
            offline(tmp_path, student_dir, str(cache_dir), processing_class=larger)
        bare = tmp_path / "bare"
        shutil.copytree(cache_dir, bare)
        (bare / "vocabulary.json").unlink()  # as captured before tokens were kept
        with pytest.raises(VocabularyError, match=r"259 token ids.*the student has 260.*capture again"):
            offline(tmp_path, student_dir, str(bare), processing_class=larger)

    def test_a_temperature_with_truncated_targets_names_the_captured_one(self, tmp_path, student_dir, cache_dir):
        with pytest.raises(
            ConfigError, match=r"temperature=2\.0, but .* captured at 1\.0 and its targets are truncated"
        ):
            offline(tmp_path, student_dir, str(cache_dir), temperature=2.0)

    def test_an_interrupted_cache_says_how_much_is_missing(self, tmp_path, student_dir, interrupted_dir):
        message = r"is not finished: 2 of 4 units are missing \(4 of 8 dataset rows\).*allow_partial=True"
        with pytest.raises(CacheError, match=message):
            offline(tmp_path, student_dir, str(interrupted_dir))

    def test_two_captures_with_different_settings_in_one_directory(self, teacher_dir, cache_dir):
        before = {p: p.read_bytes() for p in cache_dir.rglob("*") if p.is_file()}
        with pytest.raises(ConfigError, match=r"'k': 8.*'k': 9"):
            capture(CACHED_ROWS, LocalTeacher(teacher_dir), cache_dir, targets=TopK(9), progress=False)
        assert {p: p.read_bytes() for p in before} == before


def test_batches_that_the_first_rank_would_cut(tmp_path, student_dir, cache_dir):
    with pytest.raises(ConfigError, match="dispatch_batches=True, which cuts batches by rows"):
        offline(tmp_path, student_dir, str(cache_dir), accelerator_config={"dispatch_batches": True})


def test_the_way_out_of_an_interrupted_cache(tmp_path, student_dir, interrupted_dir):
    trainer = offline(tmp_path / "a", student_dir, str(interrupted_dir), allow_partial=True, max_steps=1)
    trainer.train()
    assert len(trainer.train_dataset) == 4
    given = offline(tmp_path / "b", student_dir, str(interrupted_dir), CACHED_ROWS, allow_partial=True)
    assert len(given.train_dataset) == 4  # the others have no teacher, and no cross-entropy is asked for
    mixed = offline(tmp_path / "c", student_dir, str(interrupted_dir), CACHED_ROWS, allow_partial=True, ce_weight=1.0,
                    max_steps=8, per_device_train_batch_size=1)  # fmt: skip
    mixed.train()
    assert len(mixed.train_dataset) == 8 and len(mixed.state.log_history) == 9


def test_another_chat_template_is_warned_of_and_its_rows_are_not_found(tmp_path, student_dir, teacher_dir):
    chats = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    cache = capture(chats, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(8), progress=False)
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_start|>{{ m['role'] }}", "{{ m['role'] }}:")
    with (
        pytest.warns(UserWarning, match="captured with another chat template"),
        pytest.raises(DataError, match="1 of 1 rows of the train dataset are not in the teacher cache"),
    ):
        offline(tmp_path / "run", student_dir, cache, chats, processing_class=other)


@pytest.mark.parametrize("shape", [{}, {"packing": True}], ids=["padded", "packed"])
def test_rows_longer_than_max_length_are_counted(shape, tmp_path, student_dir, teacher_dir, caplog):
    rows = Dataset.from_list([{"prompt": "a?", "completion": " b" * length} for length in (2, 20, 30)])
    cache = capture(rows, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(8), progress=False)
    logger = logging.getLogger("kd_plugin.cache.training_rows")
    logger.addHandler(caplog.handler)
    trainer = offline(tmp_path / "run", student_dir, cache, rows, max_length=23, **shape)
    logger.removeHandler(caplog.handler)
    assert "2 of 3 rows of the train dataset are longer than max_length=23: 60 tokens are cut off" in caplog.text
    assert "The longest row has 63 tokens" in caplog.text
    assert all(len(row["input_ids"]) == len(row["teacher_index"]) for row in trainer.train_dataset)


def test_rows_that_the_cache_does_not_hold(tmp_path, student_dir, cache_dir):
    rows = Dataset.from_list([{"prompt": "a?", "completion": " b1"}, {"prompt": "a?", "completion": " new"}])
    with pytest.raises(DataError, match=r"1 of 2 rows of the train dataset are not in the teacher cache.*row 1"):
        offline(tmp_path, student_dir, str(cache_dir), rows)
    trainer = offline(tmp_path, student_dir, str(cache_dir), rows, allow_partial=True)
    assert len(trainer.train_dataset) == 1


def test_an_output_directory_that_holds_another_run(tmp_path, student_dir, cache_dir):
    first = offline(tmp_path, student_dir, str(cache_dir), save_strategy="steps", save_steps=2, max_steps=2)
    first.train()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    second = offline(tmp_path, student_dir, str(cache_dir), save_strategy="steps", save_steps=2, max_steps=4)
    run_id = json.loads((tmp_path / "checkpoint-2" / "lineage.json").read_text())["run"]["id"]
    with pytest.raises(ConfigError, match=f"run {run_id}.*resume_from_checkpoint=True"):
        second.train()
    assert {p: p.read_bytes() for p in before} == before
    second.train(resume_from_checkpoint=True)
    resumed = json.loads((tmp_path / "checkpoint-4" / "lineage.json").read_text())
    assert resumed["run"]["id"] == run_id


def test_configs_refuse_at_construction(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'reverse_kl'"):
        TeacherPanelConfig(output_dir=str(tmp_path), divergence="reverse_lk", bf16=False)
    with pytest.raises(ConfigError, match="Did you mean 'route'"):
        TeacherPanelConfig(output_dir=str(tmp_path), combine="rout", bf16=False)
    with pytest.raises(ConfigError, match="Did you mean 'bucket'"):
        OfflineKDConfig(output_dir=str(tmp_path), tail="buckt", bf16=False)
    with pytest.raises(ConfigError, match="not both 0"):
        OfflineKDConfig(output_dir=str(tmp_path), kd_weight=0.0, bf16=False)


def test_padded_output_rows_are_cut_on_both_sides(tmp_path, student_dir):
    padded = save_tiny(tmp_path / "padded", seed=2, hidden=48, vocab_size=320)
    trainer = panel(tmp_path / "run", student_dir, {"t": padded}, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["divergence/t"] > 0
