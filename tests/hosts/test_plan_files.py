"""The files that ``kd-plugin plan --output`` writes are read by the tools that they are for."""

import json
import shlex
import subprocess
from dataclasses import fields

import pytest
import yaml

from kd_plugin.cli.main import main

BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8}
CASES = {
    "one-node": ["--student", "Qwen/Qwen2.5-7B", "--method", "offline"],
    "several-nodes": ["--student", "meta-llama/Llama-3.3-70B-Instruct", "--method", "offline", "--nodes", "2"],
    "panel": ["--student", "Qwen/Qwen2.5-32B", "--teachers", "[Qwen/Qwen2.5-72B:sharded]"],
    "sharded-below-3": ["--student", "Qwen/Qwen2.5-1.5B", "--teachers", "[Qwen/Qwen2.5-7B:sharded]"],
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def plan(request, tmp_path_factory):
    """Where the files are, and the arguments that they were planned with."""
    directory = tmp_path_factory.mktemp("plan")
    assert main(["plan", "--json", *request.param, "--output", str(directory)]) == 0
    return directory, request.param


def read(plan, name):
    return yaml.safe_load((plan[0] / name).read_text())


def test_deepspeed_and_transformers_read_the_json(plan):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    content = json.loads((plan[0] / "deepspeed.json").read_text())
    stage = content["zero_optimization"]["stage"]
    assert HfTrainerDeepSpeedConfig(content).is_zero3() == (stage == 3)
    config = DeepSpeedConfig({**content, **BATCH, "gradient_clipping": 1.0})
    assert config.zero_optimization_stage == stage
    known = type(config.zero_config).model_fields
    known = set(known) | {field.alias for field in known.values()}
    assert set(content["zero_optimization"]) <= known


def test_accelerate_reads_the_yaml(plan):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(plan[0] / "accelerate.yaml"))
    assert config.num_processes == 8 * config.num_machines
    assert config.deepspeed_config["deepspeed_config_file"] == str(plan[0] / "deepspeed.json")


def test_lightning_cli_reads_the_fragment(plan):
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy

    parser = ArgumentParser()
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    trainer = parser.parse_object(read(plan, "lightning.yaml")).trainer
    nodes = plan[1][plan[1].index("--nodes") + 1] if "--nodes" in plan[1] else "1"
    assert (trainer.devices, trainer.num_nodes) == (8, int(nodes))
    strategy = DeepSpeedStrategy(**trainer.strategy.init_args.as_dict())
    assert strategy.config == json.loads((plan[0] / "deepspeed.json").read_text())


def test_every_launcher_parses_its_command(plan):
    """Each launcher's own parser takes the line, and hands on what the trainer's configuration has as fields."""
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    from kd_plugin.trl import OfflineKDConfig, TeacherPanelConfig

    text = (plan[0] / "launch.sh").read_text()
    assert subprocess.run(["bash", "-n", str(plan[0] / "launch.sh")], check=False).returncode == 0
    lines = text.replace("\\\n", " ").replace('"$NODE_RANK"', "1").replace('"$HEAD"', "10.0.0.1").splitlines()
    commands = {line.split()[0]: shlex.split(line)[1:] for line in lines if line and not line.startswith("#")}
    assert set(commands) == {"accelerate", "torchrun", "deepspeed", "srun"}
    accelerate = launch_command_parser().parse_args(commands["accelerate"][1:])
    torchrun = get_args_parser().parse_args(commands["torchrun"])
    deepspeed = parse_args(commands["deepspeed"])
    method = "offline" if "offline" in plan[1] else "panel"
    config = OfflineKDConfig if method == "offline" else TeacherPanelConfig
    names = {field.name for field in fields(config)} | {"config"}
    launched = (
        (accelerate.training_script, accelerate.training_script_args),
        (torchrun.training_script, torchrun.training_script_args),
        (deepspeed.user_script, deepspeed.user_args),
    )
    for module, (command, *options) in launched:
        assert (module, command) == ("kd_plugin", method)
        assert {word[2:] for word in options if word.startswith("--")} <= names


def test_sharded_teachers_keep_small_parameters_whole_beside_any_stage(plan):
    content = json.loads((plan[0] / "deepspeed.json").read_text())["zero_optimization"]
    sharded = any("sharded" in word for word in plan[1])
    assert ("stage3_param_persistence_threshold" in content) == (content["stage"] == 3 or sharded)
