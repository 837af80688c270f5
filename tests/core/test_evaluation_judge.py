"""Our verdicts beside those of lm-eval's own scorers, on items that are written here.

``tests/benchmarks/outside_judge.py`` made the items and asked lm-eval 0.4.13 in an environment of its own.
"""

import json
from pathlib import Path

import pytest

from kd_plugin.verifying import make_verifier
from tests.benchmarks.outside_judge import items

pytest.importorskip("math_verify")
ITEMS = [json.loads(line) for line in (Path(__file__).parent / "data" / "judged.jsonl").read_text().splitlines()]

# What lm-eval rejects and we accept. It compares text once that is normalized, and we what the text means.
MEANS_THE_SAME = {
    r"\frac{3}{4}": ["0.75", r"\frac{6}{8}"], "12": ["12.0", "+12"], "-7": ["-7.0", "−7"],
    "10000": ["10,000", r"10{,}000", "10^4"], r"\sqrt{2}": ["2^{1/2}", "1.41421356"], r"2\sqrt{3}": [r"\sqrt{12}"],
    r"\frac{\sqrt{3}}{2}": [r"\frac{\sqrt3}2", r"\sqrt{3}/2"], "x^2+1": ["1+x^2", "x^{2}+1"],
    "(x+1)(x-1)": ["(x-1)(x+1)", "x^2-1"], r"\pi": [r"1\pi"], r"3\pi": [r"\pi\cdot 3"],
    "1,2,3": ["3,2,1", r"\{1,2,3\}"], r"\text{even}": ["even", r"\textbf{even}", r"\mathrm{even}"],
    r"25\%": ["0.25"], "1024": ["2^{10}", "1,024"],
}  # fmt: skip


def listed(item):
    if item["style"] == "gsm8k":  # `18.0` is no `18` to it
        return item["response"].endswith(f"Final answer: {item['answer']}.0")
    return any(f"\\boxed{{{form}}}" in item["response"] for form in MEANS_THE_SAME.get(item["answer"], ()))


def test_the_items_are_those_that_were_judged():
    assert [{k: v for k, v in item.items() if k != "lm_eval"} for item in ITEMS] == items()
    assert len(ITEMS) >= 200 and min(sum(item["style"] == s for item in ITEMS) for s in ("gsm8k", "math")) >= 100
    assert (
        0.4 < sum(item["lm_eval"] for item in ITEMS) / len(ITEMS) < 0.6
    )  # a judge that says always the same would show


def test_verdicts_are_the_same_but_for_those_that_are_listed():
    check = make_verifier("math_verify")
    ours = [check.verify(item["response"], item).passed for item in ITEMS]
    differ = [item for item, own in zip(ITEMS, ours, strict=True) if own != item["lm_eval"]]
    assert [item for item in differ if not listed(item)] == []
    assert all(not item["lm_eval"] for item in differ)  # none that it accepts is rejected here
    assert len(differ) == sum(map(listed, ITEMS)) == 36  # nothing is listed that agrees
