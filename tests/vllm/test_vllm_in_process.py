"""vLLM in the trainer's own process: the run is that of the transformers engine, and a stale head is caught."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.vllm.greedy import said
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks

CHECKOUT = Path(__file__).parents[2]


def run(tmp_path, *arguments, timeout=400):
    """Run a module of the tests by the interpreter that has vLLM."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    command = [os.environ["KD_VLLM_PYTHON"], "-m", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(("sync", "head"), [("reload", "untied"), ("adapter", "tied"), ("reload", "tied")])
def test_five_steps_are_those_of_the_transformers_engine(sync, head, tmp_path):
    """In TRL, a transformers trainer and Lightning, one after the other in one process."""
    run(tmp_path, "tests.vllm.in_process", sync, head, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["trl", "plain", "lightning"]
    for host, told in report.items():
        if (sync, head) == ("reload", "tied"):  # as on a server, vLLM 0.32 on a CPU keeps the old head without a word
            assert "of step 1: " in told["problem"] and "stale is the output head, which is tied to" in told["problem"]
            continue
        print(f"{host}, {head}, {sync}, in process: {[round(x, 4) for x in told['mine']]}; {said(told['found'])}")
        assert len(told["mine"]) == 5 and told["mine"] == pytest.approx(told["theirs"], abs=1e-3), host
        assert abs(told["mine"][-1] - told["mine"][0]) > 1e-2, "the student must move, or nothing was shown"
        assert told["found"]["rows"] == 4 * 5
