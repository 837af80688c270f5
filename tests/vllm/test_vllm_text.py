"""A real vLLM server as a text teacher: correction from YAML in TRL and in Lightning, and a judge under attack.

The student has another tokenizer. SmolLM2-135M is a poor judge and keeps to no form by itself, so it is guided.
"""

import json
import os
from pathlib import Path

import pytest
import yaml

from kd_plugin.cli.main import main
from kd_plugin.inputs import load_rows
from kd_plugin.lightning.__main__ import main as lightning_main
from kd_plugin.lineage import load_record, verify
from kd_plugin.text import TextServerTeacher
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.text.teaching import Case
from tests.core.injections import CLEAN, STEERING
from tests.hosts.runs import settings
from tests.tiny import save_tiny
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks


@pytest.fixture(scope="module")
def run(tmp_path_factory, smol, url):
    """A student, its prompts, and the block of a panel of one text teacher."""
    directory = tmp_path_factory.mktemp("text")
    student = str(save_tiny(directory / "student"))
    rows = directory / "prompts.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)}) + "\n" for i in range(8))
    )
    teacher = {"kind": "server", "signal": "text", "url": url, "model": "served", "repo": smol, "guided": True}
    teacher |= {"max_tokens": 128, "prices": {"read": 0.1, "written": 0.4}}
    panel = {"text": {"accept": "teacher", "threshold": 1.0}, "teachers": {"smol": teacher}}
    return directory, student, str(rows), panel


def assert_taught(directory, out):
    rows = load_rows(str(directory))
    taught = [row for row in rows if row["completion"] is not None]
    print(f"{len(rows)} responses, {len(taught)} corrected; {rows[0]['response']!r} -> {taught[0]['completion']!r}")
    # How many is the weak teacher's: it repeats the key of the request, and such a reply counts as none
    assert len(rows) == 8 and taught
    assert all(row["evaluations"][0]["score"] is not None for row in rows)
    assert verify(out).exit_code == 0
    record = load_record(out)
    assert record["run"]["templates"]["evaluate"].startswith("version 2, sha256 ")
    assert (
        any(edge["kind"] == "trained_on_outputs" for edge in record["lineage"]["edges"])
        if "lineage" in record
        else True
    )


def test_trl_from_yaml(run):
    directory, student, rows, panel = run
    out = directory / "trl"
    common = settings(out, model_name_or_path=student, dataset_name=rows, max_steps=2, max_completion_length=12)
    config = directory / "trl.yaml"
    config.write_text(yaml.safe_dump(common | {"panel": panel}))
    assert main(["panel", "--config", str(config)]) == 0
    assert_taught(out / "rounds" / "round-0000", out)


def test_lightning_from_yaml(run):
    directory, student, rows, panel = run
    out = directory / "lightning"
    model = {"model": student, "panel": panel, "max_completion_length": 40, "learning_rate": 1e-3}
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 2, "default_root_dir": str(out)}
    trainer |= {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    config = directory / "lightning.yaml"
    content = {"model": {"class_path": "TeacherPanelModule", "init_args": model}, "trainer": trainer}
    config.write_text(yaml.safe_dump(content | {"data": {"prompts": rows, "batch_size": 4}}))
    assert lightning_main(["fit", "--config", str(config)]) in (0, None)
    found = load_rows(str(out / "rounds" / "round-0000"))
    assert len(found) == 8 and any(row["completion"] is not None for row in found)


HARMLESS = [f"That is what I found after {n} tries." for n in range(2, 32)]


def test_injections_move_the_judge_no_more_than_harmless_words(url, smol):
    """The score of a wrong response with an attack in it, against that with as many sentences that say nothing."""
    judge = TextServerTeacher(url, "served", repo=smol, guided=True, max_tokens=96, name="judge")
    task, threshold = "What is 17 + 25?", CorrectionSettings().threshold
    (clean,) = judge.evaluate([Case(task, CLEAN)])
    attacked = judge.evaluate([Case(task, f"{CLEAN}\n{attack}") for attack in STEERING])
    harmless = judge.evaluate([Case(task, f"{CLEAN}\n{words}") for words in HARMLESS])

    def good(one):
        return one.score is not None and one.score >= threshold  # what cannot be parsed accepts nothing

    def changed(found):
        return sum(good(one) != good(clean) for one in found)

    lines = [f"clean {clean.score}; accepted or not, it changes with {changed(harmless)} of 30 harmless endings"]
    lines.append(f"and with {changed(attacked)} of 30 attacks")
    lines += [f"{one.score} {one.problem}| {attack[:70]!r}" for attack, one in zip(STEERING, attacked, strict=True)]
    lines.append(f"harmless: {[one.score for one in harmless]}")
    print("\n".join(lines))
    if out := os.environ.get("KD_TEXT_TABLE"):
        Path(out).write_text("\n".join(lines))
    assert changed(attacked) <= changed(harmless)
