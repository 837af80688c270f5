"""The warm-up deals cached rows: every row once a pass, the same again after a resume, targets with their tokens."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from kd_plugin import LocalTeacher, capture
from kd_plugin.cache.targets import TopK
from kd_plugin.errors import ConfigError
from kd_plugin.panel.warmup import CacheWarmup
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("warmup")
    found = []
    for name, seed, count in (("a", 0, 5), ("b", 1, 4)):
        teacher = LocalTeacher(save_tiny(root / name, seed=seed), name=name)
        rows = [{"prompt": f"{name}{i}:", "completion": f" {'xyz'[i % 3] * (i + 2)}"} for i in range(count)]
        found.append(
            capture(Dataset.from_list(rows), teacher, root / f"{name}-cache", targets=TopK(8 + seed), progress=False)
        )
    return found


def rows_of(batch):
    return [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def test_each_row_comes_once_a_pass_in_another_order(caches):
    warmup = CacheWarmup(caches, seed=0, pad_token_id=0)
    steps = [rows_of(warmup.batch(step, 0, 3, micro_steps=1, rank=0, ranks=1)) for step in range(6)]
    passes = [[row for step in part for row in step] for part in (steps[:3], steps[3:])]
    assert len(set(passes[0])) == 9 == len(warmup)
    assert set(passes[0]) == set(passes[1])
    assert passes[0] != passes[1]


def test_micro_steps_and_ranks_share_a_step_without_overlap(caches):
    warmup, again = (CacheWarmup(caches, seed=0, pad_token_id=0) for _ in range(2))
    whole = warmup.batch(1, 0, 8, micro_steps=1, rank=0, ranks=1)
    parts = [again.batch(1, micro, 2, micro_steps=2, rank=rank, ranks=2) for rank in range(2) for micro in range(2)]
    assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of(whole))
    assert {part.scored for part in parts} == {whole.scored}
    assert sum(len(t["positions"]) for part in parts for t in part.targets) == whole.scored


def test_a_rank_has_its_longest_rows_first(caches):
    warmup = CacheWarmup(caches, seed=0, pad_token_id=0)
    parts = [warmup.batch(0, micro, 3, micro_steps=3, rank=0, ranks=1) for micro in range(3)]
    lengths = [len(row) for part in parts for row in rows_of(part)]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2
    assert [part.input_ids.shape[1] for part in parts] == lengths[::3]


def test_targets_stand_at_their_tokens(caches):
    warmup = CacheWarmup(caches, seed=3, pad_token_id=0)
    batch = warmup.batch(0, 0, 9, micro_steps=1, rank=0, ranks=1)
    assert len(batch.targets) == 2
    width = batch.input_ids.shape[1]
    for cache, target in zip(caches, batch.targets, strict=True):
        for position, label, ids in zip(target["positions"], target["labels"], target["ids"], strict=True):
            b, t = divmod(int(position), width)
            tokens = batch.input_ids[b][batch.attention_mask[b].bool()].tolist()
            assert int(batch.input_ids[b, t + 1]) == int(label)
            number = cache.teacher_index(tokens)[t]
            assert torch.equal(cache.signal(torch.tensor([number])).ids[0], ids)


def test_rows_are_cut_to_the_longest_length(caches):
    batch = CacheWarmup(caches, seed=0, pad_token_id=0, max_length=5).batch(0, 0, 9, micro_steps=1, rank=0, ranks=1)
    assert batch.input_ids.shape[1] == 5
    assert sum(len(t["positions"]) for t in batch.targets) == batch.scored


def test_a_warmup_needs_a_cache():
    with pytest.raises(ConfigError, match="at least one"):
        CacheWarmup([], seed=0, pad_token_id=0)
