"""``kd-plugin capture`` and ``kd-plugin cache``."""

import json
import re
from pathlib import Path

import pytest
import yaml

from kd_plugin.cache import Sampled, TeacherCache, TopK, TopP
from kd_plugin.cache.merge import merge
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import flip, prompt_rows, shards_of


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture
def config(teacher_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in prompt_rows(9)))
    path = tmp_path / "capture.yaml"
    settings = {"dataset": str(rows), "teacher": teacher_dir, "output_dir": str(tmp_path / "c"), "shard_rows": 4}
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        (["--k=7"], TopK(7)),
        (["--targets=top_p", "--p=0.8", "--cap=20"], TopP(0.8, 20)),
        (["--targets=sampled", "--draws=9"], Sampled(9)),
    ],
)
def test_capture_from_yaml_equals_the_call(config, teacher, tmp_path, capsys, options, targets):
    assert main(["capture", "--config", config, "--dtype=float32", "--temperature=1.5", *options]) == 0
    assert "9 examples (0 rows dropped)" in capsys.readouterr().out
    called = capture(
        prompt_rows(9), teacher, tmp_path / "d", targets=targets, temperature=1.5, shard_rows=4, progress=False
    )
    assert shards_of(tmp_path / "c") == shards_of(tmp_path / "d")
    assert TeacherCache(tmp_path / "c").manifest.settings == called.manifest.settings


def test_a_dry_run_counts_and_stores_nothing(config, teacher, tmp_path, capsys):
    assert main(["capture", "--config", config, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "c").exists()
    cache = capture(prompt_rows(9), teacher, tmp_path / "d", progress=False)
    tokens = sum(unit.input_tokens for unit in cache.manifest.units)
    assert f"9 examples (0 rows dropped), {tokens} tokens, {cache.tokens} targets" in said


def test_bad_settings_are_one_line(config, capsys, tmp_path):
    for options, message in (
        (["--targets=topk"], "Did you mean 'top_k'?"),
        (["--output_dir="], "output_dir is not set"),
        (["--dataset=nowhere"], "cannot be read"),
        (["--kk=3"], "unknown option --kk"),
    ):
        assert main(["capture", "--config", config, *options]) != 0
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not (tmp_path / "c").exists()


def test_info_and_verify_tell_good_from_damaged(config, tmp_path, capsys):
    main(["capture", "--config", config, "--k=5"])
    directory = str(tmp_path / "c")
    capsys.readouterr()
    assert main(["cache", "info", directory]) == 0
    said = capsys.readouterr().out
    assert "top_k (k 5)" in said and "finished, begun" in said
    assert main(["cache", "info", directory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 9
    assert main(["cache", "verify", directory]) == 0
    flip(tmp_path / "c" / "data" / "00000.parquet", 500)
    flip(tmp_path / "c" / "data" / "00002.parquet", 500)
    assert main(["cache", "verify", directory]) == 1
    error = capsys.readouterr().err
    assert "rows 0 to 3" in error and "rows 8 to 8" in error  # all that is damaged, not the first alone
    assert main(["cache", "verify", str(tmp_path)]) == 1
    assert "no teacher cache" in capsys.readouterr().err


def test_appended_data_follow_what_was_there(teacher, tmp_path):
    first, more = prompt_rows(9), prompt_rows(16)[9:]
    options = {"targets": TopK(4), "shard_rows": 4, "progress": False}
    capture(first, teacher, tmp_path, **options)
    before = shards_of(tmp_path)
    cache = capture(more, teacher, tmp_path, append=True, **options)
    assert len(cache) == 16 and cache.manifest.unit_count == 5
    assert {name: data for name, data in shards_of(tmp_path).items() if name in before} == before
    assert len(set(cache.dataset()["example_id"])) == 16
    cache.verify()
    # Again: nothing to do. Without append: another dataset. Other settings: refused.
    assert len(capture(more, teacher, tmp_path, append=True, **options)) == 16
    with pytest.raises(ConfigError, match="dataset: 7 rows"):
        capture(first, teacher, tmp_path, **options)
    with pytest.raises(ConfigError, match="targets:"):
        capture(prompt_rows(30)[16:], teacher, tmp_path, append=True, **{**options, "targets": TopK(3)})


def test_append_takes_the_directory_first_as_the_others_do(config, tmp_path, capsys):
    assert main(["capture", "--config", config, "--k=5"]) == 0
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps(row) for row in prompt_rows(16)[9:]))
    assert main(["cache", "append", str(tmp_path / "c"), "--config", config, "--k=5", f"--dataset={more}"]) == 0
    capsys.readouterr()
    assert main(["cache", "verify", str(tmp_path / "c")]) == 0
    assert "5 units" in capsys.readouterr().out


def test_what_verify_says_to_delete_is_there_and_the_same_command_redoes_it(config, tmp_path, capsys):
    assert main(["capture", "--config", config]) == 0
    before = shards_of(tmp_path / "c")
    flip(tmp_path / "c" / "data" / "00001.parquet", 500)
    assert main(["cache", "verify", str(tmp_path / "c")]) == 1
    shard, record = re.search(r"delete (\S+) and (\S+) and", capsys.readouterr().err).groups()
    Path(shard).unlink()
    Path(record).unlink()
    assert main(["capture", "--config", config]) == 0
    assert shards_of(tmp_path / "c") == before
    assert main(["cache", "verify", str(tmp_path / "c")]) == 0


def test_merged_caches_hold_the_rows_of_all(teacher, tmp_path):
    import torch

    options = {"targets": Sampled(6), "shard_rows": 4, "progress": False}
    rows = prompt_rows(15)
    parts = [
        capture(rows[:6], teacher, tmp_path / "a", **options),
        capture(rows[6:], teacher, tmp_path / "b", **options),
    ]
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert len(merged) == 15 and merged.tokens == sum(part.tokens for part in parts)
    merged.verify()
    for part in parts:
        for row in part.dataset():
            mine = torch.tensor(merged.teacher_index(row["input_ids"]))
            theirs = torch.tensor(row["teacher_index"])
            assert torch.equal(mine >= 0, theirs >= 0)
            assert torch.equal(merged.signal(mine[mine >= 0]).draws, part.signal(theirs[theirs >= 0]).draws)
    assert len(merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")) == 15  # goes on, or finds all done
    with pytest.raises(ConfigError, match="as well"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "n")
    capture(rows[:6], teacher, tmp_path / "k", **{**options, "targets": Sampled(7)})
    with pytest.raises(ConfigError, match="targets:"):
        merge([tmp_path / "a", tmp_path / "k"], tmp_path / "n")
    assert not (tmp_path / "n").exists()
