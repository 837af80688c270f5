"""vLLM in each of two ranks, under DDP, ZeRO-3 and FSDP2: the steps are those of transformers generation."""

import json
import os
from pathlib import Path

import pytest

from tests.lightning.launch import run_ranks
from tests.tiny import save_tiny
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks
from tests.zero.ranks import ended, environment
from tests.zero.test_rollout_engine import UNEVEN, job, run_apart

OPTIONS = {"enforce_eager": True, "max_model_len": 256}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_tiny(root / str(seed), seed=seed, hidden=128, tied=False) for seed in (1, 2)]


@pytest.fixture(scope="module")
def python():
    return os.environ["KD_VLLM_PYTHON"]


@pytest.fixture(scope="module")
def told(python, request):
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # DeepSpeed compiles anew what it finds compiled for the torch of another environment, by that one's ninja
        "TORCH_EXTENSIONS_DIR": str(request.config.cache.mkdir("vllm-torch-extensions")),
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
    }


def engine(sync):
    return {"kind": "vllm", "sync": sync, "options": OPTIONS}


# In some steps of uneven batches a rank has no row that the student generates
@pytest.mark.parametrize(
    "runs",
    [
        {"ddp": (None, "reload", {})},
        {"zero3": (3, "adapter", {}), "zero3-uneven": (3, "reload", UNEVEN)},
        {"fsdp2": ("fsdp", "reload", {})},
    ],
    ids=lambda runs: next(iter(runs)),
)
def test_trl(runs, models, python, told, tmp_path):
    jobs = {}
    for name, (stage, sync, more) in runs.items():
        common = {"lora": sync == "adapter", **more}
        jobs[name] = job(*models, tmp_path / name, stage, engine=engine(sync), **common)
        jobs[f"{name}-own"] = job(*models, tmp_path / f"{name}-own", stage, **common)
    found = run_apart(jobs, tmp_path / "jobs", env=told, python=python)
    for name, (_, sync, _) in runs.items():
        mine, theirs = found[name][0], found[f"{name}-own"][0]
        print(f"TRL, {name}, {sync}: losses {[round(x, 4) for x in mine['losses']]}")
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-3) and len(mine["losses"]) == 3, name
        assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
        assert len(mine["parity"]) == 3 and max(mine["parity"]) < 1e-4 and not theirs["parity"], "vLLM was asked"


@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2"])
def test_lightning_by_its_own_launcher(name, models, python, told, tmp_path):
    """It tells a process its local rank alone, and vLLM asks for more."""
    rows = [{"prompt": "abcdefgh"[i % 8] * (3 + i % 5)} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student, teacher = models
    model = {"model": student, "teacher_models": {"t": teacher}, "top_k": 1, "max_completion_length": 8}
    commands, found = {}, {}
    for label, block in (("vllm", {"rollout_engine": engine("reload")}), ("own", {})):
        place = tmp_path / label
        place.mkdir()
        data = {"prompts": str(tmp_path / "prompts.jsonl")}
        told_job = {"run": {"data": data, "saved": False, "model": model | block, "own": "plain"}}
        (place / "jobs.json").write_text(json.dumps(told_job))
        commands[label] = [name, str(place), str(place / "jobs.json")]
    names = environment(**told, WORLD_SIZE="2")
    for absent in ("RANK", "LOCAL_RANK"):
        names.pop(absent, None)
    code, output = ended([python, "-m", "tests.lightning.ranks", *commands["vllm"]], names, 900)
    assert code == 0, output[-6000:]
    assert output.count("Initializing a V1 LLM engine") == 2
    run_ranks("tests.lightning.ranks", commands["own"], 2)
    for label in commands:
        found[label] = json.loads((tmp_path / label / "losses.json").read_text())["run"]
    print(f"Lightning, {name}: losses {[round(x, 4) for x in found['vllm']]}")
    assert found["vllm"] == pytest.approx(found["own"], abs=1e-3) and len(found["own"]) == 4
    assert abs(found["own"][-1] - found["own"][0]) > 1e-2, "the student must move, or nothing was shown"
