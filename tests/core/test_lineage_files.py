import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import rfc8785

from kd_plugin.errors import LicenseRefusedError, LineageError
from kd_plugin.lineage import RunLineage, Source, load_record, verify
from kd_plugin.lineage.hashing import weight_files
from kd_plugin.lineage.record import sealed
from tests.core.lineage_help import checkpoint, model_dir, run_of


@pytest.fixture
def saved(tmp_path):
    """A checkpoint whose lineage has a dataset, two teachers and a parent."""
    config = {"datasets": [{"repo": "someone/prompts", "license": "mit"}], "use": {"commercial": True}}
    run = run_of(tmp_path, "gemma", "bsd-3-clause", config=config)
    first, second = checkpoint(tmp_path / "out"), checkpoint(tmp_path / "out", "checkpoint-2", b"later")
    run.write(first, step=1)
    run.write(second, step=2, parent=first)
    return second


def reseal(record):
    """What a forger does who knows how the digest is made."""
    content = {k: v for k, v in record.items() if k not in ("digest", "saved_at")}
    return rfc8785.dumps(sealed(content, "2026-11-24T00:00:00Z"))


def test_a_checkpoint_carries_record_notice_and_verbatim_texts(saved):
    assert sorted(p.name for p in (saved / "LICENSES").iterdir()) == [
        "apache-2.0.txt", "bsd-3-clause.txt", "gemma.txt", "gemma.use-policy.txt", "mit.txt",
    ]  # fmt: skip
    assert "subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in (saved / "NOTICE").read_text()
    record = load_record(saved)
    assert [s["path"] for s in record["subjects"]] == ["model.safetensors"]
    assert record["checkpoint"] == {
        "step": 2,
        "parent": {"digest": load_record(saved.parent / "checkpoint-1")["digest"], "step": 1, "name": "checkpoint-1"},
    }
    report = verify(saved)
    assert (report.exit_code, report.problems) == (0, ())
    assert report.verdict.decision == "allow_with_duties"


def test_the_same_run_writes_the_same_bytes_but_for_saved_at_in_another_place_and_order(tmp_path):
    records = []
    for place, order in (("here", (0, 1)), ("there", (1, 0))):
        root = tmp_path / place
        student = Source("student", ref=model_dir(root, "student", "apache-2.0"))
        teachers = [Source(f"t{i}", ref=model_dir(root, f"teacher-{i}", t)) for i, t in enumerate(["mit", "gemma"])]
        run = RunLineage(
            method="teacher_panel",
            student=student,
            teachers=[teachers[i] for i in order],
            config={"run": {"id": "r", "date": "2026-01-01"}},
            config_hash="c",
        )
        directory = checkpoint(root / "out")
        run.write(directory, step=5)
        records.append(
            {k: v for k, v in json.loads((directory / "lineage.json").read_bytes()).items() if k != "saved_at"}
        )
        assert str(tmp_path) not in (directory / "lineage.json").read_text()
    assert rfc8785.dumps(records[0]) == rfc8785.dumps(records[1])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: flip(d / "model.safetensors"), id="weights changed"),
        pytest.param(lambda d: (d / "model.safetensors").unlink(), id="weights missing"),
        pytest.param(lambda d: shutil.copy(d / "model.safetensors", d / "extra.safetensors"), id="weights extra"),
        pytest.param(lambda d: (d / "model.safetensors").rename(d / "other.safetensors"), id="weights renamed"),
        pytest.param(lambda d: flip(d / "NOTICE"), id="notice edited"),
        pytest.param(lambda d: (d / "NOTICE").unlink(), id="notice missing"),
        pytest.param(lambda d: flip(d / "LICENSES" / "gemma.txt"), id="licence text edited"),
        pytest.param(lambda d: (d / "LICENSES" / "mit.txt").unlink(), id="licence text missing"),
        pytest.param(lambda d: flip(d / "bom.cdx.json"), id="bill of materials edited"),
        pytest.param(lambda d: reword(d / "README.md", "you owe", "you may ignore"), id="duties on the card edited"),
        pytest.param(lambda d: flip(d.parent / "checkpoint-1" / "lineage.json"), id="parent edited"),
        pytest.param(lambda d: (d / "lineage.json").write_bytes(b""), id="record emptied"),
        pytest.param(lambda d: (d / "lineage.json").write_bytes(b"[" * 100_000), id="record nested"),
    ],
)
def test_tampering_is_found(saved, change):
    change(saved)
    report = verify(saved)
    assert report.exit_code == 2, report.problems


def test_a_missing_record_is_incomplete(saved):
    (saved / "lineage.json").unlink()
    assert verify(saved).exit_code == 3
    with pytest.raises(LineageError, match="was not finished"):
        load_record(saved)


def test_a_forger_who_recomputes_the_digest_is_found(saved):
    original = json.loads((saved / "lineage.json").read_bytes())

    def forged(edit):
        record = json.loads(json.dumps(original))
        edit(record)
        (saved / "lineage.json").write_bytes(reseal(record))
        return verify(saved)

    def gemma(record):
        return next(n for n in record["nodes"] if n.get("licenses") == ["gemma"])

    assert forged(lambda r: None).exit_code == 0  # the helper forges well: only the edits below are wrong
    assert forged(lambda r: r["effective"].update(decision="allow")).exit_code == 2
    assert forged(lambda r: r["effective"]["duties"].pop()).exit_code == 2
    assert forged(lambda r: r["effective"].update(license_expression="MIT")).exit_code == 2
    assert forged(lambda r: gemma(r).update(licenses=["mit"])).exit_code == 2
    assert forged(lambda r: r["edges"].pop()).exit_code == 2
    assert forged(lambda r: r["nodes"].pop()).exit_code == 2
    assert forged(lambda r: r["terms"]["gemma"].update(clauses=[])).exit_code == 2
    assert forged(lambda r: r["checkpoint"]["parent"].update(digest="sha256:0")).exit_code == 2
    assert forged(lambda r: r["checkpoint"]["parent"].update(name="../../etc")).exit_code == 2
    assert forged(lambda r: r["files"].pop()).exit_code == 2
    assert forged(lambda r: r["subjects"][0].update(path="../../student/model.safetensors")).exit_code == 2
    assert forged(lambda r: r.update(subjects=[])).exit_code == 2


def test_two_hundred_random_edits_and_none_missed(saved):
    rng = random.Random(20261124)
    apart = ("optimizer.pt", "training_args.bin", "config.json", "README.md")  # a card is free but for its section
    files = [p for p in saved.rglob("*") if p.is_file() and p.name not in apart]
    for i in range(200):
        path = rng.choice(files)
        before = path.read_bytes()
        at = rng.randrange(len(before))
        edits = [
            before[:at] + bytes([before[at] ^ (1 << rng.randrange(8))]) + before[at + 1 :],
            before[:at] + before[at + 1 :],
            before[:at] + bytes([rng.randrange(256)]) + before[at:],
            before[:at],
        ]
        path.write_bytes(rng.choice(edits))
        assert verify(saved).exit_code == 2, f"edit {i} of {path.name} at {at} was missed"
        path.write_bytes(before)
    assert verify(saved).exit_code == 0


def test_what_the_gate_saw_is_recorded_although_a_source_is_gone_by_then(tmp_path):
    run = run_of(tmp_path, "gemma")
    shutil.rmtree(tmp_path / "teacher-0-gemma")
    directory = checkpoint(tmp_path / "out")
    run.write(directory, step=1)
    assert load_record(directory)["effective"]["license_expression"] == "Apache-2.0 AND LicenseRef-gemma"
    assert verify(directory).exit_code == 0


def test_local_models_are_known_by_their_weights(tmp_path):
    run = run_of(tmp_path, "gemma")
    directory = checkpoint(tmp_path / "out")
    run.write(directory, step=1)
    models = [n for n in load_record(directory)["nodes"] if n["kind"] == "model"]
    assert len({n["weights"]["model.safetensors"] for n in models}) == len(models) == 2


def test_records_that_would_crash_a_reader_are_errors(saved):
    original = json.loads((saved / "lineage.json").read_bytes())
    for effective in (
        {},
        {**original["effective"], "duties": [1]},
        {**original["effective"], "findings": [{"severity": []}]},
        {**original["effective"], "decision": 1},
    ):
        (saved / "lineage.json").write_bytes(reseal({**original, "effective": effective}))
        assert verify(saved).exit_code == 2
        with pytest.raises(LineageError, match="does not fit the schema"):
            load_record(saved)


def test_a_weight_file_whose_name_is_no_text_is_one_clear_error(tmp_path):
    directory = checkpoint(tmp_path / "out")
    (directory / "a\x1b[2J.safetensors").write_bytes(b"x")
    with pytest.raises(LineageError, match="not plain text"):
        run_of(tmp_path, "mit").write(directory, step=1)
    assert verify(directory).exit_code == 3


def test_a_pipe_among_the_weights_does_not_block(saved):
    os.mkfifo(saved / "pipe.safetensors")
    assert verify(saved).exit_code == 0


def test_a_violation_is_reported_by_verify(tmp_path):
    facts = {"distribute": True, "mau_over_700m_at_release": False}
    run = run_of(tmp_path, "llama3.1", config={"use": facts, "student": {"name": "acme"}})
    directory = checkpoint(tmp_path / "out")
    run.write(directory, step=1)
    report = verify(directory)
    assert report.exit_code == 1
    assert "acme" in str(report.problems[0])
    with pytest.raises(LicenseRefusedError):
        run.require_publishable(directory)


def test_resume_keeps_id_and_date_and_chains_to_the_parent(tmp_path):
    first = run_of(tmp_path, "mit", config={"run": {"id": "one", "date": "2026-01-01"}})
    before = checkpoint(tmp_path / "out")
    first.write(before, step=1)
    again = run_of(tmp_path, "mit", config={"run": {}}, resume_from=before)
    assert (again.run_id, again.started) == ("one", "2026-01-01")
    after = checkpoint(tmp_path / "out", "checkpoint-2")
    again.write(after, step=2)
    record = load_record(after)
    assert record["checkpoint"]["parent"]["digest"] == load_record(before)["digest"]
    assert "resumed_from" in {e["kind"] for e in record["edges"]}
    assert verify(after).exit_code == 0
    flip(before / "lineage.json")
    assert verify(after).exit_code == 2
    shutil.rmtree(before)
    rotated = verify(after)
    assert rotated.exit_code == 0 and "no longer beside" in rotated.notes[0]


def test_a_crash_while_writing_leaves_no_record(tmp_path, monkeypatch):
    run = run_of(tmp_path, "mit")
    directory = checkpoint(tmp_path / "out")
    run.write(directory, step=1)
    (directory / "model.safetensors").write_bytes(b"new weights")

    def crash(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError):
        run.write(directory, step=2)
    assert verify(directory).exit_code == 3
    assert (directory / "model.safetensors").read_bytes() == b"new weights"
    monkeypatch.undo()
    with pytest.raises(LineageError, match="was not finished"):
        run.require_publishable(directory)
    run.write(directory, step=2)
    assert verify(directory).exit_code == 0


def test_lineage_without_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LineageError, match="holds no weight files"):
        run_of(tmp_path, "mit").write(tmp_path / "empty", step=1)


def test_weights_are_told_from_what_lies_beside_them(tmp_path):
    names = {
        "model-00001-of-00002.safetensors": True,
        "pytorch_model.bin": True,
        "adapter_model.safetensors": True,
        "model-Q4.gguf": True,
        "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt": True,
        "global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": True,  # holds the float32 master weights
        "pytorch_model_fsdp_0/__0_0.distcp": True,
        "second_adapter/adapter_model.safetensors": True,
        "optimizer.pt": False,
        "optimizer.bin": False,
        "optimizer_0/__0_0.distcp": False,
        "scheduler.pt": False,
        "rng_state.pth": False,
        "rng_state_0.pth": False,
        "scaler.pt": False,
        "training_args.bin": False,
        "trainer_state.json": False,
        "checkpoint-3/model.safetensors": False,
        ".cache/model.safetensors": False,
    }
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = {p.relative_to(tmp_path).as_posix() for p in weight_files(tmp_path)}
    assert found == {name for name, is_weight in names.items() if is_weight}


def test_a_rewrite_drops_texts_that_only_the_older_record_placed(tmp_path):
    directory = checkpoint(tmp_path / "out")
    run_of(tmp_path, "gemma").write(directory, step=1)
    (directory / "LICENSES" / "users-own.txt").write_text("kept")
    run_of(tmp_path, "mit").write(directory, step=2)
    assert sorted(p.name for p in (directory / "LICENSES").iterdir()) == ["apache-2.0.txt", "mit.txt", "users-own.txt"]
    assert verify(directory).exit_code == 0


def test_copying_to_the_output_directory_keeps_the_lineage_whole(tmp_path):
    run = run_of(tmp_path, "gemma")
    directory = checkpoint(tmp_path / "out")
    run.write(directory, step=1)
    shutil.copy(directory / "model.safetensors", tmp_path / "out" / "model.safetensors")
    run.copy_files(directory, tmp_path / "out")
    assert verify(tmp_path / "out").exit_code == 0
    assert run.covers(tmp_path / "out") and not run_of(tmp_path, "mit", config={"run": {"id": "x"}}).covers(directory)


def reword(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_terms_that_were_forged_with_the_policy_and_every_digest_are_judged_by_the_registry_at_hand(tmp_path):
    directory = checkpoint(tmp_path / "out")
    record = forged(run_of(tmp_path, "gemma"), directory, "gemma")
    assert record["effective"]["decision"] == "allow_with_duties"
    assert "gemma" not in {duty["terms"] for duty in record["effective"]["duties"]}
    report = verify(directory)
    assert report.exit_code == 1 and "not the one at hand" in report.notes[0]
    assert {p.kind for p in report.problems} == {"violation"}
    assert any("gemma §3.1(2): Provide recipients a copy" in str(p) for p in report.problems)


def test_a_forged_ban_is_a_violation_too(tmp_path):
    directory = checkpoint(tmp_path / "out")
    forged(run_of(tmp_path, "llama2", config={"use": {"mau_over_700m_at_release": False}}), directory, "llama2")
    assert any("may not be used to improve" in str(p) for p in verify(directory).problems)


def forged(run, directory, terms_id):
    """Write a record whose copy of some terms asks nothing, consistent in itself, as a forger with this code would."""
    terms = dict(run.registry.terms)
    terms[terms_id] = replace(terms[terms_id], clauses=())
    run.registry = replace(run.registry, terms=terms, version="2020.01.01", sha256="0" * 64)
    run.write(directory, step=1)
    return load_record(directory)


def test_a_directory_that_is_set_apart_is_named_and_not_passed_over_in_silence(saved, tmp_path):
    extra = checkpoint(saved, "extra")
    (extra / "lineage.json").write_text("{}")  # hides nothing: it does not name the weights beside it
    report = verify(saved)
    assert [(p.kind, p.where) for p in report.problems] == [("tampered", "extra")]
    RunLineage(method="sft", student=Source("s", ref=model_dir(tmp_path, "m", "mit"))).write(extra, step=1)
    report = verify(saved)
    assert report.exit_code == 0 and report.notes == ("extra/ has a lineage of its own and was not checked",)


@pytest.mark.parametrize("name", ["extra.SAFETENSORS", "weights.npz", "extra.Bin", ".hidden.gguf"])
def test_weights_in_another_spelling_are_extra_weights(saved, name):
    (saved / name).write_bytes(b"other weights")
    assert [p.where for p in verify(saved).problems] == [name]
