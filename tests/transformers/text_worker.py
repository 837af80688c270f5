"""One rank of a run on a plain Trainer with a text teacher that corrects few rows, so that a rank may have none."""

from pathlib import Path

import torch

from kd_plugin.errors import ServerError
from kd_plugin.panel import TeacherPanel
from kd_plugin.text.correction import CorrectionSettings
from tests.hosts.runs import losses, prompts, weights, work
from tests.text_teachers import ScriptedTeacher
from tests.transformers.test_panel_host import GREEDY, build

ANSWERS = [f"answer {i}" for i in range(8)]


def main(directory: str, student: str, rows_a_rank: str, preference: str, dies: str) -> None:
    teacher = ScriptedTeacher(score=lambda case: float(case.row["answer"] not in ("answer 6", "answer 7")))
    panel = TeacherPanel({"t": teacher}, text=CorrectionSettings(accept="teacher", preference=preference or None))
    trainer = build(
        Path(directory) / "run", student, panel, prompts(count=8, answer=ANSWERS), generation_kwargs=GREEDY,
        max_steps=3, per_device_train_batch_size=int(rows_a_rank), learning_rate=1e-2,
    )  # fmt: skip
    if dies == "one" and trainer.accelerator.process_index == 1:
        teacher.dead = True  # for this rank alone
    try:
        trainer.train()
        failed = ""
    except ServerError as error:
        failed = str(error)
    report = {"losses": losses(trainer), "weights": weights(trainer), "failed": failed}
    torch.save(report, Path(directory, f"result-{trainer.accelerator.process_index}.pt"))


if __name__ == "__main__":
    work(main)
