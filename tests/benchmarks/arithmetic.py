"""One-digit arithmetic of reasoning-gym, tokenizers for it, and models trained on it from scratch."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_plugin.rollouts.in_process import InProcessEngine, Sampling
from kd_plugin.teachers import LocalTeacher
from tests.tiny import SPECIALS

FAULTS = 3.2  # nats of a text behind faults, at which teachers are taken for equally good
LONGEST = 32  # tokens of a response in the finest tokenizer


@dataclass(frozen=True)
class Problem:
    """One problem: what is asked, how an answer reads, and the entry that scores it."""

    prompt: str
    answer: str
    entry: dict[str, Any]

    def text(self, answer: str | None = None) -> str:
        value = self.answer if answer is None else answer
        return f" {value}, because {self.prompt} makes {value}."


def problems() -> list[Problem]:
    """Return all different problems of two one-digit terms."""
    found = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=3000, seed=7
    )
    unique = {entry["metadata"]["expression"]: entry for entry in found}
    return [Problem(expression, entry["answer"], entry) for expression, entry in sorted(unique.items())]


def score(problem: Problem, response: str) -> bool:
    """Return whether the final number is right, by the scorer of reasoning-gym."""
    said = re.search(r"makes (-?\d+)\.", response)
    dataset = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)
    return said is not None and dataset.score_answer(said[1], problem.entry) == 1.0


def bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def fresh(tokenizer: Any, seed: int, hidden: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def with_faults(asked: list[Problem], seed: int) -> list[tuple[str, str]]:
    """Return rows of prompt and response, half of them going on from a text with faults.

    A teacher that never saw a fault says anything behind one, and a student that makes some is led astray by it: large
    teachers have seen faults.
    """
    draw, rows = random.Random(seed), []
    pieces = [re.findall(r" ?[^ ]+", one.text()) for one in asked]
    words = sorted({word for text in pieces for word in text})
    for one, text in zip(asked, pieces, strict=True):
        rows.append((one.prompt, one.text()))
        cut = draw.randrange(1, len(text))
        begun = [draw.choice(words) if draw.random() < 0.3 else word for word in text[:cut]]
        begun += [draw.choice(words)] * draw.choice([0, 0, 1, 2, 4, 8])
        rows.append((one.prompt + "".join(begun), "".join(text[cut:])))
    return rows


def pretrain(model: nn.Module, tokenizer: Any, rows: list[tuple[str, str]], steps: int, seed: int) -> None:
    """Fit rows of prompt and response by cross-entropy on the responses."""
    draw, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=3e-3)
    encoded = [
        (tokenizer(p)["input_ids"], [*tokenizer(r, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        for p, r in rows
    ]
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps * 0.9)
        chosen = draw.sample(encoded, min(48, len(encoded)))
        width = max(len(p) + len(r) for p, r in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (p, r) in enumerate(chosen):
            ids[i, : len(p) + len(r)] = torch.tensor([*p, *r])
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def generated(model: Any, tokenizer: Any, prompts: list[str], *, temperature: float, seed: int) -> list[list[int]]:
    sampling = Sampling(LONGEST, temperature, draws="uniform")
    engine = InProcessEngine(model, tokenizer, sampling, device=torch.device("cpu"), seed=seed)
    return [one.ids for one in engine.generate([tokenizer(prompt)["input_ids"] for prompt in prompts])]


def accuracy(model: Any, tokenizer: Any, asked: list[Problem]) -> float:
    found = generated(model, tokenizer, [one.prompt for one in asked], temperature=0.0, seed=0)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    return sum(map(score, asked, texts)) / len(asked)


def teacher_of(name: str, tokenizer: Any, asked: list[Problem], work: Path | None, steps: int) -> LocalTeacher:
    """Train a teacher until it is right on 98 of 100 problems, or read it from ``work``."""
    model = fresh(tokenizer, seed=100, hidden=48 if name == "smollm2" else 64)
    kept = None if work is None else work / f"teacher-{name}.pt"
    if kept is not None and kept.exists():
        model.load_state_dict(torch.load(kept))
        model.eval()
        return LocalTeacher(model, tokenizer=tokenizer)
    rows, right = [(one.prompt, one.text()) for one in asked], 0.0
    for turn in range(6):
        pretrain(model, tokenizer, rows, steps, seed=turn)
        right = accuracy(model, tokenizer, asked)
        print(f"teacher {name}: {right:.3f} after {(turn + 1) * steps} steps", file=sys.stderr, flush=True)
        if right >= 0.98 or kept is None:
            break
    rows = [row for part in range(30) for row in with_faults(asked, part)]
    for turn in range(6):
        pretrain(model, tokenizer, rows, 3 * steps // 4, seed=9 + turn)
        right, lost = accuracy(model, tokenizer, asked), nats(model, tokenizer, with_faults(asked, 999)[1::2])
        print(f"teacher {name}: {right:.3f}, {lost:.2f} nats behind faults", file=sys.stderr, flush=True)
        if lost <= FAULTS or kept is None:
            break
    if kept is not None:
        torch.save(model.state_dict(), kept)
    return LocalTeacher(model, tokenizer=tokenizer)


@torch.no_grad()
def nats(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> float:
    """Return the mean negative log-likelihood of responses, which does not depend on how they are cut into tokens."""
    total = 0.0
    for prompt, response in rows:
        ids = tokenizer(prompt)["input_ids"]
        answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logprobs = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        total -= float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum())
    return total / len(rows)


def start_of(tokenizer: Any, asked: list[Problem], seed: int, steps: int) -> dict[str, Tensor]:
    """Return the weights of a student that answers in the right form with a random number."""
    draw, start = random.Random(seed), fresh(tokenizer, seed)
    numbers = [str(n) for n in range(-9, 19)]
    rows = [(one.prompt, one.text(draw.choice(numbers))) for one in asked for _ in range(4)]
    pretrain(start, tokenizer, rows, steps, seed)
    return dict(start.state_dict())
