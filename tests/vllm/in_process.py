"""Trainers with vLLM in their process, run by the interpreter that has vLLM; test_vllm_in_process.py starts it.

    VLLM_PYTHON -m tests.vllm.in_process SYNC TIED DIRECTORY

Each run has an engine of its own, one after the other in this process.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from kd_plugin.errors import ServerError
from kd_plugin.rollouts.vllm.engine import ServerEngine
from tests.tiny import save_tiny
from tests.vllm.greedy import compared_with_own
from tests.vllm.hosts import lightning, plain, trl

OPTIONS = {"enforce_eager": True, "max_model_len": 256}


def main(sync: str, tied: bool, directory: str) -> None:
    out, report = Path(directory), {}
    student = save_tiny(out / "student", seed=1, hidden=128, tied=tied)
    teacher = save_tiny(out / "teacher", seed=2, hidden=128, tied=False)
    engine = {"kind": "vllm", "sync": sync, "options": OPTIONS}
    generate = ServerEngine.generate
    for host in (trl, plain, lightning):
        told: dict = {}
        ServerEngine.generate, told["found"] = compared_with_own(generate)
        try:
            told["mine"] = host(out / f"{host.__name__}-a", student, teacher, engine, sync == "adapter")
            told["theirs"] = host(out / f"{host.__name__}-b", student, teacher, None, sync == "adapter")
        except ServerError as error:
            told["problem"] = str(error)
        report[host.__name__] = told
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "tied", sys.argv[3])
