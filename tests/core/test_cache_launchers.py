"""The same command under launchers: `torchrun`, `accelerate launch`, a Slurm array, and by hand in three shells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_plugin.cache import TeacherCache
from tests.core.cache_help import prompt_rows, shards_of

pytestmark = pytest.mark.slow  # each process imports torch anew
ROWS = 30
_PYTHON = Path(sys.executable).parent


@pytest.fixture(scope="module")
def command(teacher_dir, tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in prompt_rows(ROWS)))

    def arguments(out):
        return [
            *("-m", "kd_plugin", "capture", "--dataset", str(rows), "--teacher", teacher_dir, "--dtype=float32"),
            *("--k=5", "--shard_rows=2", "--output_dir", str(out), "--streaming=true"),
        ]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "c"
    subprocess.run([sys.executable, *command(out)], check=True, capture_output=True)
    return shards_of(out)


def check(out, undisturbed):
    assert shards_of(out) == undisturbed
    cache = TeacherCache(out)
    assert len(cache) == ROWS
    cache.verify()


def run(*argv):
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_torchrun(command, undisturbed, tmp_path):
    run(_PYTHON / "torchrun", "--nproc_per_node=2", "--master_port=0", *command(tmp_path / "c"))
    check(tmp_path / "c", undisturbed)


def test_accelerate_launch(command, undisturbed, tmp_path):
    flags = ("--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    run(_PYTHON / "accelerate", "launch", *flags, "--main_process_port=0", *command(tmp_path / "c"))
    check(tmp_path / "c", undisturbed)


@pytest.mark.parametrize("slurm", [True, False])
def test_a_slurm_array_or_the_same_command_by_hand(command, undisturbed, tmp_path, slurm):
    running = []
    for task in range(3):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_PROCID": "0"}
        environment = {**os.environ, **(array if slurm else {})}
        argv = [sys.executable, *command(tmp_path / "c")]
        running.append(subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for one in running:
        said, _ = one.communicate(timeout=300)
        assert one.returncode == 0, said.decode()[-3000:]
        assert f"{ROWS} examples" in said.decode()  # each returns when all is done
    check(tmp_path / "c", undisturbed)
