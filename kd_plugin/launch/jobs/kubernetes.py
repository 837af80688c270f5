"""A Kubernetes manifest of a panel's parts, found by name through a headless Service; all end together.

A pod ends when a file appears on the shared volume, which the trainers leave however they end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kd_plugin.launch.jobs.parts import Parts, Server

_APP = "kd-plugin"
_HEADER = """\
# kubectl create configmap kd-plugin-settings --from-file=train.yaml
# kubectl apply -f {file}
# Engines for the student, teachers on servers, and trainers, found by name through the headless Service. In train.yaml:
{settings}\
# Set images, models, NODES with completions and parallelism, GPUS, and the claim's name. The trainers begin when all
# servers are healthy and kd-plugin doctor finds no problem with them. When they end, whatever the reason, they leave a
# file that ends the servers. To start again: kubectl delete -f this file, then apply it with resume_from_checkpoint:
# true in train.yaml.
"""
_SERVE = """\
rm -f /shared/run-is-over
vllm serve "$MODEL" --host 0.0.0.0 --port 8000 --tensor-parallel-size {gpus}{flags}{over} &
SERVER=$!
until [ -e /shared/run-is-over ]; do kill -0 $SERVER || exit 1; sleep 5; done
kill $SERVER
"""
_OVER = """ \\
  --nnodes {nodes} --node-rank "$JOB_COMPLETION_INDEX" --master-addr {first} \\
  $([ "$JOB_COMPLETION_INDEX" = 0 ] || echo --headless)"""
_TRAIN = """\
for server in {servers}; do
  until curl --silent --fail "http://$server:8000/health"; do sleep 10; done
done
trap 'touch /shared/run-is-over' EXIT
kd-plugin doctor --training "$CONFIG" || exit 1
torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --node_rank "$JOB_COMPLETION_INDEX" \\
  --master_addr "$HEAD" --master_port "$PORT" \\
  -m kd_plugin panel --config "$CONFIG" --deepspeed "$DEEPSPEED"{arguments}
"""


class _Dumper(yaml.SafeDumper):
    """Writes scripts as blocks of lines."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def manifest(parts: Parts, file: str = "integrations/kubernetes/panel_with_engines.yaml") -> str:
    """Return the manifest.

    Args:
        parts: of the run.
        file: as which a user applies it.
    """
    documents = [_service(), *(_server(one, parts) for one in parts.servers), _trainer(parts)]
    said = parts.settings(lambda one: f"http://{_host(one)}:8000", "/shared/rollout-engine")
    body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=200)
    return _HEADER.format(file=file, settings=said) + body


def _host(server: Server) -> str:
    """Return the name of the pod that answers."""
    return f"{server.name}{'' if server.nodes == 1 else '-0'}.{_APP}"


def _service() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": _APP},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app": _APP},
            "ports": [{"name": "rendezvous", "port": 29500}, {"name": "vllm", "port": 8000}],
        },
    }


def _server(server: Server, parts: Parts) -> dict[str, Any]:
    over = _OVER.format(nodes=server.nodes, first=_host(server)) if server.nodes > 1 else ""
    flags = f" \\\n  {server.all_flags}" if server.all_flags else ""
    environment = {"MODEL": server.model or f"/shared/models/{server.name}"}
    if server.says == "rollouts":
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": "vllm/vllm-openai:v0.32.0",
        "command": ["bash", "-c"],
        "args": [_SERVE.format(gpus=parts.gpus * server.nodes, flags=flags, over=over)],
        "env": _variables(environment),
        "ports": [{"containerPort": 8000}],
    }
    if server.nodes == 1:  # of several, one answers
        container["readinessProbe"] = {"httpGet": {"path": "/health", "port": 8000}}
    return _job(server.name, container, server.nodes, parts.gpus)


def _trainer(parts: Parts) -> dict[str, Any]:
    servers = " ".join(map(_host, parts.servers))
    arguments = f" {parts.arguments}" if parts.arguments else ""
    environment = {
        "CONFIG": "/settings/train.yaml",
        "DEEPSPEED": str(Path("/shared", parts.deepspeed)),
        "NODES": str(parts.trainers),
        "GPUS": str(parts.gpus),
        "HEAD": f"trainer-0.{_APP}",
        "PORT": "29500",
    }
    container = {
        "name": "train",
        "image": "registry.example.com/kd-plugin:latest",
        "workingDir": "/shared",
        "command": ["bash", "-c"],
        "args": [_TRAIN.format(servers=servers, arguments=arguments)],
        "env": _variables(environment),
    }
    return _job("trainer", container, parts.trainers, parts.gpus, settings=True)


def _job(name: str, container: dict[str, Any], nodes: int, gpus: int, *, settings: bool = False) -> dict[str, Any]:
    mounts = {"shared": "/shared", **({"settings": "/settings"} if settings else {}), "memory": "/dev/shm"}
    volumes: dict[str, dict[str, Any]] = {
        "shared": {"persistentVolumeClaim": {"claimName": _APP}},
        "settings": {"configMap": {"name": f"{_APP}-settings"}},
        "memory": {"emptyDir": {"medium": "Memory"}},
    }
    limited = {"resources": {"limits": {"nvidia.com/gpu": gpus}}}
    mounted = {"volumeMounts": [{"name": one, "mountPath": path} for one, path in mounts.items()]}
    pod: dict[str, Any] = {
        "subdomain": _APP,
        "restartPolicy": "Never",
        "containers": [container | limited | mounted],
        "volumes": [{"name": one, **volumes[one]} for one in mounts],
    }
    indexed: dict[str, Any] = {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
    if not settings and nodes == 1:
        pod, indexed = {"hostname": name, **pod}, {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            **indexed,
            "backoffLimit": 0,
            "template": {"metadata": {"labels": {"app": _APP}}, "spec": pod},
        },
    }


def _variables(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]
