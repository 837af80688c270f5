"""TRL's own ``use_vllm`` with a real vLLM on a CPU: what stops it is TRL's, and all but that trains as it should."""

import json

import pytest

from tests.tiny import save_tiny
from tests.vllm.server import VllmServer
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks
from tests.vllm.test_vllm_in_process import run

OPTIONS = ("--max-model-len", "256", "--max-logprobs", "-1", "--logprobs-mode", "processed_logprobs")
TRANSFER = ("--weight-transfer-config", '{"backend": "nccl"}')  # as TRL asks for
STOPS = {
    "server": "NotImplementedError: Weight synchronization runs on vLLM's NCCL weight-transfer engine, which needs",
    "colocate": "AttributeError: 'Parameter' object has no attribute 'weight_loader'",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_tiny(root / str(seed), seed=seed, hidden=128, tied=False) for seed in (1, 2)]


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_what_stops_on_a_cpu_is_trls_and_the_rest_trains(mode, models, tmp_path):
    arguments = ("tests.vllm.trl_own", mode, tmp_path, *models)
    if mode == "server":
        environment = {"VLLM_SERVER_DEV_MODE": "1"}
        with VllmServer(models[0], tmp_path / "log", *OPTIONS, *TRANSFER, environment=environment) as server:
            run(tmp_path, *arguments, server.url)
    else:
        run(tmp_path, *arguments)
    report = json.loads((tmp_path / "report.json").read_text())
    print(f"{mode}: stopped by {report['ours stopped by']!r}")
    assert report["ours stopped by"] == report["theirs stopped by"] and STOPS[mode] in report["ours stopped by"]
    print(f"with weights sent another way: losses {[round(x, 4) for x in report['vllm']]}")
    assert report["vllm"] == pytest.approx(report["transformers"], abs=1e-3) and len(report["vllm"]) == 4
    assert abs(report["vllm"][-1] - report["vllm"][0]) > 1e-2, "the student must move, or nothing was shown"
    print(f"sampled: vLLM's log-probabilities are {report['apart']:.1e} nats from the student's")
    assert report["apart"] < 1e-3 and len(report["sampled"]) == 4
