"""``sync: nccl`` with a real vLLM server, and a TCP store in the place of NCCL: vLLM's own side of the protocol."""

from pathlib import Path

import pytest

from kd_plugin.errors import ServerError
from kd_plugin.rollouts.vllm import engine as server_engine
from kd_plugin.rollouts.vllm import transfer
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.rollouts.vllm.weights import AllWeights
from tests.tcp_group import TcpGroup
from tests.tiny import save_tiny
from tests.vllm.greedy import compared_with_own, said
from tests.vllm.hosts import STEPS, plain, trl
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
    """Two runs on one server: each opens a group of its own. Then a tensor that is not the student's."""
    both, found = compared_with_own(ServerEngine.generate)
    monkeypatch.setattr(ServerEngine, "generate", both)
    environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(CHECKOUT)}
    with VllmServer(models[0], tmp_path / "log", *OPTIONS, *WORKER, environment=environment) as server:
        block = {"kind": "vllm", "url": server.url, "sync": "nccl", "max_retries": 0, "timeout": 60}
        for host in (trl, plain):
            mine = host(tmp_path / f"{host.__name__}-a", *models, block, False)
            theirs = host(tmp_path / f"{host.__name__}-b", *models, None, False)
            print(f"{host.__name__}, tensors over TCP: losses {[round(x, 4) for x in mine]}")
            assert mine == pytest.approx(theirs, abs=1e-3) and len(mine) == STEPS
        print(said(found))
        assert found["rows"] == 2 * 4 * STEPS
        on_device = AllWeights.on_device

        def stale(self):
            for layer in on_device(self):
                yield {name: tensor * (1.1 if name == "lm_head.weight" else 1) for name, tensor in layer.items()}

        monkeypatch.setattr(AllWeights, "on_device", stale)
        with pytest.raises(ServerError, match="does not have the student's weights of step 0"):
            trl(tmp_path / "c", *models, block, False)
