"""The panel on a user's module, in the ready module and in the TRL trainer."""

import json

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from kd_plugin.errors import ConfigError, DataError, LicenseRefusedError, VocabularyError
from kd_plugin.lightning import KDDataModule, TeacherPanelCorrection, TeacherPanelModule
from kd_plugin.lineage import load_record, verify
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import TOPICS, assert_same, losses, settings
from tests.lightning.help import Losses, Plain, trainer
from tests.tiny import save_tiny

ROWS = [{"prompt": f"{TOPICS[i]}{'?' * (1 + i)}", "teacher_id": ("math", "code")[i % 2]} for i in range(4)]
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.fixture(scope="session")
def teachers(teacher_dir, other_teacher_dir):
    return {"math": teacher_dir, "code": other_teacher_dir}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def module(directory, student, teachers, prompts, rows=4, accumulate=1, max_steps=5, callbacks=(), ckpt=None, **fields):
    ready = TeacherPanelModule(
        student, teacher_models=teachers, learning_rate=1e-3, weight_decay=0.01, lr_scheduler_type="constant",
        **{"max_completion_length": 6, "generation_kwargs": GREEDY, **fields},
    )  # fmt: skip
    data = KDDataModule(prompts=prompts, batch_size=rows, shuffle=False)
    seen = Losses()
    host = trainer(
        directory, [seen, *callbacks], accumulate_grad_batches=accumulate, max_steps=max_steps,
        enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    host.fit(ready, datamodule=data, ckpt_path=ckpt, weights_only=False)
    windows = [seen.losses[i : i + accumulate] for i in range(0, len(seen.losses), accumulate)]
    return [sum(w) / accumulate for w in windows], dict(ready.model.named_parameters()), host


@pytest.mark.parametrize(
    "fields", [{}, {"combine": "weighted_kl", "divergence": "forward_kl"}], ids=["routed", "weighted"]
)
def test_the_three_hosts_take_the_same_steps(fields, tmp_path, student_dir, teachers, prompts):
    rows = ROWS if not fields else [{"prompt": row["prompt"]} for row in ROWS]
    host = TeacherPanelTrainer(
        model=student_dir,
        teacher_models=teachers,
        args=TeacherPanelConfig(
            **settings(
                tmp_path / "trl", max_completion_length=6, generation_kwargs=GREEDY, lr_scheduler_type="constant",
                max_grad_norm=1e9, optim="adamw_torch", weight_decay=0.01, gradient_checkpointing=False, **fields,
            )
        ),
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    host.train()
    if fields:
        prompts = tmp_path / "bare.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = str(prompts)
    ready_losses, ready_weights, _ = module(tmp_path / "a", student_dir, teachers, prompts, **fields)

    plain = Plain(student_dir)
    kd = TeacherPanelCorrection(teachers, max_completion_length=6, generation_kwargs=GREEDY, **fields)
    trainer(tmp_path / "b", [kd]).fit(plain, DataLoader(rows, batch_size=4, collate_fn=columns))

    theirs = {name: p.detach() for name, p in host.model.named_parameters()}
    assert ready_losses == pytest.approx(losses(host), rel=1e-4)
    assert plain.losses == pytest.approx(losses(host), rel=1e-4)
    assert_same({n: p.detach() for n, p in ready_weights.items()}, theirs, 1e-4)
    assert_same({n: p.detach() for n, p in plain.model.named_parameters()}, theirs, 1e-4)


def test_micro_batches_take_the_steps_of_one_batch(tmp_path, student_dir, teachers, prompts):
    whole, weights, _ = module(tmp_path / "a", student_dir, teachers, prompts, max_steps=2)
    parts, part_weights, _ = module(tmp_path / "b", student_dir, teachers, prompts, rows=1, accumulate=4, max_steps=2)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert_same({n: p.detach() for n, p in part_weights.items()}, {n: p.detach() for n, p in weights.items()}, 1e-5)


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_windows_micro_batches_have_rows_of_like_length(ce_weight, tmp_path, student_dir, teachers, prompts):
    masks = []

    def watch(model):
        model.base_model.register_forward_pre_hook(
            lambda _module, _args, given: masks.append(given["attention_mask"]), with_kwargs=True
        )

    ready = TeacherPanelModule(
        student_dir, teacher_models=teachers, max_completion_length=6, generation_kwargs=GREEDY, ce_weight=ce_weight
    )
    ready.configure_model()
    watch(ready.model)
    data = KDDataModule(prompts=prompts, batch_size=1, shuffle=False)
    trainer(tmp_path, accumulate_grad_batches=4, max_steps=1).fit(ready, datamodule=data)
    seen = [mask for mask in masks if mask is not None][-4:]
    widths = [mask.shape[1] for mask in seen]
    assert all(bool(mask.all()) for mask in seen), "one row has no padding"
    assert len(set(widths)) > 1
    assert (widths == sorted(widths, reverse=True)) is (ce_weight == 0.0)


def test_the_modules_own_loss_is_added(tmp_path, student_dir, teachers, prompts):
    plain = Plain(student_dir)
    own = []
    plain.training_step = lambda batch, batch_idx: own.append(plain.model(**batch).loss) or own[-1]
    kd = TeacherPanelCorrection(teachers, max_completion_length=6, generation_kwargs=GREEDY, ce_weight=0.5)
    trainer(tmp_path, [kd], max_steps=1).fit(plain, DataLoader(ROWS, batch_size=4, collate_fn=columns))
    alone, _, _ = module(tmp_path / "a", student_dir, teachers, prompts, max_steps=1)
    assert plain.losses[0] == pytest.approx(alone[0] + 0.5 * float(own[0].detach()), rel=1e-5)


def test_a_resumed_run_writes_and_learns_what_an_undisturbed_one_does(tmp_path, student_dir, teachers, prompts):
    fields = {"rows": 1, "generation_kwargs": None, "seed": 3}
    _, whole, _ = module(tmp_path / "a", student_dir, teachers, prompts, **fields)
    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=3, filename="{step}")
    module(tmp_path / "b", student_dir, teachers, prompts, callbacks=[saving], max_steps=3, **fields)
    checkpoint = tmp_path / "c" / "step=3.ckpt"
    _, resumed, _ = module(tmp_path / "d", student_dir, teachers, prompts, ckpt=checkpoint, **fields)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert verify(checkpoint).exit_code == 0
    assert load_record(checkpoint)["run"]["method"] == "teacher_panel"


def test_an_adapter_is_trained_and_the_teachers_are_no_part_of_the_checkpoint(tmp_path, student_dir, teachers, prompts):
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_r": 4}
    _, weights, host = module(tmp_path, student_dir, teachers, prompts, max_steps=2, **lora)
    assert {name.split(".")[-3] for name, p in weights.items() if p.requires_grad} == {"lora_A", "lora_B"}
    host.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"]
    assert saved.keys() == {f"model.{name}" for name in host.lightning_module.model.state_dict()}


def test_prompts_that_were_kept_out_are_measured_as_training_measures_them(tmp_path, student_dir, teachers, prompts):
    trained, _, _ = module(tmp_path, student_dir, teachers, prompts, max_steps=1)
    rows = [{**row, "answer": "7"} for row in ROWS + ROWS]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ready = TeacherPanelModule(
        student_dir, teacher_models=teachers, max_completion_length=6, generation_kwargs=GREEDY, verify="contains"
    )
    data = KDDataModule(prompts=str(tmp_path / "held.jsonl"), validation_rows=4, batch_size=2)
    host = trainer(tmp_path)
    found = [host.validate(ready, datamodule=data, verbose=False)[0] for _ in range(2)]
    assert found[0] == found[1]
    measured = found[0]
    assert measured["val/divergence"] == pytest.approx(trained[0], rel=1e-4) == measured["val/loss"]
    both = [measured["val/divergence/math"], measured["val/divergence/code"]]
    assert min(both) < measured["val/divergence"] < max(both)
    assert 0 < measured["val/completion_length"] <= 6 and 0 <= measured["val/rollout_accuracy"] <= 1


def test_values_are_logged_for_each_teacher(tmp_path, student_dir, teachers, prompts):
    _, _, host = module(tmp_path, student_dir, teachers, prompts, max_steps=1)
    logged = host.callback_metrics
    assert logged["divergence/math"] > 0 and logged["divergence/code"] > 0
    assert logged["tokens/math"] + logged["tokens/code"] == 4 * float(logged["kd/completion_length"])


class TestBadInput:
    def test_batches_without_prompt(self, tmp_path, student_dir, teachers):
        plain = Plain(student_dir)
        rows = DataLoader([{"question": "a"}] * 4, batch_size=2, collate_fn=columns)
        with pytest.raises(DataError, match=r"no 'prompt'; it has 'question'.*as a list, text or messages"):
            trainer(tmp_path, [TeacherPanelCorrection(teachers)]).fit(plain, rows)
        assert plain.losses == []

    def test_a_teacher_id_that_names_no_teacher(self, tmp_path, student_dir, teachers):
        (tmp_path / "p.jsonl").write_text('{"prompt": "a", "teacher_id": "mth"}\n')
        with pytest.raises(DataError, match=r"'mth' names no teacher.*Did you mean 'math'"):
            module(tmp_path, student_dir, teachers, str(tmp_path / "p.jsonl"))

    def test_another_vocabulary(self, tmp_path, student_dir, prompts, monkeypatch):
        other = save_tiny(tmp_path / "other", swap=("a", "b"))
        monkeypatch.setattr(
            "transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("a model was loaded")
        )
        with pytest.raises(VocabularyError, match=r"2 ids differ, first: id \d+ is 'a' for the student"):
            module(tmp_path, student_dir, {"t": other}, prompts)

    def test_a_teacher_without_a_license(self, tmp_path, student_dir, prompts):
        bare = save_tiny(tmp_path / "bare", license=None)
        with pytest.raises(LicenseRefusedError, match="license"):
            module(tmp_path, student_dir, {"t": bare}, prompts)

    def test_settings(self, teachers):
        with pytest.raises(ConfigError, match=r"Unknown setting 'combin'\. Did you mean 'combine'"):
            TeacherPanelCorrection(teachers, combin="route")
        with pytest.raises(ConfigError, match="Did you mean 'route'"):
            TeacherPanelCorrection(teachers, combine="rout")
        with pytest.raises(ConfigError, match="No teacher is given"):
            TeacherPanelCorrection()
        with pytest.raises(ConfigError, match=r"top_p=0\.9 with estimator='sampled'"):
            TeacherPanelCorrection(teachers, estimator="sampled", top_p=0.9)
