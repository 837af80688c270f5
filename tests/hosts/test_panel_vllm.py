"""Rollouts by TRL's vLLM: ranks with different numbers of rows, and the log-probabilities that `sampled` needs."""

import functools
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests import trl_vllm
from tests.hosts.runs import losses, prompts, settings
from tests.lightning.launch import run_ranks

ROWS = 4


LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # TRL sets them in colocate mode


@pytest.fixture
def engine(monkeypatch, student_dir):
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    return trl_vllm.install(functools.partial(monkeypatch.setattr, raising=False), model)


def panel(directory, student, teacher, **kwargs):
    chosen = {"max_steps": 1, "max_completion_length": 8, "divergence": "reverse_kl", "use_vllm": True, **kwargs}
    before = {name: os.environ.get(name) for name in LAUNCH}
    trainer = TeacherPanelTrainer(
        model=student,
        teacher_model=teacher,
        args=TeacherPanelConfig(**settings(directory, vllm_enable_sleep_mode=False, **chosen)),
        train_dataset=prompts(),
    )
    for name in LAUNCH:  # the next trainer is not launched on several ranks
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in before.items() if value is not None})
    return trainer


JOBS = {
    "server": {"vllm_mode": "server", "on_policy_fraction": 0.3, "per_device_train_batch_size": 8},
    "some_rank_none": {"vllm_mode": "server", "on_policy_fraction": 0.2, "per_device_train_batch_size": 2,
                       "max_steps": 4},
    "tensor_parallel": {"vllm_mode": "colocate", "vllm_tensor_parallel_size": 2, "on_policy_fraction": 0.3,
                        "per_device_train_batch_size": 8},
    "alone": {"vllm_mode": "colocate", "on_policy_fraction": 0.2, "per_device_train_batch_size": 2},
    "nothing": {"vllm_mode": "server", "on_policy_fraction": 0.0},
    "tools": {"vllm_mode": "server", "tools": True},
}  # fmt: skip


class TestRanks:
    """In each job ranks hold different numbers of rows that the student writes, or none."""

    @pytest.fixture(scope="class")
    def reports(self, tmp_path_factory, student_dir, teacher_dir):
        directory = tmp_path_factory.mktemp("ranks")
        arguments = [directory, student_dir, teacher_dir, json.dumps(JOBS)]
        run_ranks("tests.hosts.vllm_worker", arguments, 2, timeout=300)
        return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]

    @pytest.mark.parametrize("name", JOBS)
    def test_each_row_gets_the_completion_of_its_own_prompt(self, name, reports):
        for report in reports:
            assert report[name]["rows"] and all(wrong == 0 for _, wrong in report[name]["rows"])
        assert len(reports[0][name]["losses"]) == JOBS[name].get("max_steps", 2)

    def test_the_counts_did_differ(self, reports):
        for name in ("server", "some_rank_none", "tensor_parallel", "alone"):
            counts = [[rows for rows, _ in report[name]["rows"]] for report in reports]
            assert counts[0] != counts[1], name
        assert 0 in [rows for report in reports for rows, _ in report["some_rank_none"]["rows"]]


class TestSampled:
    @pytest.mark.parametrize("mode", ["colocate", "server"])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_vllm_is_asked_for_the_sampled_tokens(self, mode, temperature, engine, tmp_path, student_dir, teacher_dir):
        trainer = panel(
            tmp_path, student_dir, teacher_dir, estimator="sampled", vllm_mode=mode, temperature=temperature
        )
        batch = trainer._generate_and_score_completions([dict(row) for row in prompts().select(range(ROWS))])
        assert engine.asked == [(ROWS, 0)]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        at = batch["prompt_ids"].shape[1]
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = engine.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, at - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1))[..., 0]
        torch.testing.assert_close(
            batch["scored"].behaviour_logprobs, expected * batch["completion_mask"], rtol=0, atol=1e-4
        )
        trainer.train()
        assert len(losses(trainer)) == 1

    @pytest.mark.parametrize("mode", ["colocate", "server"])
    def test_of_several_the_sampled_tokens_are_taken(self, mode, engine, tmp_path, student_dir, teacher_dir):
        one = panel(tmp_path, student_dir, teacher_dir, estimator="sampled", vllm_mode=mode)
        several = panel(tmp_path, student_dir, teacher_dir, estimator="sampled", vllm_mode=mode)
        several.vllm_generation.logprobs = 3
        rows = [dict(row) for row in prompts().select(range(ROWS))]
        found = [t._generate_and_score_completions(list(rows))["scored"].behaviour_logprobs for t in (one, several)]
        assert [count for _, count in engine.asked] == [0, 3]
        torch.testing.assert_close(*found, rtol=0, atol=0)

    def test_without_log_probabilities_nothing_is_trained(self, engine, tmp_path, student_dir, teacher_dir):
        trainer = panel(tmp_path, student_dir, teacher_dir, estimator="sampled", vllm_mode="colocate")
        trainer.vllm_generation.logprobs = None
        with pytest.raises(DataError, match="no log-probabilities"):
            trainer.train()

    @pytest.mark.parametrize("mode", ["colocate", "server"])
    def test_other_estimators_ask_for_none(self, mode, engine, tmp_path, student_dir, teacher_dir):
        trainer = panel(tmp_path, student_dir, teacher_dir, vllm_mode=mode)
        trainer.train()
        assert engine.asked == [(ROWS, None)]

    def test_a_servers_log_probabilities_are_of_the_temperature(
        self, engine, tmp_path, student_dir, teacher_dir, monkeypatch
    ):
        monkeypatch.setattr(trl_vllm.Session, "logprobs_mode", "raw_logprobs")
        common = {"estimator": "sampled", "vllm_mode": "server"}
        panel(tmp_path, student_dir, teacher_dir, **common)  # at temperature 1 both are the same
        with pytest.raises(ConfigError, match="processed_logprobs"):
            panel(tmp_path, student_dir, teacher_dir, temperature=0.7, **common)

    def test_completions_are_cut_where_they_repeat_themselves(self, engine, tmp_path, student_dir, teacher_dir):
        trainer = panel(tmp_path, student_dir, teacher_dir, estimator="sampled", repetition_stop=2)
        trainer.train()
        assert len(losses(trainer)) == 1
