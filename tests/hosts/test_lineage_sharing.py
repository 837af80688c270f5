"""Two nodes that write one checkpoint share the hashing of its files, for real: two launchers, two processes."""

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kd_plugin.lineage import load_record, verify


@pytest.mark.slow
def test_two_nodes_share_the_hashing_of_a_checkpoint(tmp_path, student_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = Path(__file__).with_name("sharing_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [
        subprocess.Popen(
            [*launch, "--node_rank", str(rank), str(worker), student_dir, str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    mine, other = (Counter((output / f"hashed-{rank}.txt").read_text().split()) for rank in range(2))
    for step in (1, 2):
        checkpoint = output / f"checkpoint-{step}"
        assert verify(checkpoint).exit_code == 0
        assert [p.name for p in checkpoint.glob(".kd-*")] == []
    files = [subject["path"] for subject in load_record(output / "checkpoint-2")["subjects"]]
    assert len(files) >= 6
    # Each node hashed its share of both checkpoints; of the other's, the writer read at most what came too late
    assert other and set(other) <= set(files[1::2]) and set(files[::2]) <= set(mine)
    assert sum(mine.values()) < 2 * len(files)
