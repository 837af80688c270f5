"""On-policy text correction against offline text KD, with an oracle behind a server, at the same teacher tokens.

    python -m tests.benchmarks.text_oracle --output build/text_oracle      # 3 seeds, minutes on one core
    python -m tests.benchmarks.text_oracle --quick --output DIR            # one seed, two rounds; checks that it runs

The domain is reasoning-gym's ``spell_backward`` (words of 3 and 4 letters); 300 items are held out. The student is a
random Llama of 3 layers, width 96, over bytes, with one token for the question's fixed words. The oracle is a scripted
chat server that answers every question rightly: whole answers for offline KD, corrections for the panel. It counts a
token for every 4 bytes that it reads and writes.

On policy, the panel's trainer has each wrong response corrected (``evaluate: verifier``, ``accept: verifier``), with
templates of a few words, since this oracle needs no instructions. Offline, TRL's ``SFTTrainer`` trains on the oracle's
answers; in each round it may draw from as many of them as cost what the panel had spent by then. Both take the same
number of optimizer steps on the same number of rows, with one learning rate.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from kd_plugin.cache.targets import Generation
from kd_plugin.panel import TeacherPanel
from kd_plugin.text import Ask, ServerWriter, TextServerTeacher, in_order
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.tiny import byte_tokenizer, tiny_llama

FIXED = "Spell this word backward (example: sun -> nus): "
LEAN = {"rewrite.txt": "version: lean\nCorrect it.\n---\n{{task}}\n{{response}}\nBEGIN {{key}}\nEND {{key}}"}
ROWS, STEPS = 32, 25  # of a step; of a round


@dataclass
class Oracle:
    """A chat server that knows the answers."""

    answers: dict[str, str]
    read: int = 0
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, request: str) -> tuple[str, int, int]:
        if request in self.answers:
            text = self.answers[request]
        else:
            task, _, begin, end = request.split("\n")  # the prompt's own line end is escaped
            text = f"{begin}\n{self.answers[json.loads(task)]}\n{end}"
        read, written = -(-len(request) // 4), -(-len(text) // 4)
        with self.lock:
            self.read, self.written = self.read + read, self.written + written
        return text, read, written


@contextmanager
def serving(oracle: Oracle):
    """Yield the address of a server that answers as the oracle does."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send({"data": [{"id": "oracle"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text, read, written = oracle.reply(body["messages"][-1]["content"])
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": read, "completion_tokens": written}
            self.send({"model": "oracle", "choices": [choice], "usage": usage})

        def send(self, answer):
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def items(seed: int) -> tuple[list[dict], list[dict]]:
    """Return the rows that are trained on and those that are held out, the same words for all seeds."""
    found = {}
    for entry in reasoning_gym.create_dataset("spell_backward", size=6000, seed=1, min_word_len=3, max_word_len=4):
        found.setdefault(entry["question"], entry["answer"])
    # A line end says where the word ends and the answer begins: a base model has no chat template for that
    rows = [{"prompt": f"{question}\n", "answer": answer} for question, answer in found.items()]
    random.Random(0).shuffle(rows)
    held_out, rows = rows[:300], rows[300:]
    random.Random(seed).shuffle(rows)
    return rows, held_out


def student(seed: int, directory: Path):
    """Return a random student's directory and its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([FIXED])
    model = tiny_llama(seed, hidden=96, layers=3, vocab_size=len(tokenizer), scale=1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return str(directory), tokenizer


@torch.no_grad()
def accuracy(model, tokenizer, rows) -> float:
    """Return the share of greedy responses that are right."""
    training, right = model.training, 0
    model.eval()
    by_length: dict[int, list[dict]] = {}
    for row in rows:
        by_length.setdefault(len(tokenizer(row["prompt"])["input_ids"]), []).append(row)
    for length, alike in by_length.items():
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in alike])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        said = [tokenizer.decode(row[length:], skip_special_tokens=True).strip() for row in out]
        right += sum(text == row["answer"] for text, row in zip(said, alike, strict=True))
    model.train(training)
    return right / len(rows)


@dataclass
class Curve(TrainerCallback):
    """Measures the held-out accuracy and what the teacher has read and written, at the start and after each round."""

    tokenizer: object
    held_out: list[dict]
    oracle: Oracle
    points: list[dict] = field(default_factory=list)

    def measure(self, model) -> None:
        right = accuracy(model, self.tokenizer, self.held_out)
        self.points.append({"accuracy": right, "read": self.oracle.read, "written": self.oracle.written})
        print(len(self.points) - 1, self.points[-1], flush=True)

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self.measure(model)

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step % STEPS == 0:
            self.measure(model)


def settings(directory: Path, rounds: int, seed: int) -> dict:
    return {
        "output_dir": str(directory), "max_steps": rounds * STEPS, "per_device_train_batch_size": ROWS, "seed": seed,
        "learning_rate": 2e-3, "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "logging_steps": 10 * STEPS,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def on_policy(directory: Path, seed: int, rounds: int, keep: float) -> list[dict]:
    """Train by on-policy text correction; return the curve."""
    rows, held_out = items(seed)
    templates = directory / "templates"
    templates.mkdir(parents=True)
    for name, text in LEAN.items():
        (templates / name).write_text(text)
    model, tokenizer = student(seed, directory / "student")
    oracle = Oracle({row["prompt"]: row["answer"] for row in rows})
    with serving(oracle) as url:
        text = CorrectionSettings(
            evaluate="verifier", verifier="exact", templates=str(templates), earlier_weight=keep, keep_weight=keep
        )
        panel = TeacherPanel({"oracle": TextServerTeacher(url, name="oracle", license="apache-2.0")}, text=text)
        curve = Curve(tokenizer, held_out, oracle)
        trainer = TeacherPanelTrainer(
            model=model, teacher_models=panel, train_dataset=Dataset.from_list(rows), callbacks=[curve],
            args=TeacherPanelConfig(**settings(directory / "run", rounds, seed), max_completion_length=8),
        )  # fmt: skip
        trainer.train()
    return curve.points


def offline(directory: Path, seed: int, budgets: list[int]) -> list[dict]:
    """Train on the oracle's answers; in round k on as many as cost ``budgets[k]`` tokens. Return the curve."""
    rows, held_out = items(seed)
    model, tokenizer = student(seed, directory / "student")
    oracle = Oracle({row["prompt"]: row["answer"] for row in rows})
    with serving(oracle) as url:
        writer = ServerWriter(url, name="oracle", license="apache-2.0")
        asks = [Ask(row["prompt"], Generation(max_new_tokens=16, temperature=0)) for row in rows]
        answers = in_order(writer, asks)
    spent, costs = 0, []
    for answer in answers:
        spent += answer.usage.read + answer.usage.written
        costs.append(spent)
    draws, drawn = random.Random(seed), []
    for budget in budgets:
        bought = max(sum(cost <= budget for cost in costs), 1)
        drawn += [draws.randrange(bought) for _ in range(STEPS * ROWS)]
    data = [{"prompt": rows[i]["prompt"], "completion": answers[i].text} for i in drawn]
    curve = Curve(tokenizer, held_out, oracle)
    config = SFTConfig(**settings(directory / "run", len(budgets), seed), shuffle_dataset=False, max_length=None)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[curve]
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)  # rounds follow one another
    trainer.train()
    for point, budget in zip(curve.points, [0, *budgets], strict=True):
        point |= {"bought": sum(cost <= budget for cost in costs), "budget": budget}
    return curve.points


def plot(found: dict, path: Path) -> None:
    """Draw both curves against rounds and against teacher tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_round, by_token) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for kind, colour in (("on_policy", "tab:blue"), ("offline", "tab:orange")):
        for seed, runs in found.items():
            points, spent = runs[kind], runs["on_policy"]
            values = [point["accuracy"] for point in points]
            label = kind.replace("_", "-") if seed == min(found) else None
            by_round.plot(range(len(values)), values, color=colour, label=label)
            tokens = [point["read"] + point["written"] for point in spent]
            by_token.plot([t / 1000 for t in tokens], values, color=colour)
    for axis, name in ((by_round, f"round of {STEPS} steps"), (by_token, "thousand teacher tokens, read and written")):
        axis.axhline(0.8, color="grey", linewidth=0.8, linestyle="dotted")
        axis.set_xlabel(name)
    by_round.set_ylabel("held-out accuracy")
    by_round.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="run this seed alone; a later call finds what is there")
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--keep", type=float, default=1.0, help="weight of tokens that were right")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds, rounds = (1, 2) if given.quick else (given.seeds, given.rounds)
    given.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for seed in range(seeds) if given.only is None else [given.only]:
        kept = given.output / f"curves-{seed}.json"
        if not kept.is_file():
            print(f"seed {seed}, on policy", flush=True)
            points = on_policy(given.output / f"on_policy-{seed}", seed, rounds, given.keep)
            print(f"seed {seed}, offline", flush=True)
            budgets = [point["read"] + point["written"] for point in points[1:]]
            own = {"on_policy": points, "offline": offline(given.output / f"offline-{seed}", seed, budgets)}
            kept.write_text(json.dumps(own, indent=1))
        found[seed] = json.loads(kept.read_text())
        for kind, points in found[seed].items():
            best = next((n for n, point in enumerate(points) if point["accuracy"] >= 0.8), None)
            last = points[-1]["accuracy"]
            print(f"seed {seed}, {kind}: 0.8 first in round {best}, {last:.3f} in the last", flush=True)
    if given.only is None:
        plot(found, given.output / "text_oracle.png")


if __name__ == "__main__":
    main()
