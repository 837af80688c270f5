"""What says whose text is corrected, and what watches over it, does in Lightning what it does in TRL."""

import json

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_plugin.errors import ConfigError
from kd_plugin.lightning import KDDataModule, TeacherPanelCorrection, TeacherPanelModule
from kd_plugin.lineage import load_record
from kd_plugin.monitor.traces import read_rollouts
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import assert_same, losses, settings
from tests.lightning.help import Losses, trainer
from tests.lightning.test_panel import GREEDY, ROWS

GIVEN = [{**row, "completion": f" {i}{i}"} for i, row in enumerate(ROWS)]
SEEN = {f"{name}/{teacher}" for name in ("divergence", "entropy", "support_overlap") for teacher in ("math", "code")}


def run(
    directory, student, teachers, rows=GIVEN, max_steps=3, callbacks=(), ckpt=None, batch=4, options=None, **fields
):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GIVEN))
    ready = TeacherPanelModule(
        student, teacher_models=teachers, learning_rate=1e-3, weight_decay=0.01, lr_scheduler_type="constant", seed=42,
        **{"max_completion_length": 6, "generation_kwargs": GREEDY, **fields},
    )  # fmt: skip
    seen = Losses()
    host = trainer(directory, [seen, *callbacks], max_steps=max_steps, enable_checkpointing=bool(callbacks))
    data = KDDataModule(prompts=str(path), batch_size=4, shuffle=False)
    host.fit(ready, datamodule=data, ckpt_path=ckpt, weights_only=False)
    return seen.losses, {name: p.detach() for name, p in ready.model.named_parameters()}, host


@pytest.fixture(scope="session")
def teachers(teacher_dir, other_teacher_dir):
    return {"math": teacher_dir, "code": other_teacher_dir}


@pytest.mark.parametrize(
    "fields",
    [
        {"on_policy_fraction": 0.5, "mask_truncated_completions": True, "anchor_weight": 0.3},
        {"warmup_cache_steps": 2, "repetition_stop": 2, "panel_values": "logging", "warmup_divergence": "forward_kl"},
        {"rollouts": "interleaved", "interleaved_top_k": 3, "interleaved_block": 2},
    ],
    ids=["mixed, masked, anchored", "warmed up, without loops", "interleaved"],
)
def test_options_do_what_they_do_in_trl(fields, tmp_path, student_dir, teachers, cache):
    if "warmup_cache_steps" in fields:
        fields = {**fields, "warmup_cache": str(cache.path)}
    host = TeacherPanelTrainer(
        model=student_dir,
        teacher_models=teachers,
        args=TeacherPanelConfig(
            **settings(
                tmp_path / "trl", max_steps=3, max_completion_length=6, generation_kwargs=GREEDY,
                lr_scheduler_type="constant", max_grad_norm=1e9, optim="adamw_torch", weight_decay=0.01, seed=42,
                gradient_checkpointing=False, shuffle_dataset=False,
                **{k: str(v) if k == "on_policy_fraction" else v for k, v in fields.items()},
            )
        ),
        train_dataset=Dataset.from_list(GIVEN),
    )  # fmt: skip
    host._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(host.train_dataset)
    host.train()
    ours, weights, run_by = run(tmp_path / "pl", student_dir, teachers, **fields)
    assert ours == pytest.approx(losses(host), rel=1e-4) and len(set(ours)) == 3
    assert_same(weights, {name: p.detach() for name, p in host.model.named_parameters()}, 1e-4)
    theirs = host.state.log_history[-2]
    for name in ("tokens/math", "rollouts/repetition", *(set(theirs) & SEEN)):
        assert float(run_by.callback_metrics[name]) == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert any(name.startswith("time/") for name in run_by.callback_metrics)


def test_the_student_draws_as_the_loop_of_transformers_does_or_uniformly(tmp_path, student_dir, teachers, monkeypatch):
    sampled = {"max_steps": 2, "generation_kwargs": {}}
    ours, _, _ = run(tmp_path / "a", student_dir, teachers, **sampled)
    other, _, _ = run(tmp_path / "b", student_dir, teachers, rollout_draws="uniform", **sampled)
    monkeypatch.setattr("kd_plugin.rollouts.in_process.generates_row_by_row", lambda config: False)
    theirs, _, _ = run(tmp_path / "c", student_dir, teachers, **sampled)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert other[0] != pytest.approx(ours[0], rel=1e-5), "other tokens of the same distribution"


def test_saved_rollouts_are_read_by_the_trace(tmp_path, student_dir, teachers):
    run(tmp_path, student_dir, teachers, save_rollouts=2, save_rollouts_top_k=3, max_steps=2)
    rows = read_rollouts(tmp_path)
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    assert rows[0]["prompt"] == ROWS[0]["prompt"] and {*rows[0]["teachers"]} == {"math"}
    assert len(rows[0]["tokens"]) == 6 and len(rows[0]["teachers"]["math"]["top"][0]) == 3


def test_an_alarm_stops_and_saves_and_a_resumed_run_remembers(tmp_path, student_dir, teachers):
    ringing = {"truncation_alarm": 0.5, "alarm_window": 2, "alarm_action": "stop"}
    _, _, host = run(tmp_path / "a", student_dir, teachers, max_steps=9, **ringing)
    assert host.global_step == 2 and float(host.callback_metrics["alarm"]) == 1.0
    assert list(tmp_path.rglob("alarm-step=2.ckpt"))
    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, filename="{step}")
    run(tmp_path / "b", student_dir, teachers, max_steps=1, callbacks=[saving], **ringing)
    _, _, host = run(tmp_path / "d", student_dir, teachers, max_steps=9, ckpt=tmp_path / "c" / "step=1.ckpt", **ringing)
    assert host.global_step == 2, "the batch before the checkpoint counts"


def test_an_alarm_lowers_the_learning_rate(tmp_path, student_dir, teachers):
    ringing = {"truncation_alarm": 0.5, "alarm_window": 1, "alarm_action": "lower_learning_rate", "alarm_factor": 0.25}
    _, _, host = run(tmp_path, student_dir, teachers, max_steps=1, **ringing)
    assert host.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.25)


def test_a_student_is_anchored_to_its_start_also_after_a_resume(tmp_path, student_dir, teachers):
    fields = {"anchor_weight": 0.5}
    _, whole, host = run(tmp_path / "a", student_dir, teachers, **fields)
    assert float(host.callback_metrics["divergence/start"]) > 0
    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, filename="{step}")
    run(tmp_path / "b", student_dir, teachers, max_steps=2, callbacks=[saving], **fields)
    _, resumed, _ = run(tmp_path / "d", student_dir, teachers, ckpt=tmp_path / "c" / "step=2.ckpt", **fields)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_panel_does_not_go_on_unless_allowed(tmp_path, student_dir, teachers):
    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, filename="{step}", save_top_k=-1)
    run(tmp_path / "a", student_dir, teachers, max_steps=1, callbacks=[saving])
    other = {"math": teachers["code"], "code": teachers["code"]}
    resumed = {"max_steps": 2, "ckpt": tmp_path / "c" / "step=1.ckpt"}
    with pytest.raises(ConfigError, match=r"another panel: teacher 'math': weights was .* allow_changed_panel=True"):
        run(tmp_path / "b", student_dir, other, **resumed)
    _, _, host = run(tmp_path / "d", student_dir, other, allow_changed_panel=True, callbacks=[saving], **resumed)
    changes = load_record(tmp_path / "c" / "step=2.ckpt")["run"]["changes"]
    assert host.global_step == 2 and "teacher 'math'" in changes[0]


def test_bad_values(teachers, tmp_path, student_dir):
    with pytest.raises(ConfigError, match="repetition_stop is 1"):
        TeacherPanelCorrection(teachers, repetition_stop=1)
    with pytest.raises(ConfigError, match="on_policy_fraction goes from 2"):
        TeacherPanelCorrection(teachers, on_policy_fraction=2)
    with pytest.raises(ConfigError, match="Did you mean 'stop'"):
        TeacherPanelCorrection(teachers, alarm_action="stp")
    with pytest.raises(ConfigError, match=r"needs DeepSpeed or FSDP2, and the strategy is SingleDeviceStrategy"):
        run(tmp_path, student_dir, teachers, shard_teachers=True)
