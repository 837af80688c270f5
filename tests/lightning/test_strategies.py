"""One process, DDP, FSDP2 and ZeRO take the same steps, save whole lineage, resume, and convert."""

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.lightning import to_huggingface
from kd_plugin.lineage import load_record, verify
from kd_plugin.text import ServerWriter, capture_text
from tests.lightning.launch import run_ranks
from tests.lightning.ranks import STEPS
from tests.scripted_writer import Script, scripted_writer

TEXT_JOBS = ["text", "corrected", "mixed"]
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
# Ranks ask different numbers of rows of a teacher, at some steps none: under ZeRO-3 they must join its passes
ROUTES = random.Random(0).choices(["math", "code"], k=16)
ROWS = [{"prompt": "abcdefgh"[i % 8] * (3 + i % 5), "teacher_id": route} for i, route in enumerate(ROUTES)]


def start(name, directory, settings, ranks):
    """Run all ranks to their end, and return their losses."""
    run_ranks("tests.lightning.ranks", [name, directory, settings], ranks)
    return json.loads((directory / "losses.json").read_text())


@pytest.fixture(scope="module")
def settings(tmp_path_factory, student_dir, untied_student_dir, teacher_dir, other_teacher_dir, cache):
    directory = tmp_path_factory.mktemp("settings")
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    teachers = {"math": teacher_dir, "code": other_teacher_dir}
    written = {"generation_kwargs": GREEDY, "max_completion_length": 4}
    jobs = {
        "offline": {"model": {"model": student_dir, "cache": str(cache.path)}, "data": {"cache": str(cache.path)}},
        "panel": {
            "model": {"model": untied_student_dir, "teacher_models": teachers, **written},
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


def asked_rarely(body):
    """Write as a teacher that finds few responses short, so that a rank often has no correction."""
    request = body["messages"][-1]["content"]
    task = json.loads(re.search(r"Task:\n(.*)", request)[1])
    if verdict := re.search(r"Verdict (\w+): score=<", request):
        short = task[0] in "cg"
        return f"Verdict {verdict[1]}: score={0 if short else 10} first_wrong_step={int(short)}"
    key = re.search(r"BEGIN (\w+)", request)[1]
    return f"BEGIN {key}\nis {task[0]}\nEND {key}"


@pytest.fixture(scope="module")
def text_settings(tmp_path_factory, student_dir, untied_student_dir, teacher_dir):
    """A teacher's text, in windows of two uneven batches; text teachers behind a server, alone and beside another."""
    directory = tmp_path_factory.mktemp("text")
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Script(write=lambda body: "so " * (1 + len(body["messages"][0]["content"]) % 5))
    with scripted_writer(script) as (url, _):
        writer = ServerWriter(url, "scripted", license="mit")
        text = capture_text(rows, writer, directory / "text", deduplicate=False, progress=False)
    with scripted_writer(Script(write=asked_rarely)) as (url, _):
        teacher = {"kind": "server", "signal": "text", "url": url, "model": "scripted", "license": "mit"}
        common = {"generation_kwargs": GREEDY, "max_completion_length": 6}
        said = {"accept": "teacher", "keep_weight": 0.5}
        jobs = {
            "text": {
                "model": {"model": student_dir, "kd_weight": 0.0, "ce_weight": 1.0},
                "data": {"text": str(text.path)}, "trainer": {"accumulate_grad_batches": 2},
            },
            "corrected": {
                "model": {"model": untied_student_dir, **common, "panel": {"teachers": {"t": teacher}, "text": said}},
                "data": {"prompts": str(directory / "prompts.jsonl")},
            },
            "mixed": {
                "model": {"model": untied_student_dir, **common, "panel": {
                    "teachers": {"t": teacher, "d": teacher_dir}, "text": {"accept": "teacher"},
                    "combine": "weighted_kl",
                }},
                "data": {"prompts": str(directory / "prompts.jsonl")},
            },
            "pairs": {
                "model": {"model": untied_student_dir, **common, "panel": {
                    "teachers": {"t": teacher}, "text": {"accept": "teacher", "preference": "dpo"},
                }},
                "data": {"prompts": str(directory / "prompts.jsonl")},
            },
        }  # fmt: skip

        def write(*names):
            path = directory / f"{'-'.join(names)}.json"
            path.write_text(json.dumps({name: jobs[name] for name in names}))
            return path

        yield write


@pytest.fixture(scope="module")
def text_alone(tmp_path_factory, text_settings):
    return start("single", tmp_path_factory.mktemp("text-single"), text_settings(*TEXT_JOBS, "pairs"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_text_takes_the_steps_of_one_process_on_two_ranks(name, tmp_path, text_settings, text_alone):
    """Some ranks have no correction, some batches few tokens; resumed runs go on alike."""
    jobs = [*TEXT_JOBS, "pairs"] if name == "ddp" else TEXT_JOBS  # of the start only DDP keeps a whole copy
    found = start(name, tmp_path, text_settings(*jobs), 2)
    assert len(found) == 2 * len(jobs)
    for job, losses in found.items():
        assert losses == pytest.approx(text_alone[job], rel=1e-3, abs=1e-5), job
        assert any(losses) or "resumed" in job, job
    for job in jobs:
        assert verify(tmp_path / f"{job}.ckpt").exit_code == 0


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
