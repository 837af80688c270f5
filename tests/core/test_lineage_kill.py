"""A process that is killed while it writes lineage leaves a checkpoint that verifies or is seen to be unfinished."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kd_plugin.lineage import verify
from tests.core.lineage_help import checkpoint, model_dir

WRITER = """
import sys
from kd_plugin.lineage import RunLineage, Source
student, directory = sys.argv[1:]
run = RunLineage(method="sft", student=Source("student", ref=student))
print("ready", flush=True)
step = 0
while True:
    step += 1
    run.write(directory, step=step)
"""


def test_killed_at_any_moment_it_is_whole_or_unfinished_and_never_wrong(tmp_path):
    student = model_dir(tmp_path, "student", "gemma")
    directory = checkpoint(tmp_path / "out", weights=b"w" * 1000)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    for attempt in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, student, str(directory)], stdout=subprocess.PIPE, env=environment
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(0.01 + 0.013 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        report = verify(directory)
        assert report.exit_code in (0, 3), report.problems
