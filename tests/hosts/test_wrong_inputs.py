"""Wrong inputs to all commands: a few lines that name the file, the line and the key, and the exit code."""

import json

import pytest

from kd_plugin.cli.main import COMMANDS, main

ROW = {"prompt": "a?", "completion": " b", "answer": "b"}
TASKS = "tasks: {tasks: {mine: {rows: DATA, verify: exact}}}\n"
RUN = "output_dir: x\nstudent: MODEL\nteachers: {a: {model: MODEL}}\ndata: {dataset: DATA}\n"
PILOT = f"{RUN}budget: 1e9\n{TASKS}"
LADDER = f"output_dir: x\nrungs: [MODEL]\nbar: 0.5\n{TASKS}"
# Command, the YAML of --config (None for none), what the message must say. FILE stands for the YAML file, DIR for an
# empty directory, DATA for a small dataset, MODEL for a model.
WRONG = [
    ("capture", None, "dataset is not set", "--dataset"),
    ("capture --datset DATA", None, "unknown option --datset", "Did you mean '--dataset'"),
    ("capture --config FILE", "datset: x", "FILE, line 1: unknown key 'datset'", "Did you mean 'dataset'"),
    ("capture --config FILE", "dataset: x\nk: many", "FILE, line 2: k: expected a whole number, found 'many'"),
    ("capture --config FILE", "dataset: [x", "FILE, line 1, column", "not valid YAML"),
    ("capture --config FILE", "dataset: a\ndataset: b", "FILE, line 2: dataset is set twice"),
    ("capture --config FILE", "", "FILE: expected lines `name: value`, found nothing"),
    ("capture --config missing.yaml", None, "missing.yaml: there is no such file"),
    ("capture --dataset DATA --teacher MODEL --output_dir DIR --dtype float17", None, "dtype", "float17", "float16"),
    ("capture --dataset DATA --teacher MODEL --output_dir DIR --targets topk", None, "targets", "Did you mean 'top_k'"),
    (
        "capture --config FILE",
        "dataset: DATA\nteacher: MODEL\noutput_dir: DIR\nmode: scores",
        "FILE, line 4: mode: 'scores' is unknown",
        "Did you mean 'score'",
    ),
    (
        "capture --config FILE",
        "dataset: DATA\noutput_dir: DIR\nteacher:\n  url: http://x\n  top_kk: 3",
        "FILE, line 5: teacher: unknown key 'top_kk'",
        "Did you mean 'top_k'",
    ),
    ("capture --dataset nowhere.jsonl --teacher MODEL --output_dir DIR", None, "nowhere.jsonl"),
    ("cache", None, "required: info|verify|"),
    ("cache verfy DIR", None, "unknown 'verfy'", "Did you mean 'verify'"),
    ("cache info DIR --jsn", None, "unknown option --jsn", "Did you mean '--json'"),
    ("cache merge DIR", None, "required: caches"),
    ("cache merge DIR DIR --weights x", None, "--weights: invalid float value: 'x'"),
    ("cache fidelity --teacher MODEL", None, "dataset is not set"),
    ("cache fidelity --config FILE", "k: [8, x]", "FILE, line 1: k[1]: expected a whole number, found 'x'"),
    ("cache fidelity --k 8 x", None, "--k[1]: expected a whole number, found 'x'"),
    ("offline", None, "no student is named", "model_name_or_path"),
    ("offline off.yaml", None, "unexpected argument 'off.yaml'", "--config off.yaml"),
    ("offline --config", None, "--config needs a YAML file"),
    ("offline --config FILE", "model_name_or_path: MODEL\ntemperature: hot", "FILE, line 2: temperature: expected"),
    ("offline --config FILE", "model_name_or_path: MODEL\nlearning_rat: 1e-3", "FILE, line 2", "'learning_rate'"),
    ("offline --config FILE", "model_name_or_path: MODEL\ndivergence: klm", "FILE, line 2: ", "klm"),
    ("offline --config FILE", "model_name_or_path: MODEL\nuse_cpu: true\nloss_type: dft", "FILE, line 3: loss_type"),
    ("offline --config FILE", "model_name_or_path: MODEL\nteacher_cache: {a: x}", "FILE, line 2: teacher_cache.a"),
    ("offline --config FILE", "model_name_or_path: MODEL\nlr_scheduler_type: linaer", "FILE, line 2", "linaer"),
    ("offline --packing maybe --model_name_or_path MODEL", None, "--packing: expected true or false, found 'maybe'"),
    ("panel --teacher_models '{t:' --model_name_or_path MODEL", None, "--teacher_models: neither YAML nor JSON"),
    (
        "panel --config FILE",
        "model_name_or_path: MODEL\nuse_cpu: true\npanel:\n  teachers:\n    a:\n      modle: x",
        "FILE, line 6",
        "modle",
        "Did you mean 'model'",
    ),
    ("panel --config FILE", "model_name_or_path: MODEL\nrollouts: somebody", "FILE, line 2", "somebody"),
    ("plan --studnet x", None, "Did you mean '--student'"),
    ("plan --student Qwen/Qwen2.5-7", None, "Qwen/Qwen2.5-7"),
    ("plan --config FILE", "student: Qwen/Qwen2.5-7B\nnodes: few", "FILE, line 2: nodes: expected a whole number"),
    ("plan --config FILE", "student: Qwen/Qwen2.5-7B\nteachers: [Qwen/Qwen2.5-7B:sharder]", "FILE, line 2", "sharde"),
    ("doctor --memory_gib much", None, "--memory_gib: expected a number", "found 'much'"),
    ("trace DIR", None, "required: -o/--output"),
    ("trace DIR -o page.html --limit none", None, "--limit: invalid int value: 'none'"),
    ("consolidate", None, "arguments are required"),
    ("consolidate DIR --workers x", None, "--workers: invalid int value: 'x'"),
    ("demo --seed one", None, "--seed: expected a whole number, found 'one'"),
    ("completion powershell", None, "unknown 'powershell'", "bash, zsh, fish"),
    ("lineage", None, "required: COMMAND"),
    ("lineage shw DIR", None, "Did you mean 'show'"),
    ("lineage check FILE", "techers: {}", "FILE", "techers", "Did you mean 'teachers'"),
    ("lineage export DIR --format spdxx", None, "unknown 'spdxx'", "Did you mean 'spdx'"),
    ("run", None, "no recipe is named"),
    ("run FILE", "output_dir: x\nstudnet: y", "FILE, line 2: unknown key", "Did you mean 'student'"),
    ("run FILE", "output_dir: x\nstudent: y\nteachers: {a: b}\noffline: {}\nevaluate: {taks: x}", "FILE, line 5",
     "Did you mean 'tasks'"),
    ("run FILE", "output_dir: x\nstudent: y\nteachers: {a: b}\noffline: {}\ndata: {licence: own}", "FILE, line 5: data",
     "Did you mean 'license'"),
    ("capture --dataset DATA --teacher MODEL --output_dir DIR --dataset_text_field promt", None, "dataset_text_field",
     "Did you mean 'prompt'"),
    ("evaluate", None, "model is not set", "--model"),
    ("evaluate --model MODEL --tasks missing.yaml --output_dir DIR", None, "missing.yaml: there is no such file"),
    ("evaluate --model MODEL --tasks FILE --output_dir DIR", "tasks:\n  mine: {rows: DATA, verfy: exact}", "verfy",
     "Did you mean 'verify'"),
    ("evaluate --model MODEL --tasks FILE --output_dir DIR", "tasks:\n  mine: {rows: DATA, completions: many}", "many"),
    ("evaluate --model MODEL --tasks FILE --output_dir DIR", "tasks:\n  mine: {rows: DATA, verify: exacd}", "exacd",
     "exact"),
    ("run FILE", f"{RUN}offline: {{divergence: klm}}", "FILE, line 5", "'klm'", "forward_kl"),
    ("run FILE", f"{RUN}offline: {{}}\npanel:\n  temperature: -1", "FILE, line 7: temperature is -1.0", "positive"),
    ("run FILE", f"{RUN}panel:\n  panel: {{combin: route}}", "FILE, line 6: panel: unknown key 'combin'", "'combine'"),
    ("pilot", None, "output_dir is not set"),
    ("pilot --bugdet 3", None, "unknown option --bugdet", "Did you mean '--budget'"),
    ("pilot --config FILE", "studnet: x", "FILE, line 1: unknown key 'studnet'", "Did you mean 'student'"),
    ("pilot --config FILE", "student: x\nbudget: lots", "FILE, line 2: budget: expected a number, found 'lots'"),
    ("pilot --config FILE", "student: x\nunit: hours", "FILE, line 2", "unit 'hours'", "flops, seconds, money"),
    ("pilot --config FILE", "student: x\nmethods: [ofline]", "FILE, line 2", "'ofline'", "offline_teacher"),
    ("pilot --config FILE", "seeds: [0, one]", "FILE, line 1: seeds[1]: expected a whole number, found 'one'"),
    ("pilot --config FILE", f"{PILOT}methods: [text_correction]", "FILE, line 7: methods: ", "signal: text"),
    ("pilot --config FILE", f"{PILOT}offline:\n  learning_rat: 1", "FILE, line 8: offline: unknown key",
     "Did you mean 'learning_rate'"),
    ("pilot --config FILE", f"{PILOT}panel: {{divergence: klm}}", "FILE, line 7", "'klm'", "reverse_kl"),
    ("ladder", None, "output_dir is not set"),
    ("ladder --config FILE", "rung: x", "FILE, line 1: unknown key 'rung'", "Did you mean 'rungs'"),
    ("ladder --config FILE", "bar: 80", "FILE, line 1: bar is 80.0; expected an accuracy above 0 and at most 1"),
    ("ladder --config FILE", f"{LADDER}recipe: missing.yaml", "missing.yaml: there is no such file"),
    ("ladder --config FILE", f"{LADDER}recipe: {{techers: {{}}}}", "FILE, line 5: unknown key 'techers'", "'teachers'"),
    ("ladder --config FILE", f"{LADDER}recipe: {{teachers: {{a: MODEL}}, offline: {{ce_wight: 1}}}}",
     "FILE, line 5: offline: unknown key 'ce_wight'", "Did you mean 'ce_weight'"),
    ("ladder --config FILE",
     f"{LADDER}recipe: {{teachers: {{a: MODEL}}, data: {{dataset: DATA}}, offline: {{}}}}\nplan: {{node: 2}}",
     "FILE, line 6: plan: unknown key 'node'", "Did you mean 'nodes'"),
    ("cache import DIR", None, "SOURCE OUTPUT --teacher"),
    ("cache import --format axolotl DIR DIR", None, "SOURCE OUTPUT --teacher"),
    ("cache extract DIR", None, "unknown 'extract'", "merge, fidelity, append, import"),
    ("report DIR -o page.html", None, "DIR holds no logs", "trainer_state.json"),
    ("panel --teacher_models {t: --model_name_or_path MODEL", None, "--teacher_models", "YAML"),
    ("panel --rounds --config FILE", "model_name_or_path: MODEL", "--rounds needs a number", "'--config'"),
    ("panel --rounds few --config FILE", "model_name_or_path: MODEL", "--rounds needs a number", "'few'"),
    ("panel --config FILE", "model_name_or_path: MODEL\nuse_cpu: true\ndataset_name: DATA", "No teacher is given",
     "panel: {teachers:"),
    ("capture --dataset BROKEN --teacher MODEL --output_dir DIR", None, "broken.jsonl, line 2, column 16: not valid",
     "delimiter"),
    ("capture --dataset NOTHING --teacher MODEL --output_dir DIR", None, "nothing.jsonl is empty; expected rows"),
    ("evaluate --model nowhere --tasks FILE --output_dir DIR", "tasks:\n  mine: {rows: DATA, verify: exact}",
     "'nowhere' cannot be loaded", "directory or hub id"),
    ("evaluate --model MODEL --tasks FILE --output_dir DIR", "tasks:\n  mine: {rows: nowhere.jsonl, verify: exact}",
     "nowhere.jsonl: there is no such file"),
    ("run FILE", f"{RUN}offline: {{}}\nlaunch: {{processes: two}}", "FILE, line 6: launch.processes", "found 'two'"),
    ("run FILE", f"{RUN.replace('DATA', 'nowhere.jsonl')}offline: {{}}", "nowhere.jsonl: there is no such file"),
    ("pilot --config FILE", "budget: -3", "FILE, line 1: budget is -3; expected a number above 0"),
    ("cache fidelity --teacher MODEL --dataset DATA", None, "student is not set", "kd-plugin cache fidelity --help"),
    ("cache append DIR", None, "dataset is not set", "More: kd-plugin cache append --help"),
    ("lineage graph DIR --outptu x", None, "Did you mean '--output'", "More: kd-plugin lineage graph --help"),
    ("report nowhere -o page.html", None, "nowhere holds no logs"),
    ("doctor --config FILE", "zero: 3", "FILE, line 1: unknown key 'zero'", "servers"),
    ("offlin", None, "Did you mean 'offline'"),
    ("capture --dataset NUMBERS --teacher MODEL --output_dir DIR", None, "row 0: 'prompt' is 3; expected text"),
    ("capture --config FILE", "dataset: DATA\noutput_dir: DIR\nteacher: {url: 3}", "FILE, line 3: url=3: expected"),
    ("capture --config FILE", "teacher: MODEL\noutput_dir: DIR\ndatasets:\n- {path: DATA, fraction: half}",
     "FILE, line 4: datasets[0]: fraction: expected a number", "'half'"),
    ("capture --dataset DATA --split train[5 --teacher MODEL --output_dir DIR", None, "split 'train[5'",
     "train[:1000]"),
    ("offline --config FILE", "model_name_or_path: MODEL\nenv: 3", "FILE, line 2: env: expected a mapping"),
    ("offline --config FILE", "model_name_or_path: MODEL\nuse_cpu: true\ndeepspeed:\n  zero_optimization: x",
     "FILE, line 4: deepspeed: zero_optimization: expected a mapping, found 'x'"),
    ("offline --config FILE", "model_name_or_path: MODEL\nsave_strategy: sometimes", "FILE, line 2: save_strategy",
     "one of no, steps, epoch"),
    ("evaluate --config FILE", "model: MODEL\noutput_dir: x\ntasks: 3", "FILE, line 3: tasks: expected a mapping"),
    ("evaluate --model MODEL --tasks FILE --output_dir x", "tasks:\n  mine: {rows: NUMBERS, verify: exact}", "row 0",
     "the prompt '3'; expected text"),
    ("evaluate --model MODEL --tasks FILE --output_dir DATA", "tasks:\n  mine: {rows: DATA, verify: exact}",
     "a file is where a directory is needed"),
    ("pilot --config FILE", "student: x\nbudget: nan", "FILE, line 2: budget is nan; expected a number above 0"),
    ("plan --config FILE", "student: Qwen/Qwen2.5-7B\nteachers: [Qwen/Qwen2.5-7B:server]\ntext_teachers: {r: 3}",
     "FILE, line 3: text_teachers: r: prices: expected a mapping"),
    ("cache fidelity --dataset DATA --teacher MODEL --student nowhere", None,
     "No tokenizer can be loaded from 'nowhere'"),
    ("cache append DIR --dataset DATA --teacher MODEL", None, "empty is no teacher cache", "no manifest.json"),
    ("run FILE", f"{RUN}offline: {{}}\nevaluate: {{tasks: 3}}", "FILE, line 6: tasks: expected a mapping"),
    ("run FILE", f"{RUN}capture: {{k: -1}}\noffline: {{}}", "FILE, line 5", "expected a whole number of at least 1"),
]  # fmt: skip


# What is wrong with data, with a cache or with a place is no wrong usage
IN_DATA = (
    "nowhere.jsonl", "broken.jsonl", "nothing.jsonl", "numbers.jsonl",
    "train[5", "append empty --", "--output_dir rows",
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "content", *["says"]), [(a, b, c) for a, b, *c in WRONG], ids=lambda v: str(v)[:60]
)
def test_wrong_input(command, content, says, tmp_path, capsys, monkeypatch, student_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROW) + '\n{"prompt": "a" "completion": "b"}\n')
    (tmp_path / "nothing.jsonl").touch()
    (tmp_path / "numbers.jsonl").write_text('{"prompt": 3, "completion": 4, "answer": "b"}\n')
    places = {"FILE": "wrong.yaml", "DIR": "empty", "DATA": "rows.jsonl", "MODEL": student_dir}
    places |= {"BROKEN": "broken.jsonl", "NOTHING": "nothing.jsonl", "NUMBERS": "numbers.jsonl"}

    def placed(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    if content is not None:
        (tmp_path / "wrong.yaml").write_text(placed(content))
    words = ["{t:" if word == "'{t:'" else word for word in placed(command).split()]
    told = " ".join([*words, placed(content or "")])
    assert main(words) == (1 if any(one in told for one in IN_DATA) else 2)
    message = capsys.readouterr().err.strip()
    lines = [line for line in message.splitlines() if line]
    assert 1 <= len(lines) <= 6 and len(message) <= 6 * 120, message
    assert "Traceback" not in message and "usage:" not in message
    for said in says:
        assert placed(said) in message, message


def test_the_recipe_of_a_ladder_in_a_file_of_its_own(tmp_path, capsys, monkeypatch, student_dir):
    """The message names that file and its line, not the one that names it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "winner.yaml").write_text(f"teachers: {{a: {student_dir}}}\noffline:\n  ce_wight: 1\n")
    given = f"{LADDER}recipe: winner.yaml\n".replace("MODEL", str(student_dir)).replace("DATA", "rows.jsonl")
    (tmp_path / "ladder.yaml").write_text(given)
    assert main(["ladder", "--config", "ladder.yaml"]) == 2
    assert "kd-plugin ladder: winner.yaml, line 3: offline: unknown key 'ce_wight'" in capsys.readouterr().err


def test_there_are_forty_over_all_commands():
    assert len(WRONG) >= 40 and {command.split()[0] for command, *_ in WRONG} >= set(COMMANDS)
