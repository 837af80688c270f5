"""The count of what the loss does on a GPU: products, what Inductor's code moves, the table of the page, targets."""

import argparse
import re
from pathlib import Path

import pytest
import torch

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.compiled import passes
from tests.benchmarks import generated
from tests.benchmarks.passes import cost, ligers, ours, rows, trls

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
SIZES = {"positions": 512, "vocab": 4096, "width": 256}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("teachers", [1, 3])
def test_nothing_is_projected_twice(divergence, teachers, fused, monkeypatch):
    monkeypatch.setattr(generated, "bytes_of", lambda *tensors, **static: 0.0)
    found = cost(ours(divergence, teachers=teachers, fused=fused, **SIZES), "h100", **SIZES)
    assert found.products == 3 + teachers  # student, teachers, gradients of hidden states and of the head


@pytest.mark.parametrize(("divergence", "products"), [("forward_kl", 6), ("reverse_kl", 6), ("jsd", 8)])
def test_trl_projects_again_in_backward(divergence, products):
    assert cost(trls(divergence, **SIZES), "h100", **SIZES).products == products


def test_liger_projects_once():
    assert cost(ligers(**SIZES), "h100", **SIZES).products == 4


def test_each_tile_is_read_once_a_kernel():
    """In bytes: one float32 tile, two, and two with one written in bfloat16; the rest is of rows and blocks."""
    tile, row = torch.empty(8, 151_936, device="meta"), torch.empty(8, 1, device="meta")
    narrow, divergence = tile.bfloat16(), Divergence("reverse_kl")
    nothing = [None] * 5
    statistics = generated.bytes_of(passes.statistics, tile)
    value = generated.bytes_of(passes.kl_statistics, tile, row, tile.clone(), of_student=True)
    given = (tile, row, row, *nothing, tile.clone(), row, row, narrow)
    gradient = generated.bytes_of(passes.gradient, *given, divergence=divergence)
    assert 4.0 < statistics < 4.1 and 8.0 < value < 8.1 and 10.0 < gradient < 10.1


def test_the_table_of_the_page_is_what_is_counted():
    default = argparse.Namespace(positions=8192, vocab=151936, width=4096, gpu="h100", teachers=[1, 3, 8])
    counted = list(rows(default))
    lines = ["| " + " | ".join(row) + " |" for row in counted]
    of_page = r"^\| (?:forward_kl|reverse_kl|jsd|skew_kl) \| (?:TRL|Liger|ours), .*$"
    assert lines == re.findall(of_page, PAGE.read_text(), re.M)
    limits = {"ours, 1": 0.75, "ours, 3": 0.45, "ours, 8": 0.45}
    for row in counted:
        if row[1] in limits and row[-1]:
            assert float(row[-1]) <= limits[row[1]], row
