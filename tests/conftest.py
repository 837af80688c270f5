"""Shared tiny models on disk; one set a session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.tiny import byte_tokenizer, save_tiny


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
def untied_student_dir(tmp_path_factory):
    """A student with a head of its own, as those from 7B up have."""
    return save_tiny(tmp_path_factory.mktemp("models") / "untied", seed=1, tied=False)
