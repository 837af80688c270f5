"""A Slurm script of a panel's parts: servers first, trainers when all are healthy, and all end together."""

from __future__ import annotations

from kd_plugin.launch.jobs.parts import Parts, Server

_FILE = """\
#!/bin/bash
# Engines generate for the student, teachers are on servers: sbatch {file} train.yaml
# Each server has nodes of its own, and the last nodes train. In train.yaml names in capitals stand for nodes:
{settings}\
{for_lora}\
# output_dir, or rollout_engine.directory, must be on a disk that all nodes see. All parts end together.
#SBATCH --job-name=kd-panel-engines
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

CONFIG=${{1:?usage: sbatch {file} train.yaml}}
{models}
DEEPSPEED=${{DEEPSPEED:-{deepspeed}}} PORT=${{PORT:-29500}}
{ports}
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
{places}
HEAD=${{NODES[{served}]}} TRAINERS=$((SLURM_NNODES - {served}))
SERVING=$(IFS=,; echo "${{NODES[*]:0:{served}}}")
sed {renamed} \\
    "$CONFIG" > "train-$SLURM_JOB_ID.yaml"
export DEEPSPEED HEAD PORT TRAINERS
export VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True  # the student's weights come in while it runs

SERVERS=()
trap 'kill "${{SERVERS[@]}}"' EXIT
serve() {{ # NODE PORT MODEL FLAGS...
    local node=$1 port=$2
    shift 2
    srun --nodes 1 --nodelist "$node" vllm serve "$@" --host 0.0.0.0 --port "$port" --tensor-parallel-size {gpus} &
    SERVERS+=($!)
}}
{over}\
healthy() {{ # NODE PORT: wait; end the job where a server has ended
    until curl --silent --fail "http://$1:$2/health" > /dev/null; do
        for server in "${{SERVERS[@]}}"; do kill -0 "$server"; done
        sleep 10
    done
}}
{serves}
{waits}
srun --nodes 1 --nodelist "$HEAD" kd-plugin doctor --training "train-$SLURM_JOB_ID.yaml"

srun --kill-on-bad-exit=1 --nodes "$TRAINERS" --exclude "$SERVING" bash -c '
    torchrun --nnodes "$TRAINERS" --nproc_per_node "$SLURM_GPUS_ON_NODE" \\
        --node_rank "$SLURM_NODEID" --master_addr "$HEAD" --master_port "$PORT" \\
        -m kd_plugin panel --config "train-$SLURM_JOB_ID.yaml" --deepspeed "$DEEPSPEED"{arguments}'
"""
_OVER = """\
serve_over() {{ # COUNT NODES PORT MODEL FLAGS...: the first of the nodes answers, the others work for it
    local count=$1 nodes=$2 port=$3
    shift 3
    srun --nodes "$count" --nodelist "$nodes" bash -c '
        own=(--nnodes "$0" --node-rank "$SLURM_NODEID" --master-addr "${{1%%,*}}" --tensor-parallel-size "$2")
        [ "$SLURM_NODEID" = 0 ] || own+=(--headless)
        vllm serve "${{@:3}}" "${{own[@]}}"' \\
        "$count" "$nodes" $((count * {gpus})) "$@" --host 0.0.0.0 --port "$port" &
    SERVERS+=($!)
}}
"""


def script(parts: Parts, file: str = "integrations/slurm/panel_with_engines.sbatch") -> str:
    """Return the script.

    Args:
        parts: of the run.
        file: as which a user starts it.
    """
    first, starts = 0, {}
    for server in parts.servers:
        starts[server.name] = first
        first += server.nodes
    engines = parts.of("rollouts")
    lora = f'# For an adapter: sync: adapter, and {engines[0].variable}_FLAGS="--enable-lora --max-lora-rank 16".\n'
    several = any(server.nodes > 1 for server in parts.servers)
    return _FILE.format(
        file=file,
        settings=parts.settings(lambda server: f"http://{server.name.upper()}:8000"),
        for_lora="" if engines[0].flags else lora,
        nodes=parts.nodes,
        gpus=parts.gpus,
        models="\n".join(map(_model, parts.servers)),
        deepspeed=parts.deepspeed,
        ports=" ".join(f"{one.variable}_PORT=${{{one.variable}_PORT:-8000}}" for one in parts.servers),
        places=" ".join(f"{one.variable}=${{NODES[{starts[one.name]}]}}" for one in parts.servers),
        served=first,
        renamed=" \\\n    ".join(
            f'-e "s|//{one.name.upper()}:8000|//${one.variable}:${one.variable}_PORT|"' for one in parts.servers
        ),
        over=_OVER.format(gpus=parts.gpus) if several else "",
        serves="\n".join(_serve(one, starts[one.name]) for one in parts.servers),
        waits="\n".join(f'healthy "${one.variable}" "${one.variable}_PORT"' for one in parts.servers),
        arguments=f" \\\n        {parts.arguments}" if parts.arguments else "",
    )


def _model(server: Server) -> str:
    gives = {
        "rollouts": "the student that the engine starts from",
        "hidden": "the teacher whose hidden states are served",
        "listed": "the teacher whose likeliest tokens are served",
    }[server.says]
    name = f"{server.variable}_MODEL"
    default = f":-{server.model}" if server.model else f":?name {gives}"
    return f"{name}=${{{name}{default}}}"


def _serve(server: Server, first: int) -> str:
    name = server.variable
    own = f" ${{{name}_FLAGS:-}}" if server.says == "rollouts" else ""
    flags = f" \\\n    {server.all_flags}" if server.all_flags else ""
    told = f'"${name}_PORT" "${name}_MODEL"{flags}{own}'
    note = "# shellcheck disable=SC2086 - several flags\n" if own else ""
    if server.nodes == 1:
        return f'{note}serve "${name}" {told}'
    return f'{note}serve_over {server.nodes} "$(IFS=,; echo "${{NODES[*]:{first}:{server.nodes}}}")" {told}'
