"""The count of what the loss does on a GPU: the products that it is made of, and the table of docs/performance.md."""

import argparse
import re
from pathlib import Path

import pytest

from tests.benchmarks.passes import cost, ours, rows, trls

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
SIZES = {"positions": 512, "vocab": 4096, "width": 256}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("teachers", [1, 3])
def test_nothing_is_projected_twice(divergence, teachers):
    found = cost(ours(divergence, teachers=teachers, **SIZES), "h100", **SIZES)
    assert found.products == 3 + teachers  # student, teachers, gradients of hidden states and of the head


@pytest.mark.parametrize(("divergence", "products"), [("forward_kl", 6), ("reverse_kl", 6), ("jsd", 8)])
def test_trl_projects_again_in_backward(divergence, products):
    assert cost(trls(divergence, **SIZES), "h100", **SIZES).products == products


def test_the_table_of_the_page_is_what_is_counted():
    default = argparse.Namespace(positions=8192, vocab=151936, width=4096, gpu="h100", teachers=[1, 3, 8])
    counted = ["| " + " | ".join(row) + " |" for row in rows(default)]
    assert counted == re.findall(r"^\| (?:forward_kl|reverse_kl|jsd|skew_kl) .*$", PAGE.read_text(), re.M)
