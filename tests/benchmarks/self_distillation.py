"""A student that teaches itself: the same weights, shown the solution, correct what the student writes without it.

python -m tests.benchmarks.self_distillation --output OUT --seeds 0 1 2

The task is to sort letters. A small byte model is first trained to answer with what a hint before the question
says (the hints are random, so that it learns to read hints and not to sort), and a little to sort. That is its start:
with the solution as its hint it is nearly always right, without it rarely. Then it trains on questions alone, three
ways at equal updates:

- `start` and `ema`: on policy. The student answers, and `kind: self` teaches it under a view that shows the solution,
  by the frozen start or by the moving average.
- `offline`: offline KD on a cache of the same frozen teacher, which wrote its answers under the same view.

Accuracy is that of greedy answers to questions that no run trained on. Each run ends as a line of OUT/runs.jsonl, and a
run that is there is not repeated.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kd_plugin import LocalTeacher, SelfTeacher, TeacherPanel, capture
from kd_plugin.cache import Generation, TopK
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.views.view import View
from tests.tiny import byte_tokenizer, tiny_llama

ALPHABET, LENGTH = "abcdefghijklmnop", 5
HINT = View(context="={{ solution }}")
TRAINED, HELD_OUT, ROWS, STEPS = 4096, 512, 64, 150
SORTED_SHARE = 0.03  # of the rows that make the start
METHODS = ("start", "ema", "offline")
DECAY = 0.999


def questions(count: int, seed: int) -> list[str]:
    """Draw different words."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        letters = torch.randint(len(ALPHABET), (LENGTH,), generator=generator).tolist()
        found["".join(ALPHABET[i] for i in letters)] = None
    return list(found)


def solution(question: str) -> str:
    """Sort a word's letters."""
    return "".join(sorted(question))


def hinted(question: str, hint: str) -> str:
    """Return the prompt that the view of this benchmark makes, for a word and its hint."""
    return f"={hint}\n\n{question}>"


def make_start(seed: int, steps: int, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Train a model from scratch to repeat hints, and a little to sort."""
    model = tiny_llama(seed=seed, hidden=96, layers=2, scale=1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    words = questions(20_000, seed=1000 + seed)
    for _ in range(steps):
        prompts, answers = [], []
        for row in torch.randint(len(words), (ROWS, 2), generator=generator).tolist():
            question, other = words[row[0]], words[row[1]]
            sorts = torch.rand((), generator=generator) < SORTED_SHARE
            prompts.append(f"{question}>" if sorts else hinted(question, other))
            answers.append(solution(question) if sorts else other)
        ids, labels = batch(prompts, answers, tokenizer)
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids != tokenizer.pad_token_id).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def batch(
    prompts: list[str], answers: list[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (B, L), padded on the right, and the labels of the answers."""
    before = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    after = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for answer in answers]
    width = max(len(a) + len(b) for a, b in zip(before, after, strict=True))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (a, b) in enumerate(zip(before, after, strict=True)):
        ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
    return ids, labels


@torch.no_grad()
def answers(model: PreTrainedModel, prompts: list[str], tokenizer: PreTrainedTokenizerFast, **options) -> list[str]:
    """Answer prompts of one length, greedily unless told otherwise."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts])
    options = {"do_sample": False, **options}
    output = model.eval().generate(input_ids=ids, max_new_tokens=LENGTH + 1, **options)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def accuracy(
    model: PreTrainedModel, words: list[str], tokenizer: PreTrainedTokenizerFast, hints: bool = False
) -> float:
    """Return the share of words that are answered right."""
    prompts = [hinted(word, solution(word)) if hints else f"{word}>" for word in words]
    found = answers(model, prompts, tokenizer)
    return sum(answer == solution(word) for answer, word in zip(found, words, strict=True)) / len(words)


def train(directory: Path, start: Path, method: str, seed: int, steps: int) -> PreTrainedModel:
    """Train the student by one of :data:`METHODS`."""
    words = questions(TRAINED + HELD_OUT, seed=1)[:TRAINED]
    rows = Dataset.from_dict({"prompt": [f"{word}>" for word in words], "solution": [solution(word) for word in words]})
    common = {
        "output_dir": str(directory), "max_steps": steps, "per_device_train_batch_size": ROWS, "learning_rate": 1e-3,
        "divergence": "forward_kl", "bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 50, "seed": seed,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    if method == "offline":
        cache = capture(
            rows, LocalTeacher(str(start), dtype="float32"), directory / "cache", targets=TopK(64),
            generate=Generation(max_new_tokens=LENGTH + 1), view=HINT, seed=seed, progress=False,
        )  # fmt: skip
        trainer = OfflineKDTrainer(str(start), OfflineKDConfig(**common), teacher_cache=cache)
    else:
        teacher = SelfTeacher("ema" if method == "ema" else "start", decay=DECAY, name="self")
        trainer = TeacherPanelTrainer(
            model=str(start),
            teacher_models=TeacherPanel({"self": teacher}, own={"self": OwnTerms(view=HINT)}),
            args=TeacherPanelConfig(**common, max_completion_length=LENGTH + 1),
            train_dataset=rows,
        )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def measure(output: Path, seed: int, steps: int, start_steps: int) -> list[dict]:
    """Make a start, train it by each method, and return the lines of this seed."""
    tokenizer = byte_tokenizer()
    held_out = [word for word in questions(TRAINED + HELD_OUT, seed=1)[TRAINED:]]
    directory = output / f"start-{seed}"
    if not directory.is_dir():
        make_start(seed, start_steps, tokenizer).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    path, found = output / "runs.jsonl", []
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for method in METHODS:
        line = next((one for one in done if (one["seed"], one["method"]) == (seed, method)), None)
        if line is None:
            from transformers import AutoModelForCausalLM

            begun = AutoModelForCausalLM.from_pretrained(directory)
            before = {
                "start": accuracy(begun, held_out, tokenizer),
                "hinted": accuracy(begun, held_out, tokenizer, hints=True),
            }
            clock = time.perf_counter()
            student = train(output / f"{method}-{seed}", directory, method, seed, steps)
            seconds = time.perf_counter() - clock
            line = {
                "seed": seed, "method": method, **before, "after": accuracy(student, held_out, tokenizer),
                "seconds": round(seconds, 1),
            }  # fmt: skip
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print(line, flush=True)
        found.append(line)
    return found


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--start-steps", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    lines = [line for seed in args.seeds for line in measure(args.output, seed, args.steps, args.start_steps)]
    for method in METHODS:
        own = [line for line in lines if line["method"] == method]
        means = {key: statistics.mean(line[key] for line in own) for key in ("start", "hinted", "after", "seconds")}
        print(method, {key: round(value, 3) for key, value in means.items()}, [line["after"] for line in own])


if __name__ == "__main__":
    main()
