"""What the parents do still works: models by path, PEFT, evaluation, streaming, logging, packing, resume."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from kd_plugin.cache import Sampled, TopK
from kd_plugin.capturing import capture
from kd_plugin.panel import TeacherPanel
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import LORA, ROWS, assert_same, losses, prompts, settings, weights
from tests.tiny import byte_tokenizer

CHATS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "completion": [{"role": "assistant", "content": f"answer {'y' * i}"}],
        }
        for i in range(16)
    ]
)


def make_cache(directory, teacher, rows=ROWS, targets=None):
    return capture(rows, LocalTeacher(teacher), directory, targets=targets or TopK(16), progress=False)


def offline(directory, student, cache, rows=None, peft_config=None, eval_rows=None, **kwargs):
    return OfflineKDTrainer(
        model=student,
        args=OfflineKDConfig(**settings(directory, **kwargs)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )


def panel(directory, student, teachers, rows=None, **kwargs):
    init = {key: kwargs.pop(key) for key in ("eval_dataset", "peft_config", "processing_class") if key in kwargs}
    return TeacherPanelTrainer(
        model=student,
        teacher_models=teachers,
        args=TeacherPanelConfig(**settings(directory, max_completion_length=6, **kwargs)),
        train_dataset=prompts() if rows is None else rows,
        **init,
    )


class TestOffline:
    def test_conversations_join_by_their_tokens(self, tmp_path, student_dir, teacher_dir):
        cache = make_cache(tmp_path / "cache", teacher_dir, CHATS)
        trainer = offline(tmp_path / "run", student_dir, cache, CHATS)
        trainer.train()
        assert len(losses(trainer)) == 5

    def test_evaluation_gives_the_training_loss_on_the_same_rows(self, tmp_path, student_dir, teacher_dir):
        cache = make_cache(tmp_path / "cache", teacher_dir)
        trainer = offline(
            tmp_path / "run", student_dir, cache, ROWS, eval_rows=ROWS, max_steps=1, learning_rate=0.0,
            per_device_train_batch_size=16, per_device_eval_batch_size=16,
        )  # fmt: skip
        trainer.train()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses(trainer)[0], rel=1e-5)

    def test_streamed_rows(self, tmp_path, student_dir, teacher_dir):
        cache = make_cache(tmp_path / "cache", teacher_dir)
        streamed = offline(tmp_path / "a", student_dir, cache, ROWS.to_iterable_dataset(), shuffle_dataset=False)
        streamed.train()
        assert len(losses(streamed)) == 5

    def test_packed_equals_padded(self, tmp_path, student_dir, teacher_dir):
        cache = make_cache(tmp_path / "cache", teacher_dir)
        model = AutoModelForCausalLM.from_pretrained(student_dir, attn_implementation="eager")
        common = {"max_steps": 1, "learning_rate": 0.0, "max_length": 64}
        padded = offline(tmp_path / "a", model, cache, ROWS, per_device_train_batch_size=16, **common)
        padded.train()
        packed = offline(tmp_path / "b", student_dir, cache, ROWS, packing=True, **common)
        tokens = {tuple(row["teacher_index"]) for row in packed.train_dataset}
        index = sorted(i for row in tokens for i in row if i >= 0)
        assert index == list(range(cache.tokens))  # every target once, none lost
        for row in packed.train_dataset:
            expected = {i: t for source in cache.dataset() for t, i in
                        zip(source["input_ids"][1:], source["teacher_index"], strict=False) if i >= 0}  # fmt: skip
            following = row["input_ids"][1:]
            assert all(expected[i] == t for t, i in zip(following, row["teacher_index"], strict=False) if i >= 0)

    def test_sampled_targets(self, tmp_path, student_dir, teacher_dir):
        cache = make_cache(tmp_path / "cache", teacher_dir, targets=Sampled(20))
        trainer = offline(tmp_path / "run", student_dir, cache)
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0] + 1.0

    def test_cross_entropy_alone_is_sft(self, tmp_path, student_dir, teacher_dir):
        from trl import SFTConfig, SFTTrainer

        cache = make_cache(tmp_path / "cache", teacher_dir)
        mine = offline(tmp_path / "a", student_dir, cache, ROWS, kd_weight=0.0, ce_weight=1.0)
        mine.train()
        sft = SFTTrainer(model=student_dir, args=SFTConfig(**settings(tmp_path / "b")), train_dataset=ROWS)
        sft.train()
        assert losses(mine) == pytest.approx(losses(sft), rel=1e-5)
        assert_same(weights(mine), weights(sft))
        logged, expected = mine.state.log_history[0], sft.state.log_history[0]
        for metric in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert logged[metric] == pytest.approx(expected[metric], rel=1e-4)

    @pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
    def test_resume_gives_the_undisturbed_weights(self, peft, tmp_path, student_dir, teacher_dir):
        cache = make_cache(tmp_path / "cache", teacher_dir)
        common = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "gradient_accumulation_steps": 2}
        common |= {"per_device_train_batch_size": 2}
        whole = offline(tmp_path / "a", student_dir, cache, peft_config=peft, **common)
        whole.train()
        offline(tmp_path / "b", student_dir, cache, peft_config=peft, **common).train()
        resumed = offline(tmp_path / "b", student_dir, cache, peft_config=peft, **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
        assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(resumed).items())


class TestPanel:
    def test_routed_evaluation_and_metrics(self, tmp_path, student_dir, teacher_dir, other_teacher_dir):
        rows = prompts(teacher_id=["math", "code"] * 12)
        trainer = panel(
            tmp_path, student_dir, {"math": teacher_dir, "code": other_teacher_dir}, rows,
            eval_dataset=rows.select(range(4)),
        )  # fmt: skip
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["tokens/math"] > 0 and logged["divergence/code"] > 0
        evaluated = trainer.evaluate()
        assert evaluated["eval_loss"] > 0 and evaluated["eval_divergence/math"] > 0

    def test_the_metrics_add_up_to_the_loss(self, tmp_path, student_dir, teacher_dir, other_teacher_dir):
        rows = prompts(teacher_id=["math", "code"] * 12)
        trainer = panel(tmp_path, student_dir, {"math": teacher_dir, "code": other_teacher_dir}, rows, max_steps=1)
        trainer.train()
        entry = trainer.state.log_history[0]
        total = sum(entry[f"divergence/{name}"] * entry[f"tokens/{name}"] for name in ("math", "code"))
        assert entry["loss"] == pytest.approx(total / (entry["tokens/math"] + entry["tokens/code"]), rel=1e-4)

    def test_streamed_prompts(self, tmp_path, student_dir, teacher_dir):
        trainer = panel(tmp_path, student_dir, {"t": teacher_dir}, prompts().to_iterable_dataset(), max_steps=2)
        trainer.train()
        assert len(losses(trainer)) == 2

    def test_completions_are_logged(self, tmp_path, student_dir, teacher_dir):
        panel(tmp_path, student_dir, {"t": teacher_dir}, log_completions=True, max_steps=1).train()
        assert list((tmp_path / "completions").glob("*.parquet"))

    def test_loaded_models_and_whole_panels(self, tmp_path, student_dir, teacher_dir, tokenizer):
        student = AutoModelForCausalLM.from_pretrained(student_dir)
        chosen = TeacherPanel({"a": teacher_dir, "b": AutoModelForCausalLM.from_pretrained(teacher_dir)},
                              combine="weighted_kl", weights={"a": 3.0, "b": 1.0})  # fmt: skip
        trainer = panel(tmp_path, student, chosen, processing_class=tokenizer, max_steps=1)
        trainer.train()
        assert losses(trainer)[0] > 0

    def test_weighted_kl_of_one_teacher_twice_is_that_teacher(self, tmp_path, student_dir, teacher_dir):
        one = panel(tmp_path / "a", student_dir, {"a": teacher_dir})
        one.train()
        two = panel(
            tmp_path / "b", student_dir, {"a": teacher_dir, "b": teacher_dir}, combine="weighted_kl",
            teacher_weights={"a": 0.3, "b": 0.9},
        )  # fmt: skip
        two.train()
        assert losses(one) == pytest.approx(losses(two), rel=1e-4)
        assert_same(weights(one), weights(two))

    def test_routes_by_domain(self, tmp_path, student_dir, teacher_dir, other_teacher_dir):
        rows = prompts(domain=["sums", "talk"] * 12)
        trainer = panel(
            tmp_path, student_dir, {"a": teacher_dir, "b": other_teacher_dir}, rows, max_steps=1,
            routes={"sums": "a", "talk": "b"},
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["tokens/a"] > 0 and trainer.state.log_history[0]["tokens/b"] > 0

    def test_remove_unused_columns_keeps_the_route(self, tmp_path, student_dir, teacher_dir, other_teacher_dir):
        rows = prompts(teacher_id=["a", "b"] * 12, other=list(range(24)))
        teachers = {"a": teacher_dir, "b": other_teacher_dir}
        panel(tmp_path, student_dir, teachers, rows, remove_unused_columns=True, max_steps=1).train()

    def test_resume_gives_the_undisturbed_weights(self, tmp_path, student_dir, teacher_dir):
        common = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
        whole = panel(tmp_path / "a", student_dir, {"t": teacher_dir}, peft_config=LORA, **common)
        whole.train()
        panel(tmp_path / "b", student_dir, {"t": teacher_dir}, peft_config=LORA, **common).train()
        resumed = panel(tmp_path / "b", student_dir, {"t": teacher_dir}, peft_config=LORA, **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
        assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(resumed).items())
