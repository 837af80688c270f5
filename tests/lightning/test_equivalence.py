"""The callback on a user's module, the ready module and the TRL trainer take the same steps, float32."""

import pytest
import torch

from kd_plugin.lightning import KDDataModule, OfflineKD, OfflineKDModule
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import assert_same, losses, settings
from tests.lightning.help import Losses, Plain, loader, trainer
from tests.tiny import byte_tokenizer


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


def module(directory, student, cache, rows=4, accumulate=1, **fields):
    ready = OfflineKDModule(
        student, cache=str(cache.path), learning_rate=1e-3, weight_decay=0.01, lr_scheduler_type="constant", **fields
    )
    data = KDDataModule(cache=str(cache.path), batch_size=rows, shuffle=False)
    seen = Losses()
    trainer(directory, [seen], accumulate_grad_batches=accumulate).fit(ready, datamodule=data)
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
