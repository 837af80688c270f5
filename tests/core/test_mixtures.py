"""Several datasets as one: in TRL's own form, with columns, templates and functions, and each part in the lineage."""

import json
from pathlib import Path

import pytest
from datasets import DatasetDict
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.inputs import load_mixture, load_rows, local_files
from kd_plugin.lineage.data import dataset_sources


def file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = file(tmp_path / "one" / "a.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}", "x": i} for i in range(10)])
    two = file(tmp_path / "two" / "b.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)])
    return one, two


def shouted(row):
    return {"question": row["question"].upper(), "answer": row["answer"]}


def test_columns_templates_and_functions_make_one_dataset(parts):
    one, two = parts
    rows = load_mixture([
        {"path": one, "columns": ["prompt", "completion"]},
        {"path": two, "columns": {"question": "prompt", "answer": "completion"}},
        {"path": two, "template": {"prompt": "Q: {question}", "completion": " {answer}"},
         "formatting": f"{__name__}:shouted"},
    ])  # fmt: skip
    assert len(rows) == 18 and rows.column_names == ["prompt", "completion"]
    assert rows[10] == {"prompt": "q0", "completion": "a0"} and rows[14] == {"prompt": "Q: Q0", "completion": " a0"}
    assert {source.name for source in dataset_sources(rows)} == {"a.jsonl", "b.jsonl"}


@pytest.mark.parametrize("fractions", [(None, None), (0.5, 0.5), (3.0, 1.0)])
def test_the_rows_are_those_of_trl(parts, fractions, tmp_path):
    same = file(tmp_path / "c.jsonl", [{"prompt": f"z{i}", "completion": "c", "x": -i} for i in range(4)])
    told = [
        {"path": "json", "data_files": name, "fraction": share}
        for name, share in zip((parts[0], same), fractions, strict=True)
    ]
    theirs = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**one) for one in told]))["train"]
    ours = load_mixture(
        [{"path": name, "fraction": share} for name, share in zip((parts[0], same), fractions, strict=True)]
    )
    by_builder = load_mixture(told)
    assert ours.to_list() == theirs.to_list() == by_builder.to_list()
    assert [one.name for one in dataset_sources(by_builder)] == ["a.jsonl", "c.jsonl"]


def test_files_that_a_builder_reads_are_named(parts, tmp_path):
    one, two = parts
    inside = {"data_dir": str(tmp_path), "data_files": ["one/*.jsonl", "two/b.jsonl"]}
    assert local_files({"data_files": {"train": one, "test": [two]}}) == local_files(inside) == [Path(one), Path(two)]
    assert local_files({"data_dir": str(tmp_path / "one")}) == [tmp_path / "one"]
    assert local_files({"data_files": "nowhere.jsonl"}) == local_files({"path": "org/rows", "data_dir": "sub"}) == []


@pytest.mark.parametrize(
    ("split", "first", "count"), [("train[2:5]", 2, 3), ("train[:50%]", 0, 5), ("train[-2:]", 8, 2), ("test", 0, 10)]
)
@pytest.mark.parametrize("kind", ["file", "saved", "saved with splits"])
def test_a_part_of_what_is_on_this_machine(parts, split, first, count, kind, tmp_path):
    """As of a hub id; the one split of a file has any name."""
    place = parts[0]
    if kind != "file":
        rows, place = load_rows(place), str(tmp_path / "saved")
        (rows if kind == "saved" else DatasetDict({"train": rows, "test": rows})).save_to_disk(place)
    assert load_rows(place, split=split)["x"] == list(range(first, first + count))


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[:2", "train[:2]x"])
def test_a_part_that_cannot_be_read_is_refused(parts, split):
    with pytest.raises(DataError, match="expected such as train"):
        load_rows(parts[0], split=split)
    with pytest.raises(DataError, match="a stream has no part"):
        load_rows(parts[0], split="train[:2]", streaming=True)


def test_a_stream_that_forgot_its_columns_is_joined(parts):
    mapped = {"path": parts[1], "formatting": f"{__name__}:shouted"}
    rows = load_mixture([{"path": parts[1]}, mapped], streaming=True)
    assert [row["question"] for row in rows] == [f"q{i}" for i in range(4)] + [f"Q{i}" for i in range(4)]


def test_streams_are_joined(parts):
    rows = load_mixture(
        [{"path": name, "columns": [column]} for name, column in zip(parts[:1] * 2, "xx", strict=True)], streaming=True
    )
    assert [row["x"] for row in rows] == [*range(10), *range(10)]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"pth": "a"}, r"datasets\[1\]: unknown key 'pth'. Did you mean 'path'"),
        ({"split": "train"}, r"datasets\[1\]: path is not set"),
        ({"fraction": 0.5}, "give every part a fraction, or none"),
        ({"columns": ["promt"]}, "has no column 'promt'. Did you mean 'prompt'"),
        ({"template": {"prompt": "{nothing}"}}, "template of .*nothing.*the row has prompt, completion, x"),
        ({"formatting": "tests.nowhere:f"}, "'tests.nowhere:f' cannot be imported"),
        ({"formatting": "json"}, "expected package.module:function"),
        ({"columns": ["prompt"]}, "different columns"),
        ({"columns": "prompt"}, r"datasets\[1\]: columns: expected a list, or a mapping"),
        ({"columns": [1]}, "columns: expected a list"),
        ({"template": "{x}"}, "template: expected a mapping"),
        ({"template": {"prompt": 3}}, "template: expected a mapping"),
        ({"split": 3}, r"datasets\[1\]: split: expected text, found '3'"),
        ({"fraction": 0, "template": None}, "fraction is 0; expected a share above 0"),
        ({"data_files": 3}, "data_files: expected a path"),
    ],
)
def test_what_cannot_be_is_refused(parts, part, message):
    second = part if "pth" in part or part == {"split": "train"} else {"path": parts[0], **part}
    with pytest.raises((ConfigError, DataError), match=message):
        load_mixture([{"path": parts[0]}, second])
    with pytest.raises(ConfigError, match="a stream does not know"):
        load_mixture([{"path": parts[0], "fraction": 1.0}], streaming=True)
