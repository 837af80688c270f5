"""The GPU pack runs: every part of it on the CPU with tiny sizes, so that no typo waits for a card."""

import subprocess
import sys

import pytest
import torch

from tests.gpu.__main__ import PARTS, described, main
from tests.gpu.report import Place, Table


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_and_misses_no_limit(part):
    table = PARTS[part](Place("cpu"))
    assert table.rows and not table.failed
    assert all(len(row) == len(table.header) for row in table.rows)


def test_one_file_holds_the_results_and_a_failed_part_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(place):
        raise RuntimeError("no memory")

    def missed(place):
        return Table("Limits", ("a",), [(1,)], failed=["a is 1."])

    monkeypatch.setitem(PARTS, "kernels", broken)
    monkeypatch.setitem(PARTS, "steps", missed)
    output = tmp_path / "results.md"
    argv = ["gpu", "--device", "cpu", "--only", "kernels", "steps", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 1
    text = output.read_text()
    assert text.startswith(described(Place("cpu"))) and "no memory" in text and "FAILED: a is 1." in text


ABSENT = """
import importlib.abc, importlib.util, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent, sys.argv = sys.argv[1].split(","), ["gpu", *sys.argv[2:]]
sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in absent else find_spec(name, *rest)
from tests.gpu.__main__ import main
sys.exit(main())
"""


def test_it_needs_nothing_but_torch_transformers_and_trl(tmp_path):
    """Beside what kd-plugin itself depends on: no extra, and nothing that the tests need."""
    absent = "peft,gguf,lightning,jsonargparse,deepspeed,vllm,liger_kernel,bitsandbytes,pytest,hypothesis,matplotlib"
    given = ["--device", "cpu", "--only", "steps", "--output", str(tmp_path / "results.md")]
    done = subprocess.run([sys.executable, "-c", ABSENT, absent, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| offline, 2 x 16 | ours |" in (tmp_path / "results.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "tests.gpu"], capture_output=True, text=True, check=True)
    assert "no GPU" in done.stdout
