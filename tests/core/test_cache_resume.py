"""Interruptions, several workers, full disks: every one ends in the shards of an undisturbed run."""

import errno
import multiprocessing
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.cache import store as store_module
from kd_plugin.capturing import capture
from kd_plugin.errors import CacheError, ConfigError
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import files_of, prompt_rows, shards_of
from tests.core.cache_worker import work
from tests.tiny import save_tiny


@pytest.fixture
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture(scope="module")
def processes():
    """Fresh processes that need not import torch again: forked from one that did, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.core.cache_worker"])
    return context


def start_worker(processes, teacher_dir, out, writes=False):
    worker = processes.Process(target=work, args=(teacher_dir, str(out), writes))
    worker.start()
    return worker


def finish(worker):
    worker.join(timeout=120)
    assert worker.exitcode == 0


@pytest.fixture(scope="module")
def undisturbed(processes, teacher_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    finish(start_worker(processes, teacher_dir, out))
    return shards_of(out)


def test_killed_workers_leave_the_shards_of_an_undisturbed_run(processes, teacher_dir, tmp_path, undisturbed):
    """SIGKILL at random moments, with 1, 2 and 3 workers in turn, until the capture is whole."""
    dice = random.Random(0)
    out = tmp_path / "cache"
    kills = 0
    for round_ in range(25):
        running = [start_worker(processes, teacher_dir, out) for _ in range(1 + round_ % 3)]
        # The interesting time begins with the first claim
        deadline = time.monotonic() + 60
        while not any((out / "claims").glob("*")) and any(w.is_alive() for w in running):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(dice.random() * 0.1)
        for worker in running:
            kills += worker.is_alive()
            worker.kill()
            worker.join()
        for unit in out.glob("units/*.json"):
            assert (out / "data" / f"{unit.stem}.parquet").is_file()  # a record always speaks of a whole shard
        if len(list(out.glob("units/*.json"))) > 12:  # keep units for the rounds to come
            for path in [*out.glob("units/*.json"), *out.glob("data/*.parquet")]:
                path.unlink()
            (out / "manifest.json").unlink()
    assert kills >= 25
    finish(start_worker(processes, teacher_dir, out))
    assert shards_of(out) == undisturbed
    assert not list((out / "tmp").iterdir()) and not list((out / "claims").iterdir())
    TeacherCache(out).verify()


def test_killed_workers_that_write_leave_the_shards_of_an_undisturbed_run(processes, teacher_dir, tmp_path):
    """What the teacher writes depends on the seed and the row alone, so that kills do not show in it either."""
    dice = random.Random(1)
    out, whole = tmp_path / "cache", tmp_path / "whole"
    finish(start_worker(processes, teacher_dir, whole, writes=True))
    kills = 0
    for round_ in range(4):
        running = [start_worker(processes, teacher_dir, out, writes=True) for _ in range(1 + round_ % 3)]
        deadline = time.monotonic() + 60
        while not any((out / "claims").glob("*")) and any(w.is_alive() for w in running):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(dice.random() * 0.2)
        for worker in running:
            kills += worker.is_alive()
            worker.kill()
            worker.join()
    assert kills >= 3
    finish(start_worker(processes, teacher_dir, out, writes=True))
    assert shards_of(out) == shards_of(whole) and len(shards_of(out)) == 8


def test_three_workers_share_a_directory(processes, teacher_dir, tmp_path, undisturbed):
    out = tmp_path / "cache"
    workers = [start_worker(processes, teacher_dir, out) for _ in range(3)]
    for worker in workers:
        finish(worker)
    assert shards_of(out) == undisturbed
    assert TeacherCache(out).manifest.complete


def test_a_capture_that_is_whole_changes_nothing(teacher, tmp_path):
    capture(prompt_rows(9), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False)
    before = files_of(tmp_path)
    cache = capture(prompt_rows(9), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False)
    assert files_of(tmp_path) == before and len(cache) == 9


def test_an_interrupted_cache_says_what_is_missing(teacher, tmp_path, monkeypatch):
    commit, done = store_module.Store.commit, []

    def interrupted(self, index, *args, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(index)
        commit(self, index, *args, **kwargs)

    monkeypatch.setattr(store_module.Store, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(prompt_rows(18), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False)
    with pytest.raises(CacheError, match=r"3 of 5 units are missing \(10 of 18 dataset rows\).*allow_partial=True"):
        TeacherCache(tmp_path)
    partial = TeacherCache(tmp_path, allow_partial=True)
    rows = partial.dataset()[:]
    assert len(partial) == 8 == len(rows["input_ids"])
    monkeypatch.undo()
    cache = capture(prompt_rows(18), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False)
    assert len(cache) == 18 == len(cache.dataset())
    assert cache.dataset()[:8]["teacher_index"] == rows["teacher_index"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"targets": TopK(5)}, "targets: .*4.* against .*5"),
        ({"temperature": 2.0}, "temperature: 1.0 against 2.0"),
        ({"seed": 1}, "seed: 0 against 1"),
        ({"shard_rows": 5}, "shard_rows: 4 against 5"),
        ({"max_length": 30}, "max_length: None against 30"),
        ({"dataset": prompt_rows(8)}, "dataset: 9 rows.*against 8 rows"),
        ({"dataset": prompt_rows(10)[1:]}, "dataset: 9 rows.*fingerprint"),
    ],
)
def test_other_settings_in_one_directory_are_refused(teacher, tmp_path, change, named):
    settings = {"dataset": prompt_rows(9), "targets": TopK(4), "shard_rows": 4, "progress": False}
    capture(teacher=teacher, output_dir=tmp_path, **settings)
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=named):
        capture(teacher=teacher, output_dir=tmp_path, **{**settings, **change})
    assert files_of(tmp_path) == before


def test_a_retrained_teacher_of_the_same_name_is_refused(tmp_path):
    path, out = save_tiny(tmp_path / "teacher"), tmp_path / "cache"
    capture(prompt_rows(3), LocalTeacher(path), out, progress=False)
    shutil.rmtree(path)
    save_tiny(tmp_path / "teacher", seed=5)
    with pytest.raises(ConfigError, match="weights:"):
        capture(prompt_rows(3), LocalTeacher(path), out, progress=False)


def test_of_two_that_finish_a_unit_with_other_bytes_one_stands_whole(teacher, tmp_path):
    """A server's answers differ in rounding, and a claim may be taken over from a worker that only slept."""
    cache = capture(prompt_rows(9), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False)
    store = store_module.Store(tmp_path, cache.manifest)
    before = files_of(tmp_path)
    table = pq.read_table(tmp_path / "data" / "00001.parquet").slice(0, 3)
    store.commit(1, table, input_tokens=1, tokens=1, entries=1)
    assert files_of(tmp_path) == before  # the first stands

    # Both saw no record, and the other's shard came after ours
    (tmp_path / "units" / "00001.json").unlink()
    publish = store_module.publish

    def overtaken(temporary, final):
        publish(temporary, final)
        if final.name == "00001.json":
            (tmp_path / "data" / "00001.parquet").write_bytes(before["data/00001.parquet"])

    store_module.publish = overtaken
    try:
        store.commit(1, table, input_tokens=1, tokens=1, entries=1)
    finally:
        store_module.publish = publish
    assert store.missing() == [1]  # not done, rather than wrong
    capture(prompt_rows(9), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False).verify()
    assert shards_of(tmp_path) == {name: data for name, data in before.items() if name.startswith("data/")}


def test_a_directory_of_another_run_is_left_alone(teacher, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(CacheError, match=r"not empty \(it holds model.safetensors\)"):
        capture(prompt_rows(3), teacher, tmp_path, progress=False)
    assert files_of(tmp_path) == {"model.safetensors": b"precious"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 120 kB; only root may make one."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a file system")

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)

    yield path, remount
    subprocess.run(["umount", str(path)], check=True)


def test_a_real_disk_that_is_full_and_one_that_becomes_read_only(teacher, tmp_path, small_disk):
    path, remount = small_disk
    rows, options = prompt_rows(400), {"targets": TopK(20), "shard_rows": 20, "progress": False}
    with pytest.raises(CacheError, match=r"disk is full.*run the same command again"):
        capture(rows, teacher, path / "c", **options)
    done = shards_of(path / "c")
    assert 0 < len(done) < 20 and not list((path / "c" / "tmp").iterdir())
    assert len(list((path / "c" / "units").iterdir())) == len(done)
    remount("ro")
    with pytest.raises(CacheError, match=r"file system is read-only"):
        capture(rows, teacher, path / "c", **options)
    with pytest.raises(CacheError, match=r"file system is read-only.*Choose another output directory"):
        capture(rows, teacher, path / "new", **options)
    assert shards_of(path / "c") == done
    remount("rw,size=4m")
    capture(rows, teacher, path / "c", **options).verify()
    assert shards_of(path / "c") == shards_of(capture(rows, teacher, tmp_path / "undisturbed", **options).path)


def test_a_full_disk_leaves_the_finished_units(teacher, tmp_path, monkeypatch):
    write = store_module.write_shard

    def full(path, table, digest, unit):
        write(path, table, digest, unit)
        if unit == 1:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "write_shard", full)
    with pytest.raises(CacheError, match=r"Storing unit 1 .*disk is full.*run the same command again"):
        capture(prompt_rows(9), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["00000.parquet"]
    assert not list((tmp_path / "tmp").iterdir())
    monkeypatch.undo()
    capture(prompt_rows(9), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False).verify()


def test_a_place_that_cannot_be_written_is_one_clear_error(teacher, tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CacheError, match=r"file system is read-only.*Choose another output directory"):
        capture(prompt_rows(3), teacher, tmp_path / "c", progress=False)


def test_a_cache_in_a_place_that_cannot_be_written_is_mapped_elsewhere(teacher, tmp_path, monkeypatch):
    capture(prompt_rows(3), teacher, tmp_path / "c", targets=TopK(4), progress=False)
    mkdir = Path.mkdir

    def read_only(self, *args, **kwargs):
        if self.is_relative_to(tmp_path / "c"):
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CacheError, match="mapped_dir"):
        TeacherCache(tmp_path / "c").dataset()
    assert len(TeacherCache(tmp_path / "c", mapped_dir=tmp_path / "m").dataset()) == 3


def test_a_claim_of_a_dead_worker_is_taken_over_and_a_living_one_respected(teacher, tmp_path, monkeypatch):
    import socket

    capture(prompt_rows(3), teacher, tmp_path, targets=TopK(4), progress=False)
    store = store_module.Store(tmp_path, TeacherCache(tmp_path).manifest)
    claim = tmp_path / "claims" / "00000"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claim.write_text(f"{socket.gethostname()} {dead.pid}\n")
    assert store.claim(0) is not None
    assert store.claim(0) is None  # we live
    claim.write_text("another-host 1\n")
    assert store.claim(0) is None
    monkeypatch.setattr(store_module, "_STALE_SECONDS", 0.0)
    time.sleep(0.01)
    assert store.claim(0) is not None


def test_processes_that_open_at_once_build_the_mapped_form_once(teacher, tmp_path, monkeypatch):
    from kd_plugin.cache import mapped_write

    capture(prompt_rows(9), teacher, tmp_path, targets=TopK(4), shard_rows=4, progress=False)
    built, write = [], mapped_write._write

    def counted(*args):
        built.append(1)
        time.sleep(0.05)
        write(*args)

    monkeypatch.setattr(mapped_write, "_write", counted)
    caches = [TeacherCache(tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=cache.dataset) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1] and all(len(cache.dataset()) == 9 for cache in caches)
