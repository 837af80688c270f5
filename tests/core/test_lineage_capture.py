"""A capture's rows stand in its record, and are judged before anything is loaded; a server's own word is judged too."""

import json

import pytest
from datasets import Dataset

from kd_plugin import LocalTeacher, ServerTeacher, capture
from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.cache.merge import merge
from kd_plugin.cli.main import main
from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.lineage.data import dataset_sources
from tests.core.cache_help import prompt_rows
from tests.core.lineage_help import model_dir
from tests.fake_vllm import Behaviour, fake_vllm

HUB = {"hf://datasets/acme/x@" + "0" * 40 + "/train.parquet": {"num_bytes": 1, "checksum": None}}
COMMERCIAL = {"use": {"commercial": True}}


def hub_rows(count=4):
    rows = Dataset.from_list(prompt_rows(count))
    rows.info.download_checksums = dict(HUB)
    return rows


def names(record, kind):
    return [node["name"] for node in record["nodes"] if node["kind"] == kind]


def stored(directory, teacher_dir, rows, **options):
    return capture(rows, LocalTeacher(teacher_dir), directory, targets=TopK(4), progress=False, **options)


def test_a_hub_datasets_terms_stop_a_capture_before_anything_is_loaded(teacher_dir, tmp_path):
    with pytest.raises(LicenseRefusedError, match="acme/x: Unknown licence"):
        stored(tmp_path / "c", teacher_dir, hub_rows())
    declared = {**COMMERCIAL, "datasets": [{"repo": "acme/x", "license": "cc-by-nc-4.0"}]}
    with pytest.raises(LicenseRefusedError, match=r"acme/x: .*NonCommercial"):
        stored(tmp_path / "c", teacher_dir, hub_rows(), lineage=declared)
    assert not (tmp_path / "c").exists()
    declared = {**COMMERCIAL, "datasets": [{"repo": "acme/x", "license": "cc-by-4.0"}]}
    cache = stored(tmp_path / "c", teacher_dir, hub_rows(), lineage=declared)
    assert names(cache.manifest.lineage, "dataset") == ["acme/x"]


def test_who_trains_on_a_cache_trains_on_its_rows(teacher_dir, tmp_path):
    declared = {"datasets": [{"repo": "acme/x", "license": "cc-by-nc-4.0"}]}
    cache = stored(tmp_path / "c", teacher_dir, hub_rows(), lineage={**declared, "use": {"commercial": False}})
    student = Source("student", ref=model_dir(tmp_path, "s", "mit"))
    run = RunLineage(method="offline_kd", student=student, outputs=[cache.source], config=COMMERCIAL)
    with pytest.raises(LicenseRefusedError, match=r"acme/x: .*NonCommercial"):
        run.require_trainable()


def test_rows_in_memory_are_noted_in_the_record_and_for_whoever_trains_on_it(teacher_dir, tmp_path):
    cache = stored(tmp_path / "c", teacher_dir, prompt_rows(4))
    student = Source("student", ref=model_dir(tmp_path, "s", "mit"))
    run = RunLineage(method="offline_kd", student=student, outputs=[cache.source])
    run.require_trainable()
    assert "undeclared_dataset" in {f.code for f in run.verdict.findings}
    # Its own rows are no further dataset, whatever is done to them; rows of another cache are
    assert dataset_sources(cache.dataset())[0].name == f"kd-plugin-cache://{cache.manifest.content_digest}"
    before = run.graph
    run.add_datasets(dataset_sources(cache.dataset().select([0, 1])))
    assert run.graph is before
    other = stored(tmp_path / "other", teacher_dir, prompt_rows(3))
    run.add_datasets(dataset_sources(other.dataset()))
    assert [n.name for n in run.graph.nodes.values() if n.kind == "dataset"] == ["data in memory"]


def test_appended_and_merged_caches_name_the_rows_of_all(teacher_dir, tmp_path):
    first = {"datasets": [{"name": "mine", "license": "own"}]}
    declared = {"datasets": [{"repo": "acme/x", "license": "cc-by-4.0"}]}
    stored(tmp_path / "a", teacher_dir, prompt_rows(4), lineage=first)
    other = stored(tmp_path / "b", teacher_dir, hub_rows(3), lineage=declared)
    merged = merge([tmp_path / "a", other.path], tmp_path / "merged")
    both = stored(tmp_path / "a", teacher_dir, hub_rows(3), lineage=declared, append=True)
    for cache in (merged, both, TeacherCache(tmp_path / "a")):
        assert sorted(names(cache.manifest.lineage, "dataset")) == ["acme/x", "mine"]


def test_the_command_reads_the_card_beside_the_rows(teacher_dir, tmp_path, capsys):
    folder = tmp_path / "ds"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, prompt_rows(4))))
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (tmp_path / "use.yaml").write_text("use: {commercial: true}\n")
    common = ["--teacher", teacher_dir, "--output_dir", str(tmp_path / "c"), "--lineage", str(tmp_path / "use.yaml")]
    for reference in (folder, folder / "train.jsonl"):
        assert main(["capture", "--dataset", str(reference), *common]) != 0
        assert "NonCommercial" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("asked_for", [None, "gpt-4o"])
def test_a_server_that_says_it_serves_a_closed_model_gets_no_prompt(teacher_dir, tokenizer, tmp_path, asked_for):
    local = LocalTeacher(teacher_dir, dtype="float32")
    with fake_vllm(local.model, tokenizer, Behaviour(name="gpt-4o")) as (url, behaviour):
        teacher = ServerTeacher(url, asked_for, repo=teacher_dir, tokenizer=tokenizer)
        with pytest.raises(LicenseRefusedError, match="OpenAI"):
            capture(prompt_rows(2), teacher, tmp_path / "c", targets=TopK(4), progress=False)
        assert {path for path, _, _ in behaviour.requests} <= {"/v1/models"}
    assert not (tmp_path / "c").exists()


def test_a_servers_word_is_recorded_and_can_only_add(teacher_dir, tokenizer, tmp_path):
    local = LocalTeacher(teacher_dir, dtype="float32")
    with fake_vllm(local.model, tokenizer, Behaviour(name="alias")) as (url, _):
        teacher = ServerTeacher(url, repo=teacher_dir, tokenizer=tokenizer)
        cache = capture(prompt_rows(2), teacher, tmp_path / "c", targets=TopK(4), progress=False)
    (node,) = [n for n in cache.manifest.lineage["nodes"] if n["kind"] == "model"]
    assert {"where": "server", "value": "it says that it serves alias", "ids": []} in node["evidence"]
