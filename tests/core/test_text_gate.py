"""Captured text and licences: who may write, and what the record says wherever the rows go."""

import datasets
import pytest

from kd_plugin.errors import CacheError, LicenseRefusedError
from kd_plugin.inputs import load_rows
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.text import ServerWriter, capture_text, load_text, text_source
from tests.core.text_help import writer
from tests.core.text_worker import questions

pytestmark = pytest.mark.usefixtures("short_pauses")


CLOSED = [
    {"url": "https://api.openai.com", "model": "gpt-4o"},
    {"url": "https://openrouter.ai/api/v1", "model": "anthropic/claude-sonnet-4", "license": "mit"},
    {"url": "http://localhost:4000", "model": "azure/gpt-4o-mini", "license": "own"},
    {"url": "http://127.0.0.1:8000", "model": "unknown-model"},
]


@pytest.mark.parametrize("options", CLOSED, ids=lambda o: o["model"])
def test_closed_providers_and_gateways_are_refused_before_the_first_request(options, tmp_path, monkeypatch):
    monkeypatch.setattr("requests.Session.request", lambda *a, **k: pytest.fail("a request was sent"))
    with pytest.raises(LicenseRefusedError):
        capture_text(questions(2), ServerWriter(**options), tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_a_dataset_that_a_closed_model_wrote_is_refused_before_the_first_request(writing, tmp_path):
    url, script = writing
    with pytest.raises(LicenseRefusedError):
        capture_text([{**row, "generator": "gpt-4"} for row in questions(2)], writer(url), tmp_path / "x")
    with pytest.raises(LicenseRefusedError):
        capture_text(
            questions(2),
            writer(url),
            tmp_path / "x",
            lineage={"datasets": [{"repo": "a/b", "generated_by": ["gpt-4"]}]},
        )
    assert not script.log
    script.models = [{"id": "scripted", "root": "claude-opus-4"}]
    with pytest.raises(LicenseRefusedError):
        capture_text(questions(2), writer(url), tmp_path / "y", progress=False)
    assert not script.log


def test_lineage_names_the_writer_wherever_the_rows_go(writing, tmp_path):
    url, _ = writing
    out = tmp_path / "text"
    capture_text(questions(4), writer(url, model="scripted", repo="org/scripted"), out, progress=False)
    for sources in (
        {"outputs": [text_source(out)]},
        {"datasets": dataset_sources(load_text(out))},
        {"datasets": dataset_sources(load_rows(str(out)).filter(lambda row: row["row"] > 1))},
    ):
        run = RunLineage(method="sft", student=Source("student", license="mit"), **sources)
        run.require_trainable()
        names = {node.name: node for node in run.graph.nodes.values()}
        assert names["org/scripted"].licenses == ("mit",)
        assert {e.kind for e in run.graph.edges if e.target == names["org/scripted"].id} == {"trained_on_outputs"}
    # datasets forgets where it read a directory; the rows themselves say who wrote them
    copied = datasets.load_dataset(str(out))["train"]
    run = RunLineage(method="sft", student=Source("student", license="mit"), datasets=dataset_sources(copied))
    assert "org/scripted" in {node.name for node in run.graph.nodes.values()}
    with pytest.raises(LicenseRefusedError, match="org/scripted"):
        run.require_trainable()


def test_a_record_speaks_for_its_own_bytes_alone(writing, tmp_path):
    url, _ = writing
    out = tmp_path / "text"
    capture_text(questions(4), writer(url), out, progress=False)
    record = (out / "teacher_text.json").read_bytes()
    rows = (out / "train-00000.parquet").read_bytes()

    def refused(match):
        with pytest.raises(CacheError, match=match):
            text_source(out)
        run = RunLineage(
            method="sft", student=Source("s", license="mit"), datasets=dataset_sources(load_rows(str(out)))
        )
        with pytest.raises(LicenseRefusedError):
            run.require_trainable()

    (out / "teacher_text.json").write_bytes(record.replace(b'"mit"', b'"own"'))
    refused("not as it was written")
    (out / "teacher_text.json").unlink()
    refused("has no teacher_text.json")
    (out / "teacher_text.json").write_bytes(record)
    (out / "train-00001.parquet").write_bytes(rows)
    refused("names other files")
    (out / "train-00001.parquet").unlink()
    capture_text(questions(3), writer(url), tmp_path / "other", progress=False)
    (out / "train-00000.parquet").write_bytes((tmp_path / "other/train-00000.parquet").read_bytes())
    refused("not the file")
