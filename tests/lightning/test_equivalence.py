"""The callback on a user's module, the ready module and the TRL trainer take the same steps, float32."""

import pytest
import torch
from datasets import Dataset

from kd_plugin.cache import Sampled
from kd_plugin.cache.joint import JointCache
from kd_plugin.capturing import capture
from kd_plugin.errors import ConfigError, DataError, VocabularyError
from kd_plugin.lightning import KDDataModule, OfflineKD, OfflineKDModule
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import assert_same, losses, settings
from tests.lightning.help import ROWS, Losses, Plain, collate, loader, trainer
from tests.tiny import byte_tokenizer, save_tiny


def in_order(dataset):
    return torch.utils.data.SequentialSampler(dataset)


def trl(directory, student, cache, **kwargs):
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 1e9, "optim": "adamw_torch", "weight_decay": 0.01}
    host = OfflineKDTrainer(
        model=student,
        args=OfflineKDConfig(**settings(directory, shuffle_dataset=False, **plain, **kwargs)),
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
    )
    host._get_train_sampler = lambda dataset=None: in_order(host.train_dataset)
    host.train()
    return losses(host), {name: p.detach() for name, p in host.model.named_parameters()}


def callback(directory, student, cache, module_class=Plain, **kwargs):
    module = module_class(student)
    trainer(directory, [OfflineKD(cache, **kwargs)]).fit(module, loader(cache))
    return module.losses, {name: p.detach() for name, p in module.model.named_parameters()}


@pytest.mark.parametrize(
    "fields",
    [{}, {"ce_weight": 0.3}, {"divergence": "skew_kl", "skew_alpha": 0.3, "kd_weight": 2.0}],
    ids=["kd alone", "with cross-entropy", "another divergence"],
)
def test_offline_kd_takes_the_steps_of_the_trl_trainer(fields, tmp_path, student_dir, cache):
    theirs, their_weights = trl(tmp_path / "trl", student_dir, cache, **fields)
    ours, our_weights = callback(tmp_path / "pl", student_dir, cache, **fields)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert_same(our_weights, their_weights, 1e-4)


@pytest.mark.parametrize("variant", ["untied", "padded", "softcapped", "scaled", "biased", "moe"])
def test_other_kinds_of_student_take_the_steps_of_the_trl_trainer(variant, tmp_path, variant_dir, cache):
    student = variant_dir(variant)
    # TRL adds a mixture-of-experts student's router loss by default; Lightning's user returns it, or not
    fields = {"max_steps": 2, "router_aux_loss_coef": 0.0, "ce_weight": 0.3}
    theirs, their_weights = trl(tmp_path / "trl", student, cache, **fields)
    ours, our_weights = module(tmp_path / "ready", student, cache, steps=2, ce_weight=0.3)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert_same(our_weights, their_weights, 1e-4)


def module(directory, student, cache, rows=4, accumulate=1, steps=5, **fields):
    ready = OfflineKDModule(
        student, cache=str(cache.path), learning_rate=1e-3, weight_decay=0.01, lr_scheduler_type="constant", **fields
    )
    data = KDDataModule(cache=str(cache.path), batch_size=rows, shuffle=False)
    seen = Losses()
    trainer(directory, [seen], accumulate_grad_batches=accumulate, max_steps=steps).fit(ready, datamodule=data)
    # A window's micro-batches are each divided by its tokens and averaged by Lightning: their mean is its loss
    windows = [seen.losses[i : i + accumulate] for i in range(0, len(seen.losses), accumulate)]
    weights = {name: p.detach() for name, p in ready.model.named_parameters()}
    return [sum(window) / accumulate for window in windows], weights


@pytest.mark.parametrize("fields", [{}, {"ce_weight": 0.3}], ids=["kd alone", "with cross-entropy"])
def test_the_ready_module_takes_the_same_steps(fields, tmp_path, student_dir, cache):
    theirs, their_weights = trl(tmp_path / "trl", student_dir, cache, **fields)
    ours, our_weights = module(tmp_path / "pl", student_dir, cache, **fields)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert_same(our_weights, their_weights, 1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_take_the_steps_of_one_batch(rows, tmp_path, student_dir, cache):
    whole, whole_weights = module(tmp_path / "a", student_dir, cache)
    parts, part_weights = module(tmp_path / "b", student_dir, cache, rows=rows, accumulate=4 // rows)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert_same(part_weights, whole_weights, 1e-5)


class Altered(Plain):
    """Returns another tensor than the model's own loss, so that its step needs a loss with a graph."""

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss * 2.0


def test_a_step_that_alters_its_loss_gets_the_same_gradient(tmp_path, student_dir, cache):
    ours, weights = callback(tmp_path / "a", student_dir, cache, ce_weight=0.3)
    altered, altered_weights = callback(tmp_path / "b", student_dir, cache, Altered, ce_weight=0.15)
    assert altered == pytest.approx(ours, rel=1e-5)
    assert_same(altered_weights, weights, 1e-5)


class TestSeveralCaches:
    """An offline panel: in Lightning what it is in TRL."""

    @pytest.fixture(scope="class")
    def other(self, tmp_path_factory, other_teacher_dir):
        teacher, directory = LocalTeacher(other_teacher_dir, dtype="float32"), tmp_path_factory.mktemp("other")
        return capture(Dataset.from_list(ROWS), teacher, directory / "cache", targets=Sampled(20), progress=False)

    @staticmethod
    def fit(directory, student, caches, keep=None, **kwargs):
        """Train a user's module on the rows of the caches; ``keep`` names the columns of its batches."""
        module, kd = Plain(student), OfflineKD(caches, **kwargs)
        host = trainer(directory, [kd])
        host.fit(module, loader(kd.cache, collate_fn=lambda rows: collate(rows, keep or kd.cache.columns)))
        weights = {name: p.detach() for name, p in module.model.named_parameters()}
        return module.losses, weights, host.callback_metrics

    def test_they_take_the_steps_of_the_trl_trainer(self, tmp_path, student_dir, cache, other):
        mixture = {str(cache.path): 3.0, str(other.path): 1.0}
        theirs, their_weights = trl(tmp_path / "trl", student_dir, mixture, ce_weight=0.3)
        ours, our_weights, _ = self.fit(tmp_path / "pl", student_dir, mixture, ce_weight=0.3)
        ready = OfflineKDModule(
            student_dir, learning_rate=1e-3, weight_decay=0.01, lr_scheduler_type="constant", ce_weight=0.3
        )
        seen, data = Losses(), KDDataModule(cache=mixture, batch_size=4, shuffle=False)
        trainer(tmp_path / "ready", [seen]).fit(ready, datamodule=data)
        ready_weights = {name: p.detach() for name, p in ready.model.named_parameters()}
        for losses_of, weights in ((ours, our_weights), (seen.losses, ready_weights)):
            assert losses_of == pytest.approx(theirs, rel=1e-4)
            assert_same(weights, their_weights, 1e-4)

    def test_all_weight_on_one_is_that_one_and_the_divergence_is_that_of_the_panel(
        self, tmp_path, student_dir, cache, other
    ):
        alone, _, _ = self.fit(tmp_path / "a", student_dir, cache)
        one_sided, _, logged = self.fit(tmp_path / "b", student_dir, {cache: 1.0, other: 0.0})
        mixed, _, metrics = self.fit(tmp_path / "c", student_dir, [cache, other])
        assert one_sided == pytest.approx(alone, rel=1e-6) and mixed != pytest.approx(alone, rel=1e-3)
        for found in (logged, metrics):
            assert float(found["kd/divergence"]) == pytest.approx(float(found["kd/loss"]), rel=1e-5)

    def test_without_labels_a_token_is_scored_where_any_cache_has_a_target(self, cache, other):
        joint = JointCache.open([cache, other])
        batch = collate(joint.dataset().select(range(4)), keep=joint.columns)
        batch["teacher_index"][0] = -1  # the first row is the other cache's alone
        expected = joint.targets(batch["labels"], batch)
        found = joint.targets(None, batch)
        assert torch.equal(found["positions"], expected["positions"])
        assert torch.equal(found["others"][0]["weights"], expected["others"][0]["weights"])
        assert 0.0 in found["weights"] and 1.0 in found["others"][0]["weights"]

    def test_weights_that_do_not_fit(self, cache, other):
        with pytest.raises(ConfigError, match=r"weights of the teacher caches are \[1.0, -1.0\]"):
            OfflineKD({cache: 1.0, other: -1.0})
        with pytest.raises(ConfigError, match="names 2 caches, 1 different"):
            OfflineKD([str(cache.path), str(cache.path)])

    def test_a_cache_of_another_tokenizer(self, tmp_path, student_dir, cache):
        teacher = LocalTeacher(save_tiny(tmp_path / "swapped", swap=("a", "b")))
        swapped = capture(Dataset.from_list(ROWS), teacher, tmp_path / "cache", targets=Sampled(4), progress=False)
        kd, module = OfflineKD({cache: 1.0, swapped: 1.0}), Plain(student_dir)
        with pytest.raises(VocabularyError, match="another tokenizer"):
            kd.setup(trainer(tmp_path), module, "fit")

    def test_batches_without_the_further_column(self, tmp_path, student_dir, cache, other):
        with pytest.raises(DataError, match=r"no 'teacher_index_1'; it has 'input_ids'.*indices\(input_ids\)"):
            self.fit(tmp_path, student_dir, [cache, other], keep=("teacher_index",))
