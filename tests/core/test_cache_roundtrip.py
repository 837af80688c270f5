"""What is stored is what the teacher says live, at the right token."""

import pickle
import random

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from kd_plugin.cache import Sampled, TeacherCache, TopK, example_id
from kd_plugin.capturing import capture
from kd_plugin.errors import CacheError, ConfigError, DataError, NonFiniteError, VocabularyError
from kd_plugin.lineage.sources import Source
from kd_plugin.teachers import LocalTeacher
from kd_plugin.vocab import Vocabulary
from tests.core.cache_help import live_logprobs, prompt_rows
from tests.tiny import byte_tokenizer, tiny_llama

# float16 keeps 11 significant bits: half a step of the value
HALF_STEP = 2.0**-11


@pytest.fixture
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


def stored(cache, row):
    index = torch.tensor(row["teacher_index"])
    at = (index >= 0).nonzero()[:, 0]
    return at, cache.signal(index[at])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [5, 1000])
def test_top_k_equals_the_live_log_softmax(teacher, tmp_path, k, temperature):
    cache = capture(
        prompt_rows(20), teacher, tmp_path / "c", targets=TopK(k), temperature=temperature, shard_rows=8, progress=False
    )
    for row in cache.dataset():
        at, signal = stored(cache, row)
        live = live_logprobs(teacher, row["input_ids"], temperature)[at]
        best = live.topk(min(k, 259))
        # Near ties may change places between a padded batch and one row: the values at the stored ids are what counts
        found = live.gather(1, signal.ids)
        torch.testing.assert_close(found[:, :8], best.values[:, :8], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.sort(-1, descending=True).values, best.values, rtol=0, atol=1e-5)
        assert all(len(set(ids)) == len(ids) for ids in signal.ids.tolist())
        # 1.1: what the reader takes back of the rounding may move a value by as much again, here by far less
        assert ((signal.logprobs - found).abs() <= 2.2 * HALF_STEP * found.abs() + 1e-5).all()
        rest = live.scatter(1, best.indices, -torch.inf).logsumexp(-1)
        if k >= 259:
            assert (signal.tail_logmass == -torch.inf).all()
        else:
            torch.testing.assert_close(signal.tail_logmass, rest.float(), rtol=1e-4, atol=1e-4)


def test_a_target_belongs_to_the_next_token(teacher, tmp_path):
    """The oracle shifted by one must disagree, or the test above proves nothing."""
    cache = capture(prompt_rows(6), teacher, tmp_path / "c", targets=TopK(5), progress=False)
    row = cache.dataset()[3]
    at, signal = stored(cache, row)
    mask, index = np.array(row["completion_mask"]), np.array(row["teacher_index"])
    assert at.tolist() == (np.flatnonzero(mask) - 1).tolist()
    assert index[-1] == -1  # nothing follows the last token
    live = live_logprobs(teacher, row["input_ids"])
    assert not torch.equal(signal.ids, live[at + 1 if at[-1] + 1 < len(live) else at - 1].topk(5).indices)


def test_padded_head_rows_are_cut_before_the_softmax(tmp_path):
    padded = LocalTeacher(tiny_llama(vocab_size=300), tokenizer=byte_tokenizer(), license="own")
    cache = capture(prompt_rows(4), padded, tmp_path / "c", targets=TopK(300), progress=False)
    row = cache.dataset()[0]
    at, signal = stored(cache, row)
    assert signal.ids.max() < 259 and signal.ids.shape[1] == 259
    torch.testing.assert_close(signal.logprobs.exp().sum(-1), torch.ones(len(at)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("logprobs", ["mean", "each"])
def test_sampled_targets_keep_counts_logprobs_and_tail(teacher, tmp_path, logprobs):
    targets = Sampled(40, logprobs)
    cache = capture(prompt_rows(10), teacher, tmp_path / "c", targets=targets, shard_rows=4, progress=False)
    for row in cache.dataset():
        at, signal = stored(cache, row)
        live = live_logprobs(teacher, row["input_ids"])[at]
        listed = signal.draws > 0
        assert torch.equal(listed, signal.logprobs > -torch.inf)
        assert (signal.draws.sum(-1) == 40).all()
        expected = live.gather(1, signal.ids)
        if logprobs == "each":
            assert ((signal.logprobs - expected)[listed].abs() <= HALF_STEP * expected[listed].abs() + 1e-5).all()
        mean = (signal.draws * signal.logprobs.where(listed, 0.0)).sum(-1) / 40
        tolerance = 1e-5 if logprobs == "mean" else HALF_STEP * 12
        torch.testing.assert_close(mean, (signal.draws * expected).sum(-1).float() / 40, rtol=0, atol=tolerance)
        mass = (live.exp().gather(1, signal.ids) * listed).sum(-1)
        torch.testing.assert_close(signal.tail_logmass.exp(), (1 - mass).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [TopK(8), Sampled(10), Sampled(10, "each")])
def test_shuffle_select_filter_and_truncation_keep_the_join(teacher, tmp_path, targets):
    cache = capture(prompt_rows(30), teacher, tmp_path / "c", targets=targets, shard_rows=7, progress=False)
    whole = {row["example_id"]: row for row in cache.dataset()}
    kept = cache.dataset().shuffle(seed=1).select(range(20)).filter(lambda row: len(row["input_ids"]) > 20)
    cut = kept.map(lambda row: {name: row[name][:25] for name in ("input_ids", "teacher_index")})
    assert len(cut) > 5
    for row in cut:
        original = whole[row["example_id"]]
        assert row["teacher_index"] == original["teacher_index"][:25]
        assert cache.teacher_index(original["input_ids"]) == original["teacher_index"]


def test_batch_and_unit_shapes_do_not_change_the_draws(teacher, tmp_path):
    rows = prompt_rows(20)
    shapes = [(20, 10_000), (3, 1), (7, 200)]
    signals = []
    for i, (shard_rows, batch_tokens) in enumerate(shapes):
        cache = capture(
            rows,
            teacher,
            tmp_path / str(i),
            targets=Sampled(30),
            shard_rows=shard_rows,
            batch_tokens=batch_tokens,
            progress=False,
        )
        signals.append(cache.signal(torch.arange(cache.tokens)))
    for other in signals[1:]:
        # Forward passes of another shape round differently: a draw on the edge between two tokens may move
        differing = (other.ids != signals[0].ids).any(-1) if other.ids.shape == signals[0].ids.shape else None
        assert differing is not None and differing.float().mean() < 0.02


def test_rows_of_the_user_are_found_by_their_tokens(teacher, tmp_path):
    cache = capture(prompt_rows(40), teacher, tmp_path / "c", targets=TopK(4), shard_rows=16, progress=False)
    rows = list(cache.dataset())
    random.Random(0).shuffle(rows)
    for row in rows:
        assert cache.teacher_index(row["input_ids"]) == row["teacher_index"]
        assert cache.find_index(row["input_ids"][:-1]) is None
        assert cache.teacher_index(np.array(row["input_ids"])) == row["teacher_index"]


def test_example_id_is_the_documented_hash():
    import hashlib

    ids = [5, 70_000, 3]
    raw = b"".join(i.to_bytes(4, "little") for i in ids)
    assert example_id(ids) == hashlib.sha256(raw).hexdigest()[:32]


def test_the_shards_are_an_ordinary_dataset(teacher, tmp_path):
    rows = prompt_rows(9)
    cache = capture(rows, teacher, tmp_path / "c", targets=Sampled(20), shard_rows=4, progress=False)
    for loaded in (
        datasets.load_dataset(str(cache.path), cache_dir=str(tmp_path / "hf"), split="train"),
        datasets.load_dataset(
            "parquet", data_files=str(cache.path / "data" / "*.parquet"), cache_dir=str(tmp_path / "hf"), split="train"
        ),
    ):
        assert [row["domain"] for row in loaded] == [row["domain"] for row in rows]
        for row, own in zip(loaded, cache.dataset(), strict=True):
            assert row["input_ids"] == own["input_ids"] and row["example_id"] == example_id(row["input_ids"])
            assert len(row["target_counts"]) == sum(i >= 0 for i in own["teacher_index"])
            assert sum(row["target_counts"]) == len(row["target_ids"]) == len(row["target_draws"])
    column = pq.ParquetFile(cache.path / "data" / "00000.parquet").metadata.row_group(0)
    encodings = {column.column(i).path_in_schema.split(".")[0]: column.column(i) for i in range(column.num_columns)}
    assert "BYTE_STREAM_SPLIT" in encodings["target_ids"].encodings
    assert encodings["target_ids"].compression == "ZSTD"


def test_a_worker_process_gets_the_cache_by_pickle(teacher, tmp_path):
    cache = capture(prompt_rows(5), teacher, tmp_path / "c", targets=TopK(4), progress=False)
    cache.signal(torch.arange(3))
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.signal(torch.arange(3)).ids, cache.signal(torch.arange(3)).ids)


def test_the_empty_selection_and_bad_numbers(teacher, tmp_path):
    for i, targets in enumerate((TopK(4), Sampled(5))):
        cache = capture(prompt_rows(5), teacher, tmp_path / str(i), targets=targets, progress=False)
        assert len(cache.signal(torch.zeros(0, dtype=torch.int64))) == 0
        with pytest.raises(DataError, match="without a target"):
            cache.signal(torch.tensor([0, -1]))
        with pytest.raises(DataError, match="this cache has the targets 0 to"):
            cache.signal(torch.tensor([cache.tokens]))
        with pytest.raises(DataError, match="int64"):
            cache.signal(torch.tensor([0], dtype=torch.int32))


def test_another_tokenizer_or_temperature_is_refused_and_a_template_warned_of(teacher, tmp_path):
    cache = capture(prompt_rows(3), teacher, tmp_path / "c", targets=TopK(4), progress=False)
    cache.require_compatible(teacher.vocabulary)
    with pytest.raises(VocabularyError, match="captured with another tokenizer"):
        cache.require_compatible(Vocabulary.from_tokenizer(byte_tokenizer(swap=("a", "b"))))
    with pytest.raises(ConfigError, match=r"captured at 1\.0"):
        cache.require_compatible(teacher.vocabulary, temperature=2.0)
    other = byte_tokenizer()
    other.chat_template = "{{ messages }}"
    with pytest.warns(UserWarning, match="another chat template"):
        cache.require_compatible(Vocabulary.from_tokenizer(other))
    with pytest.raises(VocabularyError, match="dataset's tokenizer"):
        capture(prompt_rows(3), teacher, tmp_path / "d", tokenizer=byte_tokenizer(swap=("a", "b")), progress=False)
    assert not (tmp_path / "d").exists()


def test_the_source_carries_the_teacher_and_the_outputs(teacher, tmp_path):
    cache = capture(prompt_rows(3), teacher, tmp_path / "mine", targets=TopK(4), temperature=2.0, progress=False)
    source = cache.source
    assert isinstance(source, Source) and source.kind == "teacher_outputs" and source.ref == str(tmp_path / "mine")
    assert source.record["outputs"]["sampling"] == {"kind": "top_k", "k": 4, "temperature": 2.0, "seed": 0}
    assert source.record["outputs"]["tokens"] == cache.tokens
    assert "teacher" in str(source.record["nodes"])


def test_bad_rows_and_settings_are_refused_before_anything_is_written(teacher, tmp_path):
    out = tmp_path / "c"
    for rows, error, message in (
        ([], DataError, "no rows"),
        ([{"question": "x"}], DataError, "expected 'text', 'messages'"),
        ([{"prompt": "x"}], DataError, "no completion"),
        ([{"input_ids": [1, 2, 400]}], VocabularyError, "from 1 to 400"),
        ({"train": []}, DataError, "name the split"),
    ):
        with pytest.raises(error, match=message):
            capture(rows, teacher, out, progress=False)
    for option in ({"temperature": 0.0}, {"shard_rows": 0}, {"batch_tokens": -1}, {"max_length": 1}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            capture(prompt_rows(2), teacher, out, progress=False, **option)
    for bad in (0, -3, 2.5, True):
        with pytest.raises(ConfigError, match="whole number"):
            TopK(bad)
    assert not out.exists()


def test_rows_that_are_cut_away_are_dropped_and_counted(teacher, tmp_path):
    rows = [{"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": "c" * 30}]
    cache = capture(rows, teacher, tmp_path / "c", targets=TopK(2), max_length=20, progress=False)
    assert len(cache) == 1 and sum(cache.manifest.dropped.values()) == 1
    assert len(cache.dataset()[0]["input_ids"]) == 20
    with pytest.raises(DataError, match="None of the 1 rows"):
        capture(rows[:1], teacher, tmp_path / "d", max_length=20, progress=False)


def test_a_teacher_of_nan_stores_nothing(teacher, tmp_path):
    teacher.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite at"):
        capture(prompt_rows(3), teacher, tmp_path / "c", progress=False)
    with pytest.raises(CacheError, match="is not finished"):
        TeacherCache(tmp_path / "c")


def test_row_groups_are_joined_into_few_batches(teacher_dir, tmp_path, monkeypatch):
    from kd_plugin.cache import mapped_write, schema

    monkeypatch.setattr(schema, "_ROW_GROUP", 2)
    rows = [{"text": f"row {i}"} for i in range(9)]
    cache = capture(rows, LocalTeacher(teacher_dir), tmp_path / "c", targets=TopK(2), shard_rows=5, progress=False)

    def batches(limit):
        monkeypatch.setattr(mapped_write, "_BATCH_BYTES", limit)
        again = TeacherCache(cache.path, mapped_dir=tmp_path / str(limit))
        return again.dataset().data.column("input_ids").num_chunks, again.dataset().to_dict()

    few, rows = batches(8 << 20)
    many, same = batches(1)
    assert (few, many) == (1, 5)
    assert rows == same
