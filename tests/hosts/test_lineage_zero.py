"""Lineage beside what two ranks save under ZeRO-3, consolidated and in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_plugin.lineage import verify

pytest.importorskip("deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("student", ["student_dir", "untied_student_dir"])
@pytest.mark.parametrize("gather", ["consolidated", "sharded"])
def test_zero_3_on_two_ranks(gather, student, request, tmp_path):
    student_dir = request.getfixturevalue(student)
    worker = Path(__file__).with_name("zero_saving_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, student_dir, str(tmp_path), gather], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # One rank wrote, and each place once
    assert (tmp_path / "rank-1.txt").read_text() == ""
    assert (tmp_path / "rank-0.txt").read_text().split() == [f"{tmp_path}/checkpoint-2", f"{tmp_path}/final"]
    names = {}
    for place in ("checkpoint-2", "final"):
        report = verify(tmp_path / place)
        assert report.exit_code == 0, report.problems
        record = json.loads((tmp_path / place / "lineage.json").read_text())
        names[place] = {subject["path"].rsplit("/", 1)[-1] for subject in record["subjects"]}
    on_disk = {p.name for p in (tmp_path / "checkpoint-2").rglob("*_states.pt")}
    assert len(on_disk) == 4 and on_disk <= names["checkpoint-2"]
    assert ("model.safetensors" in names["checkpoint-2"]) == (gather == "consolidated")
    if gather == "sharded":
        assert {p.name for p in (tmp_path / "final").rglob("*_states.pt")} <= names["final"]
    else:
        assert names["final"] == {"model.safetensors"}
