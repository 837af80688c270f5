"""Whole steps of random models of 0.5B and 1.5B parameters: on-policy and offline, ours against TRL's.

The models have Qwen2.5's shapes and a tokenizer of as many tokens; what they write is noise, and as long as asked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from kd_plugin.cache import TopK
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.benchmarks.offline_step import OWN, cache
from tests.benchmarks.offline_step import rows as token_rows
from tests.benchmarks.panel_step import OURS, Side
from tests.gpu.report import GIB, Place, Table, added_peak, wait
from tests.tiny import CHAT_TEMPLATE, SPECIALS

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
UNSHUFFLED: dict[str, Any] = {
    "max_length": None, "shuffle_dataset": False, "model_init_kwargs": {"dtype": "float32"},
}  # fmt: skip
TINY = {"tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}}


def wide_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A token a byte, and others that no text holds, ``size`` in all."""
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<{i}>" for i in range(size - len(tokens))]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    found.chat_template = CHAT_TEMPLATE
    return found


def save(directory: Path, shape: dict[str, int], vocab: int, seed: int, place: Place) -> str:
    """Write a random model in bfloat16 with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = wide_tokenizer(vocab)
    config = Qwen2Config(
        vocab_size=vocab, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.05, **shape,
    )  # fmt: skip
    with torch.device(place.device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return str(directory)


def common(directory: Path, place: Place, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(directory), "per_device_train_batch_size": rows, "bf16": True, "use_cpu": not place.is_gpu,
        "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-6,
        "dataloader_pin_memory": False, "save_strategy": "no",
    }  # fmt: skip


def alternate(place: Place, table: Table, labels: tuple[object, ...], steps: dict[str, Callable[[], None]]) -> None:
    """Time each side's step in turn; the first warms up. Adds a row a side."""
    spent: dict[str, list[float]] = {side: [] for side in steps}
    for round_number in range(1 + int(place.pick(3, 1))):  # type: ignore[call-overload]
        for side, step in steps.items():
            wait(place)
            started = time.perf_counter()
            step()
            wait(place)
            if round_number:
                spent[side].append(time.perf_counter() - started)
    median = {side: statistics.median(times) for side, times in spent.items()}
    for side, step in steps.items():
        of_trl = f"{median[side] / median['TRL']:.2f}"
        table.rows.append((*labels, side, f"{1e3 * median[side]:.0f}", of_trl, f"{added_peak(place, step):.2f}"))


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"Say something about the number {i}." for i in range(32)]})


def on_policy_trainer(
    place: Place, model: str, scratch: Path, rows: int, own: dict[str, Any], precision: str = "bfloat16"
) -> TeacherPanelTrainer:
    """A panel of one teacher, which has the student's own weights."""
    settings = {**common(scratch, place, rows), "bf16": precision == "bfloat16"}
    return TeacherPanelTrainer(
        model=model, teacher_models={"t": LocalTeacher(model, dtype=precision, name="t")},
        train_dataset=prompts(), args=TeacherPanelConfig(**settings, **own, combine="weighted_kl"),
    )  # fmt: skip


def writing(tokens: int) -> dict[str, Any]:
    """What both sides' configurations say of a response, and of the student's weights."""
    return {"max_completion_length": tokens, "generation_kwargs": {"min_new_tokens": tokens}, "beta": 1.0,
            "model_init_kwargs": {"dtype": "float32"}}  # fmt: skip


def on_policy(place: Place, table: Table, name: str, model: str, scratch: Path) -> None:
    """A step of TeacherPanelTrainer with one teacher, and of DistillationTrainer."""
    rows, tokens = place.pick((8, 128), (2, 4))  # type: ignore[misc]
    data, own = prompts(), writing(tokens)
    theirs = DistillationTrainer(
        model=model, teacher_model=model, train_dataset=data,
        args=DistillationConfig(**common(scratch / "trl", place, rows), **own,
                                teacher_model_init_kwargs={"dtype": "bfloat16"}),
    )  # fmt: skip
    mine = on_policy_trainer(place, model, scratch / "ours", rows, own)
    sides = {
        "TRL": Side(theirs, "trl.trainer.distillation_trainer", "_chunked_divergence_loss"),
        "ours": Side(mine, *OURS),
    }
    batch = [dict(data[i]) for i in range(rows)]
    steps = {side: lambda s=made: s.step(batch, 0) for side, made in sides.items()}
    alternate(place, table, (name, f"on-policy, {rows} x {tokens}"), steps)
    for side, made in sides.items():
        parts = {part: seconds for part, seconds in made.medians().items() if part != "full step"}
        table.notes.append(
            f"{name}, {side}: " + ", ".join(f"{p} {1e3 * s:.0f} ms of the host" for p, s in parts.items())
        )


def on_policy_step(
    place: Place, model: str, scratch: Path, rows: int, tokens: int, precision: str = "bfloat16"
) -> tuple[Callable[[], None], Any]:
    """Return an on-policy step, and its trainer."""
    side = Side(on_policy_trainer(place, model, scratch, rows, writing(tokens), precision), *OURS)
    batch = [dict(row) for row in prompts().select(range(rows))]
    return lambda: side.step(batch, 0), side.trainer


def offline_trainer(place: Place, model: str, scratch: Path, rows: int, texts: Any) -> OfflineKDTrainer:
    """Trains on the 64 likeliest tokens of some other model, which a cache holds."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    return OfflineKDTrainer(
        model, OfflineKDConfig(**common(scratch / "kd", place, rows), **UNSHUFFLED, lineage=OWN),
        train_dataset=as_rows(texts), processing_class=tokenizer,
        teacher_cache=cache(scratch / "cache", TopK(64), texts, tokenizer),
    )  # fmt: skip


def as_rows(texts: Any) -> Dataset:
    return Dataset.from_list([{"input_ids": ids.tolist()} for ids in texts])


def supervised(trainer: Any, rows: int) -> None:
    """One step of a trainer over given texts, without its optimizer."""
    trainer.model.zero_grad(set_to_none=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    count = (batch["labels"][:, 1:] != -100).sum()
    trainer.training_step(trainer.model, batch, num_items_in_batch=count)


def offline(place: Place, table: Table, name: str, model: str, scratch: Path) -> None:
    """A step of OfflineKDTrainer on cached targets, and of SFTTrainer, without the optimizer."""
    rows, length = place.pick((8, 512), (2, 16))  # type: ignore[misc]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    texts = token_rows(argparse.Namespace(rows=rows, length=length), tokenizer)
    theirs = SFTTrainer(
        model, SFTConfig(**common(scratch / "sft", place, rows), **UNSHUFFLED), train_dataset=as_rows(texts),
        processing_class=tokenizer,
    )  # fmt: skip
    trainers = {"TRL": theirs, "ours": offline_trainer(place, model, scratch, rows, texts)}
    steps = {side: lambda t=trainer: supervised(t, rows) for side, trainer in trainers.items()}
    alternate(place, table, (name, f"offline, {rows} x {length}"), steps)


def offline_step(place: Place, model: str, scratch: Path) -> tuple[Callable[[], None], Any]:
    """Return an offline step of few tokens, and its trainer."""
    rows, length = place.pick((4, 64), (2, 16))  # type: ignore[misc]
    texts = token_rows(argparse.Namespace(rows=rows, length=length), PreTrainedTokenizerFast.from_pretrained(model))
    trainer = offline_trainer(place, model, scratch, rows, texts)
    return lambda: supervised(trainer, rows), trainer


def run(place: Place) -> Table:
    """Measure both kinds of step for each size."""
    header = ("model", "step", "side", "ms", "of TRL's", "GiB beside weights")
    table = Table("Whole steps, bf16 autocast over float32 weights", header)
    vocab = int(place.pick(151_936, 300))  # type: ignore[call-overload]
    for name, shape in (SHAPES if place.is_gpu else TINY).items():
        with tempfile.TemporaryDirectory() as directory:
            scratch = Path(directory)
            model = save(scratch / "model", shape, vocab, 0, place)
            on_policy(place, table, name, model, scratch)
            offline(place, table, name, model, scratch)
        if place.is_gpu:
            torch.cuda.empty_cache()
            table.notes.append(f"{name}: {torch.cuda.memory_allocated() / GIB:.2f} GiB were still held afterwards.")
    return table
