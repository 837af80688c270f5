"""Training on a teacher's text: every host, any student tokenizer, the loss of plain fine-tuning, lineage in all."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from kd_plugin.cli.main import main
from kd_plugin.errors import CacheError, ConfigError, LicenseRefusedError
from kd_plugin.lightning import KDDataModule, OfflineKDModule
from kd_plugin.lineage import load_record
from kd_plugin.teachers import client
from kd_plugin.text import ServerWriter, capture_text, load_text
from kd_plugin.transformers import OfflineKDMixin
from kd_plugin.trl import LicenseLineageCallback, OfflineKDConfig, OfflineKDTrainer
from tests.core.text_worker import questions
from tests.hosts.runs import assert_same
from tests.lightning.help import Losses
from tests.lightning.help import trainer as lightning_trainer
from tests.scripted_writer import Script, scripted_writer

SMALL = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What a teacher of no known tokenizer wrote."""
    out = tmp_path_factory.mktemp("text") / "text"
    before, client._FIRST_PAUSE = client._FIRST_PAUSE, 0.01
    write = lambda body: "<think>thinking</think>" + "It is " * (1 + len(body["messages"][0]["content"]) % 3)  # noqa: E731
    with scripted_writer(Script(write=write)) as (url, _):
        capture_text(
            questions(12), ServerWriter(url, "scripted", repo="org/scripted", license="mit"), out, progress=False
        )
    client._FIRST_PAUSE = before
    return str(out)


def lineage_of(directory):
    record = load_record(directory)
    names = {node["name"]: node for node in record["nodes"]}
    assert names["org/scripted"]["licenses"] == ["mit"]
    assert {e["kind"] for e in record["edges"] if e["to"] == names["org/scripted"]["id"]} == {"trained_on_outputs"}
    return record


def test_the_loss_is_that_of_sft_on_the_same_rows(text, student_dir, tmp_path):
    def losses(trainer):
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    options = {**SMALL, "max_steps": 4, "logging_steps": 1, "seed": 3}
    ours = losses(OfflineKDTrainer(student_dir, OfflineKDConfig(str(tmp_path / "a"), **options), teacher_text=text))
    rows = Dataset.from_list(load_text(text).select_columns(["prompt", "completion"]).to_list())
    theirs = losses(SFTTrainer(student_dir, SFTConfig(str(tmp_path / "b"), **options), train_dataset=rows))
    assert ours == pytest.approx(theirs, abs=1e-6) and len(ours) == 4


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}, {"kd_weight": 0.0, "ce_weight": 1.0}])
def test_trl_trains_and_writes_the_lineage(text, student_dir, tmp_path, options):
    args = OfflineKDConfig(str(tmp_path / "out"), teacher_text=text, **SMALL, **options)
    trainer = OfflineKDTrainer(student_dir, args)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    record = lineage_of(tmp_path / "out")
    assert record["run"]["method"] == "offline_kd"
    # The rows are the text itself, of which its own record speaks: no data of unknown origin beside it
    assert {e["kind"] for e in record["edges"] if e["from"] == "self"} == {"initialized_from", "trained_on_outputs"}


def test_plain_sft_with_the_callback_has_the_same_lineage(text, student_dir, tmp_path):
    trainer = SFTTrainer(
        student_dir, SFTConfig(str(tmp_path / "out"), **SMALL), train_dataset=load_text(text),
        callbacks=[LicenseLineageCallback()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    lineage_of(tmp_path / "out")


def test_a_plain_transformers_trainer_trains(text, student_dir, tmp_path):
    class Mine(OfflineKDMixin, Trainer):
        pass

    model = AutoModelForCausalLM.from_pretrained(student_dir)
    before = model.get_input_embeddings().weight.detach().clone()
    trainer = Mine(
        model, TrainingArguments(str(tmp_path / "out"), **SMALL), teacher_text=text,
        processing_class=AutoTokenizer.from_pretrained(student_dir), eval_dataset=None,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"][:, 0] == -100).all() and (batch["labels"] != -100).any()
    trainer.train()
    assert not torch.equal(before, model.get_input_embeddings().weight)
    trainer.save_model(str(tmp_path / "out"))
    lineage_of(tmp_path / "out")


def test_a_run_goes_on_in_mid_epoch_and_into_the_next(text, student_dir, tmp_path):
    def run(directory, steps, resume=None):
        options = {**SMALL, "max_steps": steps, "logging_steps": 1, "seed": 3, "lr_scheduler_type": "constant"}
        options |= {"save_strategy": "steps", "save_steps": 4}
        trainer = OfflineKDTrainer(
            student_dir, OfflineKDConfig(str(tmp_path / directory), **options), teacher_text=text
        )
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run("whole", 9)  # 6 steps an epoch
    run("parts", 4)
    assert run("parts", 9, resume=True) == pytest.approx(whole, rel=1e-4)


def test_lightning_trains_from_its_configuration(text, student_dir, tmp_path):
    from kd_plugin.lightning.__main__ import main as fit

    config = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": 2, "logger": False, "accelerator": "cpu", "default_root_dir": str(tmp_path),
            "enable_progress_bar": False, "limit_val_batches": 1, "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                           "init_args": {"dirpath": str(tmp_path / "ckpt"), "filename": "last"}}],
        },
        "model": {"class_path": "OfflineKDModule",
                  "init_args": {"model": student_dir, "kd_weight": 0.0, "ce_weight": 1.0}},
        "data": {"text": text, "batch_size": 2, "validation_rows": 2},
    }  # fmt: skip
    path = tmp_path / "fit.yaml"
    path.write_text(json.dumps(config))
    fit(["fit", "--config", str(path)])
    lineage_of(tmp_path / "ckpt" / "last.ckpt")


def test_lightning_takes_the_steps_of_one_large_batch(text, student_dir, tmp_path):
    """Micro-batches of one row have different numbers of tokens; the last window of an epoch is short of one."""
    found = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        module = OfflineKDModule(student_dir, kd_weight=0.0, ce_weight=1.0, learning_rate=1e-2)
        seen = Losses()
        fitted = lightning_trainer(
            tmp_path / f"{batch_size}", [seen], max_epochs=2, max_steps=-1, limit_val_batches=0,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        fitted.fit(module, datamodule=KDDataModule(text=text, batch_size=batch_size, validation_rows=1))
        found.append((seen.losses, {name: p.detach() for name, p in module.named_parameters()}))
    (whole, weights), (parts, others) = found
    rows = len(parts) // 2
    windows = [parts[epoch + i : epoch + min(i + 4, rows)] for epoch in (0, rows) for i in range(0, rows, 4)]
    assert rows % 4 and len(windows) == len(whole)
    assert [sum(window) / 4 for window in windows] == pytest.approx(whole, rel=1e-4)
    assert_same(others, weights, 1e-4)


def test_the_command_trains_from_yaml(text, student_dir, tmp_path):
    path = tmp_path / "offline.yaml"
    lines = {"model_name_or_path": student_dir, "teacher_text": text, "output_dir": str(tmp_path / "out"),
             "kd_weight": 0.0, "ce_weight": 1.0, **SMALL}  # fmt: skip
    path.write_text(json.dumps(lines))
    assert main(["offline", "--config", str(path)]) == 0
    lineage_of(tmp_path / "out")


def test_what_text_has_not_is_refused(text, student_dir, tmp_path):
    for options, match in (
        ({"divergence": "reverse_kl"}, "divergence='reverse_kl' asks for a divergence"),
        ({"ce_weight": 0.5}, r"ce_weight=0\.5 asks for a divergence"),
        ({"kd_weight": 0.5}, r"kd_weight=0\.5 asks for a divergence"),
        ({"teacher_cache": text}, "both given"),
    ):
        with pytest.raises(ConfigError, match=match):
            OfflineKDTrainer(student_dir, OfflineKDConfig(str(tmp_path / "x"), teacher_text=text, **SMALL, **options))
    with pytest.raises(CacheError, match=r"holds no dataset of a teacher's text: it has no teacher_text\.json"):
        OfflineKDTrainer(student_dir, OfflineKDConfig(str(tmp_path / "x"), **SMALL), teacher_text=str(tmp_path))


def test_the_gate_comes_before_the_weights(text, tmp_path):
    declared = {"student": {"license": "llama3"}, "use": {"commercial": True}}
    with pytest.raises(LicenseRefusedError):
        OfflineKDTrainer(
            str(tmp_path / "no such student"),
            OfflineKDConfig(str(tmp_path / "x"), lineage={**declared, "student": {"license": "cc-by-nc-4.0"}}, **SMALL),
            teacher_text=text,
        )
