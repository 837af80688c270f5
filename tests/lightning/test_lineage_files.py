"""Lineage beside every checkpoint, on each way that Lightning saves to a file."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lightning import LicenseLineage, OfflineKD
from kd_plugin.lineage import load_record, verify
from tests.lightning.help import Plain, loader, trainer
from tests.tiny import save_tiny


def fit(directory, student, cache, callbacks=(), kd=None, **kwargs):
    host = trainer(directory, [OfflineKD(cache, **(kd or {})), *callbacks], **kwargs)
    host.fit(Plain(student), loader(cache), ckpt_path=kwargs.pop("ckpt_path", None))
    return host


def checkpoints(directory):
    return sorted(directory.glob("*.ckpt"))


def test_top_k_last_and_rotation(tmp_path, student_dir, cache):
    saving = ModelCheckpoint(
        tmp_path / "c", monitor="kd/loss", save_top_k=2, save_last=True, every_n_train_steps=1, filename="{step}"
    )
    fit(tmp_path, student_dir, cache, [saving], enable_checkpointing=True)
    kept = checkpoints(tmp_path / "c")
    assert [p.name for p in kept] == ["last.ckpt", "step=4.ckpt", "step=5.ckpt"]
    assert {verify(path).exit_code for path in kept} == {0}
    assert load_record(tmp_path / "c" / "step=4.ckpt")["checkpoint"]["step"] == 4
    beside = {p.name.removesuffix(".lineage") for p in (tmp_path / "c").glob("*.lineage")}
    assert beside == {p.name for p in kept}, "a deleted checkpoint took its lineage along"


def test_a_link_to_the_last_is_deleted_without_its_target(tmp_path, student_dir, cache):
    saving = ModelCheckpoint(tmp_path / "c", save_top_k=-1, save_last="link", every_n_train_steps=2, filename="{step}")
    fit(tmp_path, student_dir, cache, [saving], enable_checkpointing=True)
    assert {p.name for p in checkpoints(tmp_path / "c")} == {"last.ckpt", "step=2.ckpt", "step=4.ckpt"}
    assert {verify(path).exit_code for path in checkpoints(tmp_path / "c")} == {0}


def test_weights_only_and_by_hand(tmp_path, student_dir, cache):
    saving = ModelCheckpoint(tmp_path / "c", save_weights_only=True, every_n_train_steps=5)
    host = fit(tmp_path, student_dir, cache, [saving], enable_checkpointing=True)
    host.save_checkpoint(tmp_path / "hand.ckpt")
    (weights_only,) = checkpoints(tmp_path / "c")
    assert verify(weights_only).exit_code == verify(tmp_path / "hand.ckpt").exit_code == 0
    for path in (weights_only, tmp_path / "hand.ckpt"):
        inside = torch.load(path, weights_only=False)["kd_plugin_lineage"]
        record = load_record(path)
        assert inside["nodes"] == record["nodes"] and inside["run"] == record["run"]
        assert json.dumps(inside)


def test_saved_in_a_thread_of_its_own(tmp_path, student_dir, cache):
    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, student_dir, cache, [saving], enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    assert [verify(path).exit_code for path in checkpoints(tmp_path / "c")] == [0, 0]


@pytest.mark.parametrize("late", [False, True], ids=["restored first", "restored last, as shards are"])
def test_a_resumed_run_stays_one_run(late, tmp_path, student_dir, cache, monkeypatch):
    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(tmp_path, student_dir, cache, [saving], enable_checkpointing=True, max_steps=2)
    first = load_record(tmp_path / "c" / "step=2.ckpt")
    host = trainer(tmp_path, [OfflineKD(cache), saving], enable_checkpointing=True, max_steps=4)
    monkeypatch.setattr(type(host.strategy), "restore_checkpoint_after_setup", late)
    host.fit(Plain(student_dir), loader(cache), ckpt_path=tmp_path / "c" / "step=2.ckpt", weights_only=False)
    second = load_record(tmp_path / "c" / "step=4.ckpt")
    assert second["run"]["id"] == first["run"]["id"]
    assert second["checkpoint"]["parent"]["digest"] == first["digest"]
    assert verify(tmp_path / "c" / "step=4.ckpt").exit_code == 0


def test_on_a_module_without_distillation(tmp_path, student_dir, cache):
    host = trainer(tmp_path, [LicenseLineage({"use": {"commercial": True}})], max_steps=1)

    class Bare(Plain):
        def training_step(self, batch, batch_idx):
            batch.pop("teacher_index")
            return super().training_step(batch, batch_idx)

    host.fit(Bare(student_dir), loader(cache))
    host.save_checkpoint(tmp_path / "x.ckpt")
    assert load_record(tmp_path / "x.ckpt")["run"]["method"] == "fine_tuning"
    assert verify(tmp_path / "x.ckpt").exit_code == 0


def test_the_users_own_callback_is_kept_and_its_declarations_count(tmp_path, student_dir, cache):
    own = LicenseLineage({"run": {"id": "mine"}})
    for callbacks in ([own, OfflineKD(cache)], [OfflineKD(cache), own]):
        host = trainer(tmp_path, callbacks, max_steps=1)
        host.fit(Plain(student_dir), loader(cache))
        host.save_checkpoint(tmp_path / "x.ckpt")
        record = load_record(tmp_path / "x.ckpt")
        assert record["run"]["id"] == "mine" and record["run"]["method"] == "offline_kd"
        assert sum(isinstance(c, LicenseLineage) for c in host.callbacks) == 1


def test_terms_that_forbid_it_stop_the_run_at_setup(tmp_path, cache):
    unlicensed = save_tiny(tmp_path / "student", license=None)
    module = Plain(unlicensed)
    with pytest.raises(LicenseRefusedError, match="license"):
        trainer(tmp_path, [OfflineKD(cache)]).fit(module, loader(cache))
    assert module.losses == []


def test_a_lineage_that_cannot_be_written_leaves_weights_without_marker(tmp_path, student_dir, cache, caplog):
    host = fit(tmp_path, student_dir, cache, max_steps=1)
    (tmp_path / "x.ckpt.lineage").write_text("a file where the directory must be")
    host.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").is_file() and "their lineage is not" in caplog.text
