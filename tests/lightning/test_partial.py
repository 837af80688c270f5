"""Tokens with a label and no target: refused, or left out of what divides the divergence."""

import functools

import pytest
from torch.utils.data import DataLoader

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import DataError
from kd_plugin.lightning import OfflineKD
from kd_plugin.teachers import LocalTeacher
from tests.equivalence import test_offline_partial as partial
from tests.equivalence.test_offline_partial import ROWS, mean
from tests.lightning.help import Losses, Plain, collate, trainer

oracle = partial.oracle


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher_dir):
    directory, teacher = tmp_path_factory.mktemp("caches"), LocalTeacher(teacher_dir, dtype="float32")
    return {
        name: capture(ROWS, teacher, directory / name, targets=TopK(259), completion_only=only, progress=False)
        for name, only in (("all", False), ("completions", None))
    }


def first_loss(tmp_path, cache, student, rows, **kwargs):
    """The loss of one batch over all rows, each token of which has a label."""
    told, module = Losses(), Plain(student, lr=0.0)
    loader = DataLoader(rows, batch_size=8, collate_fn=functools.partial(collate, keep=("teacher_index",)))
    trainer(tmp_path, [OfflineKD(cache, **kwargs), told], max_steps=1).fit(module, loader)
    return told.losses[0]


def whole_rows(cache):
    return [{**row, "completion_mask": [1] * len(row["input_ids"])} for row in cache.dataset()]


def test_labels_without_a_target_are_refused(caches, tmp_path, student_dir):
    cache = caches["completions"]
    with pytest.raises(DataError, match=r"5 trained tokens of a batch have no target.*in Lightning the labels do"):
        first_loss(tmp_path, cache, student_dir, whole_rows(cache))
    # A row in the middle of the dataset shows when its batch comes
    rows = [*cache.dataset(), whole_rows(cache)[7]][-8:]
    with pytest.raises(DataError, match="5 trained tokens of a batch have no target"):
        first_loss(tmp_path, cache, student_dir, rows)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_the_divergence_is_a_mean_over_the_tokens_with_a_target(
    ce_weight,
    caches,
    oracle,
    tmp_path,
    student_dir,
):
    cache = caches["completions"]
    loss = first_loss(tmp_path, cache, student_dir, whole_rows(cache), allow_partial=True, ce_weight=ce_weight)
    assert loss == pytest.approx(mean(oracle, 0) + ce_weight * mean(oracle, 1, first=1), rel=1e-4)
    complete = first_loss(tmp_path, cache, student_dir, cache.dataset(), allow_partial=True, ce_weight=ce_weight)
    assert complete == pytest.approx(mean(oracle, 0) + ce_weight * mean(oracle, 1), rel=1e-4)
