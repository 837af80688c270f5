"""`kd-plugin run`: one YAML file from data to a checked student."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset

from kd_plugin.cache import TeacherCache
from kd_plugin.cli.capture import CaptureConfig, rows_of
from kd_plugin.cli.main import main
from kd_plugin.cli.parsing import parse_settings
from kd_plugin.cli.recipe import sections
from kd_plugin.cli.recipe import stages as running
from kd_plugin.evaluation import load_evaluation
from kd_plugin.lineage import load_record, verify
from kd_plugin.text import load_text
from tests.scripted_writer import Script, scripted_writer
from tests.text_teachers import oracle
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, monkeypatch, student_dir, teacher_dir, other_teacher_dir):
    """Writes a recipe over two teachers and a mixture of two files, and returns its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "a1?", "answer": "1"}) + "\n")
    for name, columns in (("a", ("prompt", "completion")), ("b", ("question", "answer"))):
        rows = [dict(zip(columns, (f"{name}{i}?", f" {i}"), strict=True)) for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**changes):
        few = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2}
        content = {
            "output_dir": "work",
            "student": student_dir,
            "teachers": {"one": {"model": teacher_dir, "weight": 2.0}, "two": other_teacher_dir},
            "data": {"datasets": [
                {"path": "a.jsonl"}, {"path": "b.jsonl", "columns": {"question": "prompt", "answer": "completion"}},
            ]},
            "capture": {"k": 4},
            "offline": few,
            "panel": {**few, "max_completion_length": 4, "panel": {"combine": "weighted_kl"}},
            **changes,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return str(path)

    return write


def test_from_data_to_a_checked_student_and_nothing_twice(recipe, capsys, monkeypatch):
    asked = {"completions": 1, "max_new_tokens": 4, "tasks": {"mine": {"rows": "asked.jsonl", "verify": "contains"}}}
    path = recipe(evaluate={"tasks": asked})
    assert main(["run", path, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  (\S+) +to do", said, re.M) == ["capture-one", "capture-two", "offline", "panel", "evaluate"]
    assert "decision" in said and not Path("work").exists()
    assert len(re.findall(r"^  (?:offline|panel) +\d+ MiB with ZeRO-0.*; fits$", said, re.M)) == 2  # memory

    assert main(["run", path]) == 0
    assert len(TeacherCache("work/cache-one")) == len(TeacherCache("work/cache-two")) == 16
    assert verify("work/panel").exit_code == 0
    behind = json.dumps(load_record("work/panel")["lineage"] if "lineage" in load_record("work/panel") else
                        load_record("work/panel"))  # fmt: skip
    assert "a.jsonl" in behind and "b.jsonl" in behind
    assert load_evaluation("work/evaluate").results["mine"].questions == 1
    offline = yaml.safe_load(Path("work/recipe/offline.yaml").read_text())
    assert offline["teacher_cache"] == {"work/cache-one": 2.0, "work/cache-two": 1.0}

    monkeypatch.setattr(running.subprocess, "run", None)  # nothing may be started again
    assert main(["run", path]) == 0
    assert "to do" not in capsys.readouterr().out.split("panel  ")[-1]

    shutil.rmtree("work/cache-two")
    assert main(["run", path]) == 2
    assert "offline was done, and capture-two, on which it rests, is not there" in capsys.readouterr().err
    assert main(["run", recipe(capture={"k": 5})]) == 2
    assert "capture-one was done on" in (said := capsys.readouterr().err) and "(k)" in said
    Path("a.jsonl").write_text('{"prompt": "new", "completion": " row"}\n')
    assert main(["run", recipe()]) == 2
    assert "other settings (the data's files)" in capsys.readouterr().err


def stages(path):
    parsed = parse_settings(sections.Recipe, ["--config", path], command="run", description="")
    return sections.stages_of(sections.checked(parsed.settings, parsed.file), parsed.file)


def test_teachers_that_write(recipe, student_dir, monkeypatch, capsys):
    """One dataset of all teachers' text, the student trained on it, then corrected by the same servers."""
    rows = [{"prompt": f"What is {i}?", "answer": f"it is {i % 3}"} for i in range(8)]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {row["prompt"]: row["answer"] for row in rows}

    def write(body):
        said = body["messages"][-1]["content"]
        return answers[said] if said in answers else oracle(answers)(body)

    with scripted_writer(Script(write=write)) as (one, first), scripted_writer(Script(write=write)) as (two, second):
        teachers = {
            name: {"url": url, "model": "scripted", "license": "mit", "max_tokens": 200}
            for name, url in (("one", one), ("two", two))
        }
        few = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2}
        path = recipe(
            teachers=teachers, data={"dataset": "asked.jsonl"}, offline=few,
            capture={"targets": "text", "verify": "contains", "vote": {"by": r"is (\d)"}, "deduplicate": False},
            panel={**few, "max_completion_length": 4, "panel": {"combine": "weighted_kl"}},
        )  # fmt: skip
        assert main(["run", path, "--dry-run"]) == 0
        assert re.findall(r"^  (\S+) +to do", capsys.readouterr().out, re.M) == ["capture-text", "offline", "panel"]
        assert not first.log
        assert main(["run", path]) == 0
        assert len(load_text("work/text")) == 16
        assert len(first.log) == len(second.log) > 8
        assert verify("work/panel").exit_code == 0
        asked = len(first.log)
        assert main(["run", path]) == 0 and len(first.log) == asked
    record = json.dumps(load_record("work/panel"))
    assert "corrected_by" in record and "trained_on_outputs" in record


def test_the_authors_word_on_the_data_holds_for_every_stage(recipe, capsys, teacher_dir):
    few = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    data = {"dataset": "a.jsonl", "license": "own"}
    path = recipe(teachers={"one": teacher_dir}, data=data, offline=few, panel=None)
    assert main(["run", path]) == 0, capsys.readouterr()
    assert verify("work/offline").exit_code == 0
    record = load_record("work/offline")
    (rows,) = [node for node in record["nodes"] if node["kind"] == "dataset"]
    assert [(one["where"], one["value"]) for one in rows["evidence"]] == [("declared", "own")]

    alone = yaml.safe_load(Path("work/recipe/offline.yaml").read_text())
    assert alone.pop("lineage") == {"datasets": [{"repo": "a.jsonl", "license": "own"}]}
    Path("alone.yaml").write_text(yaml.safe_dump({**alone, "output_dir": "alone"}))
    assert main(["offline", "--config", "alone.yaml"]) == 1  # a cache's word for its writer is not the user's
    assert "refused by the terms" in capsys.readouterr().err


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def upper(row):
    return {"prompt": row["prompt"].upper(), "completion": row["completion"]}


@pytest.mark.parametrize("form", ["text field", "formatting", "saved", "stream", "hub"])
def test_every_form_of_data_reaches_the_captures(recipe, form, monkeypatch):
    rows = [{"prompt": f"q{i}?", "completion": f" {i}"} for i in range(4)]
    write("rows.jsonl", rows)
    saved = Dataset.from_list(rows)
    saved.save_to_disk("saved")
    write("plain.jsonl", [{"content": f"Text {i}.", "text": "another"} for i in range(4)])
    monkeypatch.setattr("datasets.load_dataset", hub_of(saved) if form == "hub" else load_dataset)
    data, first = {
        "text field": ({"dataset": "plain.jsonl", "dataset_text_field": "content"}, {"text": "Text 0."}),
        "formatting": ({"datasets": [{"path": "rows.jsonl", "formatting": f"{__name__}:upper"}]}, {"prompt": "Q0?"}),
        "saved": ({"dataset": "saved"}, rows[0]),
        "stream": ({"dataset": "rows.jsonl", "streaming": True}, rows[0]),
        "hub": ({"dataset": "org/rows", "split": "train", "dataset_name": "small"}, rows[0]),
    }[form]
    capture = stages(recipe(data=data, offline=None, panel=None))[0]
    found = next(iter(rows_of(CaptureConfig(**capture.config))))
    assert {key: found[key] for key in first} == first


def hub_of(rows):
    """Stands in for the hub, which cannot be reached: one repository with one configuration and one split."""

    def load(path, name=None, split=None, **_):
        assert (path, name, split) == ("org/rows", "small", "train")
        return rows

    return load


@pytest.mark.parametrize("form", ["saved", "files of a builder", "directory"])
def test_other_rows_are_seen_in_every_form(recipe, form):
    rows = [{"prompt": f"q{i}?", "completion": f" {i}"} for i in range(4)]
    Path("rows").mkdir()
    write("rows/rows.jsonl", rows)
    Dataset.from_list(rows).save_to_disk("saved")
    data = {
        "saved": {"dataset": "saved"},
        "files of a builder": {"datasets": [{"path": "json", "data_files": ["rows/*.jsonl"]}]},
        "directory": {"dataset": "rows"},
    }[form]
    path = recipe(data={**data, "license": "own"})
    before, *_ = stages(path)
    Path("saved/cache-0123456789abcdef.arrow").touch()  # as `map` leaves there
    assert stages(path)[0].digest == before.digest
    assert before.config["lineage"]["datasets"][0]["repo"] == {"saved": "saved", "directory": "rows"}.get(
        form, "rows.jsonl"
    )
    write("rows/rows.jsonl", rows[1:])
    Dataset.from_list(rows[1:]).save_to_disk("saved")
    assert stages(path)[0].digest != before.digest


def test_a_section_that_is_left_out_is_a_stage_that_is_left_out(recipe, student_dir):
    assert [stage.name for stage in stages(recipe(offline=None, capture=None))] == ["panel"]
    (panel,) = stages(recipe(offline=None, capture=None))
    assert panel.config["model_name_or_path"] == student_dir and len(panel.config["datasets"]) == 2
    assert [stage.name for stage in stages(recipe(panel=None))] == ["capture-one", "capture-two", "offline"]
    assert stages(recipe())[-1].config["model_name_or_path"] == "work/offline"


def test_the_example_asks_for_every_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = stages(str(ROOT / "examples" / "recipe.yaml"))
    assert [stage.name for stage in found] == ["capture-expert", "offline", "panel"]


def test_the_pages_first_recipe_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    first, every, *_ = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert every == (ROOT / "examples" / "recipe.yaml").read_text(encoding="utf-8").split("section.\n")[1]
    Path("mine").mkdir()
    Path("mine/rows.jsonl").write_text(rows)
    Path("LICENSE").write_text("Apache License")  # as in a checkout: it does not speak for rows elsewhere
    Path("first.yaml").write_text(first)
    for seed, name in enumerate(("student-start", "models/smollm2-135m-instruct")):
        save_tiny(tmp_path / "kd-plugin-demo" / name, seed=seed)
    assert main(["run", "first.yaml", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "capture-smollm" in said.out and "warning" not in said.out + said.err


def test_how_training_is_launched(recipe):
    assert stages(recipe(launch={"processes": 2}))[2].launcher[-2:] == ("--nproc_per_node", "2")
    told = stages(recipe(launch={"command": "accelerate launch --config_file zero3.yaml"}))
    assert told[2].launcher == ("accelerate", "launch", "--config_file", "zero3.yaml") and len(told[0].launcher) == 1


def test_a_refused_teacher_stops_before_anything_runs(recipe, capsys, teacher_dir):
    refused = {"teachers": {"one": {"license": "openai-terms-of-use"}}}
    code = main(["run", recipe(teachers={"one": teacher_dir}, lineage=refused)])
    assert code == 1 and not Path("work").exists(), capsys.readouterr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": None}, "output_dir is not set"),
        ({"teachers": None}, "no teachers are named"),
        ({"capture": None, "offline": None, "panel": None}, "nothing to do"),
        ({"capture": {"kk": 4}}, r"recipe.yaml, line \d+: capture: unknown key 'kk'. Did you mean 'k'"),
        ({"capture": {"k": "x"}}, r"line \d+: capture.k: expected a whole number, found 'x'"),
        ({"offline": {"learning_rat": 1}}, "offline: unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ({"offline": {"teacher_cache": "x"}}, "offline: teacher_cache is set by the recipe's teachers"),
        ({"data": {"datset": "x"}}, "data: unknown key 'datset'. Did you mean 'dataset'"),
        ({"data": {"datasets": ["a.jsonl"]}}, r"line \d+: data.datasets\[0\]: expected a mapping"),
        ({"data": {"datasets": ["a.jsonl"], "license": "own"}}, r"line \d+: data.datasets\[0\]: expected a mapping"),
        ({"data": None}, "data: neither dataset nor datasets is set; name the rows"),
        ({"data": {"license": "own"}}, "data: neither dataset nor datasets is set"),
        ({"data": {"dataset": 3, "splitt": "x"}}, "data: unknown key 'splitt'. Did you mean 'split'"),
        ({"teachers": {"one": 3}}, r"line \d+: teachers.one: expected a path or hub id, or a mapping .* found 3"),
        ({"teachers": {"../one": "x"}}, "teachers.../one: a directory has the teacher's name; leave out slashes"),
        (
            {"teachers": {"one": {"model": "x", "weight": "heavy"}}},
            r"line \d+: teachers: one: weight: expected a number",
        ),
        (
            {"teachers": {"one": {"model": "x", "weight": -1}}},
            "weight: expected a number above 0 for its cache, found -1",
        ),
        ({"capture": {"k": -1}}, r"line \d+: TopK\(k=-1\): expected a whole number"),
        ({"capture": {"targets": "topk"}}, "targets: 'topk' is unknown.*Did you mean 'top_k'"),
        ({"capture": {"mode": "scores"}}, "mode: 'scores' is unknown.*Did you mean 'score'"),
        ({"offline": {"save_strategy": "sometimes"}}, "offline.save_strategy: expected one of no, steps, epoch"),
        ({"panel": {"panel": 3}}, "3: there is no such file"),
        ({"evaluate": {"tasks": 3}}, "tasks: expected a mapping, or a YAML file that holds it; found 3"),
        ({"evaluate": {}}, "expected `tasks`"),
        ({"launch": {"command": "'"}}, "launch.command: expected words, as `accelerate launch`"),
        ({"launch": {"proceses": 2}}, "launch: unknown key 'proceses'. Did you mean 'processes'"),
        ({"techers": {}}, r"line \d+: unknown key 'techers'. Did you mean 'teachers'"),
        ({"teachers": {"one": {"weight": 1.0}}}, "expected model, or url and more"),
        ({"student": {"use_peft": True}}, r"line \d+: student: model_name_or_path is not set"),
        ({"evaluate": {"taks": "x"}}, "evaluate: unknown key 'taks'. Did you mean 'tasks'"),
        ({"evaluate": {"tasks": "x"}, "offline": None, "panel": None}, "evaluate asks the trained student"),
        ({"data": {"dataset": "a.jsonl", "license": "own"}, "lineage": "x.yaml"}, "Say it there: datasets"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(recipe, capsys, changes, message):
    assert main(["run", recipe(**changes), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and len(said.splitlines()) <= 6, said
