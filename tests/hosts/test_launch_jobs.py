"""What a plan writes for Slurm and Kubernetes starts all parts in order, waits for their health, and ends them all."""

import os
import re
import signal
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.launch.jobs.parts import parts_of
from kd_plugin.launch.jobs.write import EXAMPLE, KUBERNETES, SLURM, write_jobs
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.run import Cluster, PlannedRun, parse_teacher
from kd_plugin.planner.time import Engines
from kd_plugin.rollouts.vllm.settings import engine_settings
from kd_plugin.teachers.hidden.states import FLAGS
from tests.zero.cluster import install

FILES = Path(__file__).parents[2] / "integrations"
NODES = [f"n{i}" for i in range(6)]
# Each writes what it is called with; a server stays until it is told to end, and answers at the second question
STUBS = {
    "vllm": '[ -e "$LOG.dies" ] && exit 1\ntrap \'echo "ended $2" >> "$LOG"; exit 0\' TERM\n'
    'echo "vllm $*" >> "$LOG"\nwhile true; do /bin/sleep 0.05; done\n',
    "torchrun": 'echo "torchrun $*" >> "$LOG"\n',
    "kd-plugin": 'echo "doctor $*" >> "$LOG"\n[ ! -e "$LOG.ill" ]\n',
    "curl": 'url=$(tr -c a-z0-9 _ <<< "$3"); echo "asked $3" >> "$LOG"\n'
    '[ -e "$LOG.$url" ] || { touch "$LOG.$url"; exit 1; }\n',
    "sleep": "exec /bin/sleep 0.2\n",
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A 32B student on two engines, R1 on a server over two nodes, two nodes that train."""
    directory = tmp_path_factory.mktemp("plan")
    beside = ["--engine_gpus", "16", "--server_gpus", "16", "--server_active", "37", "--server_width", "7168"]
    command = [
        "plan",
        "--student",
        "Qwen/Qwen2.5-32B",
        "--teachers",
        "[deepseek-ai/DeepSeek-R1:server]",
        "--nodes",
        "2",
    ]
    assert main([*command, *beside, "--output", str(directory)]) == 0
    return directory


@pytest.fixture
def stubs(tmp_path):
    """Return an environment with the stand-ins in front, and the file that they write to."""
    install(tmp_path / "bin")
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    slurm = {"SLURM_JOB_NODELIST": ",".join(NODES), "SLURM_NNODES": "6", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}
    return {**os.environ, **slurm, "PATH": path, "LOG": str(log)}, log


def started(command, environment, directory):
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=directory,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output = process.communicate(timeout=60)[0].decode()
        return process.returncode, output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_examples_are_what_a_plan_writes(tmp_path):
    """After a change: python -m kd_plugin.launch.jobs.write integrations"""
    shipped = ("integrations/slurm", "integrations/kubernetes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for path in write_jobs(EXAMPLE, *map(Path, shipped)):
            assert path.read_text() == (FILES.parent / path).read_text(), path


def test_a_plan_is_a_slurm_job(planned, stubs, tmp_path):
    environment, log = stubs
    script = planned / SLURM
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    said = [line[4:] for line in script.read_text().splitlines() if re.match(r"#   ", line)]
    (tmp_path / "train.yaml").write_text("\n".join(said))
    code, output = started(["bash", str(script), "train.yaml"], environment, tmp_path)
    lines = log.read_text().splitlines()
    assert code == 0, output
    kinds = [line.split()[0] for line in lines]
    trains = kinds.index("torchrun")
    assert kinds.count("doctor") == 1 and lines[trains - 1] == "doctor doctor --training train-7.yaml"
    assert (
        kinds.count("vllm") == 4
        and kinds.count("torchrun") == 2
        and trains > max(number for number, kind in enumerate(kinds) if kind in ("vllm", "asked"))
    )
    assert {line for line in lines if line.startswith("asked")} == {
        f"asked http://{n}:8000/health" for n in ("n0", "n2", "n3")
    }
    r1 = sorted(line for line in lines if "vllm serve deepseek-ai/DeepSeek-R1" in line)
    assert all("--nnodes 2" in one and "--tensor-parallel-size 16" in one and "--master-addr n0" in one for one in r1)
    assert ["--headless" in one for one in sorted(r1, key=lambda one: "--node-rank 1" in one)] == [False, True]
    assert FLAGS.replace("'", "") in r1[0]
    engines = [line for line in lines if "vllm serve Qwen/Qwen2.5-32B" in line]
    assert (
        all("--max-model-len 4608" in one and "--tensor-parallel-size 8" in one for one in engines)
        and len(engines) == 2
    )
    assert sum(line.startswith("ended") for line in lines) == 4, "all end with the trainers"
    train = next(line for line in lines if line.startswith("torchrun"))
    assert (
        "--nnodes 2" in train and "--master_addr n4" in train and f"--deepspeed {planned / 'deepspeed.json'}" in train
    )
    trained = yaml.safe_load((tmp_path / "train-7.yaml").read_text())
    assert engine_settings(trained["rollout_engine"]).addresses == ("http://n2:8000", "http://n3:8000")
    assert trained["panel"]["teachers"]["deepseek-r1"]["url"] == "http://n0:8000"


def test_a_server_that_does_not_start_ends_the_job(planned, stubs, tmp_path):
    environment, log = stubs
    (tmp_path / "train.yaml").touch()
    Path(f"{log}.dies").touch()
    code, _ = started(["bash", str(planned / SLURM), "train.yaml"], environment, tmp_path)
    assert code != 0 and "torchrun" not in log.read_text()


def test_what_the_doctor_finds_ends_the_job(planned, stubs, tmp_path):
    environment, log = stubs
    (tmp_path / "train.yaml").touch()
    Path(f"{log}.ill").touch()
    code, _ = started(["bash", str(planned / SLURM), "train.yaml"], environment, tmp_path)
    lines = log.read_text().splitlines()
    assert code != 0 and "torchrun" not in log.read_text()
    assert sum(line.startswith("ended") for line in lines) == 4, "the servers too"


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_a_plan_is_kubernetes_jobs(ill, planned, stubs, tmp_path):
    """By the schemas; the pods' scripts wait for one another and end with the trainers."""
    environment, log = stubs
    if ill:
        Path(f"{log}.ill").touch()
    service, *jobs = yaml.safe_load_all((planned / KUBERNETES).read_text())
    for document in (service, *jobs):
        kubernetes_validate.validate(document, "1.34", strict=True)
    pods = [(job["spec"].get("completions", 1), job["spec"]["template"]["spec"]["containers"][0]) for job in jobs]
    assert [count for count, _ in pods] == [2, 1, 1, 2]
    running, shared = [], tmp_path / "shared"
    shared.mkdir()
    for count, container in pods:
        told = {variable["name"]: variable["value"] for variable in container["env"]}
        for number in range(count):
            command = container["args"][0].replace("/shared", str(shared))
            own = {**environment, **told, "JOB_COMPLETION_INDEX": str(number)}
            running.append(subprocess.Popen(["bash", "-c", command], env=own, start_new_session=True))
    try:
        assert [process.wait(timeout=60) for process in running] == [0] * 4 + [int(ill)] * 2
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text().splitlines()
    assert lines.count("doctor doctor --training /settings/train.yaml") == 2
    if ill:
        assert not any(line.startswith("torchrun") for line in lines)
        return
    first = next(number for number, line in enumerate(lines) if line.startswith("torchrun"))
    assert sum(line.startswith("vllm") for line in lines[:first]) == 4
    assert {line for line in lines if line.startswith("asked")} == {
        f"asked http://{name}.kd-plugin:8000/health" for name in ("deepseek-r1-0", "engine-1", "engine-2")
    }
    assert any("--headless" in line and "--node-rank 1" in line for line in lines)


def run_of(*teachers, **options):
    student = architecture("Qwen/Qwen2.5-7B", lora_rank=options.get("lora_rank", 0))
    return PlannedRun(student, teachers=tuple(map(parse_teacher, teachers)), generates=False)


def parts(run, beside, cluster=None, lora_rank=0):
    return parts_of(run, cluster or Cluster(), beside, lora_rank=lora_rank, deepspeed="ds.json", arguments="")


def test_an_adapters_engine_is_started_for_its_rank():
    found = parts(run_of("big:server", lora_rank=12), Engines(8), lora_rank=12)
    assert found.sync == "adapter" and "--enable-lora --max-lora-rank 16" in found.servers[0].flags


def test_parts_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="no teacher is placed on a server"):
        parts(run_of("Qwen/Qwen2.5-72B:sharded"), Engines(8, 8, 72e9, 8192))
    with pytest.raises(ConfigError, match="a node has 16: it takes whole nodes"):
        parts(run_of("big:server"), Engines(8, 16, 72e9, 8192), Cluster(gpus_per_node=16))


def test_two_servers_of_one_model_have_two_names():
    found = parts(run_of("org/Big_Model:server", "other/big-model:server"), Engines(8, 16, 72e9, 8192))
    assert [server.name for server in found.servers] == ["big-model", "big-model-copy1", "engine"]
