"""One rank of an offline run on a plain Trainer; leaves losses, weights and what an evaluation measured."""

from pathlib import Path

import torch

from kd_plugin.cache import TeacherCache
from tests.hosts.runs import losses, weights, work
from tests.transformers.help import build, tokenized


def main(directory: str, cache: str, student: str, rows_a_rank: str, option: str) -> None:
    rows = tokenized()
    if option == "streamed":
        rows = TeacherCache(cache).dataset().map(lambda row: {"labels": row["input_ids"]}).to_iterable_dataset()
    trainer = build(
        Path(directory) / "run", cache, student, rows, max_steps=4, ce_weight=0.3, allow_partial=option != "plain",
        eval_dataset=tokenized().select(range(7)), per_device_eval_batch_size=2,
        per_device_train_batch_size=int(rows_a_rank),
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
        measured = {name: found[name] for name in names}
        torch.save(
            {"losses": losses(trainer), "weights": weights(trainer), "eval": measured}, Path(directory, "result.pt")
        )


if __name__ == "__main__":
    work(main)
