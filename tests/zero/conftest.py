"""A teacher cache for all jobs of several ranks."""

import pytest
from datasets import Dataset

from kd_plugin import LocalTeacher, capture
from kd_plugin.cache import TopK
from tests.hosts.runs import prompts
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of an untied teacher: a random tied one predicts its own input, like a cache shifted by one."""
    directory = tmp_path_factory.mktemp("offline")
    teacher = save_tiny(directory / "teacher", seed=0, tied=False, scale=1.0)
    rows = [{"prompt": p, "completion": " and so on"} for p in prompts(count=48)["prompt"]]
    capture(Dataset.from_list(rows), LocalTeacher(teacher), directory / "cache", targets=TopK(16), progress=False)
    return str(directory / "cache")
