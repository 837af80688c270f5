"""What is said while a student writes with its weights cut over ranks, and how criteria reach ``generate``."""

import logging

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from kd_plugin.rollouts import in_process
from kd_plugin.rollouts.in_process import GenerationProgress, slow_notice
from kd_plugin.sharding import gathered_bytes, missing_bytes
from kd_plugin.trl.generation import generating


@pytest.fixture
def cut():
    """A model of 1,024 float32 weights, of which this rank holds a quarter, as DeepSpeed marks them."""
    model = torch.nn.Linear(32, 32, bias=False)
    model.weight.ds_numel = 1024
    model.weight.ds_tensor = torch.zeros(256)
    model.weight.data = torch.zeros(0)
    return model


def test_what_gathering_adds_is_what_the_other_ranks_hold(cut):
    assert gathered_bytes(cut) == 4096
    assert missing_bytes(cut) == 3072


@pytest.mark.parametrize(("fits", "why"), [(True, "is off"), (False, "which has less free")])
def test_the_notice_says_why_it_is_slow_and_what_is_faster(cut, fits, why):
    said = slow_notice(cut, 4, fits=fits)
    assert why in said and "no hang" in said and "use_vllm=True" in said
    assert ("ds3_gather_for_generation=True" in said) == fits


def test_progress_is_said_every_half_minute_and_stops_nothing(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(in_process.time, "monotonic", lambda: clock[0])
    progress = GenerationProgress(100, says=True)
    with caplog.at_level(logging.WARNING, logger=in_process.logger.name):
        for written in range(1, 8):
            clock[0] += 10.0
            assert not progress(torch.zeros(2, 5 + written), None).any()
    assert [record.getMessage() for record in caplog.records] == [
        "Generating without gathered weights: 3 of up to 100 tokens a row, 0.1 tokens/s a row.",
        "Generating without gathered weights: 6 of up to 100 tokens a row, 0.1 tokens/s a row.",
    ]


def test_other_ranks_are_silent(monkeypatch, caplog):
    monkeypatch.setattr(in_process, "PROGRESS_SECONDS", 0.0)
    progress = GenerationProgress(100, says=False)
    with caplog.at_level(logging.WARNING, logger=in_process.logger.name):
        progress(torch.zeros(2, 6), None)
    assert not caplog.records


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_criteria_of_nested_blocks_add_up_and_other_options_of_the_caller_win():
    class Model:
        def generate(self, **options):
            return options

    model, outer, inner = Model(), Never(), Never()
    with generating(model, stopping_criteria=StoppingCriteriaList([outer]), top_k=1):
        with generating(model, stopping_criteria=StoppingCriteriaList([inner])):
            found = model.generate(top_k=2)
        assert list(model.generate()["stopping_criteria"]) == [outer]
    assert list(found["stopping_criteria"]) == [outer, inner] and found["top_k"] == 2
    assert model.generate() == {}
