"""``sync: nccl`` with a real vLLM server, and a TCP store in the place of NCCL: vLLM's own side of the protocol."""

from pathlib import Path

import pytest

from kd_plugin.rollouts.vllm import engine as server_engine
from kd_plugin.rollouts.vllm import transfer
from kd_plugin.rollouts.vllm.engine import ServerEngine
from tests.tcp_group import TcpGroup
from tests.tiny import save_tiny
from tests.vllm.greedy import compared_with_own, said
from tests.vllm.hosts import STEPS, trl
from tests.vllm.server import VllmServer
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks

CHECKOUT = Path(__file__).parents[2]
OPTIONS = ("--max-model-len", "512", "--weight-transfer-config", '{"backend": "nccl"}')
WORKER = ("--worker-extension-cls", "tests.vllm.tcp_worker.Worker")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_tiny(root / str(seed), seed=seed, hidden=128, tied=False) for seed in (1, 2)]


@pytest.fixture
def joined(monkeypatch):
    """Have the trainer join the same group."""
    monkeypatch.setattr(transfer, "open_group", lambda address, port, members: TcpGroup(address, port, 0, members))
    monkeypatch.setattr(server_engine, "require_gpu", lambda device: None)


def test_a_real_server_takes_tensor_after_tensor(models, joined, tmp_path, monkeypatch):
    both, found = compared_with_own(ServerEngine.generate)
    monkeypatch.setattr(ServerEngine, "generate", both)
    environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(CHECKOUT)}
    with VllmServer(models[0], tmp_path / "log", *OPTIONS, *WORKER, environment=environment) as server:
        block = {"kind": "vllm", "url": server.url, "sync": "nccl", "max_retries": 0, "timeout": 60}
        mine = trl(tmp_path / "a", *models, block, False)
    theirs = trl(tmp_path / "b", *models, None, False)
    print(f"tensors over TCP: losses {[round(x, 4) for x in mine]}; {said(found)}")
    assert mine == pytest.approx(theirs, abs=1e-3) and len(mine) == STEPS
    assert found["rows"] == 4 * STEPS
