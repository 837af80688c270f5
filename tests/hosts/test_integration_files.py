"""Each launcher's file is read by the launcher's own code; what needs GPUs or Slurm is checked as far as that goes."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from kd_plugin.teachers.hidden.states import FLAGS

ROOT = Path(__file__).parents[2]
FILES = ROOT / "integrations"
BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8}


@pytest.mark.parametrize("path", sorted((FILES / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_reads_its_files(path):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    content = json.loads(path.read_text())
    assert HfTrainerDeepSpeedConfig(content).is_zero3() == path.stem.startswith("zero3")
    # What the trainer fills in where a file says "auto"
    filled = {
        **content, **BATCH, "gradient_clipping": 1.0, "bf16": {"enabled": True},
        "zero_optimization": {k: v for k, v in content["zero_optimization"].items() if v != "auto"},
    }  # fmt: skip
    config = DeepSpeedConfig(filled)
    assert config.zero_optimization_stage == int(re.match(r"zero(\d)", path.stem).group(1))
    offload = config.zero_config.offload_param
    device = "none" if offload is None else str(getattr(offload.device, "value", offload.device))
    assert device == {"zero3_cpu_offload": "cpu", "zero3_nvme_offload": "nvme"}.get(path.stem, "none")


@pytest.mark.parametrize("path", sorted((FILES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType.DEEPSPEED
    assert config.num_processes == 8 * config.num_machines
    assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize("path", sorted((FILES / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_slurm_scripts_are_shell_and_name_files_that_exist(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/bin/bash") and "#SBATCH --nodes=" in text
    for named in re.findall(r"integrations/[\w/]+\.(?:json|sbatch|yaml)", text):
        assert (ROOT / named).is_file()
    method = re.search(r"-m kd_plugin (\w+)", text).group(1)
    assert method == path.stem.split("_")[0]


def test_deepspeed_reads_its_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(FILES / "deepspeed" / "hostfile")) == {"node1": 8, "node2": 8}


def test_kubernetes_takes_its_job():
    """By the Kubernetes project's schemas; what pods are told of each other must agree, too."""
    import kubernetes_validate

    service, job = yaml.safe_load_all((FILES / "kubernetes" / "job.yaml").read_text())
    for document in (service, job):
        kubernetes_validate.validate(document, "1.34", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "completionMode": 2}}, "1.34", strict=True)
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    variables = {v["name"]: v["value"] for v in pod["containers"][0]["env"]}
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["selector"] == {"job-name": name}
    assert variables["HEAD"] == f"{name}-0.{pod['subdomain']}"
    assert int(variables["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(variables["GPUS"]) == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert (ROOT / variables["DEEPSPEED"].removeprefix("/shared/")).is_file()


def test_kubernetes_takes_the_engines():
    """By the schemas; every server is waited for by its name, and one file ends all."""
    import kubernetes_validate

    service, *jobs = yaml.safe_load_all((FILES / "kubernetes" / "panel_with_engines.yaml").read_text())
    for document in (service, *jobs):
        kubernetes_validate.validate(document, "1.34", strict=True)
    pods = {job["metadata"]["name"]: job["spec"]["template"] for job in jobs}
    commands = {name: pod["spec"]["containers"][0]["args"][0] for name, pod in pods.items()}
    assert set(pods) == {"engine", "hidden", "listed", "trainer"}
    for name, pod in pods.items():
        assert pod["metadata"]["labels"] == service["spec"]["selector"]
        assert pod["spec"]["subdomain"] == service["metadata"]["name"] and "/shared/run-is-over" in commands[name]
        assert subprocess.run(["bash", "-n", "-c", commands[name]], check=False).returncode == 0
        if name != "trainer":
            assert pod["spec"]["hostname"] == name
    assert "for server in hidden.kd-plugin listed.kd-plugin engine.kd-plugin;" in commands["trainer"]
    assert FLAGS in " ".join(commands["hidden"].split())
    variables = {v["name"]: v["value"] for v in pods["trainer"]["spec"]["containers"][0]["env"]}
    assert variables["HEAD"] == f"trainer-0.{service['metadata']['name']}"
    assert (ROOT / variables["DEEPSPEED"].removeprefix("/shared/")).is_file()


def test_every_file_is_in_the_readme():
    readme = (FILES / "README.md").read_text()
    for path in FILES.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert str(path.relative_to(FILES)) in readme
