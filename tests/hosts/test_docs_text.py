"""The code of docs/text-teachers.md and the files for text run as typed, with a scripted server and tiny students."""

import json
import re
from pathlib import Path

import yaml

from kd_plugin.cli.main import main
from kd_plugin.lightning.__main__ import main as fit
from kd_plugin.lineage import load_record
from kd_plugin.text import load_text
from kd_plugin.verifying import make_verifier
from tests.core.text_worker import questions
from tests.scripted_writer import Script, scripted_writer
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "text-teachers.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def write(body):
    number = int(body["messages"][-1]["content"].split()[2].split("+")[0])
    return f"<think>{number} twice, {body['seed']}</think>It is {2 * number}"


def test_the_page_and_its_files_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    save_tiny(tmp_path / "STUDENT", tied=False)
    (tmp_path / "my_checks.py").write_text("def is_right(response, row):\n    return True\n")
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, questions(12))) + "\n")
    (tmp_path / "eval.jsonl").write_text(
        json.dumps({"question": "How far is it from here to the moon and back?"}) + "\n"
    )
    capture, verifiers, training = blocks("yaml")
    for one in yaml.safe_load(verifiers)["verify"]:
        make_verifier(one)
    with scripted_writer(Script(write=write)) as (url, script):
        (tmp_path / "capture.yaml").write_text(capture.replace("http://127.0.0.1:8000", url))
        estimate, run = [line.split()[1:] for line in blocks("bash")[0].splitlines()]
        assert main(estimate) == 0 and not script.log
        assert main(run) == 0 and len(script.log) == 48
        scope = {"prompts": questions(6)}
        code = blocks("python")
        assert len(code) == 3
        for block in code:
            block = block.replace("http://127.0.0.1:8000", url)
            block = block.replace("max_steps=2", "max_steps=2, use_cpu=True, report_to='none'")
            exec(compile(block, str(PAGE), "exec"), scope)
        file = (ROOT / "integrations/capture/text.yaml").read_text().replace("http://127.0.0.1:8000", url)
        (tmp_path / "full.yaml").write_text(file)
        assert main(["capture", "--config", "full.yaml", "--output_dir", "full"]) == 0
    rows = load_text("full")
    assert len(rows) == 24 and {row["domain"] for row in rows} == {"odd", "even"}
    small = ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--model_name_or_path", "STUDENT"]
    (tmp_path / "train.yaml").write_text(training)
    # Python trained into `student` above, and a run does not overwrite another's checkpoints
    assert main(["offline", "--config", "train.yaml", "--output_dir", "by-yaml", *small]) == 0
    yaml_file = str(ROOT / "integrations/trl/text.yaml")
    text = ["--teacher_text", "full", "--output_dir", "trl", "--max_length", "128", "--bf16", "false"]
    assert main(["offline", "--config", yaml_file, *text, *small]) == 0
    options = {
        "model.model": "STUDENT", "data.text": "full", "data.max_length": 128, "trainer.precision": "32-true",
        "trainer.max_epochs": "null", "trainer.max_steps": 2, "trainer.accumulate_grad_batches": 1,
        "trainer.val_check_interval": 2, "trainer.check_val_every_n_epoch": "null", "trainer.logger": "false",
        "trainer.default_root_dir": str(tmp_path / "lightning"), "trainer.accelerator": "cpu",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    fit(["fit", "--config", str(ROOT / "integrations/lightning/text.yaml"), *flags])
    saved = [*(tmp_path / "lightning").rglob("last.ckpt")]
    for directory in (tmp_path / "by-yaml", tmp_path / "trl", *saved):
        record = load_record(directory)
        assert "trained_on_outputs" in {edge["kind"] for edge in record["edges"]}
    assert len(saved) == 1
