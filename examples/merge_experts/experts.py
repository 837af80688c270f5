"""One LoRA expert a domain, fitted by plain supervised fine-tuning with TRL, and how a model is examined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from examples.merge_experts.tasks import Problem
from kd_plugin.trl import LicenseLineageCallback

MAX_NEW_TOKENS = 16


def lora() -> LoraConfig:
    """The adapter that experts and students have."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def load_tokenizer(base: str | Path) -> Any:
    """The base's tokenizer, padding on the left as generation needs it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(base: str | Path) -> Any:
    """The base in float32: many CPUs have no fast bfloat16."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def fit_expert(
    base: str | Path, problems: Sequence[Problem], directory: Path, *, steps: int, rows: int, seed: int
) -> None:
    """Fit a LoRA adapter to a domain's answers and write it to ``directory``."""
    dataset = Dataset.from_list([{"prompt": p.prompt, "completion": f" {p.answer}"} for p in problems])
    trainer = SFTTrainer(
        model=load_base(base),
        args=SFTConfig(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=rows,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        ),
        train_dataset=dataset,
        processing_class=load_tokenizer(base),
        peft_config=lora(),
        callbacks=[LicenseLineageCallback({"student": {"license": "apache-2.0"}})],
    )
    trainer.train()
    trainer.save_model(str(directory))


@torch.inference_mode()
def accuracy(
    model: Any, tokenizer: Any, problems: Mapping[str, Sequence[Problem]], *, rows: int = 32
) -> dict[str, float]:
    """Return the share of problems solved in each domain, the model writing greedily."""
    model.eval()
    solved: dict[str, float] = {}
    for domain, items in problems.items():
        right = 0
        ordered = sorted(items, key=lambda problem: len(problem.prompt))
        for start in range(0, len(ordered), rows):
            batch = ordered[start : start + rows]
            inputs = tokenizer([p.prompt for p in batch], return_tensors="pt", padding=True).to(model.device)
            outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(p.is_solved_by(text) for p, text in zip(batch, texts, strict=True))
        solved[domain] = right / len(items)
    return solved
