import json

import pytest

from kd_plugin.cli.lineage import main
from tests.core.lineage_help import checkpoint, run_of


@pytest.fixture
def saved(tmp_path):
    directory = checkpoint(tmp_path / "out")
    run_of(tmp_path, "gemma", config={"teachers": {"t0": {"repo": "org/[red]g"}}}).write(directory, step=7)
    return directory


def test_show_prints_the_tree_the_duties_and_that_this_is_no_advice(saved, capsys):
    assert main(["show", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "taught by (distributions) (t0): org/[red]g [gemma, from README.md]" in shown  # no markup is read
    assert "allow with duties" in shown and "§3.1(4)" in shown and "not legal advice" in shown


def test_show_as_json_is_the_record(saved, capsys):
    assert main(["show", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((saved / "lineage.json").read_bytes())


def test_verify_has_an_exit_code_for_every_outcome(saved, tmp_path, capsys):
    assert main(["verify", str(saved)]) == 0
    assert "good" in capsys.readouterr().out
    (saved / "model.safetensors").write_bytes(b"other")
    assert main(["verify", str(saved), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 2 and report["problems"][0]["where"] == "model.safetensors"
    (saved / "lineage.json").unlink()
    assert main(["verify", str(saved)]) == 3

    facts = {"distribute": True, "mau_over_700m_at_release": False}
    misnamed = checkpoint(tmp_path / "misnamed")
    run_of(tmp_path, "llama3.1", config={"use": facts, "student": {"name": "acme"}}).write(misnamed, step=1)
    assert main(["verify", str(misnamed)]) == 1


def test_show_tells_a_damaged_record_from_a_missing_one(saved, capsys):
    (saved / "lineage.json").write_text("{")
    assert main(["show", str(saved)]) == 2
    (saved / "lineage.json").unlink()
    assert main(["show", str(saved)]) == 3
    assert "was not finished" in capsys.readouterr().err


def test_help_teaches_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as left:
        main(["verify", "--help"])
    assert left.value.code == 0
    assert "tampered" in capsys.readouterr().out
