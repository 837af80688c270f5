"""A teacher cache for all jobs of several ranks, and two nodes."""

import subprocess
import uuid

import pytest
from datasets import Dataset

from kd_plugin import LocalTeacher, capture
from kd_plugin.cache import TopK
from tests.hosts.runs import prompts
from tests.tiny import save_tiny
from tests.zero.cluster import ADDRESSES


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of an untied teacher: a random tied one predicts its own input, like a cache shifted by one."""
    directory = tmp_path_factory.mktemp("offline")
    teacher = save_tiny(directory / "teacher", seed=0, tied=False, scale=1.0)
    rows = [{"prompt": p, "completion": " and so on"} for p in prompts(count=48)["prompt"]]
    capture(Dataset.from_list(rows), LocalTeacher(teacher), directory / "cache", targets=TopK(16), progress=False)
    return str(directory / "cache")


@pytest.fixture
def nodes():
    """Two namespaces with a cable between them; the test is skipped, with the reason, where they are not permitted."""
    tag = uuid.uuid4().hex[:6]
    names, ends = [f"kd{tag}{i}" for i in range(2)], [f"v{tag}{i}" for i in range(2)]

    def ip(*arguments):
        try:
            done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no `ip` (iproute2) on this machine")
        if done.returncode:
            pytest.skip(f"network namespaces are not permitted here: ip {' '.join(arguments)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
