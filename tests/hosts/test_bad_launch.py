"""Each setting that DeepSpeed could not run is one clear error of either host, before any weights are loaded."""

import contextlib
import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from trl import DistillationTrainer

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.launch.configs import deepspeed_config as planned_config
from kd_plugin.launch.preflight import require_batches, require_filled, require_offload, require_student
from kd_plugin.planner.memory import Layout
from kd_plugin.planner.run import PlannedRun, architecture
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import prompts, settings
from tests.zero.worker import deepspeed_config


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    """Refuse weights; and take back what transformers and Lightning set for the whole process once ranks are meant."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def panel(tmp_path, student_dir, teacher_dir):
    """Build a trainer of a panel under a DeepSpeed configuration."""

    def build(deepspeed, teacher=teacher_dir, **arguments):
        config = TeacherPanelConfig(**settings(tmp_path / "out", deepspeed=deepspeed, **arguments))
        TeacherPanelTrainer(model=student_dir, teacher_models={"a": teacher}, args=config, train_dataset=prompts())

    return build


def shards(checkpoint, tag, ranks):
    """Make a directory that looks as if DeepSpeed had saved in it."""
    (checkpoint / tag).mkdir(parents=True)
    (checkpoint / "latest").write_text(tag)
    for rank in range(ranks):
        (checkpoint / tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return checkpoint


def planned(name="Qwen/Qwen2.5-0.5B", stage=3):
    run = PlannedRun(student=architecture(name), method="offline", precision="fp32")
    return planned_config(run, Layout(stage))


class Builder:
    """A DeepSpeed op that cannot be had: incompatible, or one whose compiler fails."""

    error_log = "libaio.h is missing"

    def __init__(self, compatible):
        self.is_compatible = lambda: compatible

    def load(self):
        raise RuntimeError("Ninja is required\n to load C++ extensions")


@pytest.fixture
def no_ops(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "create_op_builder", lambda self, name: Builder("Adam" in name))


class TestTheTrlTrainersRefuse:
    def test_batches_that_contradict(self, panel):
        with pytest.raises(ConfigError, match=r"train_batch_size is 64 .* and 8 = 4 rows x 2 accumulated x 1 ranks"):
            panel({**deepspeed_config(3), "train_batch_size": 64}, gradient_accumulation_steps=2)
        with pytest.raises(ConfigError, match=r"gradient_accumulation_steps is 3 .* and 1 in the trainer"):
            panel({**deepspeed_config(3), "gradient_accumulation_steps": 3})

    def test_a_configuration_made_for_another_student(self, panel):
        with pytest.raises(ConfigError, match=r"another student \(Qwen/Qwen2.5-0.5B\): hidden_size 896"):
            panel(planned())

    def test_an_op_that_is_not_there(self, panel, no_ops):
        with pytest.raises(ConfigError, match=r"offloads to cpu.*op cpu_adam cannot be had here: Ninja is required"):
            panel(deepspeed_config(3, offload_optimizer={"device": "cpu"}))

    def test_a_checkpoint_of_another_number_of_ranks(self, panel, tmp_path):
        checkpoint = shards(tmp_path / "out" / "checkpoint-2", "global_step2", ranks=2)
        for resume in (str(checkpoint), "true"):
            with pytest.raises(ConfigError, match=r"saved by 2 ranks and this run has 1"):
                panel(deepspeed_config(3), resume_from_checkpoint=resume)

    def test_a_placement_that_cannot_be(self, panel, student_dir, tmp_path, monkeypatch):
        LoraConfig(base_model_name_or_path=student_dir).save_pretrained(tmp_path / "adapter")
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ConfigError, match=r"Teacher 'a' is an adapter.*FSDP"):
            panel(None, AdapterTeacher(tmp_path / "adapter", license="own"))

    def test_interleaved_rollouts_from_vllm(self, panel):
        with pytest.raises(ConfigError, match=r"'interleaved' needs transformers generation.*use_vllm=False"):
            panel(None, rollouts="interleaved", use_vllm=True)

    def test_nothing_else(self, panel):
        with pytest.raises(AssertionError, match="a model was loaded"):
            panel(deepspeed_config(3))


class TestTrainRefuses:
    """``train(resume_from_checkpoint=...)`` looks at the checkpoint before DeepSpeed loads anything of it."""

    @pytest.fixture
    def resume(self, tmp_path, student_dir, teacher_dir, monkeypatch):
        monkeypatch.undo()
        args = TeacherPanelConfig(**settings(tmp_path / "out"))
        trainer = TeacherPanelTrainer(student_dir, teacher_dir, args, prompts())
        config = deepspeed_config(2)
        monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", SimpleNamespace(deepspeed_config=config))
        trainer.is_deepspeed_enabled = True

        def begin(*args, **kwargs):
            raise AssertionError("the parent's training began")

        monkeypatch.setattr(DistillationTrainer, "train", begin)

        def call(checkpoint, stage=2):
            config["zero_optimization"]["stage"] = stage
            trainer.train(resume_from_checkpoint=str(checkpoint))

        call.config = config
        return call

    def test_shards_of_another_number_of_ranks(self, resume, tmp_path):
        with pytest.raises(ConfigError, match=r"saved by 4 ranks and this run has 1.*consolidate .* --universal"):
            resume(shards(tmp_path / "a", "global_step2", ranks=4))
        with pytest.raises(AssertionError, match="training began"):
            resume(shards(tmp_path / "b", "global_step2", ranks=1))

    def test_universal_shards_and_those_of_stage_0_go_on(self, resume, tmp_path):
        checkpoint = shards(tmp_path / "a", "global_step2", ranks=0)
        with pytest.raises(AssertionError, match="training began"):
            resume(checkpoint, stage=0)
        with pytest.raises(ConfigError, match=r"holds no \*_optim_states.pt"):
            resume(checkpoint)
        assert "checkpoint" not in resume.config
        (checkpoint / "latest_universal").touch()
        with pytest.raises(AssertionError, match="training began"):
            resume(checkpoint)
        assert resume.config["checkpoint"] == {"load_universal": True}


def test_the_command_refuses_with_one_line(tmp_path, student_dir, teacher_dir, capsys, monkeypatch):
    monkeypatch.undo()
    rows = Dataset.from_list([{"prompt": "a?", "completion": f" b{i}"} for i in range(4)])
    capture(rows, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(8), progress=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    (tmp_path / "ds.json").write_text(json.dumps({**deepspeed_config(2), "train_batch_size": 64}))
    common = settings(tmp_path / "out", model_name_or_path=student_dir, teacher_cache=str(tmp_path / "cache"))
    (tmp_path / "run.json").write_text(json.dumps(common))  # JSON is YAML
    assert main(["offline", "--config", str(tmp_path / "run.json"), "--deepspeed", str(tmp_path / "ds.json")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("kd-plugin offline: Batch sizes contradict")


class TestLightningRefuses:
    @pytest.fixture
    def setup(self, student_dir, teacher_dir):
        """Call the panel callback's setup under a DeepSpeed strategy, as the trainer does before it loads anything."""
        from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

        from kd_plugin.lightning import TeacherPanelCorrection, TeacherPanelModule

        def call(config, teacher=teacher_dir, **fields):
            strategy = ModelParallelStrategy(2, 1) if config == "FSDP2" else DeepSpeedStrategy(config=config)
            data = SimpleNamespace(hparams={"batch_size": 2})
            trainer = SimpleNamespace(
                strategy=strategy,
                world_size=2,
                accumulate_grad_batches=3,
                datamodule=data,
                callbacks=[],
                ckpt_path=None,
            )
            module = TeacherPanelModule(student_dir, teacher_models={"a": teacher_dir})
            TeacherPanelCorrection({"a": teacher}, **fields).setup(trainer, module, "fit")

        return call

    def test_batches_that_contradict(self, setup):
        with pytest.raises(ConfigError, match=r"train_batch_size is 64 .* and 12 = 2 rows x 3 accumulated x 2 ranks"):
            setup({"zero_optimization": {"stage": 2}, "train_batch_size": 64})

    def test_what_lightning_does_not_fill_in(self, setup):
        with pytest.raises(ConfigError, match=r'zero_optimization.reduce_bucket_size is "auto"'):
            setup({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})

    def test_a_configuration_made_for_another_student(self, setup):
        config = {key: value for key, value in planned().items() if value != "auto"}
        with pytest.raises(ConfigError, match=r"another student \(Qwen/Qwen2.5-0.5B\)"):
            setup(config)

    def test_an_op_that_is_not_there(self, setup, no_ops, tmp_path):
        nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
        with pytest.raises(ConfigError, match=r"offloads to nvme.*op async_io cannot be had here: libaio.h is missing"):
            setup({"zero_optimization": {"stage": 3, "offload_param": nvme}})

    def test_an_adapter_for_another_student(self, setup, teacher_dir, tmp_path):
        LoraConfig(base_model_name_or_path=teacher_dir).save_pretrained(tmp_path / "adapter")
        with pytest.raises(ConfigError, match=r"Teacher 'a': the adapter .* was trained on '.*', and the base is '.*'"):
            setup({"zero_optimization": {"stage": 3}}, AdapterTeacher(tmp_path / "adapter", name="a", license="own"))

    @pytest.mark.parametrize("universal", [False, True])
    def test_a_checkpoint_of_another_number_of_ranks(self, universal, tmp_path, student_dir, teacher_dir, monkeypatch):
        """Through ``fit``: Lightning tells callbacks of ``ckpt_path`` only when everything is loaded."""
        from lightning.pytorch import Trainer

        from kd_plugin.lightning import KDDataModule, TeacherPanelModule
        from tests.lightning.ranks import DeepSpeedOnCPU

        monkeypatch.setattr(DeepSpeedOnCPU, "setup_environment", lambda self: None)  # no ranks are needed for it
        monkeypatch.setattr(DeepSpeedOnCPU, "model_sharded_context", contextlib.nullcontext)
        checkpoint = shards(tmp_path / "step=2.ckpt", "checkpoint", ranks=4)
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a?"}\n' * 4)
        host = Trainer(
            strategy=DeepSpeedOnCPU(stage=2), accelerator="cpu", devices=1, max_steps=3, logger=False,
            default_root_dir=tmp_path, enable_progress_bar=False, enable_checkpointing=False,
        )  # fmt: skip
        module = TeacherPanelModule(student_dir, teacher_models={"a": teacher_dir})
        data = KDDataModule(prompts=str(tmp_path / "prompts.jsonl"), batch_size=2)
        said = pytest.raises(ConfigError, match=r"step=2.ckpt was saved by 4 ranks and this run has 1")
        if universal:
            (checkpoint / "latest_universal").touch()
            said = pytest.raises(AssertionError, match="a model was loaded")
        with said:
            host.fit(module, datamodule=data, ckpt_path=checkpoint)
        assert host.strategy.config.get("checkpoint") == ({"load_universal": True} if universal else None)

    @pytest.mark.parametrize("sharding", [{"zero_optimization": {"stage": 3}}, "FSDP2"], ids=["ZeRO-3", "FSDP2"])
    def test_an_anchor_beside_a_student_in_shards(self, setup, sharding):
        with pytest.raises(ConfigError, match=r"anchor_weight keeps a whole copy .* ZeRO-3 and FSDP2 shard it"):
            setup(sharding, anchor_weight=0.1)


def student(hidden=64, layers=2):
    own = SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers)
    return SimpleNamespace(get_text_config=lambda: own)


def test_buckets_tell_their_student_without_a_name():
    buckets = {"stage3_param_persistence_threshold": 640, "stage3_prefetch_bucket_size": int(0.9 * 64 * 64)}
    require_student({"zero_optimization": buckets}, student())
    with pytest.raises(ConfigError, match=r"another student: hidden_size 64; this one has hidden_size 96"):
        require_student({"zero_optimization": buckets}, student(96))
    require_student({"zero_optimization": {**buckets, "stage3_prefetch_bucket_size": 50_000_000}}, student(96))


def test_a_planned_configuration_fits_its_own_student():
    require_student(planned(), student(896, 24))
    with pytest.raises(ConfigError, match=r"num_hidden_layers 24; this one has num_hidden_layers 28"):
        require_student(planned(), student(896, 28))


def test_auto_contradicts_nothing():
    require_batches({"train_batch_size": "auto"}, micro_batch=1, accumulation=1, ranks=1)
    require_filled({"zero_optimization": {"stage": 3}, "train_batch_size": 8})


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, r"offload_param to cpu needs ZeRO stage 3; .* has stage 2"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer to nvme needs ZeRO stage 3"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs ZeRO stage 1 or more"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "names no nvme_path"),
        (
            {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": f"{__file__}/x"}},
            "is no directory to write in",
        ),
        ({"stage": 3, "offload_param": {"device": "nvm"}}, "Did you mean 'nvme'"),
    ],
)
def test_offloading_that_cannot_be(zero, message):
    with pytest.raises(ConfigError, match=message):
        require_offload({"zero_optimization": zero})


def test_no_offloading_needs_no_op(no_ops):
    require_offload({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}})
    require_offload({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})  # no op in it
