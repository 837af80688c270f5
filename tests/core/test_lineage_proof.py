"""Records are compared with the weights beside them: each file is read once, large ones while models are loaded."""

import os
import threading

import pytest

from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lineage import RunLineage, Source, hashing, proof
from kd_plugin.lineage.hashing import Digests, sha256_file
from tests.core.lineage_help import checkpoint, run_of


def age(path, seconds=10):
    """Make a file look as if it was written some time ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.fixture
def reads(monkeypatch):
    """Count how often each file is read; a file counts as settled at once."""
    seen = []

    read = Digests._read

    def counted(self, path, key):
        seen.append(path.name)
        return read(self, path, key)

    monkeypatch.setattr(Digests, "_read", counted)
    monkeypatch.setattr(hashing, "_TICK_NS", 0)
    return seen


def test_a_file_is_read_once_until_it_changes(tmp_path, reads):
    cache, path = Digests(), tmp_path / "w"
    path.write_bytes(b"x" * 100)
    assert cache.of([path, path], "w") == [sha256_file(path)] * 2
    assert cache.of([path], "w") == [sha256_file(path)]
    assert reads == ["w"]
    path.write_bytes(b"y" * 100)
    age(path)
    assert cache.of([path], "w") == [sha256_file(path)]
    assert reads == ["w", "w"]


def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path):
    cache, path = Digests(), tmp_path / "w"
    path.write_bytes(b"x")
    first = cache.of([path], "w")
    path.write_bytes(b"y")  # perhaps within one tick of the file system's clock
    assert cache.of([path], "w") != first


def test_a_parent_is_read_once_in_a_run(tmp_path, reads):
    saved = checkpoint(tmp_path / "out")
    run_of(tmp_path, "mit").write(saved, step=1)
    reads.clear()
    for name in ("a", "b"):
        child = checkpoint(tmp_path / name)
        run = RunLineage(method="sft", student=Source("s", ref=str(saved)), teachers=[Source("t", ref=str(saved))])
        run.require_trainable()
        run.write(child, step=1)
    assert reads == ["model.safetensors"]


def test_large_weights_are_read_in_the_background_and_settled_before_the_first_batch(tmp_path, monkeypatch):
    saved = checkpoint(tmp_path / "out")
    run_of(tmp_path, "mit").write(saved, step=1)
    (saved / "model.safetensors").write_bytes(b"W" * (saved / "model.safetensors").stat().st_size)
    release = threading.Event()

    def slow(path, count=None):
        assert release.wait(30)
        return sha256_file(path, count)

    monkeypatch.setattr(proof, "LARGE", 1)
    monkeypatch.setattr(hashing, "sha256_file", slow)
    run = RunLineage(method="sft", student=Source("s", ref=str(saved)))
    run.require_trainable()  # nothing is known yet, and nothing waits
    release.set()
    with pytest.raises(LicenseRefusedError, match=r"lineage\.json: not about these weights: sha256"):
        run.settle()


def test_a_long_reading_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hashing, "_PATIENCE", 0.0)
    hold = threading.Event()

    def slow(path, count=None):
        hold.wait(0.5)
        return sha256_file(path, count)

    monkeypatch.setattr(hashing, "sha256_file", slow)
    path = tmp_path / "w"
    path.write_bytes(b"x")
    Digests().of([path], "weights of parent")
    assert "weights of parent: hashing 0.0 GiB" in capsys.readouterr().err
