"""Caches that an earlier kd-plugin wrote stay readable; what sampled targets leave out changes no loss."""

import shutil
from pathlib import Path

import pytest
import torch

from kd_plugin.cache import Sampled, TeacherCache
from kd_plugin.cache.files import seal
from kd_plugin.cache.manifest import read_manifest
from kd_plugin.cache.targets import describe, from_description
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.sparse import fused_sparse_divergence
from kd_plugin.errors import CacheError, ConfigError
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import prompt_rows

# Three rows of `prompt_rows` with 8 draws, as version 1 of the format wrote them
VERSION_1 = Path(__file__).parent / "data" / "cache-version-1"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(VERSION_1, tmp_path / "old")
    return TeacherCache(tmp_path / "old")


def test_a_cache_of_version_1_is_read(old):
    old.verify()
    assert old.manifest.version == 1 and old.manifest.settings.targets == Sampled(8, logprobs="each")
    signal = old.signal(torch.arange(old.tokens))
    assert (signal.draws.sum(-1) == 8).all()
    # Each token's own log-probability: with the tail they make up the whole distribution
    mass = signal.logprobs.exp().sum(-1) + signal.tail_logmass.exp()
    torch.testing.assert_close(mass, torch.ones(old.tokens), rtol=0, atol=2e-3)
    assert old.dataset()[0]["teacher_index"].count(-1) < len(old.dataset()[0]["input_ids"])


def test_what_it_kept_is_named_only_where_version_1_had_no_choice():
    assert describe(Sampled(8, "each")) == {"kind": "sampled", "draws": 8}
    for targets in (Sampled(8), Sampled(8, "each")):
        assert from_description(describe(targets)) == targets
    with pytest.raises(ConfigError, match="Did you mean 'mean'"):
        Sampled(8, "meen")


def test_a_later_version_is_refused(old):
    path = old.path / "manifest.json"
    path.write_bytes(seal({**old.manifest.to_json(), "version": 4}))
    with pytest.raises(CacheError, match="up to version 3"):
        read_manifest(old.path)


def test_the_mean_alone_gives_the_loss_and_gradient_of_each_logprob(teacher_dir, tmp_path):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    caches = [
        capture(prompt_rows(6), teacher, tmp_path / kept, targets=Sampled(30, kept), progress=False)
        for kept in ("mean", "each")
    ]
    torch.manual_seed(0)
    hidden = torch.randn(caches[0].tokens, 16)
    head = OutputHead(torch.randn(259, 16))
    found = []
    for cache in caches:
        leaf = hidden.clone().requires_grad_()
        loss = fused_sparse_divergence(leaf, head, cache.signal(torch.arange(cache.tokens)), Divergence("forward_kl"))
        loss.loss_sum.backward()
        found.append((loss.kd, leaf.grad))
    # The counts are the same; what float16 rounds away of each log-probability is what differs
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=5e-3)
    assert torch.equal(found[0][1], found[1][1])
    sizes = [sum(unit.bytes for unit in cache.manifest.units) / cache.tokens for cache in caches]
    assert sizes[0] < sizes[1]
