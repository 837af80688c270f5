"""One rank of a panel run on a plain Trainer; leaves losses, weights and what an evaluation measured."""

from pathlib import Path

import torch

from tests.hosts.runs import losses, prompts, weights, work
from tests.transformers.test_panel_host import GREEDY, ROUTES, build


def main(directory: str, student: str, first: str, second: str, rows_a_rank: str) -> None:
    rows = prompts(count=8, teacher_id=ROUTES)
    trainer = build(
        Path(directory) / "run", student, {"a": first, "b": second}, rows, eval_dataset=rows.select(range(7)),
        generation_kwargs=GREEDY, max_steps=3, per_device_train_batch_size=int(rows_a_rank),
        per_device_eval_batch_size=2, save_rollouts=1,
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        report = {"losses": losses(trainer), "weights": weights(trainer), "eval": found["eval_loss"]}
        torch.save(report, Path(directory, "result.pt"))


if __name__ == "__main__":
    work(main)
