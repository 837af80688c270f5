"""One rank of an evaluation of both trainers on an uneven number of rows; leaves what was measured."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM

from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import ROWS, prompts, settings, work
from tests.tiny import byte_tokenizer

GREEDY = {"max_completion_length": 24, "top_k": 1, "mask_truncated_completions": True}
NAMES = ("loss", "entropy", "mean_token_accuracy", "divergence/teacher", "tokens/teacher")


def offline(directory, student, cache, eval_dataset, peft_config=None, compute_metrics=None, **kwargs):
    chosen = {"max_steps": 1, "ce_weight": 0.3, **kwargs}
    return OfflineKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager"),
        args=OfflineKDConfig(**settings(directory, **chosen)),
        train_dataset=ROWS,
        eval_dataset=eval_dataset,
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        compute_metrics=compute_metrics,
    )


def panel(directory, student, teacher, eval_dataset, **kwargs):
    """Build a panel whose student ends many of its greedy responses, some sooner and some later."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.generation_config.eos_token_id = [2, *range(3, 259, 9)]
    return TeacherPanelTrainer(
        model=model,
        processing_class=byte_tokenizer(),
        teacher_model=teacher,
        args=TeacherPanelConfig(**settings(directory, **{"max_steps": 1, **GREEDY, **kwargs})),
        train_dataset=prompts(),
        eval_dataset=eval_dataset,
    )


def measured(trainer, prefix: str = "eval", **kwargs) -> dict[str, float]:
    """Evaluate, and return the means over tokens."""
    found = trainer.evaluate(**kwargs)
    return {name: found[f"{prefix}_{name}"] for name in NAMES if f"{prefix}_{name}" in found}


def main(directory: str, student: str, teacher: str, cache: str, batch: str) -> None:
    size = {"per_device_eval_batch_size": int(batch)}
    report = {}
    for count in (5, 7, 8):  # some rank repeats one row, or all of its rows, or none
        trainer = offline(Path(directory) / "offline", student, cache, ROWS.select(range(count)), **size)
        report[f"offline {count}"] = measured(trainer)
        trainer = panel(Path(directory) / "panel", student, teacher, prompts(count=count), **size)
        report[f"panel {count}"] = measured(trainer)
    trainer = offline(Path(directory) / "packed", student, cache, ROWS, max_length=None, padding_free=True, **size)
    trainer.eval_dataset = trainer.eval_dataset.select(range(5))
    report["padding-free 5"] = measured(trainer)
    if trainer.accelerator.is_main_process:
        Path(directory, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    work(main)
