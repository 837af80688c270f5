"""Locks that a killed build of a DeepSpeed op left behind: found, said, refused, never deleted."""

import logging
import os
import subprocess
import sys
import time

import pytest
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from kd_plugin.errors import ConfigError
from kd_plugin.launch.preflight import abandoned_locks, op_directory, require_offload

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
TAKE = "import os, sys; from torch.utils.file_baton import FileBaton as B; assert B(sys.argv[1]).try_acquire()"


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock of torch itself, whose process is no more, for the op that offloading to the CPU needs."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    path = tmp_path / "cpu_adam" / "lock"
    subprocess.run([sys.executable, "-c", f"{TAKE}; os._exit(9)", str(path)], check=False)
    assert path.exists()
    return path


def age(path, minutes):
    then = time.time() - 60 * minutes
    os.utime(path, (then, then))


def test_the_directory_is_torchs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "named"))
    assert str(op_directory() / "op") == _get_build_directory("op", False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(op_directory() / "op") == _get_build_directory("op", False)


def test_a_run_that_would_wait_for_ever_is_refused_and_the_lock_is_left(lock):
    age(lock, 61)
    with pytest.raises(ConfigError, match=rf"cpu_adam left a lock behind, 61 minutes old.* delete {lock}"):
        require_offload(OFFLOAD)
    assert lock.exists()


def test_a_young_lock_and_one_of_another_op_are_said_alone(lock, caplog):
    age(lock, 61)
    with caplog.at_level(logging.WARNING, logger="kd_plugin.launch.preflight"):
        require_offload({"zero_optimization": {"stage": 2}})
    assert f"No build takes so long: delete {lock}" in caplog.text
    age(lock, 3)
    (found,) = abandoned_locks()
    assert "3 minutes old" in str(found) and "Unless another one builds cpu_adam now" in str(found)


def test_a_build_that_goes_on_is_no_fault(lock):
    assert [found.path for found in abandoned_locks()] == [lock]
    lock.unlink()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    try:
        assert abandoned_locks() == []
    finally:
        baton.release()
