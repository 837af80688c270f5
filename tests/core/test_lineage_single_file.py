"""A checkpoint that is one file has its lineage beside it, and is verified like any other."""

import pytest
import torch

from kd_plugin.errors import LineageError
from kd_plugin.lineage import RunLineage, Source, load_record, verify
from kd_plugin.lineage.record import lineage_directory


@pytest.fixture
def run(student_dir, teacher_dir):
    return RunLineage(
        method="offline_kd", student=Source("student", ref=student_dir), teachers=[Source("t", ref=teacher_dir)]
    )


@pytest.fixture
def checkpoint(tmp_path, run):
    path = tmp_path / "epoch=0-step=2.ckpt"
    torch.save({"w": torch.ones(2)}, path)
    run.write(path, step=2)
    return path


def test_its_files_lie_beside_it(checkpoint, run):
    beside = lineage_directory(checkpoint)
    assert beside == checkpoint.with_name("epoch=0-step=2.ckpt.lineage")
    assert {"lineage.json", "NOTICE", "LICENSES", "bom.cdx.json"} <= {p.name for p in beside.iterdir()}
    assert [s["path"] for s in load_record(checkpoint)["subjects"]] == [checkpoint.name]
    assert verify(checkpoint).exit_code == 0 and verify(beside).exit_code == 0
    assert run.covers(checkpoint)


def test_a_changed_or_missing_file_is_noticed(checkpoint):
    beside = lineage_directory(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes() + b"x")
    assert verify(checkpoint).exit_code == 2
    checkpoint.unlink()
    assert verify(beside).exit_code == 2
    with pytest.raises(LineageError, match="not there"):
        verify(checkpoint)


def test_a_link_leads_to_the_lineage_of_what_it_names(checkpoint):
    last = checkpoint.with_name("last.ckpt")
    last.symlink_to(checkpoint.name)
    assert verify(last).exit_code == 0


def test_a_chain_of_files(checkpoint, run, student_dir, teacher_dir):
    nxt = checkpoint.with_name("epoch=1-step=4.ckpt")
    torch.save({"w": torch.zeros(2)}, nxt)
    run.resume(checkpoint)
    run.write(nxt, step=4)
    report = verify(nxt)
    assert report.exit_code == 0 and load_record(nxt)["checkpoint"]["parent"]["name"] == checkpoint.name
    (lineage_directory(checkpoint) / "lineage.json").write_text("{}")
    assert verify(nxt).exit_code == 2


def test_the_summary_is_the_record_without_digests(checkpoint, run):
    record, summary = load_record(checkpoint), run.summary(step=2)
    assert set(record) - set(summary) == {"subjects", "files", "digest", "saved_at"}
    assert all(record[key] == value for key, value in summary.items())
