"""Students with a head of their own, as from 7B up, take the steps of one process under every strategy.

Rows and ranks differ in their numbers of tokens, so a mean of rank means shows, and so does a weight that a wrapper
does not gather for the backward pass: DeepSpeed keeps no small one whole here, see ``ranks.py``.
"""

import json

import pytest

from tests.lightning.ranks import STEPS
from tests.lightning.test_strategies import GREEDY, ROWS, start

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
CE = {"ce_weight": 0.3}
WINDOW = {"accumulate_grad_batches": 2}


def block(first, second):
    """Two teachers, of whom one is compared by its likeliest tokens."""
    teachers = {"math": {"kind": "local", "model": first}, "code": {"kind": "local", "model": second}}
    teachers["code"]["estimator"] = "topk_tail"
    return {"combine": "route", "teachers": teachers}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, student_dir, untied_student_dir, teacher_dir, other_teacher_dir, cache):
    """Write some jobs of those below to a file."""
    root = tmp_path_factory.mktemp("untied")
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    untied = untied_student_dir
    rows = {"prompts": str(root / "prompts.jsonl")}
    panel = {
        "teacher_models": {"math": teacher_dir, "code": other_teacher_dir},
        "generation_kwargs": GREEDY,
        "max_completion_length": 4,
    }
    cached = {"cache": str(cache.path)}
    warm = {"warmup_cache": str(cache.path), "warmup_cache_steps": 2}

    def offline(student=untied, own=None, trainer=None, **fields):
        model = {"model": student, **cached, **fields}
        return {"model": model, "data": cached, "saved": False, "own": own, "trainer": trainer or {}}

    def on_policy(student=untied, own=None, trainer=None, **fields):
        model = {"model": student, **panel, **fields}
        return {"model": model, "data": rows, "saved": False, "own": own, "trainer": trainer or {}}

    quick = {"offline": offline(), "offline, ce": offline(**CE), "panel": on_policy(), "panel, ce": on_policy(**CE)}
    further = {
        "offline, tied, ce": offline(student_dir, **CE),
        "offline, LoRA": offline(**LORA),
        "offline, LoRA, ce": offline(**LORA, **CE),
        "offline, adapted": offline(own="adapted", **CE),
        "offline, altered": offline(own="altered"),
        "offline, altered, ce": offline(own="altered", **CE),
        "offline, wrapped": offline(own="wrapped"),
        "offline, wrapped, ce": offline(own="wrapped", **CE),
        "offline, accumulated": offline(own="plain", trainer=WINDOW),
        "panel, tied, ce": on_policy(student_dir, **CE),
        "panel, LoRA": on_policy(**LORA),
        "panel, LoRA, ce": on_policy(**LORA, **CE),
        "panel, altered, ce": on_policy(own="altered", **CE),
        "panel, wrapped": on_policy(own="wrapped"),
        "panel, accumulated, ce": on_policy(own="plain", trainer=WINDOW, **CE),
        "panel, warm-up": on_policy(**warm),
        "panel, warm-up, ce": on_policy(**warm, **CE),
        "panel, some ranks without tokens, ce": on_policy(mask_truncated_completions=True, **CE),
    }

    mixed = {"teacher_models": None, "panel": block(teacher_dir, other_teacher_dir)}
    # What ranks ask of each other: teachers of several estimators, two caches, rows that are saved, none at all
    collectives = {
        "routed, saved, accumulated": on_policy(save_rollouts=2, trainer=WINDOW),
        "mixed estimators, saved": on_policy(**mixed, save_rollouts=2, trainer=WINDOW),
        "two caches": on_policy(**{**warm, "warmup_cache": f"{cache.path},{cache.path}"}),
        "ranks without tokens": on_policy(mask_truncated_completions=True),
    }

    def write(name, given):
        (root / f"{name}.json").write_text(json.dumps(given))
        return root / f"{name}.json"

    files = {"quick": quick, "further": {**quick, **further}, "collectives": collectives}
    return {name: write(name, given) for name, given in files.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, jobs):
    """Return what one process finds in the jobs of a name, each name run once."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = start("single", tmp_path_factory.mktemp("single"), jobs[name], 1)
        return found[name]

    return of


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("zero3", "quick"),
        *(pytest.param(s, "further", marks=pytest.mark.zero) for s in ("zero3", "zero2", "zero1", "fsdp2", "ddp")),
    ],
)
def test_two_ranks_take_the_steps_of_one(strategy, name, tmp_path, jobs, alone):
    found = start(strategy, tmp_path, jobs[name], 2)
    expected = alone(name)
    assert found.keys() == expected.keys()
    apart = {
        job: (losses, expected[job])
        for job, losses in found.items()
        if losses != pytest.approx(expected[job], rel=1e-4)
    }
    assert not apart


@pytest.mark.zero
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_open_heads_alike_whatever_their_rows_ask(ranks, tmp_path, jobs, alone):
    found, expected = start("zero3", tmp_path, jobs["collectives"], ranks), alone("collectives")
    assert found.keys() == expected.keys()
    for job, losses in found.items():
        # Which rows of a window come together, as those of like length, depends on the rows of a rank
        parts = len(losses) // STEPS
        sums, whole = ([sum(of[i : i + parts]) for i in range(0, len(of), parts)] for of in (losses, expected[job]))
        assert sums == pytest.approx(whole, rel=1e-4), job
