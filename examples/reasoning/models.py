"""Teacher and students, trained from scratch by plain cross-entropy."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.reasoning.problems import LENGTHS, Problem, tokenizer, with_slips

TEACHER_WIDTH, STUDENT_WIDTH, LAYERS = 64, 24, 2
ROWS = 32  # of an update


def new_model(width: int, seed: int) -> LlamaForCausalLM:
    """Return a model with random weights."""
    words = tokenizer()
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
            pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None, initializer_range=0.08,
        )
    )  # fmt: skip


def teach(
    model: LlamaForCausalLM,
    updates: int,
    learning_rate: float,
    *,
    seed: int,
    without: frozenset[str],
    slips: float = 0.0,
    decay: bool = False,
    saved: Callable[[int], Any] = lambda update: None,
) -> None:
    """Train a model on solutions, by cross-entropy.

    Args:
        model: is changed.
        updates: how many.
        learning_rate: after 50 updates.
        seed: of the problems.
        without: prompts that are left out.
        slips: share of the letters that are wrong and taken back; those themselves are not learned.
        decay: whether the learning rate falls to a tenth.
        saved: is told the number of updates after each.
    """
    words, draw = tokenizer(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = (
            learning_rate * min(1.0, (update + 1) / 50) * (1.0 - 0.9 * update / updates if decay else 1.0)
        )
        texts, marks = [], []
        while len(texts) < ROWS:
            problem = Problem.draw(draw, draw.randint(*LENGTHS))
            if problem.prompt in without:
                continue
            written, learned = with_slips(draw, problem.solution, slips)
            texts.append(words(problem.prompt + written)["input_ids"] + [words.eos_token_id])
            marks.append([False] * len(problem.prompt) + learned + [True])
        width = max(map(len, texts))
        ids = torch.tensor([text + [words.pad_token_id] * (width - len(text)) for text in texts])
        learned_BT = torch.tensor([mark + [False] * (width - len(mark)) for mark in marks])
        logits = model(input_ids=ids, attention_mask=(ids != words.pad_token_id).long()).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[learned_BT[:, 1:]], ids[:, 1:][learned_BT[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        saved(update + 1)
    model.eval()


def make_teacher(directory: Path, updates: int, without: frozenset[str]) -> None:
    """Train the teacher on solutions with slips that are taken back: it knows what to do behind a wrong step."""
    model = new_model(TEACHER_WIDTH, seed=0)
    teach(model, updates, 3e-3, seed=0, without=without, slips=0.08, decay=True)
    save(model, directory, "teacher")


def make_starts(directories: dict[int, Path], without: frozenset[str]) -> None:
    """Train one student on solutions without slips, and save it after each of several numbers of updates."""
    model = new_model(STUDENT_WIDTH, seed=7)

    def saved(update: int) -> None:
        if update in directories:
            save(model, directories[update], f"student after {update} updates")

    teach(model, max(directories), 4e-3, seed=1, without=without, saved=saved)


def save(model: LlamaForCausalLM, directory: Path, name: str) -> None:
    """Save a model with its tokenizer and its licence."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    (directory / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {name} of examples/reasoning\n")
