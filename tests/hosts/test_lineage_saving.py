"""Every way of saving, of our trainers and of others, leaves complete lineage, also where it goes to a hub."""

import json
import shutil
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import LicenseRefusedError, LineageError
from kd_plugin.lineage import RunLineage, load_record, proof, verify
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import (
    LicenseLineageCallback,
    OfflineKDConfig,
    OfflineKDTrainer,
    TeacherPanelConfig,
    TeacherPanelTrainer,
)
from tests.hosts.runs import LORA, prompts, settings
from tests.tiny import byte_tokenizer

RUN = {"run": {"id": "test-run", "date": "2026-01-02"}}
ROWS = Dataset.from_list([{"prompt": "a?", "completion": f" b{i}"} for i in range(8)])
KINDS = ("transformers", "sft", "offline", "panel")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    directory = tmp_path_factory.mktemp("cache") / "cache"
    return capture(ROWS, LocalTeacher(teacher_dir), directory, targets=TopK(8), progress=False)


@pytest.fixture
def build(tmp_path, student_dir, teacher_dir, cache):
    """Return a function that builds a trainer of a kind, saving at each of two steps."""

    def of_kind(kind, peft_config=None, lineage=RUN, **kwargs):
        common = settings(
            tmp_path / kind, **{"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "seed": 3, **kwargs}
        )
        if kind == "offline":
            return OfflineKDTrainer(
                model=student_dir,
                args=OfflineKDConfig(**common, lineage=lineage),
                teacher_cache=cache,
                eval_dataset=ROWS if "eval_strategy" in kwargs else None,
                processing_class=byte_tokenizer(),
                peft_config=peft_config,
            )
        if kind == "panel":
            return TeacherPanelTrainer(
                model=student_dir,
                teacher_models={"t": teacher_dir},
                args=TeacherPanelConfig(**common, max_completion_length=4, lineage=lineage),
                train_dataset=prompts(),
                eval_dataset=prompts(count=4),
                peft_config=peft_config,
            )
        callback = LicenseLineageCallback(lineage=lineage)
        if kind == "sft":
            trainer = SFTTrainer(
                model=student_dir,
                args=SFTConfig(**common),
                train_dataset=ROWS,
                eval_dataset=ROWS,
                peft_config=peft_config,
                callbacks=[callback],
            )
        else:
            rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
            trainer = Trainer(
                model=AutoModelForCausalLM.from_pretrained(student_dir),
                args=TrainingArguments(**common),
                train_dataset=rows,
                eval_dataset=rows,
                callbacks=[callback],
            )
        callback.attach(trainer)
        return trainer

    return of_kind


class Hub:
    """Stands in for the hub: keeps what is uploaded, as it is at that moment."""

    def __init__(self, directory):
        self.directory = directory
        self.uploads = []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, run_as_future=False, ignore_patterns=None, **kwargs):
        place = self.directory / f"upload-{len(self.uploads)}"
        shutil.copytree(folder_path, place, ignore=shutil.ignore_patterns(*(ignore_patterns or ())))
        self.uploads.append(place)
        done = Future()
        done.set_result(None)
        return done if run_as_future else None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    return fake


def assert_whole(directory):
    report = verify(directory)
    assert report.exit_code == 0, report.problems
    assert (directory / "NOTICE").is_file() and any((directory / "LICENSES").iterdir())
    record = json.loads((directory / "lineage.json").read_text())
    assert record["subjects"]
    return record


@pytest.mark.parametrize("kind", KINDS)
def test_best_model_rotation_and_weights_alone(kind, build, tmp_path):
    trainer = build(
        kind,
        max_steps=3,
        save_total_limit=2,
        save_only_model=True,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        per_device_eval_batch_size=4,
    )
    trainer.train()
    kept = sorted((tmp_path / kind).glob("checkpoint-*"))
    assert len(kept) == 2
    for checkpoint in kept:
        assert assert_whole(checkpoint)["checkpoint"]["step"] == int(checkpoint.name.split("-")[1])
        assert not (checkpoint / "optimizer.pt").exists()
    trainer.save_model(str(tmp_path / "best"))  # the best model was loaded again
    assert_whole(tmp_path / "best")


@pytest.mark.parametrize(("kind", "peft"), [(k, LORA if k in ("sft", "panel") else None) for k in KINDS])
def test_a_push_in_mid_run_and_at_the_end(kind, peft, build, hub, tmp_path):
    trainer = build(kind, peft, push_to_hub=True, hub_strategy="all_checkpoints", hub_model_id="out")
    trainer.train()
    assert len(hub.uploads) == 4  # at each of two steps the model, and the checkpoint
    for upload, step in zip(hub.uploads, (1, 1, 2, 2), strict=True):
        assert assert_whole(upload)["checkpoint"]["step"] == step
    trainer.push_to_hub()
    last = hub.uploads[-1]
    assert assert_whole(last)["checkpoint"]["step"] == 2
    card = (last / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and "licence" not in front
    assert "## License lineage" in card
    if kind != "transformers":
        assert "trl" in front["tags"]


def test_a_push_of_what_may_not_be_shipped_uploads_nothing(build, hub):
    writer = {"model": "meta-llama/Llama-3.1-8B", "license": "llama3.1"}
    data = [{"repo": "a/b", "license": "mit", "generated_by": [writer]}]
    lineage = {**RUN, "datasets": data, "use": {"mau_over_700m_at_release": False}}
    trainer = build("sft", lineage=lineage, push_to_hub=True, hub_model_id="acme")
    with pytest.raises(LicenseRefusedError, match="Llama"):
        trainer.train()
    assert hub.uploads == []


def test_a_push_without_lineage_uploads_nothing(build, hub, monkeypatch):
    trainer = build("offline", push_to_hub=True, hub_model_id="acme")

    def full_disk(*args, **kwargs):
        raise LineageError("No space left on device")

    monkeypatch.setattr("kd_plugin.lineage.RunLineage.write", full_disk)
    with pytest.raises(LineageError, match="No space left"):
        trainer.train()
    assert hub.uploads == []


def test_large_checkpoints_are_hashed_while_training_goes_on(build, monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "LARGE", 0)
    trainer = build("panel", save_total_limit=1, max_steps=4)
    threads, write = [], RunLineage.write

    def watched(self, directory, **kwargs):
        threads.append(threading.current_thread().name)
        return write(self, directory, **kwargs)

    monkeypatch.setattr(RunLineage, "write", watched)
    trainer.train()
    assert len(threads) == 4 and all(name.startswith("license-lineage") for name in threads)
    assert [p.name for p in (tmp_path / "panel").glob("checkpoint-*")] == ["checkpoint-4"]
    assert_whole(tmp_path / "panel" / "checkpoint-4")


class _Uploader(TrainerCallback):
    """A user's callback that ships each checkpoint."""

    seen: list = []  # noqa: RUF012

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(verify(f"{args.output_dir}/checkpoint-{state.global_step}").exit_code)


def test_a_users_callback_finds_the_record_on_save(build):
    trainer = build("panel")
    uploader = _Uploader()
    trainer.add_callback(uploader)
    trainer.train()
    assert uploader.seen == [0, 0]


def test_a_model_that_is_merged_from_the_trained_adapter_carries_the_lineage(tmp_path, build):
    trainer = build("offline", LORA, max_steps=1)
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert verify(tmp_path / "merged").exit_code == 0
    merged = load_record(tmp_path / "merged")
    assert [s["path"] for s in merged["subjects"]] == ["model.safetensors"] and merged["checkpoint"]["step"] == 1
    assert merged["nodes"] == load_record(tmp_path / "offline" / "checkpoint-1")["nodes"]
