"""One process, DDP, FSDP2 and ZeRO take the same steps, save whole lineage, resume, and convert."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.lightning.convert import to_huggingface
from kd_plugin.lineage import load_record, verify
from tests.lightning.ranks import STEPS

ROOT = Path(__file__).parents[2]
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
# Ranks ask different numbers of rows of a teacher, at some steps none: under ZeRO-3 they must join its passes
ROUTES = random.Random(0).choices(["math", "code"], k=16)
ROWS = [{"prompt": "abcdefgh"[i % 8] * (3 + i % 5), "teacher_id": route} for i, route in enumerate(ROUTES)]


def start(name, directory, settings, ranks):
    """Run all ranks to their end; the output of a rank that fails is the message."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.lightning.ranks", name, str(directory), str(settings)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), said[0][-3000:]
    return json.loads((directory / "losses.json").read_text())


@pytest.fixture(scope="module")
def settings(tmp_path_factory, student_dir, teacher_dir, other_teacher_dir, cache):
    directory = tmp_path_factory.mktemp("settings")
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    teachers = {"math": teacher_dir, "code": other_teacher_dir}
    written = {"generation_kwargs": GREEDY, "max_completion_length": 4}
    jobs = {
        "offline": {"model": {"model": student_dir, "cache": str(cache.path)}, "data": {"cache": str(cache.path)}},
        "panel": {
            "model": {"model": student_dir, "teacher_models": teachers, **written},
            "data": {"prompts": str(directory / "prompts.jsonl")},
        },
    }

    def write(*names):
        path = directory / f"{'-'.join(names)}.json"
        path.write_text(json.dumps({name: jobs[name] for name in names}))
        return path

    return write


@pytest.fixture(scope="module")
def alone(tmp_path_factory, settings):
    directory = tmp_path_factory.mktemp("single")
    return directory, start("single", directory, settings("offline", "panel"), 1)


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def nodes(checkpoint):
    return {node["id"] for node in load_record(checkpoint)["nodes"]}


@pytest.mark.parametrize(
    "name",
    [
        "zero3",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_take_the_steps_of_one(name, tmp_path, settings, alone, student_dir):
    directory, expected = alone
    jobs = ("offline", "panel")
    found = start(name, tmp_path, settings(*jobs), 2)
    for job, losses in found.items():
        assert len(losses) == (1 if "resumed" in job else STEPS)
        assert losses == pytest.approx(expected[job], rel=1e-3), job
    for job in jobs:
        checkpoint = tmp_path / f"{job}.ckpt"
        assert verify(checkpoint).exit_code == 0, verify(checkpoint).problems
        assert nodes(checkpoint) == nodes(directory / f"{job}.ckpt")
    converted = to_huggingface(tmp_path / "offline.ckpt", tmp_path / "hf", model=student_dir)
    whole = to_huggingface(directory / "offline.ckpt", tmp_path / "whole", model=student_dir)
    expected_weights = weights(whole)
    for key, value in weights(converted).items():
        torch.testing.assert_close(value, expected_weights[key], rtol=1e-3, atol=1e-4)
    assert verify(converted).exit_code == 0
    assert nodes(tmp_path / "offline.ckpt") <= nodes(converted)
