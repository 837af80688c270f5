"""A capture in a process of its own, for tests that kill it."""

import os

import torch

from kd_plugin.cache import Generation, Sampled
from kd_plugin.capturing import capture
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import prompt_rows

ROWS = 60


def work(teacher: str, out: str, writes: bool = False) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    capture(
        prompt_rows(ROWS // 2 if writes else ROWS),
        LocalTeacher(teacher, dtype="float32"),
        out,
        targets=Sampled(20),
        generate=Generation(n=2, max_new_tokens=8, keep_unfinished=True) if writes else None,
        shard_rows=4,
        batch_tokens=64,
        progress=False,
    )
