"""Workers that finish together, and what dead ones leave behind, on hosts of any name and with any clock."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kd_plugin.cache import TeacherCache, TopK, files, mapped_write
from kd_plugin.cache import store as store_module
from kd_plugin.capturing import capture
from kd_plugin.lineage import proof
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import files_of, prompt_rows

HOSTS = ["node7", "node7.cluster.local", "10.0.0.3", "a/b", "two words", "nodé", "\udcff", "", "x" * 64, ".", "a.7.b"]
YEAR = 365 * 86_400


def dead_process():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


def left_by(directory, pid, *, place=None, started=0, stem="00000.parquet"):
    """Make the temporary file of a process."""
    place = files._place() if place is None else place
    path = directory / f"{stem}.{files._host()}.{pid}.{place}-{started}-0123abcd"
    path.write_bytes(b"")
    return path


@pytest.fixture
def store(teacher_dir, tmp_path):
    capture(prompt_rows(3), LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(4), progress=False)
    return store_module.Store(tmp_path / "cache", TeacherCache(tmp_path / "cache").manifest)


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_may_have_any_name(store, monkeypatch, host):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    tmp = store.directory / "tmp"
    mine = files.temporary_name(tmp, "manifest.json")
    mine.write_bytes(b"")
    dead = left_by(tmp, dead_process())
    assert dead.parent == tmp == mine.parent
    with store.claim(0) as claim:
        assert claim is not None and store.claim(0) is None
        files.remove_leftovers(tmp)
        assert list(tmp.iterdir()) == [mine]
    (store.directory / "claims" / "00001").write_text(
        files.claim_text(files.Owner(files._host(), dead_process(), files._place()))
    )
    assert store.claim(1) is not None


@pytest.mark.parametrize("host", ["node7", "node7.cluster.local", "a.7.b"])
def test_what_earlier_versions_left_is_removed_too(tmp_path, monkeypatch, host):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    dead, own = (tmp_path / f"00000.parquet.{host}.{pid}.0123abcd" for pid in (dead_process(), os.getpid()))
    for path in (dead, own):
        path.write_bytes(b"")
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [own]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process started")
def test_a_process_id_that_is_used_again_is_another_process(store):
    own = files.this_process()
    assert own.started > 0 and not own.gone
    before = files.Owner(own.host, own.pid, own.place, own.started - 1)
    assert before.gone
    (store.directory / "claims" / "00000").write_text(files.claim_text(before))
    left = left_by(store.directory / "tmp", own.pid, started=own.started - 1)
    kept = left_by(store.directory / "tmp", own.pid, started=own.started, stem="other")
    assert store.claim(0) is not None
    files.remove_leftovers(store.directory / "tmp")
    assert not left.exists() and kept.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say whether a process ended")
def test_a_killed_process_that_nobody_has_waited_for_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = files.Owner(files._host(), child.pid, files._place(), files._started(child.pid))
    assert not owner.gone
    child.kill()
    deadline = time.monotonic() + 10
    while not owner.gone:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.stdin.close()
    child.wait()


def test_another_machine_or_container_of_the_same_name_is_not_taken_for_dead(store):
    elsewhere = "0" * 12
    left = left_by(store.directory / "tmp", dead_process(), place=elsewhere)
    (store.directory / "claims" / "00000").write_text(
        files.claim_text(files.Owner(files._host(), dead_process(), elsewhere))
    )
    assert store.claim(0) is None
    files.remove_leftovers(store.directory / "tmp")
    assert left.exists()


@pytest.mark.parametrize("skew", [-2 * YEAR, 2 * YEAR])
def test_age_goes_by_the_clock_of_the_file_system(tmp_path, monkeypatch, skew):
    young, old = (left_by(tmp_path, 1, place="0" * 12, stem=stem) for stem in ("young", "old"))
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_files_that_systems_and_people_put_there_do_no_harm(store):
    """NFS keeps a removed file that is open under another name; others copy with a Mac."""
    strangers = [
        store.directory / place / name
        for place in ("tmp", "claims", "units")
        for name in (".nfs000000000123", ".DS_Store", "._00000.json", "notes.json", "x")
    ]
    for path in strangers:
        path.write_bytes(b"?")
        os.utime(path, (0, 0))
    assert store.missing() == []
    store.finish()
    assert all(path.exists() for path in strangers)
    TeacherCache(store.directory).verify()


def test_a_claim_that_cannot_be_read_is_waited_for(store):
    for text in ("", "host", "host pid", "a b c d e", "\udcff 3", "host 99999999999999999999999"):
        (store.directory / "claims" / "00000").write_bytes(text.encode("utf-8", "surrogateescape"))
        store._seen.clear()
        assert store.claim(0) is None, text


def test_files_that_vanish_while_leftovers_are_looked_for(tmp_path, monkeypatch):
    """Another worker renames its file, or removes the same one, between our listing and our look."""
    paths = [left_by(tmp_path, dead_process(), stem="dead"), left_by(tmp_path, 1, place="0" * 12)]
    (directory := left_by(tmp_path, dead_process(), stem="a")).unlink()
    directory.mkdir()
    listing = Path.iterdir

    def then_gone(self):
        found = list(listing(self))
        for path in paths:
            path.unlink(missing_ok=True)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", then_gone)
    files.remove_leftovers(tmp_path)
    assert list(listing(tmp_path)) == []


def test_many_workers_that_finish_together(store):
    before, errors = files_of(store.directory), []
    together = threading.Barrier(8)

    def finish():
        own = store_module.Store(store.directory, store.manifest)
        for _ in range(20):
            together.wait()
            (store.directory / "README.md").unlink(missing_ok=True)  # so that each writes it anew
            together.wait()  # nobody removes it while another looks at it
            try:
                own.finish()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=finish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    (store.directory / "README.md").write_bytes(before["README.md"])
    assert files_of(store.directory) == before


def test_a_record_that_vanishes_while_it_is_read_is_of_a_missing_unit(store, monkeypatch):
    read = store_module.read_unit_record

    def vanishing(path, settings):
        path.unlink()
        return read(path, settings)

    monkeypatch.setattr(store_module, "read_unit_record", vanishing)
    assert store_module.gather(store.directory, store.manifest).missing_units == [0]


def test_records_are_in_the_order_of_their_units(tmp_path):
    (tmp_path / "units").mkdir()
    for index in (99_999, 100_000, 7):
        (tmp_path / "units" / f"{index:05d}.json").write_text("{}")
    assert [int(path.stem) for path in store_module._records(tmp_path)] == [7, 99_999, 100_000]


def test_a_heartbeat_outlives_its_file(store, monkeypatch):
    monkeypatch.setattr(store_module, "_HEARTBEAT_SECONDS", 0.001)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    broken = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    with store.claim(0):
        (store.directory / "claims" / "00000").unlink()
        time.sleep(0.02)
    assert not broken


def test_two_builds_of_the_mapped_form_without_locks(store, monkeypatch):
    """The first to finish stands, and neither takes away what the other is writing."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(mapped_write.fcntl, "flock", no_locks)
    write, together, errors = mapped_write._write, threading.Barrier(2), []

    def at_once(*args):
        together.wait(timeout=30)
        write(*args)
        together.wait(timeout=30)

    monkeypatch.setattr(mapped_write, "_write", at_once)
    manifest = TeacherCache(store.directory).manifest
    final = mapped_write.mapped_directory(store.directory, manifest, None)

    def build(pause):
        try:
            time.sleep(pause)
            mapped_write.build(store.directory, manifest, final)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=build, args=(0.05 * i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path for path in final.parent.iterdir() if path.is_dir()] == [final]
    assert len(TeacherCache(store.directory).dataset()) == 3


def test_digests_that_the_writer_takes_away_in_the_same_instant(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    asked = proof.Shares(tmp_path, proof.Place(0, 2, True))
    replace = Path.replace

    def late(self, target):
        asked.remove()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", late)
    proof.hash_share(tmp_path, proof.Place(1, 2, True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
