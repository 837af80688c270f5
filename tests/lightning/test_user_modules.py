"""Modules as different people write them, with what a trainer does around a step."""

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model

from kd_plugin.cache.joining import TARGET, batch_targets
from kd_plugin.errors import ConfigError, DataError, VocabularyError
from kd_plugin.lightning import OfflineKD
from kd_plugin.student.head import as_trained
from tests.hosts.runs import LORA, assert_same
from tests.lightning.help import Plain, collate, loader, trainer
from tests.tiny import byte_tokenizer, tiny_llama


class Nested(pl.LightningModule):
    """The model two attributes down, cross-entropy computed from logits, loss in a dictionary."""

    def __init__(self, model):
        super().__init__()
        self.net = torch.nn.ModuleDict({"student": Plain(model).model})
        self.losses = []

    def training_step(self, batch, batch_idx):
        logits = self.net["student"](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        return {"loss": loss, "logits": logits.detach()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Adapted(Plain):
    """A PEFT model."""

    def __init__(self, model):
        super().__init__(model)
        torch.manual_seed(0)
        self.model = get_peft_model(self.model, LORA)


class Tuples(Plain):
    """Asks the student for a tuple."""

    def training_step(self, batch, batch_idx):
        loss, logits = self.model(**batch, return_dict=False)
        assert logits.shape[:2] == batch["input_ids"].shape
        return loss


class Copies(Plain):
    """Gives the student copies of the labels, as wrappers do that move inputs."""

    def training_step(self, batch, batch_idx):
        return self.model(**{**batch, "labels": batch["labels"].clone()}).loss


class Manual(Plain):
    """Calls backward itself."""

    def __init__(self, model):
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.model(**batch).loss)


def run(directory, module, cache, batch_size=4, collate_fn=collate, callbacks=(), kd=None, **kwargs):
    kd = OfflineKD(cache, **(kd or {}))
    trainer(directory, [kd, *callbacks], **kwargs).fit(module, loader(cache, batch_size, collate_fn))
    return module.losses


def test_a_model_two_attributes_down_that_computes_its_own_loss(tmp_path, student_dir, cache):
    for weight in (0.0, 0.5):
        plain = run(tmp_path / "a", Plain(student_dir), cache, kd={"ce_weight": weight})
        assert run(tmp_path / "b", Nested(student_dir), cache, kd={"ce_weight": weight}) == pytest.approx(plain)


def test_a_peft_model_trains_its_adapter_alone(tmp_path, student_dir, cache):
    module = Adapted(student_dir)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses = run(tmp_path, module, cache)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name for name in changed)
    assert losses[-1] < losses[0]


def test_another_peft_model_beside_the_student_is_not_taken_for_it(student_dir):
    module = Plain(student_dir)
    both = torch.nn.ModuleList([get_peft_model(tiny_llama(), LORA), module])
    assert as_trained(both, module.model) is module.model
    adapted = Adapted(student_dir)
    assert as_trained(torch.nn.ModuleList([both, adapted]), adapted.model.get_base_model()) is adapted.model


def test_manual_optimization_is_refused_with_the_reason(tmp_path, student_dir, cache):
    with pytest.raises(ConfigError, match=r"automatic_optimization=False and calls backward itself"):
        run(tmp_path, Manual(student_dir), cache)


def test_the_module_is_left_as_it_was(tmp_path, student_dir, cache):
    module = Plain(student_dir)
    run(tmp_path, module, cache, max_steps=1)
    assert "training_step" not in module.__dict__
    batch = collate([cache.dataset()[0]], keep=())
    assert module.model(**batch).logits.shape[-1] == 259
    assert module.model.generate(batch["input_ids"][:, :4], max_new_tokens=2).shape[1] == 6


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", [Tuples, Copies])
def test_a_student_that_is_asked_in_another_way(kind, weight, tmp_path, student_dir, cache):
    plain = run(tmp_path / "a", Plain(student_dir), cache, kd={"ce_weight": weight})
    assert run(tmp_path / "b", kind(student_dir), cache, kd={"ce_weight": weight}) == pytest.approx(plain)


def test_a_projection_is_saved_where_labels_are_copied(tmp_path, student_dir, cache):
    module = Copies(student_dir)
    projections = []
    module.model.lm_head.register_forward_hook(lambda *seen: projections.append(seen))
    run(tmp_path, module, cache, kd={"ce_weight": 0.5})
    assert not projections


@pytest.mark.parametrize("rows", [1, 2])
def test_gradient_accumulation_averages_the_micro_batches(rows, tmp_path, student_dir, cache):
    one_row = Plain(student_dir)
    run(tmp_path / "a", one_row, cache, batch_size=rows, accumulate_grad_batches=4 // rows, max_steps=1)
    ours = torch.stack([torch.tensor(x) for x in one_row.losses])
    assert len(ours) == 4 // rows and ours.std(correction=0) > 0


def test_bf16_mixed(tmp_path, student_dir, cache):
    exact = run(tmp_path / "a", Plain(student_dir), cache)
    mixed = run(tmp_path / "b", Plain(student_dir), cache, precision="bf16-mixed")
    assert mixed == pytest.approx(exact, rel=0.05) and mixed != exact


def test_a_compiled_student(tmp_path, student_dir, cache):
    plain, compiled = Plain(student_dir), Plain(student_dir)
    compiled.model = torch.compile(compiled.model, backend="aot_eager")
    expected = run(tmp_path / "a", plain, cache, max_steps=2)
    assert run(tmp_path / "b", compiled, cache, max_steps=2) == pytest.approx(expected, rel=1e-4)
    ours = {n.replace("_orig_mod.", ""): p.detach() for n, p in compiled.named_parameters()}
    assert_same(ours, {n: p.detach() for n, p in plain.named_parameters()})


def test_targets_gathered_by_the_loaders_workers(tmp_path, student_dir, cache):
    def gathering(rows):
        batch = collate(rows)
        batch[TARGET] = batch_targets(cache, batch["labels"], batch.pop("teacher_index"))
        return batch

    expected = run(tmp_path / "a", Plain(student_dir), cache)
    assert run(tmp_path / "b", Plain(student_dir), cache, collate_fn=gathering) == pytest.approx(expected)


def test_rows_without_labels_are_scored_where_they_have_targets(tmp_path, student_dir, cache):
    class Labelless(Plain):
        def training_step(self, batch, batch_idx):
            assert "labels" not in batch
            return self.model(**batch).logits.sum() * 0.0

    def bare(rows):
        batch = collate(rows)
        del batch["labels"]
        return batch

    expected = run(tmp_path / "a", Plain(student_dir), cache)
    assert run(tmp_path / "b", Labelless(student_dir), cache, collate_fn=bare) == pytest.approx(expected, rel=1e-5)


class TestBadInput:
    """One clear error before the first step."""

    def test_no_causal_model(self, tmp_path, cache):
        class Empty(Plain):
            def __init__(self):
                super().__init__(torch.nn.Linear(2, 2))

        with pytest.raises(ConfigError, match=r"Empty holds no transformers causal language model"):
            run(tmp_path, Empty(), cache)

    def test_two_candidates(self, tmp_path, student_dir, cache):
        module = Plain(student_dir)
        module.other = tiny_llama()
        with pytest.raises(ConfigError, match=r"holds 2 causal language models: model, other.*student='model'"):
            run(tmp_path, module, cache)
        assert run(tmp_path, module, cache, kd={"student": "model"}, max_steps=1)

    def test_an_attribute_that_is_not_there(self, tmp_path, student_dir, cache):
        with pytest.raises(ConfigError, match=r"student='modle' names no part of Plain.*Did you mean 'model'"):
            run(tmp_path, Plain(student_dir), cache, kd={"student": "modle"})

    def test_batches_without_teacher_index(self, tmp_path, student_dir, cache):
        module = Plain(student_dir)
        with pytest.raises(DataError, match=r"no 'teacher_index'; it has 'input_ids'.*TeacherCache"):
            run(tmp_path, module, cache, collate_fn=lambda rows: collate(rows, keep=()))
        assert module.losses == []

    def test_batches_that_are_no_mapping(self, tmp_path, student_dir, cache):
        with pytest.raises(DataError, match="batch is a tuple; a dictionary"):
            run(tmp_path, Plain(student_dir), cache, collate_fn=lambda rows: tuple(collate(rows).values()))

    def test_a_step_that_returns_nothing(self, tmp_path, student_dir, cache):
        class Silent(Plain):
            def training_step(self, batch, batch_idx):
                self.log("x", self.model(**batch).loss)

        with pytest.raises(ConfigError, match=r"Silent\.training_step returns nothing. Return the loss"):
            run(tmp_path, Silent(student_dir), cache)

    def test_a_step_that_never_runs_the_student(self, tmp_path, student_dir, cache):
        class Elsewhere(Plain):
            def training_step(self, batch, batch_idx):
                return self.model(batch["input_ids"][:1]).logits.sum()

        module = Elsewhere(student_dir)
        with pytest.raises(ConfigError, match=r"did not run the student over the batch's input_ids of shape \(4, "):
            run(tmp_path, module, cache)

    def test_an_adapter_on_the_output_head(self, tmp_path, student_dir, cache):
        module = Plain(student_dir)
        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        module.model = get_peft_model(module.model, config)
        with pytest.raises(ConfigError, match=r"An adapter changes the output head .*modules_to_save"):
            run(tmp_path, module, cache)

    def test_another_vocabulary(self, tmp_path, student_dir, cache):
        with pytest.raises(VocabularyError, match="another tokenizer"):
            run(tmp_path, Plain(student_dir), cache, kd={"tokenizer": byte_tokenizer(swap=("a", "b"))})

    def test_a_strategy_that_is_not_supported(self, tmp_path, student_dir, cache):
        from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

        class Odd(SingleDeviceStrategy):
            pass

        assert issubclass(Odd, Strategy)
        host = trainer(tmp_path, strategy=Odd(device="cpu"))
        host.strategy.__class__ = type("FSDPStrategy", (Strategy,), dict(SingleDeviceStrategy.__dict__))
        with pytest.raises(ConfigError, match=r"FSDPStrategy is not supported.*ModelParallelStrategy \(FSDP2\)"):
            OfflineKD(cache).setup(host, Plain(student_dir), "fit")

    def test_numbers_and_names(self, cache):
        with pytest.raises(ConfigError, match="Did you mean 'reverse_kl'"):
            OfflineKD(cache, divergence="reverse_lk")
        with pytest.raises(ConfigError, match="kd_weight is 0"):
            OfflineKD(cache, kd_weight=0)
        with pytest.raises(ConfigError, match="Did you mean 'bucket'"):
            OfflineKD(cache, tail="buckt")
