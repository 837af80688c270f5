"""Whole steps of the panel's trainer: against TRL's, with three routed teachers, with four adapters, and memory.

    python -m tests.benchmarks.panel_step --model DIR     # all tables, float32; half an hour on 2 idle cores
    python -m tests.benchmarks.panel_step --quick         # tiny models in memory, seconds; checks that it runs

DIR is SmolLM2-135M-Instruct; student and teachers have its size. Both sides of a comparison alternate within one
process, with one seed a round, so they write the same tokens; medians are compared. All rollouts have one length, but
in the comparison "natural": its prompts are the demo's, its rollouts end where the student ends them, its step has four
micro-batches, and the lengths are printed. ``--precision autocast`` is TRL's default, ``bf16=True`` over float32
weights; ``bfloat16`` has weights in bfloat16. It changes the comparisons of full steps, not the others.
Adapters are random LoRAs of rank 16 on all linear layers, over one base. Memory is measured in a process of its own a
row: the resident set after one generation batch was scored, and for offloaded teachers the most bytes of weights that
were on the device at once, counted as they are moved (on a CPU the device's memory is the host's).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer

from kd_plugin.demo.prompts import GENERAL, MATH, questions
from kd_plugin.divergence import Divergence
from kd_plugin.panel import TeacherPanel, panel_loss, score_rows
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.vocab import Vocabulary
from tests.tiny import save_tiny

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [f"t{i}" for i in range(8)]
OURS = ("kd_plugin.panel.step", "panel_loss")


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return timed


class Side:
    """One trainer, and the time of its steps."""

    def __init__(self, trainer, loss_module: str, loss_name: str) -> None:
        self.trainer, self.clock, self.rounds = trainer, Clock(), []
        trainer.create_optimizer_and_scheduler(1000)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        self.lengths: list[int] = []
        trainer._generate = self.clock.around("generation", self._keeping_lengths(trainer._generate))
        trainer.accelerator.backward = self.clock.around("loss and backward", trainer.accelerator.backward)
        self.module, self.loss_name = sys.modules[loss_module], loss_name

    def step(self, rows: list[dict], seed: int) -> None:
        """One optimizer step; the module's loss function is timed while it is this side's turn."""
        self.lengths = []
        torch.manual_seed(seed)
        self.clock.seconds = {}
        original = getattr(self.module, self.loss_name)
        setattr(self.module, self.loss_name, self.clock.around("loss and backward", original))
        started = time.perf_counter()
        try:
            self.trainer.model.train()
            for _ in range(self.trainer.args.gradient_accumulation_steps):
                self.trainer.training_step(self.trainer.model, [dict(row) for row in rows], None)
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()
        finally:
            setattr(self.module, self.loss_name, original)
        self.rounds.append({"full step": time.perf_counter() - started, **self.clock.seconds})

    def _keeping_lengths(self, generate: Callable) -> Callable:
        def kept(*args, **kwargs):
            found = generate(*args, **kwargs)
            self.lengths += map(len, found[1])
            return found

        return kept

    def medians(self) -> dict[str, float]:
        return {key: statistics.median(r[key] for r in self.rounds) for key in self.rounds[0]}


def config(cls, options, directory: str, micro_batches: int = 1, **extra):
    natural = micro_batches > 1
    return cls(
        output_dir=directory, per_device_train_batch_size=options.rows // micro_batches,
        gradient_accumulation_steps=micro_batches, max_completion_length=options.tokens,
        generation_kwargs={} if natural else {"min_new_tokens": options.tokens}, learning_rate=1e-6,
        bf16=options.precision == "autocast", model_init_kwargs={"dtype": options.dtype},
        use_cpu=True, report_to="none", gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True,
        beta=1.0, **extra,
    )  # fmt: skip


def prompts(teachers: int = 1) -> Dataset:
    texts = [f"Write {'a few ' * (i % 3)}words about the number {i}." for i in range(64)]
    routes = {"teacher_id": [NAMES[i % teachers] for i in range(64)]} if teachers > 1 else {}
    return Dataset.from_dict({"prompt": texts, **routes})


def natural_prompts() -> Dataset:
    pairs = zip(questions("train", MATH, 64), questions("train", GENERAL, 64), strict=True)
    return Dataset.from_dict({"prompt": [question.prompt for pair in pairs for question in pair]})


def compare(options, sides: dict[str, Side], title: str) -> None:
    for round_number in range(options.rounds + 1):
        for name, side in sides.items():
            rows = list(side.trainer.train_dataset)
            begin = round_number * options.rows % len(rows)
            side.step((rows + rows)[begin : begin + options.rows], round_number)
            print(f"round {round_number}, {name}: {sum(side.lengths)} tokens, {sorted(side.lengths)}", file=sys.stderr)
    for side in sides.values():
        del side.rounds[0]  # the first touches memory for the first time
    (first, a), (second, b) = ((name, side.medians()) for name, side in sides.items())
    print(f"\n### {title}\n\n| part | {first}, s | {second}, s | ratio |\n|---|---|---|---|")
    for part in ("full step", "generation", "loss and backward"):
        print(f"| {part} | {a[part]:.3f} | {b[part]:.3f} | {a[part] / b[part]:.2f} |", flush=True)


def ours(options, directory: str, teachers: dict, **extra) -> Side:
    trainer = TeacherPanelTrainer(
        model=options.model, teacher_models=teachers, args=config(TeacherPanelConfig, options, directory, **extra),
        train_dataset=prompts(1 if extra else len(teachers)),
    )  # fmt: skip
    return Side(trainer, *OURS)


def against_trl(options, scratch: Path) -> None:
    _against_trl(options, scratch, prompts(), 1, "One teacher, against TRL's DistillationTrainer")


def natural(options, scratch: Path) -> None:
    title = "One teacher, against TRL's DistillationTrainer: natural lengths, four micro-batches"
    _against_trl(options, scratch, natural_prompts(), 4, title)


def _against_trl(options, scratch: Path, dataset: Dataset, micro_batches: int, title: str) -> None:
    common = {"options": options, "micro_batches": micro_batches}
    theirs = DistillationTrainer(
        model=options.model, teacher_model=options.model, train_dataset=dataset,
        args=config(DistillationConfig, directory=str(scratch / "trl"),
                    teacher_model_init_kwargs={"dtype": options.dtype}, **common),
    )  # fmt: skip
    mine = TeacherPanelTrainer(
        model=options.model, teacher_models=local(options, 1), train_dataset=dataset,
        args=config(TeacherPanelConfig, directory=str(scratch / "ours"), combine="weighted_kl", **common),
    )  # fmt: skip
    sides = {
        "ours": Side(mine, *OURS),
        "TRL": Side(theirs, "trl.trainer.distillation_trainer", "_chunked_divergence_loss"),
    }
    compare(options, sides, title)


def local(options, count: int) -> dict[str, LocalTeacher]:
    return {name: LocalTeacher(options.model, dtype=options.dtype, name=name) for name in NAMES[:count]}


def routed(options, scratch: Path) -> None:
    sides = {
        "three routed": ours(options, str(scratch / "three"), local(options, 3)),
        "one": ours(options, str(scratch / "one"), local(options, 1), combine="weighted_kl"),
    }
    compare(options, sides, "Three routed local teachers, against one")


def save_adapter(model: str, directory: Path, seed: int) -> str:
    from peft import LoraConfig, get_peft_model  # the GPU pack, which takes parts of this, has no need of it

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=16, target_modules=LINEAR, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    peft.save_pretrained(directory)
    return str(directory)


def fixed_batch(options, vocab: int) -> tuple:
    torch.manual_seed(1)
    ids = torch.randint(3, vocab, (options.rows, 16 + options.tokens))
    return ids, torch.ones_like(ids), [range(options.tokens)] * options.rows


def adapters(options, scratch: Path) -> None:
    base = LocalTeacher(options.model, dtype="float32")
    found = {n: AdapterTeacher(save_adapter(options.model, scratch / n, i), base=base, name=n)
             for i, n in enumerate(NAMES[:4])}  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids, mask, positions = fixed_batch(options, base.vocabulary.size)
    seconds: dict[tuple[int, str], list[float]] = {}

    def timed(count: int, part: str, function: Callable):
        started = time.perf_counter()
        result = function()
        seconds.setdefault((count, part), []).append(time.perf_counter() - started)
        return result

    hidden = student.base_model(input_ids=ids).last_hidden_state[:, 15:-1].detach()
    hidden = hidden.reshape(-1, hidden.shape[-1]).requires_grad_()
    head = OutputHead.from_model(student, base.vocabulary.size)

    def loss_and_backward(panel: TeacherPanel, scores, values: bool) -> None:
        loss = panel_loss(
            panel, scores, hidden, head, ids[:, 16:].reshape(-1), divergence=Divergence("reverse_kl"),
            values=values,
        )  # fmt: skip
        torch.autograd.grad(loss.loss_sum, [hidden, head.weight])

    for _ in range(options.rounds + 1):
        for count in (1, 4):
            panel = TeacherPanel({name: found[name] for name in NAMES[:count]}, combine="weighted_kl")
            asked = [panel.assign({})] * options.rows
            scores = timed(
                count, "scoring", lambda p=panel, a=asked: score_rows(p, a, ids, mask, 16, positions, options.rows)
            )
            for part, values in (("loss, all values", True), ("loss, values when logged", False)):
                timed(count, part, lambda p=panel, c=scores, v=values: loss_and_backward(p, c, v))
    print("\n### Four adapters, all consulted on all rows, against one\n\n| part | four, s | one, s | ratio |")
    print("|---|---|---|---|")
    for part in ("scoring", "loss, all values", "loss, values when logged"):
        four, one = (statistics.median(seconds[count, part][1:]) for count in (4, 1))
        print(f"| {part} | {four:.3f} | {one:.3f} | {four / one:.2f} |", flush=True)


class Counted(LocalTeacher):
    """Counts the bytes of offloaded weights that are on the device."""

    here, most = 0, 0

    def _move(self, device) -> None:
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        Counted.here += size if self._holders else -size
        Counted.most = max(Counted.most, Counted.here)
        super()._move(device)


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once: what a device would hold of them."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory_of(options, kind: str, count: int, scratch: Path) -> None:
    """Print one row's measurement as JSON; run in a process of its own."""
    if kind == "adapters":
        base = LocalTeacher(options.model, dtype="float32")
        teachers = {n: AdapterTeacher(scratch / n, base=base, name=n) for n in NAMES[:count]}
    else:
        teachers = {n: Counted(options.model, name=n, dtype="float32", placement="offload") for n in NAMES[:count]}
    panel = TeacherPanel(teachers, combine="weighted_kl")
    vocab = Vocabulary.from_tokenizer(next(iter(teachers.values())).tokenizer).size
    ids, mask, positions = fixed_batch(options, vocab)
    scores = score_rows(panel, [panel.assign({})] * options.rows, ids, mask, 16, positions, options.rows)
    tensors = tensor_bytes() / 2**20
    del scores
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
    own = sum(f.stat().st_size for f in scratch.glob("t0/*.safetensors")) / 2**20
    print(json.dumps({"resident": resident, "tensors": tensors, "on_device": Counted.most / 2**20, "adapter": own}))


def memory(options, scratch: Path) -> None:
    for i, name in enumerate(NAMES):
        save_adapter(options.model, scratch / name, i)
    print(
        "\n### Memory, MiB\n\n| teachers | adapters: tensors | adapters: resident | an adapter file "
        "| offloaded: resident | on the device |"
    )
    print("|---|---|---|---|---|---|")
    for count in (1, 2, 4, 8):
        found = {}
        for kind in ("adapters", "offloaded"):
            size = ["--rows", str(options.rows), "--tokens", str(options.tokens)]
            command = [sys.executable, "-m", "tests.benchmarks.panel_step", "--model", options.model, *size]
            command += ["--memory", kind, str(count), str(scratch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        a, o = found["adapters"], found["offloaded"]
        of_adapters = f"{a['tensors']:.1f} | {a['resident']:.0f} | {a['adapter']:.1f}"
        print(f"| {count} | {of_adapters} | {o['resident']:.0f} | {o['on_device']:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["float32", "autocast", "bfloat16"], default="float32")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["trl", "natural", "routed", "adapters", "memory"])
    parser.add_argument("--memory", nargs=3, metavar=("KIND", "COUNT", "SCRATCH"))
    options = parser.parse_args()
    options.dtype = "bfloat16" if options.precision == "bfloat16" else "float32"
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if options.memory:
            memory_of(options, options.memory[0], int(options.memory[1]), Path(options.memory[2]))
            return
        if options.quick:
            options.model = save_tiny(scratch / "tiny", scale=1.0)
            options.rows, options.tokens, options.rounds = 4, 6, 2
        if not options.model:
            parser.error("--model DIR, or --quick")
        parts = {"trl": against_trl, "natural": natural, "routed": routed, "adapters": adapters, "memory": memory}
        for name, part in parts.items():
            if options.only in (None, name):
                part(options, scratch)


if __name__ == "__main__":
    main()
