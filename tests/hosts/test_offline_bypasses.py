"""Nothing that the host offers takes the targets out of offline KD's loss without a word."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from kd_plugin.cache import TopK
from kd_plugin.cache.joining import TARGET
from kd_plugin.capturing import capture
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from kd_plugin.trl.upstream import FUSED_HEAD
from tests.hosts.runs import LORA, ROWS, losses, settings
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return capture(ROWS, teacher, tmp_path_factory.mktemp("c") / "cache", targets=TopK(16), progress=False)


def build(directory, student, cache, cls=OfflineKDTrainer, rows=ROWS, **kwargs):
    names = ("data_collator", "compute_loss_func", "compute_metrics", "eval_dataset")
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    return cls(
        model=student,
        args=OfflineKDConfig(**settings(directory, **{"max_steps": 2, **kwargs})),
        train_dataset=rows,
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        **given,
    )


@pytest.fixture(scope="module")
def expected(cache, student_dir, tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("plain"), student_dir, cache)
    trainer.train()
    return losses(trainer)


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class TestRefused:
    def test_a_loss_of_the_users_own(self, tmp_path, cache, monkeypatch):
        monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # before a model is loaded
        with pytest.raises(ConfigError, match=r"compute_loss_func.*ce_weight"):
            build(tmp_path, "nowhere", cache, compute_loss_func=cross_entropy)

    def test_rows_that_would_not_be_joined(self, tmp_path, student_dir, cache):
        with pytest.raises(ConfigError, match="skip_prepare_dataset"):
            build(tmp_path, student_dir, cache, dataset_kwargs={"skip_prepare_dataset": True})

    @pytest.mark.parametrize("change", ["compute_loss_func", "label_smoother", "loss_type", "collator", "head"])
    def test_what_is_set_afterwards(self, change, tmp_path, student_dir, cache):
        trainer = build(tmp_path, student_dir, cache, eval_dataset=ROWS)
        if change == "compute_loss_func":
            trainer.compute_loss_func = cross_entropy
        elif change == "label_smoother":
            trainer.label_smoother = lambda outputs, labels, **kwargs: cross_entropy(outputs, labels, 1)
        elif change == "loss_type":
            trainer.args.loss_type = "dft"
        elif change == "collator":
            trainer.data_collator = trainer.data_collator.inner
        else:  # what liger's kernels would do when training starts
            from trl.trainer import utils

            if not hasattr(utils, "add_fused_lm_head"):
                pytest.skip("before TRL 1.15 no head is fused")
            utils.add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "is_top1"))
        with pytest.raises((ConfigError, DataError), match=r"target|loss_type"):
            trainer.train()
        with pytest.raises((ConfigError, DataError), match=r"target|loss_type"):
            trainer.evaluate()

    def test_a_loss_that_asks_the_model_for_logits(self, tmp_path, student_dir, cache, expected):
        class Own(OfflineKDTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return model(**inputs).loss

        if not FUSED_HEAD:  # there the model's own loss is what SFTTrainer takes, so it is that of the targets
            trainer = build(tmp_path, student_dir, cache, Own)
            trainer.train()
            assert losses(trainer) == pytest.approx(expected, rel=1e-6)
            return
        with pytest.raises(ConfigError, match="targets"):
            build(tmp_path, student_dir, cache, Own).train()

    def test_a_host_that_only_looks_at_the_targets(self, tmp_path, student_dir, cache, monkeypatch):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                model(**inputs, fused_lm_head=True)
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

        monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
        with pytest.raises(ConfigError, match="does not come from them"):
            build(tmp_path, student_dir, cache).train()


def right_padded(examples):
    """Pad as TRL does, and give what TRL's collator does not."""
    width = max(len(example["input_ids"]) for example in examples)

    def padded(name, value):
        rows = [list(example[name]) + [value] * (width - len(example[name])) for example in examples]
        return torch.tensor(rows)

    ids = padded("input_ids", 0)
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}


class TestCollators:
    def test_one_of_the_users_own(self, tmp_path, student_dir, cache, expected):
        trainer = build(tmp_path, student_dir, cache, data_collator=right_padded)
        trainer.train()
        assert losses(trainer) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("kind", ["left", "cut", "order", "labels"])
    def test_one_that_moves_the_tokens(self, kind, tmp_path, student_dir, cache):
        def moved(examples):
            batch = right_padded(examples[::-1] if kind == "order" else examples)
            if kind == "left":
                flipped = {name: values.flip(1) for name, values in batch.items()}
                lengths = batch["attention_mask"].sum(1)
                for name in batch:
                    for row, length in enumerate(lengths):
                        flipped[name][row, -length:] = batch[name][row, :length]
                return flipped
            if kind == "cut":
                return {name: values[:, :8] for name, values in batch.items()}
            if kind == "labels":
                del batch["labels"]
            return batch

        with pytest.raises(DataError, match="collator"):
            build(tmp_path, student_dir, cache, data_collator=moved, dataloader_drop_last=True).train()


class TestTheLossStays:
    """Switches of the host that must not change what is learnt."""

    @pytest.mark.parametrize(
        "switch",
        [
            {"padding_free": True, "max_length": None},
            {"torch_compile": True, "torch_compile_backend": "eager"},
            {"gradient_checkpointing_kwargs": {"selective": True}},
            {"gradient_checkpointing": False},
            {"dataloader_num_workers": 1},
            {"average_tokens_across_devices": False},
            {"neftune_noise_alpha": 0.0},
        ],
        ids=lambda switch: next(iter(switch)),
    )
    def test_switch(self, switch, tmp_path, student_dir, cache, expected):
        if "gradient_checkpointing_kwargs" in switch and not FUSED_HEAD:
            pytest.skip("before TRL 1.15 torch itself refuses this switch")
        model = AutoModelForCausalLM.from_pretrained(student_dir, attn_implementation="eager")
        trainer = build(tmp_path, model, cache, **switch)
        trainer.train()
        assert len(losses(trainer)) == 2
        if "padding_free" not in switch:  # without flash attention rows see each other, in TRL too
            assert losses(trainer) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("wrapped", ["peft", "compiled"])
    def test_a_model_that_is_wrapped_already(self, wrapped, tmp_path, student_dir, cache, expected):
        if wrapped == "compiled" and not FUSED_HEAD:
            pytest.skip("before TRL 1.15 SFTTrainer fails over a compiled model")
        model = AutoModelForCausalLM.from_pretrained(student_dir)
        model = get_peft_model(model, LORA) if wrapped == "peft" else torch.compile(model, backend="eager")
        trainer = build(tmp_path, model, cache)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(expected[0], rel=1e-4)

    def test_metrics_that_need_logits(self, tmp_path, student_dir, cache):
        plain = build(tmp_path, student_dir, cache, eval_dataset=ROWS).evaluate()
        seen = []

        def metrics(prediction):
            seen.append(prediction.predictions.shape)
            return {"rows": float(len(prediction.predictions))}

        trainer = build(tmp_path, student_dir, cache, eval_dataset=ROWS, compute_metrics=metrics)
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6) and found["eval_rows"] == len(ROWS)
        assert seen[0][-1] == 259
        assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)

    def test_targets_reach_the_model_by_one_name(self, tmp_path, student_dir, cache):
        trainer = build(tmp_path, student_dir, cache)
        assert TARGET in next(iter(trainer.get_train_dataloader()))
