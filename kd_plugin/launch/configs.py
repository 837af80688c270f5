"""A chosen layout as files that launchers read: DeepSpeed JSON, Accelerate YAML, commands, a LightningCLI fragment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.launch.preflight import MADE_FOR, made_for
from kd_plugin.planner.memory import Layout, bucket_elements, persistence_threshold
from kd_plugin.planner.run import Cluster, PlannedRun


def deepspeed_config(run: PlannedRun, layout: Layout, nvme_path: str = "/local_nvme") -> dict[str, Any]:
    """Return a DeepSpeed configuration; its batch sizes are ``auto``, which transformers fills in."""
    hidden = run.student.hidden
    zero: dict[str, Any] = {"stage": layout.stage, "overlap_comm": True, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = bucket_elements(hidden)
    if layout.offload_optimizer != "none":
        zero["offload_optimizer"] = _offload(layout.offload_optimizer, nvme_path)
    if layout.offload_parameters != "none":
        zero["offload_param"] = _offload(layout.offload_parameters, nvme_path)
    if layout.stage in (1, 2):
        zero["allgather_bucket_size"] = bucket_elements(hidden)
        # Each gradient goes to the rank that owns it; the default sends it to all ranks, in twice the bytes
        zero["use_multi_rank_bucket_allreduce"] = False
    sharded = [t.shape for t in run.placed("sharded") if t.shape is not None]
    if layout.stage == 3 or sharded:  # sharded teachers take these from the student's file, whatever its stage
        live = max(max(2 * shape.largest_layer, shape.head_numel) for shape in (run.student, *sharded))
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": persistence_threshold(hidden),
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "bf16": {"enabled": run.precision == "bf16"},
        "zero_optimization": zero,
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        MADE_FOR: made_for(run.student.name, hidden, run.student.layers),
    }


def accelerate_config(cluster: Cluster, layout: Layout, deepspeed_file: str) -> dict[str, Any]:
    """Return an Accelerate configuration that launches on every GPU with the DeepSpeed file.

    On several nodes the launch command adds each node's rank and the first one's address.
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": deepspeed_file,
            "zero3_init_flag": layout.stage == 3,
            **({"deepspeed_multinode_launcher": "standard"} if cluster.nodes > 1 else {}),
        },
        "num_machines": cluster.nodes,
        "num_processes": cluster.ranks,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }


def lightning_fragment(layout: Layout, cluster: Cluster, deepspeed_file: str, run: PlannedRun) -> dict[str, Any]:
    """Return the ``trainer`` part of a LightningCLI file."""
    return {
        "trainer": {
            "accelerator": "gpu",
            "devices": cluster.gpus_per_node,
            "num_nodes": cluster.nodes,
            "precision": "bf16-true" if run.precision == "bf16" else "32-true",
            "accumulate_grad_batches": run.accumulation,
            "strategy": {
                "class_path": "lightning.pytorch.strategies.DeepSpeedStrategy",
                "init_args": {"config": deepspeed_file},
            },
        }
    }


def training_arguments(run: PlannedRun, layout: Layout) -> str:
    """Return the arguments of the training command that a plan decides."""
    arguments = (
        f"--per_device_train_batch_size {run.micro_batch} --gradient_accumulation_steps {run.accumulation} "
        f"--gradient_checkpointing {str(layout.checkpointing).lower()}"
    )
    if run.method == "panel" and run.generates and layout.stage == 3 and not run.gather_for_generation:
        arguments += " --ds3_gather_for_generation false"
    if run.placed("sharded") and layout.stage < 3:
        arguments += " --shard_teachers true"
    return arguments


def commands(run: PlannedRun, layout: Layout, cluster: Cluster, deepspeed_file: str, accelerate_file: str) -> str:
    """Return the launch commands as a commented shell script; ``train.yaml`` is the user's own settings."""
    method = run.method
    train = f"kd_plugin {method} --config train.yaml"
    settings = training_arguments(run, layout)
    several = cluster.nodes > 1
    where = ' --machine_rank "$NODE_RANK" --main_process_ip "$HEAD" --main_process_port 29500' if several else ""
    nodes = f" --nnodes {cluster.nodes}"
    nodes += ' --node_rank "$NODE_RANK" --master_addr "$HEAD" --master_port 29500' if several else ""
    hostfile = " --hostfile hostfile" if several else f" --num_gpus {cluster.gpus_per_node}"
    note = "# On each node, with NODE_RANK and HEAD (the first node's address) set:\n" if several else ""
    return f"""\
# Choose one. The model, the data and the teachers are in train.yaml.
{note}# accelerate
accelerate launch --config_file {accelerate_file}{where} -m {train} {settings}

# torchrun
torchrun{nodes} --nproc_per_node {cluster.gpus_per_node} -m {train} {settings} --deepspeed {deepspeed_file}

# deepspeed (from the first node alone)
deepspeed{hostfile} --no_local_rank --module {train} {settings} --deepspeed {deepspeed_file}

# Slurm: the whole script is integrations/slurm/{method}.sbatch
srun --nodes {cluster.nodes} --ntasks-per-node 1 --gpus-per-node {cluster.gpus_per_node} bash -c \\
  'torchrun --nnodes {cluster.nodes} --nproc_per_node {cluster.gpus_per_node} \\
   --node_rank "$SLURM_NODEID" --master_addr "$HEAD" --master_port 29500 \\
   -m {train} {settings} --deepspeed {deepspeed_file}'
"""


def write_all(run: PlannedRun, layout: Layout, cluster: Cluster, directory: Path, nvme_path: str) -> list[Path]:
    """Write the files into ``directory``, which is made where it is missing, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {name: directory / name for name in ("deepspeed.json", "accelerate.yaml", "lightning.yaml", "launch.sh")}
    ds, acc = str(names["deepspeed.json"]), str(names["accelerate.yaml"])
    config = deepspeed_config(run, layout, nvme_path)
    names["deepspeed.json"].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names["accelerate.yaml"].write_text(_yaml(accelerate_config(cluster, layout, ds)), encoding="utf-8")
    names["lightning.yaml"].write_text(_yaml(lightning_fragment(layout, cluster, ds, run)), encoding="utf-8")
    names["launch.sh"].write_text(commands(run, layout, cluster, ds, acc), encoding="utf-8")
    return list(names.values())


def _offload(device: str, nvme_path: str) -> dict[str, Any]:
    return {"device": device, "pin_memory": True, **({"nvme_path": nvme_path} if device == "nvme" else {})}


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False)
