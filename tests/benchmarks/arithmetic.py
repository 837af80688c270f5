"""One-digit arithmetic of reasoning-gym, tokenizers for it, and models trained on it from scratch."""

from __future__ import annotations

import random
import re
import sys
import time
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

BEHIND_FAULTS = 0.15  # nats a byte of the right text behind faults, at which a teacher is good enough
RARE = 0.05  # what a token of a fault counts in a teacher's training
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


@dataclass(frozen=True)
class Text:
    """A prompt and what follows it: a part with faults, and how the text goes on rightly."""

    prompt: str
    faults: str
    right: str

    def encoded(self, tokenizer: Any) -> tuple[list[int], list[float]]:
        """Return its tokens, with that of the end, and what each counts."""
        ids, counts = [], []
        for part, count in ((self.prompt, 0.0), (self.faults, RARE), (self.right, 1.0)):
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
            counts += [count] * (len(ids) - len(counts))
        return [*ids, tokenizer.eos_token_id], [*counts, 1.0]


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


def with_faults(asked: list[Problem], seed: int) -> list[Text]:
    """Return texts, half of them with a first part in which words stand that do not belong there.

    A teacher that never saw a fault says anything behind one, and a student that makes some is led astray by it: large
    teachers have seen faults. The faults are learned too, at a small weight, as if they were rare: else a teacher that
    writes a word as several tokens says anything inside a word that it would not have begun, and one that writes it as
    one token does not.
    """
    draw, rows = random.Random(seed), []
    pieces = [re.findall(r" ?[^ ]+", one.text()) for one in asked]
    words = sorted({word for text in pieces for word in text})
    alike = {word: [other for other in words if _form(other) == _form(word)] for word in words}
    for one, text in zip(asked, pieces, strict=True):
        rows.append(Text(one.prompt, "", one.text()))
        cut, rate = draw.randrange(1, len(text)), draw.choice([0.2, 0.4, 0.8])
        begun = [
            draw.choice(alike[word] if draw.random() < 0.7 else words) if draw.random() < rate else word
            for word in text[:cut]
        ]
        begun += [draw.choice(words)] * draw.choice([0, 0, 0, 1, 2, 4])
        rows.append(Text(one.prompt, "".join(begun), "".join(text[cut:])))
    return rows


def _form(word: str) -> str:
    return re.sub(r"-?\d+", "0", word)


def pretrain(model: nn.Module, tokenizer: Any, rows: list[Text], steps: int, seed: int) -> None:
    """Fit texts by cross-entropy on what follows the prompt; their parts with faults count :data:`RARE`."""
    draw, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=3e-3)
    encoded = [one.encoded(tokenizer) for one in rows]
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps * 0.9)
        chosen = draw.sample(encoded, min(48, len(encoded)))
        width = max(map(len, (ids for ids, _ in chosen)))
        ids, weights = torch.zeros(len(chosen), width, dtype=torch.long), torch.zeros(len(chosen), width)
        for i, (own, counts) in enumerate(chosen):
            ids[i, : len(own)], weights[i, : len(own)] = torch.tensor(own), torch.tensor(counts)
        where = weights[:, 1:] > 0
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1][where]
        found = nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][where], reduction="none")
        loss = (found * weights[:, 1:][where]).sum() / weights.sum()
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
    """Train a teacher on texts with faults until it goes on from new ones as well as any other, or read it.

    All teachers see the same stream of texts, each until it loses no more than :data:`BEHIND_FAULTS` nats a byte behind
    faults that it did not see: bytes, since a text has other tokens for each.
    """
    model = fresh(tokenizer, seed=100, hidden=48 if name == "smollm2" else 64)
    kept = None if work is None else work / f"teacher-{name}.pt"
    if kept is not None and kept.exists():
        model.load_state_dict(torch.load(kept))
        model.eval()
        return LocalTeacher(model, tokenizer=tokenizer)
    unseen, begin = with_faults(asked, 999)[1::2], time.perf_counter()
    for turn in range(30):
        rows = [row for part in range(30) for row in with_faults(asked, 30 * turn + part)]
        pretrain(model, tokenizer, rows, steps, seed=turn)
        right, lost = accuracy(model, tokenizer, asked), nats_per_byte(model, tokenizer, unseen)
        print(
            f"teacher {name}: {(turn + 1) * steps} steps, {time.perf_counter() - begin:.0f} s, right {right:.3f}; "
            f"nats a byte behind faults {lost[0]:.4f}, in faults {lost[1]:.4f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if (lost[0] <= BEHIND_FAULTS and right >= 0.99) or kept is None:
            break
    if kept is not None:
        torch.save(model.state_dict(), kept)
    return LocalTeacher(model, tokenizer=tokenizer)


@torch.no_grad()
def nats_per_byte(model: Any, tokenizer: Any, rows: list[Text]) -> tuple[float, float]:
    """Return the negative log-likelihood of what follows the faults, and of the faults, each by its bytes.

    It does not depend on the tokens into which a text is cut.
    """
    right = faults = 0.0
    for one in rows:
        ids, counts = one.encoded(tokenizer)
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        lost, count = -logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0], torch.tensor(counts)[1:]
        right, faults = right + float(lost[count == 1.0].sum()), faults + float(lost[count == RARE].sum())
    return right / sum(len(one.right.encode()) for one in rows), faults / sum(len(one.faults.encode()) for one in rows)


def start_of(tokenizer: Any, asked: list[Problem], seed: int, steps: int) -> dict[str, Tensor]:
    """Return the weights of a student that answers in the right form with a random number."""
    draw, start = random.Random(seed), fresh(tokenizer, seed)
    numbers = [str(n) for n in range(-9, 19)]
    rows = [Text(one.prompt, "", one.text(draw.choice(numbers))) for one in asked for _ in range(4)]
    pretrain(start, tokenizer, rows, steps, seed)
    return dict(start.state_dict())
