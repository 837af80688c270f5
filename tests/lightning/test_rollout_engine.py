"""Servers generate for a LightningModule's student: the run is that of the transformers engine, or it is stopped."""

import pytest
import torch
from lightning.pytorch import Trainer
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from kd_plugin.errors import ServerError
from kd_plugin.lightning import TeacherPanelCorrection
from kd_plugin.teachers import LocalTeacher, client
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import LORA, TOPICS
from tests.lightning.help import Plain


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


def fit(directory, student, teacher_dir, engine, lora=False, steps=3):
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    module = Plain(get_peft_model(model, LORA) if lora else model, lr=1e-2)
    panel = TeacherPanelCorrection(
        {"t": LocalTeacher(teacher_dir, dtype="float32")},
        tokenizer=LocalTeacher(student).tokenizer,
        rollout_engine=engine,
        top_k=1,
        max_completion_length=8,
        divergence="reverse_kl",
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[panel],
    )
    rows = [{"prompt": f"{TOPICS[i % 8]}?"} for i in range(16)]
    loader = torch.utils.data.DataLoader(rows, 4, collate_fn=lambda some: {"prompt": [row["prompt"] for row in some]})
    trainer.fit(module, loader)
    return module


@pytest.fixture
def served(untied_student_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
    with fake_vllm(model, tokenizer, Behaviour()) as (url, behaviour):
        yield url, behaviour


@pytest.mark.parametrize("sync", ["adapter", "reload"])
def test_it_trains_as_with_transformers_generation(sync, served, untied_student_dir, teacher_dir, tmp_path):
    engine = {"kind": "vllm", "url": served[0], "sync": sync, "chunk": 3}
    mine = fit(tmp_path / "a", untied_student_dir, teacher_dir, engine, sync == "adapter")
    theirs = fit(tmp_path / "b", untied_student_dir, teacher_dir, None, sync == "adapter")
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4, abs=1e-4) and len(mine.losses) == 3
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert [body["cache_salt"] for path, _, body in served[1].requests if "seed" in body][-1] == "policy-2"
    assert not list((tmp_path / "a" / "rollout-engine").iterdir())


def test_when_the_server_is_gone_what_was_learned_is_saved(served, untied_student_dir, teacher_dir, tmp_path):
    served[1].dies_at = 7
    engine = {"kind": "vllm", "url": served[0], "sync": "reload", "max_retries": 0}
    with pytest.raises(ServerError, match="No rollout engine is left"):
        fit(tmp_path, untied_student_dir, teacher_dir, engine)
    assert [path.name for path in tmp_path.glob("server-step=*.ckpt")] == ["server-step=1.ckpt"]
