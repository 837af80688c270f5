"""vLLM in the trainer's own process: the run is that of the transformers engine, and a stale head is caught."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.vllm.greedy import said
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize(("sync", "head"), [("reload", "untied"), ("adapter", "tied"), ("reload", "tied")])
def test_five_steps_are_those_of_the_transformers_engine(sync, head, tmp_path):
    command = [os.environ["KD_VLLM_PYTHON"], "-m", "tests.vllm.in_process", sync, head, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    if (sync, head) == ("reload", "tied"):  # as on a server, vLLM 0.32 on a CPU keeps the old head without a word
        assert "of step 1: " in report["problem"] and "stale is the output head, which is tied to" in report["problem"]
        return
    print(f"{head}, {sync}, in process: losses {[round(x, 4) for x in report['mine']]}; {said(report['found'])}")
    assert len(report["mine"]) == 5 and report["mine"] == pytest.approx(report["theirs"], abs=1e-3)
    assert abs(report["mine"][-1] - report["mine"][0]) > 1e-2, "the student must move, or nothing was shown"
    assert report["found"]["rows"] == 4 * 5
