"""Datasets as streams: read in order, never held, and the same cache as from the same rows held."""

import json
import tracemalloc

import pytest
from datasets import Dataset, IterableDataset

from kd_plugin import LocalTeacher
from kd_plugin.cache import Generation, TopK
from kd_plugin.capturing import capture
from kd_plugin.capturing.rows import Rows, StreamedRows, open_rows
from kd_plugin.cli.main import main
from kd_plugin.errors import DataError
from kd_plugin.inputs import load_rows
from tests.core.cache_help import files_of, prompt_rows, shards_of

USER, ANSWER = {"role": "user", "content": "What is up?"}, {"role": "assistant", "content": "The sky."}


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


def stream(rows, **kwargs):
    return IterableDataset.from_generator(lambda: iter(rows), **kwargs)


def captured(rows, teacher, out, **options):
    return capture(rows, teacher, out, **{"targets": TopK(4), "shard_rows": 4, "progress": False, **options})


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"text": f"red {i} blue"} for i in range(10)], {}),
        ([{"prompt": f"say {i}", "completion": "so"} for i in range(9)], {}),
        ([{"messages": [USER, ANSWER], "domain": "a"}] * 5, {}),
        ([{"prompt": [USER], "completion": [ANSWER]}] * 5, {}),
        (
            [{"prompt": f"say {i}"} for i in range(5)],
            {"generate": Generation(n=2, max_new_tokens=5, keep_unfinished=True)},
        ),
        ([{"prompt": "2", "completion": c, "answer": "4"} for c in "345"], {"filter": "exact_match"}),
    ],
)
def test_a_stream_fills_the_cache_that_the_same_rows_fill(teacher, tmp_path, rows, options):
    held = captured(Dataset.from_list(rows), teacher, tmp_path / "held", **options)
    streamed = captured(stream(rows), teacher, tmp_path / "streamed", **options)
    assert shards_of(tmp_path / "held") == shards_of(tmp_path / "streamed")
    assert held.manifest.parts == streamed.manifest.parts
    # So that one may go on with the other
    before = files_of(tmp_path / "held")
    captured(stream(rows), teacher, tmp_path / "held", **options)
    assert files_of(tmp_path / "held") == before


def test_rows_of_a_stream_are_asked_for_in_any_order():
    rows = [{"text": str(i)} for i in range(23)]
    streamed, held = StreamedRows(stream(rows), 5), Rows(rows)
    assert len(streamed) == 23 and streamed.columns == ("text",)
    for first, count in ((0, 5), (10, 5), (20, 3), (5, 5), (0, 1), (7, 2)):
        assert streamed.slice(first, count) == held.slice(first, count)
    assert streamed.fingerprint() == held.fingerprint()
    assert StreamedRows(stream(rows), 7).fingerprint() == held.fingerprint()


def test_a_stream_is_not_held():
    tracemalloc.start()
    peaks = []
    for count in (2_000, 20_000):
        tracemalloc.reset_peak()
        base = tracemalloc.get_traced_memory()[0]
        rows = StreamedRows(_Count(count), 100)
        for first in range(0, count, 100):
            rows.slice(first, 100)
        peaks.append(tracemalloc.get_traced_memory()[1] - base)
    tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


class _Count:
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return ({"text": f"{i} " * 50} for i in range(self.count))


def test_a_stream_that_changes_is_refused():
    passes = []

    class Shuffled:
        def __iter__(self):
            passes.append(1)
            return iter([{"text": f"{i + 10 * len(passes)}"} for i in range(10)])

    rows = StreamedRows(Shuffled(), 5)
    with pytest.raises(DataError, match=r"other rows at 0 to 4.*fixed seed"):
        rows.slice(0, 5)
    shuffled = stream([{"text": str(i)} for i in range(40)]).shuffle(seed=3, buffer_size=20)
    rows = StreamedRows(shuffled, 5)
    assert [rows.slice(first, 5)[0]["text"] for first in range(0, 40, 5)]


def test_what_is_no_dataset_is_refused():
    with pytest.raises(DataError, match="can be read once only"):
        open_rows(iter([{"text": "x"}]), 5)
    with pytest.raises(DataError, match="no rows"):
        open_rows(stream([]), 5)
    with pytest.raises(DataError, match="no rows"):
        open_rows([], 5)
    with pytest.raises(DataError, match=r"name the split: dataset\['train'\]"):
        open_rows({"train": [{"text": "x"}]}, 5)
    with pytest.raises(DataError, match="Row 0 of the dataset is str"):
        open_rows(["x"], 5)
    with pytest.raises(DataError, match="Row 0 of the dataset is str"):
        open_rows(_Strings(), 5)


class _Strings:
    def __iter__(self):
        return iter(["x"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory", "saved"])
def test_files_can_be_streamed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    dataset = Dataset.from_list([{"messages": [USER, ANSWER]}] * 7)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        dataset.to_json(path)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "saved":
        dataset.save_to_disk(path)
    else:
        path.mkdir()
        dataset.to_parquet(path / "train-00000.parquet")
    loaded = load_rows(str(path), streaming=True)
    assert isinstance(loaded, Dataset if kind == "saved" else IterableDataset)
    assert open_rows(loaded, 3).fingerprint() == Rows(dataset).fingerprint()


def test_a_hub_id_is_asked_for_as_given(monkeypatch):
    asked = []

    def load(reference, name=None, **options):
        asked.append((reference, name, options))
        return stream([{"text": "x"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    load_rows("org/data", split="test", name="main", streaming=True)
    assert asked == [("org/data", "main", {"split": "test", "streaming": True})]


def test_streaming_from_the_command_line(teacher_dir, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in prompt_rows(9)))
    options = ["--teacher", teacher_dir, "--dtype=float32", "--k=4", "--shard_rows=4"]
    where = ["--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "c")]
    assert main(["capture", "--streaming=true", *where, *options]) == 0
    captured(prompt_rows(9), teacher, tmp_path / "d")
    assert shards_of(tmp_path / "c") == shards_of(tmp_path / "d")
    assert not list((tmp_path / "hf").rglob("*.arrow"))  # nothing was converted beforehand


@pytest.mark.parametrize("form", [list, Dataset.from_list, stream])
def test_rows_with_images_are_not_captured_as_their_text_alone(form, teacher, tmp_path):
    rows = form([{**row, "images": ["a.png"]} for row in prompt_rows(3)])
    with pytest.raises(DataError, match=r"column 'images': teachers score text, and no cache holds images"):
        captured(rows, teacher, tmp_path / "c")
    assert not (tmp_path / "c").exists()
