"""The ways to make one student of three experts, all with the same number of updates and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model

from examples.merge_experts.experts import MAX_NEW_TOKENS, load_base, load_tokenizer, lora
from examples.merge_experts.tasks import DOMAINS, Problem
from kd_plugin import AdapterTeacher, LocalTeacher, capture
from kd_plugin.cache import Generation, TopK
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Attributes:
        name: in the results.
        offline: share of the updates that fit the experts' own answers from a cache; the rest are on-policy.
        averaged: whether the student starts as the average of the experts' adapters instead of as the base.
        divergence: of the on-policy updates.
    """

    name: str
    offline: float
    averaged: bool = False
    divergence: str = "forward_kl"


RECIPES = (
    Recipe("average, then panel", offline=0.0, averaged=True),
    Recipe("panel", offline=0.0),
    Recipe("warm-up, then panel", offline=0.5),
    Recipe("offline KD", offline=1.0),
    Recipe("average, then offline KD", offline=1.0, averaged=True),
)


def cache_answers(base: str | Path, expert: Path, problems: Sequence[Problem], directory: Path) -> None:
    """Let an expert answer by sampling, and keep its distribution at every token of its answers."""
    model = PeftModel.from_pretrained(load_base(base), expert).merge_and_unload()
    capture(
        Dataset.from_list([{"prompt": p.prompt, "domain": p.domain} for p in problems]),
        LocalTeacher(model, tokenizer=load_tokenizer(base), name=expert.name, license="apache-2.0"),
        directory,
        targets=TopK(64),
        generate=Generation(max_new_tokens=MAX_NEW_TOKENS, keep_unfinished=True),
    )


def train_student(
    recipe: Recipe,
    base: str | Path,
    experts: Mapping[str, Path],
    caches: Sequence[Path],
    problems: Sequence[Problem],
    directory: Path,
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
) -> Any:
    """Train a LoRA student by ``recipe`` and return it.

    Every recipe is one run of the same trainer: its first updates come from the caches, the others from the panel,
    whose teachers are adapters on the student's own frozen base.
    """
    offline_steps = round(recipe.offline * steps)
    start: dict[str, Any] = {"repo": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
    if recipe.averaged:  # no file says it: PEFT keeps nothing of what add_weighted_adapter was made from
        start["merged_from"] = [str(expert) for expert in experts.values()]
    trainer = TeacherPanelTrainer(
        model=averaged(base, experts) if recipe.averaged else get_peft_model(load_base(base), lora()),
        teacher_models={name: AdapterTeacher(path, name=name) for name, path in experts.items()},
        args=TeacherPanelConfig(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=rows // len(DOMAINS),
            gradient_accumulation_steps=len(DOMAINS),  # a micro-batch has rows of like length: mostly of one domain
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            combine="route",
            divergence=recipe.divergence,
            warmup_cache=",".join(map(str, caches)) if offline_steps else None,
            warmup_cache_steps=offline_steps,
            max_completion_length=MAX_NEW_TOKENS,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            lineage={"student": start},
        ),
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "teacher_id": p.domain} for p in problems]),
        processing_class=load_tokenizer(base),
    )
    trainer.train()
    trainer.save_model(str(directory))
    return trainer.model


def averaged(base: str | Path, adapters: Mapping[str, Path]) -> Any:
    """Return the base with one trainable adapter, the plain average of the experts' weight changes.

    The sum of three changes of rank 16 has rank 48, which is what "cat" makes of them: the average is exact.
    """
    names = list(adapters)
    model = PeftModel.from_pretrained(load_base(base), adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters[name], adapter_name=name)
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "default", combination_type="cat")
    model.set_adapter("default")
    for name in names:
        model.delete_adapter(name)
    return model
