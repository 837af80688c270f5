"""One rank of a panel whose student writes through vLLM (a double): says whose completions its rows got."""

import functools
import json
import os
import sys
from pathlib import Path

from trl import DistillationTrainer

from kd_plugin.sharding import close_process_group
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests import trl_vllm
from tests.hosts.runs import losses, prompts, settings

COUNT = 16


def put(module, name, value) -> None:
    setattr(module, name, value)


def watched(trainer: TeacherPanelTrainer, found: list) -> None:
    """Note of each call how many rows the student wrote, and how many of them got another prompt's completion."""
    inner = trainer._generate_single_turn

    def generate(prompt_ids, *args, **kwargs):
        answer = inner(prompt_ids, *args, **kwargs)
        given = trainer._assigned.given
        given = given if len(given) == len(prompt_ids) else [None] * len(prompt_ids)
        own = [row for row, ids in enumerate(given) if ids is None]
        found.append([len(own), sum(answer[row] != trl_vllm.completion(prompt_ids[row]) for row in own)])
        return answer

    trainer._generate_single_turn = generate


def uneven_tools(trainer: TeacherPanelTrainer, rank: int) -> None:
    """Let the parent's tool loop generate anew for as many rows, and as often, as a rank's tool calls ask for."""
    rounds = {0: [3, 1, 2], 1: [1]}[rank]

    def loop(self, prompts, prompt_ids, completion_ids, completions, images, multimodal_fields):
        for rows in rounds:
            self._generate_single_turn(prompt_ids[:rows], None, {})
        return [[1] * len(ids) for ids in completion_ids], completions, completion_ids, 0, 0, []

    DistillationTrainer._tool_call_loop = loop
    trainer.tools = [print]


def main(directory: str, student: str, teacher: str, jobs: str) -> None:
    out, rank = Path(directory), int(os.environ["RANK"])
    trl_vllm.install(put)
    report = {}
    for name, job in json.loads(jobs).items():
        tools, fraction = job.pop("tools", False), job.pop("on_policy_fraction", None)
        chosen = {"max_completion_length": 8, "max_steps": 2, "on_policy_fraction": fraction, **job}
        trainer = TeacherPanelTrainer(
            model=student,
            teacher_model=teacher,
            args=TeacherPanelConfig(**settings(out / name, use_vllm=True, vllm_enable_sleep_mode=False, **chosen)),
            train_dataset=prompts(count=COUNT, completion=[" done"] * COUNT),
        )
        found: list = []
        watched(trainer, found)
        if tools:
            uneven_tools(trainer, rank)
        trainer.train()
        report[name] = {"rows": found, "losses": losses(trainer)}
    (out / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    functools.partial(main, *sys.argv[1:])()
    close_process_group()
