"""vLLM in the trainer's process, scripted: when it sleeps, what of the process it leaves alone, what is refused."""

import os
import random

import numpy as np
import pytest
import torch

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.monitor.run import PanelRun
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.in_process import Sampling
from kd_plugin.rollouts.vllm.in_process import InProcessVllm
from kd_plugin.rollouts.vllm.settings import EngineSettings
from kd_plugin.teachers import LocalTeacher
from tests import fake_vllm_here
from tests.hosts.runs import assert_same, losses, weights
from tests.hosts.test_rollout_engine import plain


@pytest.fixture
def vllm(monkeypatch):
    return fake_vllm_here.install(monkeypatch)


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


def made(student, **options):
    told = {"student": student, "dtype": torch.float32, **options}
    return InProcessVllm(
        EngineSettings(sync="reload", options=told.pop("options", None)), Sampling(), [2], 259, 259, **told
    )


@pytest.mark.parametrize("sync", ["adapter", "reload"])
def test_the_engine_sleeps_while_the_student_trains(sync, vllm, teacher, untied_student_dir, tmp_path, monkeypatch):
    """Written against vLLM's interface: on a GPU it was not run."""
    chosen, lora = {"sync": sync, "options": {"enable_sleep_mode": True}}, sync == "adapter"
    mine = plain(tmp_path / "a", untied_student_dir, teacher, chosen, lora)
    (engine,) = vllm.made
    assert engine.asleep, "before the first step too"
    asleep, step = [], mine.compute_loss

    def computed(*args, **kwargs):
        asleep.append(engine.asleep)
        return step(*args, **kwargs)

    monkeypatch.setattr(mine, "compute_loss", computed)
    mine.train()
    theirs = plain(tmp_path / "b", untied_student_dir, teacher, None, lora)
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-4, abs=1e-4) and len(losses(mine)) == 3
    assert_same(weights(mine), weights(theirs), 1e-4)
    assert asleep == [True] * 3 and engine.asleep
    load = ["reset_prefix_cache"] if lora else ["reload_weights", "reset_prefix_cache"]
    assert engine.calls == [*load, "generate", "generate"] * 3, "of each step: weights, the probe, the rollouts"
    assert not list((tmp_path / "a" / "rollout-engine").iterdir())


def test_an_engine_that_fails_sleeps_again_and_the_run_ends(vllm, teacher, untied_student_dir, tmp_path):
    run = plain(tmp_path, untied_student_dir, teacher, {"sync": "reload", "options": {"enable_sleep_mode": True}})
    (engine,) = vllm.made
    engine.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    assert engine.asleep


def test_a_tied_head_that_it_keeps_is_caught(vllm, teacher, student_dir, tmp_path):
    with pytest.raises(ServerError, match=r"at this process does not have the student's weights of step 1: .*tied to"):
        plain(tmp_path, student_dir, teacher, {"sync": "reload"}).train()


def test_it_leaves_the_random_numbers_of_the_process_alone(vllm, untied_student_dir):
    """Else rows would come in another order, and dropout would be another."""
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    made(untied_student_dir)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_each_rank_is_told_to_vllm_whatever_launched_it(vllm, untied_student_dir, monkeypatch):
    """Lightning's launcher writes no RANK, Slurm no LOCAL_RANK either."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "7")
    made(untied_student_dir, rank=1, ranks=2)
    assert vllm.made[0].place == [1, 1, 2] and vllm.made[0].options["enable_sleep_mode"] is False
    assert "RANK" not in os.environ and os.environ["LOCAL_RANK"] == "7"


def test_an_engine_over_several_ranks_is_refused(vllm, untied_student_dir):
    options = {"tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2, and without url each rank has an engine"):
        made(untied_student_dir, rank=0, ranks=2, options=options)
    assert made(untied_student_dir, options=options).live == ["this process"], "one rank may have several devices"


def test_without_vllm_it_is_refused_before_anything_is_loaded(teacher, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vLLM would generate in this process, and it is not installed here\. Name"):
        PanelRun(PanelSettings(rollout_engine={"sync": "reload"}), {"t": teacher})
