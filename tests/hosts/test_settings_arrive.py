"""Every setting arrives: each host, given every field at another value than its default, has them all at the core."""

import importlib
import inspect
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kd_plugin.cache import Generation, TopK, TopP
from kd_plugin.capturing import capture
from kd_plugin.capturing import plan as plan_module
from kd_plugin.capturing.capture import CaptureSettings, ScoringSettings
from kd_plugin.cli.capture import main as capture_command
from kd_plugin.cli.training import parse
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.divergence.spec import DivergenceSettings
from kd_plugin.lightning import OfflineKD, OfflineKDModule, TeacherPanelCorrection, TeacherPanelModule
from kd_plugin.lightning.__main__ import KDCommand
from kd_plugin.lightning.module import PanelModuleSettings, StudentSettings
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.vllm.settings import EngineSettings
from kd_plugin.settings import values_of
from kd_plugin.teachers import LocalTeacher
from kd_plugin.transformers import OfflineKDMixin, TeacherPanelMixin
from kd_plugin.trl import OfflineKDConfig, TeacherPanelConfig
from tests.tiny import byte_tokenizer

capture_module = importlib.import_module("kd_plugin.capturing.capture")
ROWS = [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(4)]
LINEAGE = {"use": "research"}
PARAMETERS = {name: default / 2 for name, default in vars(DivergenceSettings()).items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    directory = tmp_path_factory.mktemp("cache") / "cache"
    return str(capture(ROWS, LocalTeacher(teacher_dir), directory, targets=TopK(6), progress=False).path)


@pytest.fixture(scope="module")
def panel(teacher_dir, other_teacher_dir, cache):
    """Every field of PanelSettings but those that exclude others, and what needs DeepSpeed."""
    values = {
        **PARAMETERS, "teacher_models": {"a": teacher_dir, "b": other_teacher_dir}, "combine": "confidence",
        "teacher_weights": {"a": 0.3, "b": 0.7}, "domain_weights": {"x": {"a": 1.0}}, "confidence_temperature": 0.5,
        "routes": {"x": "a"}, "reward": {"verifier": "exact", "weight": 0.5},
        "estimator": "exact", "top_k_tail": 7, "student_top_k": 3, "ratio_bounds": [0.4, 3.0],
        "panel_values": "logging", "allow_other_eos": True, "allow_changed_panel": True, "divergence": "jsd",
        "beta": 0.3, "rollouts": "interleaved", "rollout_draws": "uniform", "interleaved_top_k": 4,
        "interleaved_block": 5, "on_policy_fraction": "0.5", "warmup_cache": cache, "warmup_cache_steps": 2,
        "warmup_divergence": "reverse_kl", "allow_misaligned": True, "watch_positions": 9, "save_rollouts": 2,
        "save_rollouts_top_k": 4, "mask_truncated_completions": True, "repetition_stop": 3, "anchor_weight": 0.1,
        "length_alarm": 2.0, "truncation_alarm": 0.4, "repetition_alarm": 0.6, "alarm_window": 3,
        "alarm_action": "stop", "alarm_factor": 0.7, "teacher_model_name_or_path": teacher_dir,
        "teacher_model_revision": "main", "teacher_model_init_kwargs": {"dtype": "float32"},
        "trust_remote_code": True, "max_completion_length": 6, "temperature": 0.9, "top_p": 0.8, "top_k": 11,
        "min_p": 0.05, "repetition_penalty": 1.2, "cache_implementation": "dynamic",
        "generation_kwargs": {"no_repeat_ngram_size": 2}, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    return complete(PanelSettings, values, {"panel", "shard_teachers", "estimator", "text", "rollout_engine"})


@pytest.fixture(scope="module")
def offline():
    values = {
        "divergence": "jsd", "jsd_beta": 0.3, **PARAMETERS, "temperature": 0.9, "tail": "keep", "kd_weight": 0.4,
        "ce_weight": 0.6, "allow_partial": True, "allow_misaligned": True,
    }  # fmt: skip
    return complete(OfflineSettings, values, set())


def complete(cls, values, without):
    """Every field is there, at another value than its default: a new field fails here until it is added."""
    defaults = vars(cls())
    assert {name for name in defaults if values.get(name, defaults[name]) == defaults[name]} == without
    return values


def test_trl_panel(panel, tmp_path):
    config = TeacherPanelConfig(str(tmp_path), use_cpu=True, lineage=LINEAGE, **panel)
    assert config.settings() == PanelSettings(**panel) and config.lineage == LINEAGE


def test_trl_offline(offline, tmp_path):
    config = OfflineKDConfig(str(tmp_path), use_cpu=True, **offline)
    assert config.settings() == OfflineSettings(**offline)
    assert config.objective() == OfflineSettings(**offline).objective()


@pytest.mark.parametrize("command", ["panel", "offline"])
def test_command(command, panel, offline, tmp_path):
    cls, config_class, values = {
        "panel": (PanelSettings, TeacherPanelConfig, panel), "offline": (OfflineSettings, OfflineKDConfig, offline)
    }[command]  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path), "model_name_or_path": "m"}))
    _, config, _ = parse(command, config_class, ["--config", str(file), "--use_cpu"])
    assert vars(config.settings()) == vars(cls(**values))


def test_lightning_panel_callback(panel):
    built = TeacherPanelCorrection(ce_weight=0.3, seed=5, lineage=LINEAGE, **panel)
    assert built.settings == PanelSettings(**panel)
    assert (built.objective.ce_weight, built.seed, built.lineage) == (0.3, 5, LINEAGE)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("host", ["trl", "transformers", "lightning"])
def test_a_rollout_engine(host, in_file, teacher_dir, tmp_path):
    block = {"kind": "vllm", "url": "http://HEAD:8000", "sync": "reload", "max_staleness": 2, "chunk": 64}
    (tmp_path / "engine.yaml").write_text(yaml.safe_dump({"rollout_engine": block}))
    values = {
        "rollout_engine": str(tmp_path / "engine.yaml") if in_file else block,
        "teacher_models": {"a": teacher_dir},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path), "model_name_or_path": "m"}))
    made = {
        "trl": lambda: parse("panel", TeacherPanelConfig, ["--config", str(file), "--use_cpu"])[1].settings(),
        "transformers": lambda: PanelSettings(**values),
        "lightning": lambda: TeacherPanelCorrection(**values).settings,
    }[host]()
    assert made.engine_settings() == EngineSettings(**block)


def test_lightning_offline_callback(offline, cache):
    built = OfflineKD(cache, lineage=LINEAGE, **offline)
    assert built.objective == OfflineSettings(**offline).objective() and built.lineage == LINEAGE
    assert built._allow_misaligned and built._untaught == "keep"


STUDENT = {
    "revision": "main", "dtype": "bfloat16", "model_init_kwargs": {"attn_implementation": "eager"}, "use_peft": True,
    "lora_r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "lora_target_modules": ["q_proj"],
    "gradient_checkpointing": True, "learning_rate": 1e-3, "weight_decay": 0.1, "lr_scheduler_type": "cosine",
    "warmup_steps": 3, "sample_length": 5, "samples_shown": 6, "verify": "math",
    "eval_tasks": {"tasks": {"own": {"rows": "own.jsonl", "verify": "exact"}}}, "eval_tasks_batch_size": 3,
}  # fmt: skip


def test_lightning_modules(panel, offline, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text('{"prompt": "2 + 2 =", "answer": "4"}\n')
    student = complete(StudentSettings, STUDENT, set())
    given = {**panel, **student, "ce_weight": 0.3, "seed": 5, "lineage": LINEAGE}
    built = TeacherPanelModule("m", **given)
    assert built._correction.settings == PanelSettings(**panel) and built._correction.seed == 5
    assert (built._correction.objective.ce_weight, built._correction.lineage) == (0.3, LINEAGE)
    assert dict(built.hparams) == {"model": "m", **vars(PanelModuleSettings(**given))}
    module = OfflineKDModule("m", cache, **offline, **student, lineage=LINEAGE)
    callback, own_set = module.configure_callbacks()
    assert [task.name for task in own_set.tasks.tasks] == ["own"]
    assert callback.objective == OfflineSettings(**offline).objective() and callback.lineage == LINEAGE
    assert {name: module.hparams[name] for name in STUDENT} == STUDENT


def test_lightning_command(panel, tmp_path):
    file = tmp_path / "run.yaml"
    given = {**panel, **STUDENT, "ce_weight": 0.3, "seed": 5, "lineage": LINEAGE}
    model = {"class_path": "TeacherPanelModule", "init_args": {"model": "m", **given}}
    file.write_text(
        yaml.safe_dump({"model": model, "trainer": {"accelerator": "cpu", "logger": False}, "data": {"prompts": "p"}})
    )
    built = KDCommand(["--config", str(file)], run=False).model
    assert built._correction.settings == PanelSettings(**panel)
    assert values_of(PanelModuleSettings, built.hparams) == vars(PanelModuleSettings(**given))


def test_transformers_hosts_take_the_settings_whole(panel, offline, cache, tmp_path, student_dir):
    """They have no fields of their own; what they keep is the object that they were given."""
    rows = Dataset.from_list([{"prompt": row["prompt"], "answer": "1"} for row in ROWS])
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    common = {"model": AutoModelForCausalLM.from_pretrained(student_dir), "args": args}
    common |= {"processing_class": byte_tokenizer()}
    panel = {k: v for k, v in panel.items() if k not in ("teacher_model_name_or_path", "rollouts", "repetition_stop")}
    given = PanelSettings(**panel)
    built = type("Panel", (TeacherPanelMixin, Trainer), {})(**common, panel_settings=given, train_dataset=rows)
    assert built.panel_settings == given
    given = OfflineSettings(**offline | {"temperature": 1.0})
    built = type("Offline", (OfflineKDMixin, Trainer), {})(**common, teacher_cache=cache, offline_settings=given)
    assert built.objective == given.objective() and built.allow_partial


CAPTURE = {
    "filter": "exact_match", "answer_column": "right", "temperature": 1.5, "max_length": 9, "completion_only": True,
    "assistant_only": True, "date": "2026-11-29", "shard_rows": 7, "batch_tokens": 99, "seed": 3, "lineage": LINEAGE,
}  # fmt: skip


@pytest.mark.parametrize("dry_run", [False, True])
def test_capture(dry_run, tmp_path, teacher_dir, monkeypatch):
    """The command passes on all that Python's ``capture`` takes, and a dry run too."""
    complete(ScoringSettings, CAPTURE, set())
    asked = []
    for module in (capture_module, plan_module):
        monkeypatch.setattr(module, "prepare", lambda rows, teacher, settings, tokenizer=None: asked.append(settings))
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    file = tmp_path / "run.yaml"
    own = {"dataset": str(tmp_path / "rows.json"), "teacher": teacher_dir, "output_dir": str(tmp_path / "c")}
    own |= {"targets": "top_p", "p": 0.7, "cap": 8, "chat_template": str(tmp_path / "t.jinja")}
    own |= {"mode": "generate", "completions": 3, "max_new_tokens": 5, "sampling_temperature": 0.7}
    own |= {"sampling_top_p": 0.6, "sampling_top_k": 4, "keep_unfinished": True}
    file.write_text(yaml.safe_dump({**CAPTURE, **own}))
    with pytest.raises(AttributeError):  # nothing was prepared
        capture_command(["--config", str(file), *["--dry-run"] * dry_run])
    generation = Generation(3, 5, 0.7, 0.6, 4, True)
    expected = CaptureSettings(**CAPTURE, targets=TopP(0.7, 8), generate=generation, chat_template="{{ messages }}")
    assert asked == [expected]
    assert set(vars(expected)) <= set(inspect.signature(capture).parameters)
