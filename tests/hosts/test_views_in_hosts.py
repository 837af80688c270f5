"""Views, and teachers of other tokenizers, in TRL, transformers and Lightning: the same steps, and what they leave."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from kd_plugin.cli.main import main
from kd_plugin.lightning import TeacherPanelCorrection
from kd_plugin.lineage.verify import verify
from kd_plugin.panel.block import panel_from_block
from kd_plugin.panel.checks import require_defined_panel
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.transformers import TeacherPanelMixin
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.core.test_adapter_teacher import save_adapter
from tests.hosts.runs import LORA, losses, settings
from tests.lightning.help import Plain, trainer
from tests.tiny import byte_tokenizer, save_tiny
from tests.tokenizers import byte_level

GREEDY = {"do_sample": False}
ROWS = [
    {"prompt": [{"role": "user", "content": f"{text}?"}], "hint": f"It is {'so' * i}."}
    for i, text in enumerate(["one plus two", "the sea", "a red bird", "what is time"])
]


class PanelTrainer(TeacherPanelMixin, Trainer):
    """A plain trainer with the panel."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, a teacher with its tokenizer and one with another, each with a template of its own."""
    place = tmp_path_factory.mktemp("views")
    other = byte_level()
    path = save_tiny(place / "bpe", seed=7, hidden=48, vocab_size=len(other))
    other.save_pretrained(path)
    return {
        "student": save_tiny(place / "student", seed=1),
        "same": save_tiny(place / "same", seed=2, hidden=48),
        "bpe": path,
    }


def block(models, estimator):
    return {
        "combine": "weighted_kl",
        "teachers": {
            "solver": {"model": models["same"], "view": {"context": "Hint: {{ hint }}"}},
            "bpe": {
                "model": models["bpe"],
                "estimator": estimator,
                "view": {"chat_template": "own", "tokenizer": "own", "system": "Be right."},
            },
        },
    }


def in_trl(models, where, panel, **fields):
    host = TeacherPanelTrainer(
        model=models["student"],
        args=TeacherPanelConfig(
            **settings(
                where, max_completion_length=6, lr_scheduler_type="constant", max_steps=3, max_grad_norm=1e9,
                optim="adamw_torch", weight_decay=0.01, gradient_checkpointing=False, panel=panel, **fields,
            )
        ),
        train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    host.train()
    return host


@pytest.mark.parametrize("estimator", ["topk_tail", "byte_marginals"])
def test_the_three_hosts_take_the_same_steps(models, tmp_path, estimator):
    panel = block(models, estimator)
    trl = in_trl(models, tmp_path / "trl", panel, generation_kwargs=GREEDY)

    plain = Plain(models["student"])
    kd = TeacherPanelCorrection(panel=panel, max_completion_length=6, generation_kwargs=GREEDY)
    rows = DataLoader(ROWS, batch_size=4, collate_fn=lambda rows: {k: [r[k] for r in rows] for k in rows[0]})
    trainer(tmp_path / "lightning", [kd], max_steps=3).fit(plain, rows)

    model = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32)
    own = PanelTrainer(
        model,
        TrainingArguments(
            **settings(
                tmp_path / "transformers", lr_scheduler_type="constant", max_steps=3, max_grad_norm=1e9,
                weight_decay=0.01, train_sampling_strategy="sequential",
            )
        ),
        panel_settings=PanelSettings(panel=panel, max_completion_length=6, generation_kwargs=GREEDY),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    own.train()

    assert plain.losses == pytest.approx(losses(trl), rel=1e-3)
    assert losses(own) == pytest.approx(losses(trl), rel=1e-3)


@pytest.mark.parametrize("view", [{"context": "Hint: {{ hint }}"}, {"tokenizer": "own", "chat_template": "own"}])
def test_an_adapter_reads_by_its_view_as_the_merged_model_does(models, tmp_path, view):
    """Three epochs of four rows; a base of the student's tokens, and one of tokens of its own."""
    base = models["bpe" if "tokenizer" in view else "same"]
    adapter = save_adapter(base, tmp_path / "adapter", LORA, 1)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "README.md").write_text("---\nlicense: mit\n---\n")
    own = {"estimator": "byte_marginals"} if "tokenizer" in view else {}
    found = []
    for name, teacher in (
        ("adapter", {"kind": "adapter", "adapter": adapter, "base": base, "license": "mit"}),
        ("merged", {"model": str(tmp_path / "merged")}),
    ):
        panel = {"combine": "weighted_kl", "teachers": {"t": {**teacher, **own, "view": view}}}
        found.append(losses(in_trl(models, tmp_path / name, panel, generation_kwargs=GREEDY)))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 3


def test_yaml_of_views_and_the_docs_block(models, tmp_path):
    """integrations/trl/views.yaml trains by the command; what docs/views.md shows is a panel."""
    root = Path(__file__).parents[2]
    content = yaml.safe_load((root / "integrations" / "trl" / "views.yaml").read_text())
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({**row, "solution": row["hint"]}) + "\n" for row in ROWS))
    for name, model in (("solver", "same"), ("other", "bpe")):
        content["panel"]["teachers"][name]["model"] = models[model]
    content["panel"]["teachers"]["other"]["view"]["tokenizer"] = "own"
    (tmp_path / "views.yaml").write_text(yaml.safe_dump(content | {"output_dir": str(tmp_path / "out")}))
    small = "--max_steps 2 --bf16 false --use_cpu true --save_strategy no --report_to none --max_completion_length 4"
    small += " --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --dataset_name " + str(
        tmp_path / "p.jsonl"
    )
    arguments = ["--config", str(tmp_path / "views.yaml"), "--model_name_or_path", models["student"], *small.split()]
    assert main(["panel", *arguments]) == 0
    assert verify(tmp_path / "out").exit_code == 0

    (text,) = re.findall(r"```yaml\n(.*?)```", (root / "docs" / "views.md").read_text(encoding="utf-8"), re.DOTALL)
    panel = panel_from_block(
        yaml.safe_load(text.replace("TEACHER", models["same"]).replace("OTHER", models["bpe"]))["panel"]
    )
    require_defined_panel(panel, panel.divergence, 1.0)
    assert set(panel.views) == {"solver", "chat", "other"} and "solution" in panel.columns


def test_what_views_add_is_in_the_lineage_by_hash(models, tmp_path):
    host = in_trl(models, tmp_path / "trl", block(models, "sampled"))
    host.save_model(str(tmp_path / "saved"))
    views = json.loads((tmp_path / "saved" / "lineage.json").read_text())["run"]["views"]
    assert views["solver"]["context"] == hashlib.sha256(b"Hint: {{ hint }}").hexdigest()
    assert views["solver"]["columns"] == ["hint"]
    assert views["bpe"]["system"] == hashlib.sha256(b"Be right.").hexdigest()
    assert views["bpe"]["chat_template"] == "own" and views["bpe"]["tokenizer"] == "own"
    shown = subprocess.run(
        [sys.executable, "-m", "kd_plugin", "lineage", "show", str(tmp_path / "saved")], capture_output=True, text=True
    )
    assert "solver read context" in shown.stdout and "hint" in shown.stdout
    assert not verify(tmp_path / "saved").problems


def test_saved_rollouts_show_what_a_teacher_read_and_said_of_the_students_tokens(models, tmp_path):
    in_trl(models, tmp_path, block(models, "sampled"), save_rollouts=2, logging_steps=1)
    (file, *_) = sorted((tmp_path / "rollouts").glob("*.jsonl"))
    row = json.loads(file.read_text().splitlines()[0])
    hints = [one["hint"] for one in ROWS]
    assert any(f"Hint: {hint}<|im_end|>" in row["teachers"]["solver"]["read"] for hint in hints)
    assert row["teachers"]["bpe"]["read"].startswith("<|im_start|>system\nBe right.<|im_end|>")
    assert "Hint" not in row["prompt"]
    said = row["teachers"]["bpe"]
    assert len(said["logprob"]) == len(row["scored"]) and len(said["top"]) == len(row["scored"])
