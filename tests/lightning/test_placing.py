"""Teachers wherever they may lie under a strategy: each gives the losses of a run in one process."""

import json

import pytest
from peft import LoraConfig

from tests.core.test_adapter_teacher import save_adapter
from tests.hosts.runs import LORA
from tests.lightning.test_strategies import GREEDY, start

pytestmark = pytest.mark.zero
ROWS = [{"prompt": "abcdefgh"[i % 8] * (3 + i % 5)} for i in range(16)]


def adapter(adapter, base):
    return {"kind": "adapter", "adapter": adapter, "base": base, "accept_base": True, "license": "own"}


@pytest.fixture(scope="module", params=["student_dir", "untied_student_dir"])
def jobs(request, tmp_path_factory, teacher_dir, other_teacher_dir):
    student_dir = request.getfixturevalue(request.param)
    root = tmp_path_factory.mktemp("placing")
    other = LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM")
    own = adapter(save_adapter(student_dir, root / "own", LORA, 1), "student")
    based = {"model": teacher_dir, "dtype": "float32"}
    first, second = (
        adapter(save_adapter(teacher_dir, root / name, config, seed), based)
        for name, config, seed in (("first", LORA, 2), ("second", other, 3))
    )
    offloaded = {"model": other_teacher_dir, "placement": "offload"}
    panels = {
        "adapters": {"own": own, "first": first, "second": second},
        "offloaded": {
            "own": own,
            "local": offloaded,
            "first": {**first, "base": {**based, "placement": "offload"}},
        },
    }
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {"generation_kwargs": GREEDY, "max_completion_length": 4, "model": student_dir}
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    data = {"prompts": str(root / "prompts.jsonl")}

    def write(**further):
        given = {}
        for name, teachers in panels.items():
            block = {"teachers": teachers, "combine": "weighted_kl"}
            model = {**common, **lora, "panel": block, **further}
            given[name] = {"model": model, "data": data, "saved": False}
        block = {"teachers": panels["adapters"], "combine": "weighted_kl"}
        own = {**common, "panel": block, **further}
        given["a user's own module"] = {"model": own, "data": data, "saved": False, "own": "adapted"}
        interleaved = {"rollouts": "interleaved", "interleaved_top_k": 1, "interleaved_block": 2}
        panel = {"teachers": panels["offloaded"], "combine": "weighted_kl"}
        given["interleaved"] = {"model": {**common, **lora, "panel": panel, **interleaved, **further}, "data": data}
        given["interleaved"]["saved"] = False
        path = root / f"{len(further)}.json"
        path.write_text(json.dumps(given))
        return path

    return write


@pytest.fixture(scope="module")
def alone(tmp_path_factory, jobs):
    return start("single", tmp_path_factory.mktemp("single"), jobs(), 1)


@pytest.mark.parametrize(("name", "further"), [("zero3", {}), ("zero2", {"shard_teachers": True}), ("fsdp2", {})])
def test_two_ranks_take_the_steps_of_one(name, further, tmp_path, jobs, alone):
    found = start(name, tmp_path, jobs(**further), 2)
    for job, losses in found.items():
        assert losses == pytest.approx(alone[job], rel=1e-3), job
