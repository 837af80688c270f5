"""What a plain Trainer with offline KD keeps, writes and refuses."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DefaultDataCollator,
    TrainingArguments,
)

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import CacheError, ConfigError, DataError, LicenseRefusedError, NonFiniteError, VocabularyError
from kd_plugin.lineage import load_record, verify
from kd_plugin.lineage.trainer_callback import lineage_callback
from kd_plugin.teachers import LocalTeacher
from kd_plugin.transformers import LicenseLineageCallback, OfflineKDMixin
from tests.hosts.runs import losses, settings, weights
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama, tiny_model
from tests.transformers.help import TEXTS, OfflineTrainer, build, step, tokenized, train

OWN = {"student": {"license": "apache-2.0"}}
SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return capture(TEXTS, teacher, tmp_path_factory.mktemp("c") / "cache", targets=TopK(32), progress=False)


class TestRuns:
    def test_resume_gives_the_undisturbed_weights(self, cache, tmp_path, student_dir):
        whole, resumed = (
            build(tmp_path / name, cache, student_dir, tokenized(), ce_weight=0.2, **SAVING) for name in "ab"
        )
        whole.train()
        shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
        resumed.train(resume_from_checkpoint=True)
        assert all(torch.equal(own, weights(whole)[name]) for name, own in weights(resumed).items())
        first, last = (load_record(tmp_path / "b" / f"checkpoint-{step}") for step in (3, 6))
        assert last["run"]["id"] == first["run"]["id"]
        assert last["checkpoint"]["parent"]["digest"] == first["digest"]

    def test_a_directory_that_holds_another_run(self, cache, tmp_path, student_dir):
        build(tmp_path, cache, student_dir, **SAVING).train()
        with pytest.raises(ConfigError, match="already holds 2 checkpoint"):
            build(tmp_path, cache, student_dir, **SAVING).train()

    def test_evaluation_is_the_training_loss(self, cache, tmp_path, student_dir):
        loss, _, trainer = step(tmp_path, cache, student_dir, tokenized(), ce_weight=0.4, eval_dataset=tokenized())
        for size in (1, 3, 16):
            trainer.args.per_device_eval_batch_size = size
            found = trainer.evaluate()
            assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
            assert found["eval_entropy"] > 0 and 0 <= found["eval_mean_token_accuracy"] <= 1

    def test_several_sets_and_metrics_of_logits(self, cache, tmp_path, student_dir):
        shapes = []

        def metrics(prediction):
            shapes.append(prediction.predictions.shape)
            return {"rows": float(len(prediction.predictions))}

        sets = {"few": tokenized(TEXTS[:3]), "many": tokenized(TEXTS[3:])}
        trainer = build(tmp_path, cache, student_dir, eval_dataset=sets, compute_metrics=metrics)
        found = trainer.evaluate()
        alone = [build(tmp_path, cache, student_dir, eval_dataset=rows).evaluate() for rows in sets.values()]
        expected = [one["eval_loss"] for one in alone]
        assert [found["eval_few_loss"], found["eval_many_loss"]] == pytest.approx(expected, rel=1e-5)
        assert found["eval_many_rows"] == 13.0 and shapes[0][-1] == 259
        predicted = trainer.predict(trainer.eval_dataset["many"])
        assert predicted.metrics["test_loss"] == pytest.approx(expected[1], rel=1e-5)
        logits = AutoModelForCausalLM.from_pretrained(student_dir)(torch.tensor([sets["many"][0]["input_ids"]])).logits
        torch.testing.assert_close(torch.tensor(predicted.predictions[0, : logits.shape[1]]), logits[0].detach())

    @pytest.mark.parametrize(
        "switch",
        [
            {"torch_compile": True, "torch_compile_backend": "eager"},
            {"gradient_checkpointing": True},
            {"dataloader_num_workers": 1},
            {"remove_unused_columns": False},
            {"average_tokens_across_devices": False},
        ],
        ids=lambda switch: next(iter(switch)),
    )
    def test_switches_that_must_not_change_the_loss(self, switch, cache, tmp_path, student_dir):
        expected, *_ = train(tmp_path / "a", cache, student_dir, tokenized(), max_steps=2)
        found, *_ = train(tmp_path / "b", cache, student_dir, tokenized(), max_steps=2, **switch)
        assert found == pytest.approx(expected, rel=1e-4)

    def test_a_model_whose_forward_pass_takes_no_further_arguments(self, cache, tmp_path, student_dir):
        class Narrow(OfflineTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                assert self.model_accepts_loss_kwargs

        model = AutoModelForCausalLM.from_pretrained(student_dir)
        model.accepts_loss_kwargs = False
        narrow = step(tmp_path / "a", cache, model, tokenized(), cls=Narrow, per_device_train_batch_size=2,
                      gradient_accumulation_steps=8)  # fmt: skip
        assert narrow[0] == pytest.approx(step(tmp_path / "b", cache, student_dir, tokenized())[0], rel=1e-5)

    def test_without_a_collator(self, cache, tmp_path, student_dir):
        expected, *_ = train(tmp_path / "a", cache, student_dir, tokenized(), max_steps=2)
        found, *_ = train(tmp_path / "b", cache, student_dir, tokenized(), max_steps=2, data_collator=None)
        assert found == pytest.approx(expected, rel=1e-6)

    def test_labels_that_a_collator_makes(self, tmp_path, teacher_dir, student_dir):
        teacher = LocalTeacher(teacher_dir, dtype="float32")
        texts = capture(TEXTS, teacher, tmp_path / "c", targets=TopK(8), completion_only=False, progress=False)
        rows = tokenized(completion_only=False)
        made = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
        found, *_ = train(tmp_path / "a", texts, student_dir, rows.remove_columns("labels"), data_collator=made)
        assert found == pytest.approx(train(tmp_path / "b", texts, student_dir, rows)[0], rel=1e-6)


class TestLineage:
    def test_the_hash_of_the_configuration_holds_the_distillation_settings(self, cache, tmp_path, student_dir):
        rows = tokenized()
        kinds = ({}, {}, {"divergence": "reverse_kl"}, {"ce_weight": 0.5})
        hashes = [
            lineage_callback(build(tmp_path / f"{i}", cache, student_dir, rows, **kind).callback_handler.callbacks)
            for i, kind in enumerate(kinds)
        ]
        first, again, *others = [callback.run.config_hash for callback in hashes]
        assert first == again and len({first, *others}) == 3

    def test_every_checkpoint_has_it(self, cache, tmp_path, student_dir, teacher_dir):
        trainer = build(tmp_path, cache, student_dir, tokenized(), lineage={"run": {"id": "mine"}}, **SAVING)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        for directory in ("checkpoint-3", "checkpoint-6", "final"):
            record = load_record(tmp_path / directory)
            assert record["run"]["id"] == "mine" and record["run"]["method"] == "offline_kd"
            assert {"initialized_from", "distilled_logits"} <= {edge["kind"] for edge in record["edges"]}
            assert verify(tmp_path / directory).problems == ()
        card = (tmp_path / "checkpoint-6" / "README.md").read_text()
        assert "apache-2.0" in card

    def test_a_declaration_of_a_callback_of_the_users_own(self, cache, tmp_path, student_dir):
        own = LicenseLineageCallback({"run": {"id": "theirs"}})
        build(tmp_path, cache, student_dir, callbacks=[own], **SAVING).train()
        assert json.loads((tmp_path / "checkpoint-6" / "lineage.json").read_text())["run"]["id"] == "theirs"

    def test_a_student_of_which_nothing_is_known(self, cache, tmp_path):
        unknown = save_tiny(tmp_path / "unknown", license=None, seed=1)
        with pytest.raises(LicenseRefusedError, match="student"):
            build(tmp_path / "run", cache, unknown)


class TestRefused:
    def test_another_tokenizer(self, cache, tmp_path, student_dir):
        with pytest.raises(VocabularyError):
            build(tmp_path, cache, student_dir, processing_class=byte_tokenizer(("a", "b")))

    def test_another_temperature(self, cache, tmp_path, student_dir):
        with pytest.raises((ConfigError, CacheError), match="temperature"):
            build(tmp_path, cache, student_dir, temperature=2.0)

    def test_no_cache_or_no_directory(self, tmp_path, student_dir):
        with pytest.raises(ConfigError, match="No teacher cache is given"):
            build(tmp_path, None, student_dir)
        with pytest.raises(CacheError):
            build(tmp_path, str(tmp_path / "nowhere"), student_dir)

    def test_rows_that_the_cache_does_not_hold(self, cache, tmp_path, student_dir):
        rows = tokenized([*TEXTS, {"prompt": "new?", "completion": " one"}])
        with pytest.raises(DataError, match=r"1 of 17 rows of the train dataset are not in the teacher cache.*row 16"):
            build(tmp_path, cache, student_dir, rows)
        with pytest.raises(DataError, match="1 of 17 rows of the eval dataset"):
            build(tmp_path, cache, student_dir, eval_dataset=rows)

    def test_rows_of_another_cache(self, cache, tmp_path, student_dir, teacher_dir):
        other = capture(TEXTS[4:], LocalTeacher(teacher_dir), tmp_path / "c", targets=TopK(4), progress=False)
        with pytest.raises(DataError, match="not made from"):
            build(tmp_path, cache, student_dir, other.dataset().map(lambda row: {"labels": row["input_ids"]}))

    @pytest.mark.parametrize("rows", [Dataset.from_list(TEXTS), [{"input_ids": [5, 6], "labels": [5, 6]}]], ids=str)
    def test_rows_that_cannot_be_joined(self, rows, cache, tmp_path, student_dir):
        with pytest.raises(DataError, match="cannot be joined to a teacher cache"):
            build(tmp_path, cache, student_dir, rows)

    def test_tokens_without_a_target(self, cache, tmp_path, student_dir):
        with pytest.raises(DataError, match=r"have no target.*token 1 of row 0"):
            build(tmp_path, cache, student_dir, tokenized(completion_only=False))
        rows = tokenized(completion_only=False).remove_columns("labels")
        made = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
        with pytest.raises(DataError, match="have no target"):
            build(tmp_path, cache, student_dir, rows, data_collator=made).train()

    def test_collators_that_move_the_tokens(self, cache, tmp_path, student_dir):
        left = byte_tokenizer()
        left.padding_side = "left"
        with pytest.raises(DataError, match=r"DataCollatorForSeq2Seq moved the tokens.*pads on the right"):
            build(tmp_path, cache, student_dir, data_collator=DataCollatorForSeq2Seq(left)).train()
        rows = tokenized().remove_columns("labels")
        with pytest.raises(DataError, match="labels are needed"):
            build(tmp_path, cache, student_dir, rows, data_collator=DefaultDataCollator(),
                  per_device_train_batch_size=1).train()  # fmt: skip

    def test_losses_of_the_users_own(self, cache, tmp_path, student_dir):
        with pytest.raises(ConfigError, match=r"compute_loss_func.*ce_weight"):
            build(tmp_path, cache, student_dir, compute_loss_func=lambda *_, **__: None)
        with pytest.raises(ConfigError, match="label_smoothing_factor"):
            build(tmp_path, cache, student_dir, label_smoothing_factor=0.1)
        later = build(tmp_path, cache, student_dir)
        later.compute_loss_func = lambda *_, **__: None
        with pytest.raises(ConfigError, match="compute_loss_func"):
            later.train()

    def test_a_trainer_that_forms_its_loss_from_logits(self, cache, tmp_path, student_dir):
        class FromLogits(OfflineKDMixin, type("Theirs", OfflineTrainer.__mro__[2:3], {})):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                labels = inputs.pop("labels")
                logits = model(**inputs).logits
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

        with pytest.raises(ConfigError, match="asked for logits to train on"):
            build(tmp_path, cache, student_dir, cls=FromLogits).train()

    def test_what_replaces_the_forward_pass_afterwards(self, cache, tmp_path, student_dir):
        trainer = build(tmp_path, cache, student_dir)
        inner = type(trainer.model).forward.__get__(trainer.model)

        def forward(input_ids=None, attention_mask=None, labels=None, teacher_target=None, **kwargs):
            return inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

        trainer.model.forward = forward
        with pytest.raises(ConfigError, match="does not come from them"):
            trainer.train()
        trainer = build(tmp_path, cache, student_dir, per_device_train_batch_size=1)
        trainer.data_collator = trainer.data_collator.inner
        with pytest.raises(DataError, match="without the teacher's targets"):
            trainer.train()

    def test_settings_that_are_not_supported(self, cache, tmp_path, student_dir, monkeypatch):
        with pytest.raises(ConfigError, match="dispatch_batches"):
            build(tmp_path, cache, student_dir, accelerator_config={"dispatch_batches": True})
        with pytest.raises(ConfigError, match="pass model, not model_init"):
            build(tmp_path, cache, student_dir, model_init=lambda: None)
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
        with pytest.raises(ConfigError, match="one process a GPU"):
            build(tmp_path, cache, student_dir)

    def test_a_router_loss_that_would_be_left_out(self, cache, tmp_path, tokenizer):
        model = tiny_model("moe", seed=1, output_router_logits=True)
        with pytest.raises(ConfigError, match="router"):
            build(tmp_path, cache, model, lineage=OWN)

    def test_a_loss_that_is_not_finite(self, cache, tmp_path):
        model = tiny_llama(seed=1)
        model.lm_head.weight.data[0] = torch.nan
        with pytest.raises(NonFiniteError):
            build(tmp_path, cache, model, lineage=OWN).train()


def test_cross_entropy_alone_is_the_trainers_own_loss(cache, tmp_path, student_dir):
    from transformers import Trainer

    ours, *_ = train(tmp_path / "a", cache, student_dir, tokenized(), kd_weight=0.0, ce_weight=1.0)
    theirs = Trainer(
        model=AutoModelForCausalLM.from_pretrained(student_dir),
        args=TrainingArguments(**settings(tmp_path / "b")),
        train_dataset=tokenized(),
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer()),
    )
    theirs.train()
    assert ours == pytest.approx(losses(theirs), rel=1e-5)
