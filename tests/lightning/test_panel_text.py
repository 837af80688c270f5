"""Text teachers in Lightning: the steps of the TRL host, on one rank and on two."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from kd_plugin.lightning import TeacherPanelCorrection
from kd_plugin.panel import TeacherPanel
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import TOPICS, assert_same, losses, settings
from tests.lightning.help import Losses, Plain, trainer
from tests.text_teachers import ScriptedTeacher
from tests.tiny import byte_tokenizer

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
ROWS = [{"prompt": f"{TOPICS[i]}{'?' * (1 + i)}", "answer": f"answer {i % 3}"} for i in range(4)]


def panel(teacher_dir, preference):
    teachers = {"t": ScriptedTeacher(score=lambda case: float(case.row["answer"] == "answer 1")), "d": teacher_dir}
    text = CorrectionSettings(accept="teacher", preference=preference)
    return TeacherPanel(teachers, combine="weighted_kl", text=text)


@pytest.mark.parametrize("preference", [None, "dpo"])
def test_lightning_takes_the_steps_of_trl(preference, tmp_path, student_dir, teacher_dir):
    common = {"max_completion_length": 12, "generation_kwargs": GREEDY}
    host = TeacherPanelTrainer(
        model=student_dir, teacher_models=panel(teacher_dir, preference), train_dataset=Dataset.from_list(ROWS),
        args=TeacherPanelConfig(
            **settings(tmp_path / "trl", max_steps=3, weight_decay=0.01, lr_scheduler_type="constant", **common)
        ),
    )  # fmt: skip
    host.train()
    ready, seen = Plain(student_dir), Losses()
    correction = TeacherPanelCorrection(panel(teacher_dir, preference), tokenizer=byte_tokenizer(), **common)
    run = trainer(tmp_path / "lightning", [seen, correction], max_steps=3)
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    run.fit(ready, DataLoader([0], batch_size=1, collate_fn=lambda _: dict(columns)))
    # At the start every margin is 0 and Adam makes much of rounding
    assert seen.losses == pytest.approx(losses(host), rel=1e-3 if preference else 1e-4)
    mine = {name: p.detach() for name, p in ready.model.named_parameters()}
    assert_same(mine, {name: p.detach() for name, p in host.model.named_parameters()}, 1e-3 if preference else 1e-4)
    logged = run.callback_metrics
    assert logged["text/accepted"] == 0.75 and logged["economics/read/t"] > 0
    assert torch.isfinite(logged["divergence/d"])
