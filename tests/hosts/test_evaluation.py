"""``eval_loss`` is the mean over all scored tokens, whatever the batch size, the masks and the ranks."""

import json
import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.teachers import LocalTeacher
from tests.hosts.eval_worker import measured, offline, panel
from tests.hosts.runs import ROWS, launched, prompts
from tests.tiny import tiny_model

COUNT = 10  # no multiple of the batch sizes but one


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return capture(ROWS, teacher, tmp_path_factory.mktemp("c") / "cache", targets=TopK(259), progress=False)


@pytest.fixture(scope="module")
def partial(tmp_path_factory, teacher_dir):
    """A cache that holds every other row."""
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    rows = ROWS.select(range(0, 16, 2))
    return capture(rows, teacher, tmp_path_factory.mktemp("c") / "cache", targets=TopK(16), progress=False)


def token_means(student_dir, teacher_dir, tokenizer, rows, ce_weight):
    """Return offline KD's loss by hand, from full distributions."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (student_dir, teacher_dir))
    total = count = 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            q, p = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (student, teacher))
        labels = ids[0, len(prompt) :]
        total += float((p.exp() * (p - q)).sum() - ce_weight * q.gather(-1, labels[:, None]).sum())
        count += len(labels)
    return total / count


class TestOffline:
    @pytest.mark.parametrize("size", [1, 3, 4, 16])
    def test_batch_sizes(self, size, tmp_path, student_dir, teacher_dir, cache, tokenizer):
        rows = ROWS.select(range(COUNT))
        found = measured(offline(tmp_path, student_dir, cache, rows, per_device_eval_batch_size=size))
        expected = token_means(student_dir, teacher_dir, tokenizer, rows, ce_weight=0.3)
        assert found["loss"] == pytest.approx(expected, rel=1e-3)
        if size != 16:
            whole = measured(offline(tmp_path, student_dir, cache, rows, per_device_eval_batch_size=16))
            assert found == pytest.approx(whole, rel=1e-5)

    @pytest.mark.parametrize("ce_weight", [0.0, 0.3])
    def test_rows_without_targets(self, ce_weight, tmp_path, student_dir, partial):
        options = {"allow_partial": True, "ce_weight": ce_weight}
        found = [
            measured(offline(tmp_path, student_dir, partial, ROWS, per_device_eval_batch_size=size, **options))
            for size in (16, 3, 1)
        ]
        assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)

    @pytest.mark.parametrize("kind", ["packing", "padding_free"])
    def test_packed_rows(self, kind, tmp_path, student_dir, cache):
        chosen = (
            {"packing": True, "max_length": 64} if kind == "packing" else {"padding_free": True, "max_length": None}
        )
        found = [
            measured(offline(tmp_path, student_dir, cache, ROWS, per_device_eval_batch_size=1, **chosen)),
            measured(offline(tmp_path, student_dir, cache, ROWS, per_device_eval_batch_size=1)),
        ]
        if kind == "padding_free":  # one row a batch, so no row sees another
            assert found[0] == pytest.approx(found[1], rel=1e-4)
        assert math.isfinite(found[0]["loss"])

    def test_several_sets_and_metrics(self, tmp_path, student_dir, cache):
        sets = {"few": ROWS.select(range(3)), "many": ROWS.select(range(3, 16))}
        one = {
            name: measured(offline(tmp_path, student_dir, cache, rows, per_device_eval_batch_size=16))["loss"]
            for name, rows in sets.items()
        }
        for metrics in (None, lambda prediction: {"rows": float(len(prediction.predictions))}):
            trainer = offline(tmp_path, student_dir, cache, sets, per_device_eval_batch_size=2, compute_metrics=metrics)
            found = trainer.evaluate()
            for name, expected in one.items():
                assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)
                logged = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
                assert logged[0][f"eval_{name}_loss"] == found[f"eval_{name}_loss"]
        assert found["eval_many_rows"] == 13.0
        predicted = trainer.predict(trainer.eval_dataset["many"]).metrics
        assert predicted["test_loss"] == pytest.approx(one["many"], rel=1e-5)

    def test_during_training(self, tmp_path, student_dir, cache):
        rows = ROWS.select(range(COUNT))
        trainer = offline(
            tmp_path, student_dir, cache, rows, eval_strategy="steps", eval_steps=1, learning_rate=0.0,
            per_device_eval_batch_size=3, prediction_loss_only=True,
        )  # fmt: skip
        trainer.train()
        whole = measured(offline(tmp_path, student_dir, cache, rows, per_device_eval_batch_size=16))
        logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert logged == pytest.approx([whole["loss"]], rel=1e-5)

    def test_a_router_loss_is_weighted_by_tokens(self, tmp_path, teacher_dir, cache, tokenizer):
        tiny_model("moe", seed=1).save_pretrained(tmp_path / "moe")
        tokenizer.save_pretrained(tmp_path / "moe")
        (tmp_path / "moe" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        common = {"eval_dataset": ROWS.select(range(4)), "per_device_eval_batch_size": 4}
        losses = [
            measured(offline(tmp_path, str(tmp_path / "moe"), cache, **common, router_aux_loss_coef=coef))["loss"]
            for coef in (0.0, 0.5)
        ]
        trainer = offline(tmp_path, str(tmp_path / "moe"), cache, **common, router_aux_loss_coef=0.5)
        aux = trainer.evaluate()["eval_aux_loss"]
        assert losses[1] - losses[0] == pytest.approx(0.5 * aux, rel=1e-3)


class TestPanel:
    @pytest.mark.parametrize("masked", [True, False])
    def test_batch_sizes(self, masked, tmp_path, student_dir, teacher_dir):
        found = []
        for size in (16, 1, 3):
            options = {"per_device_eval_batch_size": size, "mask_truncated_completions": masked}
            found.append(measured(panel(tmp_path, student_dir, teacher_dir, prompts(count=COUNT), **options)))
        assert 0 < found[0]["tokens/teacher"] < COUNT * 24
        assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
        assert found[0]["loss"] == pytest.approx(found[0]["divergence/teacher"], rel=1e-5)

    def test_several_sets(self, tmp_path, student_dir, teacher_dir):
        sets = {"few": prompts(count=3), "many": prompts(count=8)}
        found = panel(tmp_path, student_dir, teacher_dir, sets, per_device_eval_batch_size=2).evaluate()
        for name, rows in sets.items():
            whole = measured(panel(tmp_path, student_dir, teacher_dir, rows, per_device_eval_batch_size=16))
            assert found[f"eval_{name}_loss"] == pytest.approx(whole["loss"], rel=1e-4)

    def test_nothing_to_score_is_no_loss_of_0(self, tmp_path, student_dir, teacher_dir, caplog):
        trainer = panel(tmp_path, student_dir, teacher_dir, prompts(count=4), max_completion_length=1)
        with caplog.at_level(logging.WARNING, logger="kd_plugin"):
            found = trainer.evaluate()
        assert math.isnan(found["eval_loss"]) and "no token was scored" in caplog.text


def test_two_ranks_measure_what_one_does(tmp_path, student_dir, teacher_dir, cache):
    found = {}
    for name, ranks, batch in (("one", 1, 16), ("two", 2, 2)):
        (tmp_path / name).mkdir()
        launched("tests.hosts.eval_worker", ranks, (tmp_path / name, student_dir, teacher_dir, cache.path, batch))
        found[name] = json.loads((tmp_path / name / "report.json").read_text())
    for job, expected in found["one"].items():
        if "padding-free" not in job:  # rows of one batch see each other there
            assert found["two"][job] == pytest.approx(expected, rel=1e-4), job
    assert len(expected) > 2
