"""A run that is stopped in mid-epoch and resumed ends with the weights of an undisturbed one."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_plugin.cache.loading import ResumableLoader
from kd_plugin.lightning import KDDataModule, OfflineKDModule
from kd_plugin.lightning.module import OfflineModuleSettings
from tests.lightning.help import trainer


def offline(student, cache, **data):
    return (
        OfflineKDModule(student, cache=str(cache.path), learning_rate=1e-3, lr_scheduler_type="constant"),
        KDDataModule(cache=str(cache.path), batch_size=2, shuffle=True, seed=5, **data),
    )


@pytest.mark.parametrize("stop", [3, 8, 11], ids=["mid-epoch", "at its end", "in the second"])
def test_offline(stop, tmp_path, student_dir, cache):
    whole, data = offline(student_dir, cache)
    trainer(tmp_path, max_steps=14).fit(whole, datamodule=data)

    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=stop, filename="{step}", save_top_k=-1)
    cut, data = offline(student_dir, cache)
    trainer(tmp_path, [saving], max_steps=stop, enable_checkpointing=True).fit(cut, datamodule=data)
    resumed, data = offline(student_dir, cache)
    trainer(tmp_path, max_steps=14).fit(
        resumed, datamodule=data, ckpt_path=tmp_path / "c" / f"step={stop}.ckpt", weights_only=False
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def rows_of(loader):
    return [row for batch in loader for row in batch]


def test_ranks_see_together_what_one_sees():
    rows = list(range(11))
    alone = ResumableLoader(rows, list, 4, shuffle=True, seed=3)
    pair = [ResumableLoader(rows, list, 2, shuffle=True, seed=3, rank=r, world=2) for r in range(2)]
    assert len(alone) == len(pair[0]) == len(pair[1]) == 3
    for whole, first, second in zip(alone, *pair, strict=True):
        assert set(first + second) >= set(whole)


def test_each_epoch_has_an_order_of_its_own_and_every_row_once():
    loader = ResumableLoader(list(range(9)), list, 2, shuffle=True)
    first = rows_of(loader)
    loader.set_epoch(1)
    second = rows_of(loader)
    assert sorted(first) == sorted(second) == list(range(9)) and first != second
    loader.set_epoch(0)
    assert rows_of(loader) == first


def test_a_window_is_shown_whole_before_its_first_batch():
    seen = []

    def look(windows):
        for window in windows:
            seen.append(list(window))
            yield window

    rows, options = list(range(10)), {"window_end": lambda batch: batch // 2 * 2 + 2}
    loader = ResumableLoader(rows, list, 2, **options, look_ahead=look)
    assert rows_of(loader) == rows
    assert seen == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]


def test_what_was_fetched_before_its_turn_does_not_count_as_handed_out():
    rows, options = list(range(10)), {"window_end": lambda batch: batch // 2 * 2 + 2}
    loader = ResumableLoader(rows, list, 2, **options, look_ahead=lambda windows: iter(list(windows)))
    handed_out = iter(loader)
    assert [next(handed_out) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    again = ResumableLoader(rows, list, 2, **options, look_ahead=lambda windows: iter(list(windows)))
    again.load_state_dict(loader.state_dict())
    assert rows_of(again) == [6, 7, 8, 9]


def test_a_checkpoint_builds_the_module_with_every_setting(tmp_path, student_dir, cache):
    """Its hyper-parameters are all fields of the settings, those at their default too."""
    module = OfflineKDModule(student_dir, cache=str(cache.path), kd_weight=0.5)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}")
    data = KDDataModule(cache=str(cache.path), batch_size=2)
    trainer(tmp_path, [saving], max_steps=1, enable_checkpointing=True).fit(module, datamodule=data)
    again = OfflineKDModule.load_from_checkpoint(tmp_path / "step=1.ckpt", strict=False, weights_only=False)
    assert dict(again.hparams) == dict(module.hparams)
    assert (
        set(again.hparams) == {"model", "cache", *vars(OfflineModuleSettings())} and again.hparams["kd_weight"] == 0.5
    )
