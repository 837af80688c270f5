"""No flipped byte, missing or foreign file passes, and none is trained on."""

import random
import shutil

import pytest
import torch

from kd_plugin.cache import Sampled, TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import CacheCorruptionError, CacheError
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import files_of, flip, prompt_rows


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture(scope="module", params=[TopK(8), Sampled(12)], ids=["top_k", "sampled"])
def whole(request, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "cache"
    cache = capture(prompt_rows(12), teacher, out, targets=request.param, shard_rows=4, progress=False)
    cache.dataset()  # builds the mapped form
    return out


def use(path):
    """Everything that training does at its start and in its first epoch."""
    cache = TeacherCache(path)
    dataset = cache.dataset()
    cache.teacher_index(dataset[0]["input_ids"])
    for row in dataset:
        index = torch.tensor(row["teacher_index"])
        cache.signal(index[index >= 0])


def test_every_flipped_byte_is_caught(whole, tmp_path):
    use(whole)
    dice = random.Random(1)
    files = [p for p in sorted(whole.rglob("*")) if p.is_file() and p.name != ".lock"]
    tried = 0
    for file in files:
        size = file.stat().st_size
        for _ in range(7 if size else 0):
            copy = tmp_path / "copy"
            shutil.copytree(whole, copy)
            flip(copy / file.relative_to(whole), dice.randrange(size * 8))
            with pytest.raises(CacheCorruptionError) as caught:
                TeacherCache(copy).verify()
            assert file.name.removesuffix(".crc") in str(caught.value), (file, str(caught.value))
            # The card tells nothing that training reads, and the tokens are read for a student of other ones alone;
            # whatever else is damaged is never trained on
            if file.name not in ("README.md", "vocabulary.json"):
                with pytest.raises(CacheCorruptionError):
                    use(copy)
            shutil.rmtree(copy)
            tried += 1
    assert tried >= 100


def test_a_damaged_shard_says_what_is_lost_and_only_that_is_redone(whole, teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    targets = TeacherCache(whole).manifest.settings.targets
    shard = copy / "data" / "00001.parquet"
    flip(shard, 999)
    with pytest.raises(CacheCorruptionError, match=r"the 4 examples of dataset rows 4 to 7.*delete .*00001") as caught:
        TeacherCache(copy)
    assert str(shard) in str(caught.value)
    shard.unlink()
    (copy / "units" / "00001.json").unlink()
    others = {name: p for name, p in files_of(copy).items() if name.startswith("data/")}
    capture(prompt_rows(12), teacher, copy, targets=targets, shard_rows=4, progress=False).verify()
    after = files_of(copy)
    assert {name: after[name] for name in others} == others
    assert after["data/00001.parquet"] == files_of(whole)["data/00001.parquet"]


def test_missing_truncated_and_foreign_shards_are_named(whole, tmp_path):
    shard = "data/00002.parquet"

    def damaged(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        change(copy)
        return copy

    with pytest.raises(CacheCorruptionError, match="is missing"):
        TeacherCache(damaged(lambda c: (c / shard).unlink()))
    with pytest.raises(CacheCorruptionError, match="were written"):
        TeacherCache(damaged(lambda c: (c / shard).write_bytes((c / shard).read_bytes()[:-5])))
    with pytest.raises(CacheCorruptionError, match=r"00002\.parquet"):
        TeacherCache(damaged(lambda c: shutil.copy(c / "data/00001.parquet", c / shard)))
    with pytest.raises(CacheCorruptionError, match=r"stray\.parquet.*no unit"):
        TeacherCache(damaged(lambda c: shutil.copy(c / shard, c / "data/stray.parquet"))).verify()


def test_a_lost_manifest_is_made_again_without_a_new_capture(whole, teacher, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    targets = TeacherCache(whole).manifest.settings.targets
    (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"no manifest\.json"):
        TeacherCache(copy)

    def refuse(*args, **kwargs):
        raise AssertionError("nothing needs to be scored")

    monkeypatch.setattr(LocalTeacher, "score", refuse)
    again = capture(prompt_rows(12), teacher, copy, targets=targets, shard_rows=4, progress=False)
    assert again.manifest.content_digest == TeacherCache(whole).manifest.content_digest


def test_a_damaged_mapped_form_is_built_again_when_deleted(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    ids = next(copy.glob("mapped/*/ids.bin"))
    flip(ids, 40)
    with pytest.raises(CacheCorruptionError, match="built again from the shards"):
        use(copy)
    shutil.rmtree(copy / "mapped")
    use(copy)
