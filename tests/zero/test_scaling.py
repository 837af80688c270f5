"""What one of 512 ranks holds and sends, counted on the real DeepSpeed in a world whose other ranks are not there."""

import json
import subprocess
import sys

import pytest

from kd_plugin.launch.configs import deepspeed_config
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.memory import Layout, state_bytes
from kd_plugin.planner.run import PlannedRun, PlannedTeacher
from kd_plugin.planner.time import traffic
from tests.tiny import save_tiny
from tests.zero.fake_world import SHAPE
from tests.zero.ranks import CHECKOUT, environment

pytestmark = pytest.mark.zero
NODES, STAGES = (1, 8, 64), (1, 2, 3)


@pytest.fixture(scope="module", params=NODES, ids=[f"{nodes}-nodes" for nodes in NODES])
def world(request, tmp_path_factory):
    """A plan, the number of ranks, and by stage what rank 0 of them found."""
    directory = tmp_path_factory.mktemp("world")
    ranks = 8 * request.param
    run = PlannedRun(
        architecture(save_tiny(directory / "student", **SHAPE)),
        teachers=(PlannedTeacher("t", None, "server"),),
        accumulation=2,
        precision="fp32",
    )
    configs = {}
    for stage in STAGES:
        content = deepspeed_config(run, Layout(stage))
        # As in test_plan_bytes: in so small a model whole layers would wait for the backward pass
        content["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": run.accumulation}
        configs[stage] = {**content, **batch, "train_batch_size": ranks * run.accumulation, "gradient_clipping": 1.0}
    job = {"ranks": ranks, "stages": [str(s) for s in STAGES], "config": configs, "accumulation": run.accumulation}
    (directory / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.zero.fake_world", str(directory / "job.json")]
    done = subprocess.run(command, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return run, ranks, json.loads((directory / "found.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_one_of_many_ranks_holds_and_sends_what_is_planned(world, stage):
    run, ranks, found = world
    held, state, expected = found[str(stage)], state_bytes(run, stage, ranks), traffic(run, stage, ranks)
    assert held["weights"] == pytest.approx(state.weights, rel=0.02)
    assert held["optimizer"] == pytest.approx(state.optimizer, rel=0.02)
    sent = held["sent"]
    assert sent["training reduce"] == pytest.approx(expected.gradients, rel=0.02)
    assert sent["training gather"] == pytest.approx(expected.weights, rel=0.05)
