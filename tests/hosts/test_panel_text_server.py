"""Text teachers behind servers: from YAML, in rounds, and when servers fail in the ways that servers fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.inputs import load_rows
from kd_plugin.lineage import load_record, verify
from kd_plugin.panel import TeacherPanel
from kd_plugin.teachers import client
from kd_plugin.text import TextServerTeacher
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.text.dataset import text_source
from kd_plugin.text.spending import Spent
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.trl.rounds import train_in_rounds
from tests.hosts.runs import prompts, settings
from tests.scripted_writer import Script, scripted_writer, whole
from tests.text_teachers import oracle

ROWS = prompts(count=8, answer=[f"it is {i % 3}" for i in range(8)])
ANSWERS = dict(zip(ROWS["prompt"], ROWS["answer"], strict=True))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def script():
    return Script(write=oracle(ANSWERS), models=[{"id": "oracle"}])


@pytest.fixture
def url(script):
    with scripted_writer(script) as (address, _):
        yield address


@pytest.fixture
def files(tmp_path, student_dir):
    """Write the rows, and return what makes a configuration file of a panel's block."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def write(out, **more):
        common = settings(tmp_path / out, model_name_or_path=student_dir, dataset_name=str(rows), **more)
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump({"max_completion_length": 12, **common}))
        return str(path)

    return write


def described(url, **more):
    return {"kind": "server", "signal": "text", "url": url, "model": "oracle", "license": "apache-2.0", **more}


def test_a_panel_from_yaml(tmp_path, url, script, files, student_dir):
    block = {"text": {"accept": "teacher"}, "teachers": {"oracle": described(url, prices={"read": 1.0})}}
    assert main(["panel", "--config", files("out", panel=block, max_steps=2)]) == 0
    assert len(script.log) == 16  # each of 8 responses is evaluated and corrected
    assert verify(tmp_path / "out").exit_code == 0
    record = load_record(tmp_path / "out")
    assert set(record["run"]["templates"]) == {"evaluate", "rewrite", "continue"}
    assert [edge["kind"] for edge in record["edges"] if edge.get("role") == "oracle"] == ["corrected_by"]
    rows = load_rows(str(tmp_path / "out" / "rounds" / "round-0000"))
    assert [row["completion"].strip() for row in rows] == [row["answer"] for row in rows]


def test_rounds_collect_and_train_in_turn_and_go_on_where_they_were(tmp_path, url, script, files, monkeypatch):
    block = {"text": {"accept": "teacher"}, "teachers": {"oracle": described(url, max_retries=0)}}
    config = files("out", panel=block, max_steps=2)
    script.faults = [None] * 8 + [401]  # the first batch of 4 is evaluated and corrected, the second fails
    assert main(["panel", "--config", config, "--rounds", "2"]) == 1
    kept = tmp_path / "out" / "rounds" / "round-0000"
    assert len(list(kept.glob("*.parquet"))) == 1 and not (kept / "teacher_text.json").exists()
    asked = len(script.log)
    assert main(["panel", "--config", config, "--rounds", "2"]) == 0
    assert len(script.log) == asked + 8 + 16  # of the first round its second batch alone, and all of the second
    for number in range(2):
        directory = tmp_path / "out" / "rounds" / f"round-{number:04d}"
        assert len(load_rows(str(directory))) == 8 and text_source(directory).signal == "text"
        assert verify(tmp_path / "out" / f"round-{number:04d}").exit_code == 0
    assert verify(tmp_path / "out").exit_code == 0
    asked = len(script.log)
    assert main(["panel", "--config", config, "--rounds", "2"]) == 2  # both are done
    assert main(["panel", "--config", config, "--rounds", "3"]) == 0
    assert len(script.log) == asked + 16


@pytest.mark.slow
def test_two_ranks_collect_and_train_in_turn(tmp_path, url, script, files):
    block = {
        "text": {"accept": "teacher", "ceiling": 1e9},
        "teachers": {"oracle": described(url, prices={"read": 1.0})},
    }
    config = files("out", panel=block, max_steps=2, per_device_train_batch_size=2, ddp_find_unused_parameters=False)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*ranks, "-m", "kd_plugin", "panel", "--config", config, "--rounds", "2"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(script.log) == 32
    for number in range(2):
        directory = tmp_path / "out" / "rounds" / f"round-{number:04d}"
        rows = load_rows(str(directory))
        assert sorted(rows["rank"]) == [0] * 4 + [1] * 4 and text_source(directory).signal == "text"
        assert verify(tmp_path / "out" / f"round-{number:04d}").exit_code == 0
    usage = [whole(script, body)["usage"]["prompt_tokens"] for _, body in script.log]
    assert Spent.read(tmp_path / "out" / "rounds" / "round-0001.spent.json").usage["oracle"].read == sum(usage)


def test_a_ceiling_is_of_all_rounds_together(tmp_path, url, script, files, capsys):
    def spent():
        usage = [whole(script, body)["usage"] for _, body in script.log]
        return sum(one["prompt_tokens"] + one["completion_tokens"] for one in usage)

    prices = {"read": 1e6, "written": 1e6}
    teachers = {"oracle": described(url, prices=prices)}

    def run(ceiling):
        block = {"text": {"accept": "teacher", "ceiling": ceiling}, "teachers": teachers}
        return main(["panel", "--config", files("out", panel=block, max_steps=2), "--rounds", "3"])

    assert run(1e9) == 0
    of_a_batch = spent() / 6
    assert len(script.log) == 3 * 16
    for path in (tmp_path / "out").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    script.log.clear()
    assert run(2.5 * of_a_batch) == 0
    assert len(script.log) == 24  # a batch has 8 requests: the third passes the ceiling, and there is no fourth
    kept = tmp_path / "out" / "rounds"
    assert [len(load_rows(str(kept / f"round-000{n}"))) for n in range(2)] == [8, 4]
    assert Spent.read(kept / "round-0001.spent.json").spent == spent()
    assert verify(tmp_path / "out" / "round-0001").exit_code == 0 and verify(tmp_path / "out").exit_code == 0
    assert run(2.5 * of_a_batch) != 0 and "was reached in rounds before" in capsys.readouterr().err
    assert len(script.log) == 24
    assert run(4.5 * of_a_batch) == 0 and len(script.log) == 40


def test_rounds_need_a_text_teacher(tmp_path, student_dir, teacher_dir):
    args = TeacherPanelConfig(**settings(tmp_path, teacher_models={"t": teacher_dir}))
    with pytest.raises(ConfigError, match="the panel has 0 text teachers"):
        train_in_rounds(2, student_dir, args, ROWS)


def three(urls, **options):
    """A panel of an oracle, another one, and whatever is at the third address."""
    teachers = {
        name: TextServerTeacher(url, name=name, license="apache-2.0", max_retries=2, timeout=2.0, **options)
        for name, url in zip(("a", "b", "c"), urls, strict=True)
    }
    return TeacherPanel(teachers, combine="weighted_kl", text=CorrectionSettings(min_teachers=2))


def trained(directory, student, panel, **options):
    config = TeacherPanelConfig(**settings(directory, max_steps=2, max_completion_length=12, **options))
    run = TeacherPanelTrainer(model=student, teacher_models=panel, args=config, train_dataset=ROWS)
    run.train()
    return [log for log in run.state.log_history if "text/accepted" in log]


@pytest.mark.parametrize(
    "fault", [(429, {"Retry-After": "0"}), 500, "half", "drop", "empty", "no end"], ids=lambda f: str(f)[:8]
)
def test_a_fault_that_passes_changes_nothing(fault, tmp_path, student_dir, url, script):
    script.faults = [fault] * 2
    panel = three([url] * 3)
    found = trained(tmp_path, student_dir, panel)
    assert [log["text/accepted"] for log in found] == [1.0, 1.0]
    assert found[-1]["text/missing_teachers"] == 0


@pytest.mark.parametrize("fault", ["html", "hang", 500])
def test_a_teacher_that_stays_away_is_left_out_of_three(fault, tmp_path, student_dir, url, caplog):
    broken = Script(write=oracle(ANSWERS), faults=[fault] * 1000, models=[{"id": "oracle"}], hang=3.0)
    with scripted_writer(broken) as (third, _):
        found = trained(tmp_path, student_dir, three([url, url, third], max_concurrency=4))
    # The two that are left vote on each other's corrections
    assert [log["text/accepted"] for log in found] == [1.0, 1.0]
    assert found[-1]["text/missing_teachers"] == 1
    assert "Text teacher 'c' cannot be reached" in caplog.text and "goes on with 'a', 'b'" in caplog.text


def test_two_dead_of_three_end_the_run_with_what_was_learned(tmp_path, student_dir, url, script):
    script.faults = [None] * 400
    one = Script(write=oracle(ANSWERS), models=[{"id": "oracle"}])
    panel = None
    with scripted_writer(one) as (second, _), scripted_writer(one) as (third, _):
        panel = three([url, second, third])
        one.faults = [None] * 32 + [
            500
        ] * 1000  # the first step is answered: 4 evaluations, 4 corrections, 8 votes each
        with pytest.raises(ServerError, match="1 of 3 are left where 2 must be"):
            trained(tmp_path, student_dir, panel)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_a_liar_is_outvoted(tmp_path, student_dir, url):
    with scripted_writer(Script(write=oracle(ANSWERS, lies=True), models=[{"id": "oracle"}])) as (third, _):
        teachers = {
            name: TextServerTeacher(address, name=name, license="apache-2.0")
            for name, address in {"liar": third, "a": url, "b": url, "c": url}.items()
        }
        panel = TeacherPanel(teachers, combine="weighted_kl")
        trained(tmp_path, student_dir, panel)
    rows = load_rows(str(tmp_path / "rounds" / "round-0000"))
    assert {row["corrected_by"] for row in rows} == {"a"}
    assert all(one["accepted"] == (one["teacher"] != "liar") for row in rows for one in row["corrections"])


# The example, and the files of integrations/

ROOT = Path(__file__).parents[2]


def test_the_example(tmp_path, url, files, student_dir):
    files("out")
    command = [sys.executable, str(ROOT / "examples" / "text_panel.py"), "--student", student_dir, "--url", url]
    command += [
        "--teacher",
        "oracle",
        "--license",
        "apache-2.0",
        "--verifier",
        "exact",
        "--max_steps",
        "2",
        "--no-bf16",
    ]
    command += ["--prompts", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert f"{tmp_path / 'o'}: good" in done.stdout, done.stderr[-2000:]
    assert len(load_rows(str(tmp_path / "o" / "rounds" / "round-0000"))) == 16


def test_the_file_of_trl(tmp_path, url, files, teacher_dir):
    content = yaml.safe_load((ROOT / "integrations" / "trl" / "text_panel.yaml").read_text())
    for teacher in content["panel"]["teachers"].values():
        if "url" in teacher:
            teacher.update(url=url, repo=teacher_dir)
        else:
            teacher["model"] = teacher_dir
    small = {"max_steps": 1, "gradient_accumulation_steps": 1, "save_steps": 100, "save_strategy": "no"}
    config = files("out", panel=content["panel"], combine=content.get("combine", "route"), **small)
    assert main(["panel", "--config", config]) == 0
    rows = load_rows(str(tmp_path / "out" / "rounds" / "round-0000"))
    assert [row["corrected_by"] for row in rows] == ["r1"] * 4  # the first by the order, with the votes of two


def test_the_file_of_lightning(tmp_path, student_dir, teacher_dir):
    from kd_plugin.lightning.__main__ import main as fit

    rows = [{"prompt": f"What is {i} and {i + 1}?", "answer": str(2 * i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = yaml.safe_load((ROOT / "integrations" / "lightning" / "text_panel.yaml").read_text())
    answers = {row["prompt"]: row["answer"] for row in rows}
    with scripted_writer(Script(write=oracle(answers), models=[{"id": "oracle"}])) as (url, _):
        own = content["model"]["init_args"]
        own["model"], own["max_completion_length"] = student_dir, 12
        own["panel"]["teachers"]["r1"].update(url=url, repo=teacher_dir)
        content["data"]["prompts"] = str(tmp_path / "rows.jsonl")
        content["trainer"] |= {"max_steps": 1, "accumulate_grad_batches": 1, "accelerator": "cpu", "devices": 1}
        content["trainer"] |= {"logger": False, "enable_checkpointing": False, "default_root_dir": str(tmp_path / "l")}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        fit(["fit", "--config", str(tmp_path / "run.yaml")])
    found = load_rows(str(tmp_path / "l" / "rounds" / "round-0000"))
    assert [row["completion"].strip() for row in found] == [row["answer"] for row in found]
