"""Short, deterministic training runs, and what they leave behind."""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.sharding import close_process_group
from tests.lightning.launch import run_ranks

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ROWS = Dataset.from_list([{"prompt": f"{i}?", "completion": f" answer {'y' * i}"} for i in range(16)])
TOPICS = ["one plus two", "the sea", "a red bird", "what is time", "count to six", "say hello", "why rain", "odd"]


def prompts(kind: str = "plain", count: int = 24, **columns) -> Dataset:
    """Build prompts of different lengths, plain or conversational."""
    texts = [f"{TOPICS[i % len(TOPICS)]} {'x' * (i % 5)}?" for i in range(count)]
    rows = texts if kind == "plain" else [[{"role": "user", "content": text}] for text in texts]
    return Dataset.from_dict({"prompt": rows, **columns})


def settings(output_dir, **kwargs) -> dict:
    """Return the arguments of a quiet float32 run on the CPU."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 11,
        **kwargs,
    }


@dataclass
class Trace(TrainerCallback):
    """Keeps each step's gradients."""

    gradients: list = field(default_factory=list)

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def losses(trainer) -> list[float]:
    """Return the loss of each step, as logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer) -> dict:
    """Return the trained parameters."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(mine: dict, theirs: dict, relative: float = 1e-4) -> None:
    """Compare tensors by the norm of their difference, relative to the norm of the whole set."""
    assert mine.keys() == theirs.keys()
    difference = torch.sqrt(sum(((mine[k] - theirs[k]).double() ** 2).sum() for k in mine))
    size = torch.sqrt(sum((theirs[k].double() ** 2).sum() for k in mine))
    assert difference <= relative * size, f"differs by {float(difference / size):.2e} of the norm"


def launched(module: str, ranks: int, *jobs: Sequence[Any]) -> None:
    """Have the ``main`` of a worker module do some jobs one after the other; it must end well.

    Args:
        module: of the tests; it ends with :func:`work`.
        ranks: 1 does the jobs in this process; more are started once for all jobs, because importing torch and a
            trainer takes each process longer than most jobs.
        jobs: the arguments of ``main``, as text.
    """
    told = [list(map(str, job)) for job in jobs]
    if ranks == 1:
        for arguments in told:
            import_module(module).main(*arguments)
        return
    run_ranks(module, [json.dumps(told)], ranks, timeout=900)


def work(main: Callable[..., None]) -> None:
    """Do the jobs of the command line, as one rank, and leave the process group."""
    for arguments in json.loads(sys.argv[1]):
        main(*arguments)
    close_process_group()


def ages_of_tokens(monkeypatch) -> list[list[int]]:
    """Return a list that runs with servers fill: by how many steps the weights of each batch's tokens are behind.

    What was begun ahead is waited for at each step. On a loaded machine a batch would else be drawn later, from newer
    weights, so that its age would depend on the load.
    """
    found: list[list[int]] = []
    generate = ServerEngine.generate

    def noted(self, prompts):
        drawn = generate(self, prompts)
        found.append([self.host.step - version for one in drawn for version in one.versions])
        wait([future for futures in self._begun.values() for future in futures])
        return drawn

    monkeypatch.setattr(ServerEngine, "generate", noted)
    return found
