"""Two nodes, each a network namespace of its own, joined by a cable: ZeRO-3 over them, one lineage."""

import json
import subprocess
import sys

import pytest

from kd_plugin.lineage import verify
from tests.zero.cluster import ADDRESSES
from tests.zero.ranks import CHECKOUT, environment, reports

pytestmark = pytest.mark.zero


def torchrun(rank, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    return [*launch, "--node_rank", str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29511", "-m"], {}


def accelerate(rank, tmp_path):
    """Take the shipped YAML with its DeepSpeed file, and its own command's options; two ranks in all, not sixteen."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "integrations/accelerate/several_nodes.yaml", "--machine_rank", str(rank)]
    launch += ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29511", "--num_processes", "2"]
    return [*launch, "-m"], {}


def slurm(rank, tmp_path):
    """Build what a batch script does on each node: torchrun, with its numbers from Slurm's variables."""
    script = (
        f"exec {sys.executable} -m torch.distributed.run --nnodes $SLURM_NNODES "
        "--nproc_per_node $SLURM_NTASKS_PER_NODE "
        '--node_rank $SLURM_NODEID --master_addr $HEAD --master_port 29511 -m "$@"'
    )
    variables = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "77", "SLURM_NODEID": str(rank)}
    return ["bash", "-c", script, "node"], {**variables, "HEAD": ADDRESSES[0]}


@pytest.mark.parametrize("launcher", [torchrun, accelerate, slurm])
def test_two_nodes_train_one_student(launcher, nodes, untied_student_dir, teacher_dir, tmp_path):
    job = {"method": "panel", "stage": 3, "steps": 2, "completion": 4, "student": untied_student_dir}
    job |= {"teachers": {"a": teacher_dir}, "output_dir": str(tmp_path / "out")}
    job["arguments"] = {"save_strategy": "steps", "save_steps": 2}
    if launcher is accelerate:
        job["arguments"]["deepspeed"] = None  # the YAML names the file
    (tmp_path / "job.json").write_text(json.dumps(job))
    running = []
    for rank, (name, end) in enumerate(nodes):
        command, variables = launcher(rank, tmp_path)
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, "tests.zero.worker", str(tmp_path / "job.json")],
                env=environment(GLOO_SOCKET_IFNAME=end, **variables),
                cwd=CHECKOUT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        ended = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ended[0][-3000:] + ended[1][-3000:]
    first, second = reports(tmp_path, 2)
    assert first["losses"] == second["losses"] and first["steps"] == 2
    assert verify(tmp_path / "out" / "checkpoint-2").exit_code == 0
    assert len(list((tmp_path / "out").rglob("lineage.json"))) == 1
