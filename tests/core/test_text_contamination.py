"""Decontamination: planted near-copies are found, and other problems of the same generators spared."""

import pytest

from kd_plugin.text.contamination import EvaluationItems
from kd_plugin.text.settings import TextSettings
from tests.benchmarks.contamination import measure


def test_near_copies_are_found_and_the_rest_is_spared():
    pytest.importorskip("reasoning_gym")
    defaults = TextSettings()
    recall, spared, precision = measure(defaults.ngram, defaults.overlap, count=10)
    assert recall["as it is"] == recall["other case and space"] == recall["inside a longer prompt"] == 1.0
    assert recall["one word in twenty changed"] >= 0.9 and recall["one word in ten changed"] >= 0.75
    assert spared >= 0.97 and precision >= 0.98


def test_short_items_are_found_as_a_whole_and_signs_count():
    items = EvaluationItems(5, 0.5)
    items.add("short", 0, "12 - 7")
    items.add("short", 1, "12 - 7")
    items.add("short", 2, "   ")
    assert len(items) == 1
    assert items.find("What is 12 - 7?").item == 0
    for other in ("What is 12 + 7?", "What is 12 - 8?", "", "12"):
        assert items.find(other) is None


def test_phrases_of_a_whole_set_do_not_convict():
    items = EvaluationItems(3, 0.5)
    for i in range(200):
        items.add("set", i, f"Solve the following problem step by step. Alice has {i} apples and Bob {3 * i + 1000}.")
    found = items.find("Solve the following problem step by step. What is the capital of France?")
    assert found is None
    assert items.find("solve the following problem step by step: alice has 7 apples, and bob 1021").item == 7
