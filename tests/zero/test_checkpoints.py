"""Checkpoints of several ranks: killed and resumed, joined later, and refused where they cannot fit."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.launch.checkpoints import require_resumable
from kd_plugin.lineage import load_record, verify
from tests.zero.ranks import run, run_all
from tests.zero.worker import deepspeed_config


@pytest.mark.zero
@pytest.mark.parametrize("student", ["student_dir", "untied_student_dir"])
def test_a_killed_run_ends_and_resumes_to_the_same_weights(student, request, teacher_dir, tmp_path, capsys):
    student_dir = request.getfixturevalue(student)
    saving = {"save_strategy": "steps", "save_steps": 2}
    base = {"method": "panel", "stage": 3, "steps": 6, "student": student_dir, "teachers": {"a": teacher_dir}}
    base |= {"arguments": saving, "completion": 4, "zero": {"stage3_gather_16bit_weights_on_model_save": False}}
    whole = run({**base, "output_dir": str(tmp_path / "whole")}, tmp_path / "undisturbed")
    killed = {**base, "output_dir": str(tmp_path / "killed")}
    started = time.monotonic()
    with pytest.raises(AssertionError):
        run({**killed, "die_at": 3, "die_file": str(tmp_path / "died")}, tmp_path / "dies")
    assert time.time() - float((tmp_path / "died").read_text()) < 60, f"{time.monotonic() - started:.0f} s in all"
    resumed = run({**killed, "resume": True}, tmp_path / "resumes")
    assert resumed[0]["norm"] == pytest.approx(whole[0]["norm"], rel=1e-6)
    assert resumed[0]["losses"] == pytest.approx(whole[0]["losses"], rel=1e-6)

    checkpoint = tmp_path / "killed" / "checkpoint-6"
    assert verify(checkpoint).exit_code == 0
    assert main(["consolidate", str(checkpoint), "--output", str(tmp_path / "joined"), "--dtype", "float32"]) == 0
    assert "lineage are in" in capsys.readouterr().out
    assert verify(tmp_path / "joined").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "joined", dtype=torch.float32)
    norm = sum(float((p.detach().double() ** 2).sum()) for p in model.parameters())
    assert norm == pytest.approx(whole[0]["norm"], rel=1e-6)
    assert (tmp_path / "joined" / "tokenizer.json").is_file()


@pytest.mark.zero
def test_another_number_of_ranks_goes_on_from_the_universal_format(
    student_dir, untied_student_dir, cache, tmp_path, capsys
):
    """Two ranks save; one and four go on, with the same rows in each step, to the losses and weights of the two.

    Another number of ranks adds gradients in another order, and Adam makes much of small ones.
    """
    kinds = {"full": {"stage": 3}, "lora": {"stage": 3, "lora": True}, "cut": {"stage": 2}}
    kinds["untied"] = {"stage": 3, "student": untied_student_dir}
    base = {"method": "offline", "steps": 4, "student": student_dir, "cache": cache}

    def jobs(ranks, **more):
        saving = {"save_strategy": "steps", "save_steps": 2}
        told = {**base, "rows": 4 // ranks, "arguments": saving}
        return {
            k: {**told, **v, "output_dir": str(tmp_path / f"{ranks}-{k}"), **more.get(k, {})} for k, v in kinds.items()
        }

    whole = run_all(jobs(2), tmp_path / "two", timeout=600)
    resume = {}
    for kind in kinds:
        checkpoint = tmp_path / f"2-{kind}" / "checkpoint-2"
        assert main(["consolidate", str(checkpoint), "--universal"]) == 0
        resume[kind] = {"resume": f"{checkpoint}-universal"}
        assert resume[kind]["resume"] in capsys.readouterr().out
        assert verify(resume[kind]["resume"]).exit_code == 0
    for ranks in (1, 4):
        found = run_all(jobs(ranks, **resume), tmp_path / f"on-{ranks}", ranks, timeout=600)
        for kind in kinds:
            assert found[kind][0]["losses"] == pytest.approx(whole[kind][0]["losses"], rel=1e-3), (ranks, kind)
            assert found[kind][0]["norm"] == pytest.approx(whole[kind][0]["norm"], rel=1e-4), (ranks, kind)
            last = tmp_path / f"{ranks}-{kind}" / "checkpoint-4"
            assert verify(last).exit_code == 0
            assert load_record(last)["run"]["id"] == load_record(tmp_path / f"2-{kind}" / "checkpoint-2")["run"]["id"]


@pytest.fixture
def shards(tmp_path) -> Path:
    """The file names of a checkpoint that two ranks wrote."""
    (tmp_path / "checkpoint-2" / "global_step2").mkdir(parents=True)
    (tmp_path / "checkpoint-2" / "latest").write_text("global_step2")
    for rank in range(2):
        (tmp_path / "checkpoint-2" / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return tmp_path / "checkpoint-2"


def test_another_number_of_ranks_needs_the_universal_format(shards):
    assert not require_resumable(shards, 2, deepspeed_config(2))
    with pytest.raises(ConfigError, match=r"saved by 2 ranks and this run has 4.*--universal"):
        require_resumable(shards, 4, deepspeed_config(2))
    (shards / "latest_universal").write_text("global_step2")
    assert require_resumable(shards, 4, deepspeed_config(2))


def test_a_checkpoint_without_shards_is_no_matter_of_ranks(tmp_path):
    assert not require_resumable(tmp_path, 3, deepspeed_config(2))


def test_what_cannot_be_consolidated_is_refused(shards, tmp_path, capsys):
    assert main(["consolidate", str(tmp_path)]) == 2
    assert "it is no DeepSpeed checkpoint" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    assert main(["consolidate", str(shards), "--output", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["consolidate", str(shards), "--dtype", "int"]) == 2
    assert "expected bfloat16, float16 or float32" in capsys.readouterr().err
    for path in (shards / "global_step2").iterdir():
        path.unlink()
    assert main(["consolidate", str(shards)]) == 2
    assert "were not copied here" in capsys.readouterr().err
