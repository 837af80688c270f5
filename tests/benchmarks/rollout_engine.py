"""Generation by a vLLM server here against transformers in process, and a whole on-policy step against TRL's.

    KD_VLLM_PYTHON=.venv-vllm/bin/python python -m tests.benchmarks.rollout_engine --model DIR    # some ten minutes

DIR is SmolLM2-135M-Instruct. Both sides generate from the same prompts, as many tokens a row (no end token), and take
turns within one run; medians of tokens per second are compared. The server and this process share the cores, so a whole
step has nothing to overlap: it is that of max_staleness 0. The student trains a LoRA adapter, the teacher is the model
itself; TRL's trainer generates as it does by default. Give both the same threads (OMP_NUM_THREADS=2) and an idle
machine: a server is three processes, and gets more of a busy one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from kd_plugin.demo.prompts import GENERAL, questions
from kd_plugin.rollouts.in_process import InProcessEngine, Sampling
from kd_plugin.rollouts.vllm.pool import EnginePool, Job
from kd_plugin.rollouts.vllm.settings import EngineSettings
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import settings
from tests.vllm.server import VllmServer

LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Steps(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds, self._began = [], time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now


def generation(url, model, tokenizer, prompts, tokens, rounds):
    """Return median tokens per second of the server and of this process."""
    sampling = Sampling(tokens, draws="uniform", generation_kwargs={})
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    pool = EnginePool(EngineSettings(url=url, sync="reload"), sampling, [], len(tokenizer), len(tokenizer))
    pool._names = {url: "served"}  # nothing is synced here
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    here = InProcessEngine(student, tokenizer, sampling, device=torch.device("cpu"), seed=0)
    found = {"server": [], "transformers": []}
    student.generation_config.min_new_tokens = tokens
    for number in range(rounds):
        began = time.perf_counter()
        drawn = [one.result() for one in pool.submit([Job(tuple(row), number * 100 + i) for i, row in enumerate(ids)])]
        found["server"].append(sum(len(one.ids) for one in drawn) / (time.perf_counter() - began))
        began = time.perf_counter()
        drawn = here.generate(ids)
        found["transformers"].append(sum(len(one.ids) for one in drawn) / (time.perf_counter() - began))
    print({name: [round(value) for value in values] for name, values in found.items()})
    return {name: statistics.median(values) for name, values in found.items()}


def steps(url, model, prompts, tokens, rounds, where):
    """Return median seconds of a step of ours, by the server, and of TRL's, with as many tokens a row."""
    data = Dataset.from_dict({"prompt": list(prompts) * rounds})
    common = {
        **settings(where, max_steps=rounds, per_device_train_batch_size=len(prompts), learning_rate=1e-4),
        "max_completion_length": tokens, "beta": 1.0,
    }  # fmt: skip
    engine = {"kind": "vllm", "url": url, "sync": "adapter", "tolerance": 0.25}
    found = {}
    for name, cls, config in (
        (
            "ours",
            TeacherPanelTrainer,
            TeacherPanelConfig(rollout_engine=engine, generation_kwargs={"min_tokens": tokens}, **common),
        ),
        ("TRL", DistillationTrainer, DistillationConfig(generation_kwargs={"min_new_tokens": tokens}, **common)),
    ):
        student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        clock = Steps()
        trainer = cls(
            model=student, teacher_model=model, args=config, train_dataset=data, peft_config=LORA, callbacks=[clock]
        )
        trainer.train()
        found[name] = statistics.median(clock.seconds[1:])
        print(name, [round(value, 2) for value in clock.seconds])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("generation", "steps"), help="one part of the two")
    arguments = parser.parse_args()
    model = str(Path(arguments.model).resolve())
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [question.text for question in questions("train", GENERAL, arguments.rows)]
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    options = ("--max-model-len", "1024", "--enable-lora", "--max-lora-rank", "8")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        if arguments.only != "steps":
            with VllmServer(model, log, "--max-model-len", "1024", dtype="bfloat16") as server:
                rate = generation(server.url, model, tokenizer, prompts, arguments.tokens, arguments.rounds)
            print(
                f"{arguments.rows} rows of {arguments.tokens} tokens, bfloat16: server {rate['server']:.0f} tokens/s, "
                f"transformers {rate['transformers']:.0f}: {rate['server'] / rate['transformers']:.2f} times as fast"
            )
        if arguments.only != "generation":
            with VllmServer(model, log, *options) as server:
                took = steps(server.url, model, prompts, arguments.tokens, arguments.rounds, Path(scratch, "out"))
            print(
                f"whole step, float32: ours {took['ours']:.2f} s, TRL {took['TRL']:.2f} s: "
                f"{took['ours'] / took['TRL']:.2f}"
            )


if __name__ == "__main__":
    main()
