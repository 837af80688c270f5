"""The shipped files start the training that they are for: each by its own launcher, two ranks, two steps.

Between them the launchers use all five DeepSpeed files, with no change but NVMe's directory.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kd_plugin.errors import ConfigError
from kd_plugin.launch.preflight import require_offload
from kd_plugin.lineage import verify
from tests.tiny import save_tiny
from tests.zero.cluster import NODES, install, rank_environment
from tests.zero.ranks import CHECKOUT, free_port

pytestmark = pytest.mark.zero
FILES = CHECKOUT / "integrations"


@pytest.fixture
def run(untied_student_dir, teacher_dir, tmp_path):
    """Run a shipped command in a directory with ``integrations/`` and ``train.yaml``, as a user has them."""
    (tmp_path / "integrations").symlink_to(FILES)
    rows = [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model_name_or_path": untied_student_dir, "output_dir": str(tmp_path / "out"), "max_steps": 2,
        "per_device_train_batch_size": 2, "bf16": False, "save_strategy": "steps", "save_steps": 2,
        "report_to": "none", "logging_steps": 1, "accelerator_config": {"use_configured_state": True},
        "dataset_name": str(tmp_path / "prompts.jsonl"),
    }  # fmt: skip
    panel = {"teacher_models": {"a": teacher_dir}, "max_completion_length": 4}
    install(tmp_path / "bin")

    def call(command, variables=None, *, method="panel", **more):
        settings = {**common, **(panel if method == "panel" else {"max_length": 64}), **more}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
        process = subprocess.Popen(
            command,
            env=rank_environment(tmp_path / "bin", PORT=str(free_port()), **(variables or {})),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=900)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, output[-6000:]
        checkpoint = tmp_path / "out" / "checkpoint-2"
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        assert len(list(checkpoint.glob("global_step2/*_optim_states.pt"))) == 2  # two ranks, under DeepSpeed
        assert verify(checkpoint).exit_code == 0 and verify(tmp_path / "out").exit_code == 0

    return call


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of an untied teacher: a random tied one predicts its own input, like a cache shifted by one."""
    from datasets import Dataset

    from kd_plugin import LocalTeacher, capture
    from kd_plugin.cache import TopK

    directory = tmp_path_factory.mktemp("offline")
    teacher = save_tiny(directory / "teacher", seed=0, tied=False, scale=1.0)
    rows = Dataset.from_list([{"prompt": f"{i}?", "completion": f" {i}"} for i in range(16)])
    capture(rows, LocalTeacher(teacher), directory / "cache", targets=TopK(16), progress=False)
    return {"method": "offline", "teacher_cache": str(directory / "cache"), "dataset_name": None}


def slurm(nodes: int) -> dict[str, str]:
    names = ",".join(NODES[:nodes])
    return {
        "SLURM_JOB_NODELIST": names, "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "77",
    }  # fmt: skip


def test_kubernetes_job(run, cache):
    """Its pods are processes here, with what the Job's controller would set; ZeRO-1."""
    job = next(d for d in yaml.safe_load_all((FILES / "kubernetes" / "job.yaml").read_text()) if d["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    given |= {"METHOD": "offline", "CONFIG": "train.yaml", "GPUS": "1", "HEAD": "127.0.0.1", "PORT": str(free_port())}
    given["DEEPSPEED"] = "integrations/deepspeed/zero1.json"
    pod = [*container["command"], *container["args"]]
    both = (
        "import os, subprocess, sys\n"
        "pods = [subprocess.Popen(sys.argv[1:], env={**os.environ, 'JOB_COMPLETION_INDEX': str(i)}) for i in (0, 1)]\n"
        "sys.exit(max(pod.wait() for pod in pods))"
    )
    del given["PORT"]  # the fixture's
    run(["python", "-c", both, *pod], given, **cache)


def test_hostfile(run, cache):
    """Two names of this machine stand for the two nodes, and a stand-in for pdsh; ZeRO-2."""
    command = "deepspeed --hostfile integrations/deepspeed/hostfile --num_gpus 1 --master_port $PORT"
    command += (
        " --no_local_rank --module kd_plugin offline --config train.yaml --deepspeed integrations/deepspeed/zero2.json"
    )
    run(["bash", "-c", command], **cache)


def test_accelerate_on_one_node(run):
    """The YAML names zero3.json itself."""
    command = "accelerate launch --config_file integrations/accelerate/one_node.yaml --num_processes 2"
    run(["bash", "-c", f"{command} --main_process_port $PORT -m kd_plugin panel --config train.yaml"])


def test_slurm_offline(run, cache, tmp_path):
    """Offloading to the CPU needs DeepSpeed's cpu_adam, which is compiled on first use."""
    settings = FILES / "deepspeed" / "zero3_cpu_offload.json"
    _require(settings)
    script = str(FILES / "slurm" / "offline.sbatch")
    run(["bash", script, "train.yaml"], {**slurm(2), "DEEPSPEED": str(settings)}, **cache)


def test_slurm_panel(run, tmp_path):
    """Offloading to NVMe, into a directory of the test, needs DeepSpeed's async_io.

    Student and teacher are larger than the other tests', since DeepSpeed leaves parts below 1 MiB in memory.
    """
    settings = tmp_path / "nvme.json"
    text = (FILES / "deepspeed" / "zero3_nvme_offload.json").read_text()
    settings.write_text(text.replace("/local_nvme", str(tmp_path / "nvme")))
    _require(settings)
    script = str(FILES / "slurm" / "panel.sbatch")
    student, teacher = (save_tiny(tmp_path / name, hidden=1024, layers=1) for name in ("student", "teacher"))
    models = {"model_name_or_path": student, "teacher_models": {"a": teacher}}
    run(["bash", script, "train.yaml"], {**slurm(2), "DEEPSPEED": str(settings)}, **models)
    for mine in ("zero_stage_3/float32params", "zero_stage_3/optimizer", "model0/zero_stage_3/float32params"):
        assert any((tmp_path / "nvme" / mine).rglob("*.swp"))


def test_slurm_panel_with_a_server(run, teacher_dir):
    """The first node serves the teacher, with the tests' server in vLLM's place; the others train under zero3.json."""
    teacher = {"kind": "server", "url": "http://TEACHER:8000", "model": teacher_dir, "repo": teacher_dir}
    panel = {"teachers": {"a": {**teacher, "tokenizer": teacher_dir, "estimator": "topk_tail"}}}
    script = str(FILES / "slurm" / "panel_with_server.sbatch")
    variables = {**slurm(3), "TEACHER_MODEL": teacher_dir, "TEACHER_PORT": str(free_port())}
    run(["bash", script, "train.yaml"], variables, teacher_models=None, panel=panel)


def test_slurm_panel_with_engines(run, untied_student_dir, teacher_dir, other_teacher_dir, tmp_path):
    """Three nodes serve, with the tests' servers in vLLM's place, and two train under zero3.json."""
    teachers = {
        "large": {"kind": "server", "signal": "hidden", "url": "http://HIDDEN:8000", "repo": teacher_dir},
        "other": {"kind": "server", "url": "http://LISTED:8000", "repo": other_teacher_dir, "estimator": "topk_tail"},
    }
    ports = {f"{name}_PORT": str(free_port()) for name in ("ENGINE", "HIDDEN", "LISTED")}
    models = {"ENGINE_MODEL": untied_student_dir, "HIDDEN_MODEL": teacher_dir, "LISTED_MODEL": other_teacher_dir}
    run(
        ["bash", str(FILES / "slurm" / "panel_with_engines.sbatch"), "train.yaml"],
        {**slurm(5), **ports, **models},
        teacher_models=None,
        panel={"combine": "weighted_kl", "teachers": teachers},
        rollout_engine={"kind": "vllm", "url": "http://ENGINE:8000", "sync": "reload", "max_staleness": 1},
    )
    assert (tmp_path / "out" / "rollout-engine").is_dir()


def _require(settings: Path) -> None:
    """Have the ops compiled before the launchers' time runs, or skip.

    The ranks' PATH finds the environment's ninja. Two of different versions do not read each other's logs, and each
    would compile all again.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
            require_offload(json.loads(settings.read_text()))
    except ConfigError as error:
        pytest.skip(str(error))
