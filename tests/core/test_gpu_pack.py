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


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "tests.gpu"], capture_output=True, text=True, check=True)
    assert "no GPU" in done.stdout
