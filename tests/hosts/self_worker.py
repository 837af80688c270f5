"""One rank of a run whose student teaches itself by its average; leaves losses, and both sets of weights."""

from pathlib import Path

import torch

from kd_plugin import SelfTeacher
from tests.hosts.runs import losses, weights, work
from tests.hosts.test_self_teacher import of_teacher, panel_of, rows
from tests.transformers.test_panel_host import GREEDY, build


def main(directory: str, student: str, rows_a_rank: str) -> None:
    teacher = SelfTeacher("ema", decay=0.5)
    trainer = build(
        Path(directory) / "run", student, panel_of(teacher), rows(8), generation_kwargs=GREEDY, max_steps=3,
        per_device_train_batch_size=int(rows_a_rank), learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    rank = trainer.accelerator.process_index
    found = {"losses": losses(trainer), "weights": weights(trainer), "average": of_teacher(teacher)}
    torch.save(found, Path(directory, f"{rank}.pt"))


if __name__ == "__main__":
    work(main)
