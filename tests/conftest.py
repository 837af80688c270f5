"""Shared tiny models on disk; one set a session."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed's operators are built once for this checkout. In the home directory a build that was killed, by whomever,
# would leave a lock behind on which every test of several ranks waits for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parent.parent / ".cache" / "torch_extensions"))

import pytest

from tests.tiny import byte_tokenizer, save_tiny


def pytest_sessionstart():
    """Delete the locks that killed test runs left behind."""
    from kd_plugin.launch.preflight import abandoned_locks

    for lock in abandoned_locks():
        lock.path.unlink(missing_ok=True)


# Rooms whose files take longest. They come first, so that at the end short files keep all workers busy.
LONG = ("equivalence", "transformers", "lightning", "hosts")


def pytest_collection_modifyitems(items):
    """Begin with the long rooms; `make test` has xdist keep this order."""
    items.sort(key=lambda item: not set(LONG) & set(item.path.parts))


@pytest.fixture(autouse=True)
def no_config_is_left():
    """Have no test run under the DeepSpeed configuration of one before it: transformers keeps it for the process."""
    yield
    if "transformers.integrations.deepspeed" in sys.modules:
        sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """A teacher that is wider than the student, with an untied head."""
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", seed=2, hidden=48, tied=False)


@pytest.fixture(scope="session")
def other_teacher_dir(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "other", seed=3, hidden=64, layers=1, license="mit")


@pytest.fixture(scope="session")
def variant_dir(tmp_path_factory):
    """Return a function from a variant of tests/tiny.py, a seed and a width to a directory with such a model."""
    made = {}

    def saved(variant, seed=1, hidden=32):
        key = (variant, seed, hidden)
        if key not in made:
            directory = tmp_path_factory.mktemp("variants") / f"{variant}-{seed}"
            made[key] = save_tiny(directory, variant=variant, seed=seed, hidden=hidden)
        return made[key]

    return saved


@pytest.fixture(scope="session")
def untied_student_dir(tmp_path_factory):
    """A student with a head of its own, as those from 7B up have."""
    return save_tiny(tmp_path_factory.mktemp("models") / "untied", seed=1, tied=False)
