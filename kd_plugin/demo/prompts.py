"""The questions that the demo bundles, in two domains, and what it measures with held-out ones.

``python -m kd_plugin.demo.prompts`` generates the arithmetic ones with reasoning-gym
(https://github.com/open-thought/reasoning-gym, Apache-2.0), whose generators are seeded, so that a test regenerates
them and compares. That needs the extra ``dev``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.rollouts.rows import left_padded
from kd_plugin.teachers import LocalTeacher

MATH, GENERAL = "math", "general"
DOMAINS = (MATH, GENERAL)
# Small enough for a model of 135M parameters to learn in a minute, and short, since prompts cost time too.
TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 30},
}
SEED = 20261124
PER_TASK = 160
HELD_OUT_PER_TASK = 8


@dataclass(frozen=True)
class Question:
    """A prompt of the demo.

    Attributes:
        domain: ``math`` (problems from reasoning-gym) or ``general``; names the teacher that scores it.
        text: what the user asks.
        answer: the known answer of a math problem, from which the math teacher learns; None in ``general``.
    """

    domain: str
    text: str
    answer: str | None = None

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The question as a conversation, the form of TRL's ``prompt`` column."""
        return [{"role": "user", "content": self.text}]


def questions(split: str, domain: str, limit: int) -> list[Question]:
    """Return the first ``limit`` bundled questions of a domain; ``split`` is ``train`` or ``held_out``."""
    if domain == MATH:
        rows = _bundle("arithmetic.json")[split]
        return [Question(MATH, row["question"], row["answer"]) for row in rows[:limit]]
    return [Question(GENERAL, text) for text in _bundle("general.json")[split][:limit]]


def available(split: str, domain: str) -> int:
    """How many questions of a domain are bundled."""
    return len(_bundle("arithmetic.json" if domain == MATH else "general.json")[split])


@cache
def _bundle(name: str) -> dict[str, Any]:
    return json.loads((files("kd_plugin.demo") / "data" / name).read_text(encoding="utf-8"))


def generate_bundle() -> dict[str, Any]:
    """Generate the bundle: ``train`` and ``held_out`` hold distinct problems, the tasks interleaved."""
    import reasoning_gym

    per_task: list[list[dict[str, str]]] = []
    for task, settings in TASKS.items():
        problems: dict[str, dict[str, str]] = {}
        for item in reasoning_gym.create_dataset(task, size=20 * PER_TASK, seed=SEED, **settings):
            question = item["question"].strip()
            problems.setdefault(question, {"task": task, "question": question, "answer": item["answer"].strip()})
        per_task.append(list(problems.values())[:PER_TASK])
    depth = max(map(len, per_task))
    rows = [rows[i] for i in range(depth) for rows in per_task if i < len(rows)]
    held_out = HELD_OUT_PER_TASK * len(TASKS)
    return {
        "license": "Apache-2.0",
        "source": f"reasoning-gym {version('reasoning-gym')}, seed {SEED}",
        "held_out": rows[:held_out],
        "train": rows[held_out:],
    }


def as_json(bundle: dict[str, Any]) -> str:
    """Return the bundle as JSON with one problem a line, which makes diffs readable."""
    lines = ["{", f'  "license": {json.dumps(bundle["license"])},', f'  "source": {json.dumps(bundle["source"])},']
    for split in ("held_out", "train"):
        rows = ",\n".join(f"    {json.dumps(row)}" for row in bundle[split])
        lines.append(f'  "{split}": [\n{rows}\n  ]' + ("," if split == "held_out" else ""))
    return "\n".join([*lines, "}"]) + "\n"


def main() -> None:
    """Write the bundle into the package's source."""
    target = Path(str(files("kd_plugin.demo") / "data" / "arithmetic.json"))
    target.write_text(as_json(generate_bundle()), encoding="utf-8")
    print(f"wrote {target}")


# Vector instructions without a bfloat16 product: there it is emulated, several times slower than float32
_NO_BFLOAT16 = frozenset({"AVX2", "DEFAULT", "NO AVX"})
_ROWS_AT_ONCE = 4
_GENERATE_AT_ONCE = 16


def fast_dtype() -> str:
    """Return ``bfloat16`` where this CPU multiplies it natively, else ``float32``, which takes more memory."""
    return "float32" if torch.backends.cpu.get_cpu_capability() in _NO_BFLOAT16 else "bfloat16"


@dataclass(frozen=True)
class Asked:
    """A question with what a model wrote.

    Attributes:
        prompt_ids: tokens of the rendered conversation.
        completion_ids: tokens that the model wrote, its end-of-sequence token included where it wrote one.
        text: the same, decoded, without special tokens.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str


def answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    max_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Asked]:
    """Let a model answer greedily, some questions at a time; ``advance`` hears how many are done."""
    rendered = [
        tokenizer.apply_chat_template(q.prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for q in questions
    ]
    answers: dict[int, Asked] = {}
    by_length = sorted(range(len(questions)), key=lambda i: len(rendered[i]))
    for start in range(0, len(by_length), _GENERATE_AT_ONCE):
        batch = by_length[start : start + _GENERATE_AT_ONCE]
        ids, mask = left_padded([rendered[i] for i in batch], tokenizer.pad_token_id)
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, temperature=None,
                top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        for i, row in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            text = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            answers[i] = Asked(tuple(rendered[i]), tuple(row[:end]), text)
        advance(len(answers))
    return [answers[i] for i in range(len(questions))]


def held_out_kl(student: LocalTeacher, teacher: LocalTeacher, answers: Sequence[Asked]) -> float:
    """Mean KL(teacher ‖ student) in nats per token, over the tokens of the teacher's own held-out answers."""
    total, count = 0.0, 0
    for start in range(0, len(answers), _ROWS_AT_ONCE):
        rows = answers[start : start + _ROWS_AT_ONCE]
        width = max(len(a.prompt_ids) + len(a.completion_ids) for a in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        positions: list[int] = []
        for row, a in enumerate(rows):
            tokens = a.prompt_ids + a.completion_ids
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            first = row * width + len(a.prompt_ids) - 1
            positions.extend(range(first, first + len(a.completion_ids)))
        where = torch.tensor(positions)
        with torch.inference_mode():
            ours, theirs = (m.score(ids, mask, where) for m in (student, teacher))
            student_logits, teacher_logits = (s.head.logits(s.hidden).float() for s in (ours, theirs))
            values = divergence_from_logits(student_logits, teacher_logits, Divergence("forward_kl"))
        total += float(values.sum())
        count += len(positions)
    return total / count


@dataclass(frozen=True)
class StudentMeasure:
    """What a student was worth at one point of the demo.

    Attributes:
        kl: domain to held-out KL from that domain's teacher, in nats per token.
        samples: one answer of each domain, the same question every time.
    """

    kl: dict[str, float]
    samples: dict[str, str]


def open_model(directory: str | Path, tokenizer: Any, name: str = "student") -> LocalTeacher:
    """Open a model directory for scoring and writing, in the dtype that this machine is fast in."""
    return LocalTeacher(directory, tokenizer=tokenizer, name=name, dtype=fast_dtype())


if __name__ == "__main__":
    main()
