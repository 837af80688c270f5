"""Lightning's rows stand in the lineage, and a student carries its lineage from fit to fit."""

import json

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lightning import KDDataModule, LicenseLineage, OfflineKD, TeacherPanelModule
from kd_plugin.lineage import load_record
from tests.lightning.help import Plain, loader, trainer

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4


def rows_of(**columns):
    rows = Dataset.from_list([{**row, **columns} for row in ROWS]).with_format("torch", ["input_ids", "labels"])
    return DataLoader(rows, batch_size=2)


def codes(callback):
    return {finding.code for finding in callback.run.verdict.findings}


def test_rows_of_a_loader_are_noted_or_refused(tmp_path, student_dir):
    callback = LicenseLineage()
    trainer(tmp_path, [callback], max_steps=1).fit(Plain(student_dir), rows_of())
    assert "undeclared_dataset" in codes(callback)
    with pytest.raises(LicenseRefusedError, match="OpenAI"):
        trainer(tmp_path, [LicenseLineage()], max_steps=1).fit(Plain(student_dir), rows_of(model="gpt-4o"))


def test_a_caches_own_rows_are_no_further_dataset(tmp_path, student_dir, cache):
    host = trainer(tmp_path, [OfflineKD(cache)], max_steps=1)
    host.fit(Plain(student_dir), loader(cache))
    (callback,) = [c for c in host.callbacks if isinstance(c, LicenseLineage)]
    direct = {e.target for e in callback.run.graph.edges if e.source == "self"}
    assert "dataset" not in {callback.run.graph.nodes[i].kind for i in direct}


@pytest.mark.parametrize(("front", "stops"), [("license: mit\ngenerated_by: gpt-4o", "OpenAI"), ("license: mit", None)])
def test_prompts_beside_a_card(tmp_path, student_dir, teacher_dir, front, stops):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"q{i}"}) for i in range(4)))
    (folder / "README.md").write_text(f"---\n{front}\n---\n")
    module = TeacherPanelModule(student_dir, teacher_models={"t": teacher_dir}, max_completion_length=4)
    host = trainer(tmp_path, max_steps=1)
    data = KDDataModule(prompts=str(folder / "rows.jsonl"), batch_size=2, shuffle=False)
    if stops:
        with pytest.raises(LicenseRefusedError, match=stops):
            host.fit(module, datamodule=data)
        return
    host.fit(module, datamodule=data)
    host.save_checkpoint(tmp_path / "a.ckpt")
    record = load_record(tmp_path / "a.ckpt")
    assert [n["licenses"] for n in record["nodes"] if n["kind"] == "dataset"] == [["mit"]]


def test_a_second_fit_starts_from_what_the_first_made(tmp_path, student_dir, cache):
    module = Plain(student_dir)
    trainer(tmp_path / "1", [OfflineKD(cache)], max_steps=1).fit(module, loader(cache))
    host = trainer(tmp_path / "2", [LicenseLineage()], max_steps=1)
    host.fit(module, rows_of())
    host.save_checkpoint(tmp_path / "b.ckpt")
    record = load_record(tmp_path / "b.ckpt")
    assert {"checkpoint", "teacher_outputs"} <= {node["kind"] for node in record["nodes"]}
