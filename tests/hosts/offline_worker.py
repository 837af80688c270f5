"""One rank of an offline run on the cache, student and directory that it is told; leaves losses and weights."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kd_plugin.cache import TeacherCache
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import losses, settings, weights, work
from tests.tiny import byte_tokenizer


def main(directory: str, cache: str, student: str, rows_a_rank: str, *options: str) -> None:
    out = Path(directory)
    chosen = {"packing": True, "max_length": 64} if "packed" in options else {}
    if "partial" in options:  # captured at completions, trained at every token
        chosen = {"completion_only_loss": False, "allow_partial": True}
    targets = {"teacher_cache": cache}
    if "text" in options:  # `cache` is a capture of text
        targets = {"teacher_text": cache}
    else:
        chosen["ce_weight"] = 0.3
    trainer = OfflineKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=OfflineKDConfig(
            **settings(out / "run", per_device_train_batch_size=int(rows_a_rank), max_steps=4, **chosen)
        ),
        train_dataset=TeacherCache(cache).dataset().to_iterable_dataset() if "streamed" in options else None,
        **targets,
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save({"losses": losses(trainer), "weights": weights(trainer)}, out / "result.pt")


if __name__ == "__main__":
    work(main)
