"""Help and completion: listed for every command, without the imports of any."""

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kd_plugin.cli import described, main

HEAVY = ("torch", "transformers", "datasets", "trl", "lightning", "numpy", "pyarrow", "rich", "huggingface_hub")
ROOT = Path(__file__).parents[2]


def python(code, **environment):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=ROOT)


def test_the_list_of_options_is_that_of_the_commands():
    """If not: `python -m kd_plugin.cli.described` writes it anew."""
    assert json.loads(described.FILE.read_text(encoding="utf-8")) == json.loads(json.dumps(described.described()))


def paths():
    listed = json.loads(described.FILE.read_text(encoding="utf-8"))

    def within(name, one):
        yield [name]
        for below, other in one["commands"].items():
            yield from ([name, *rest] for rest in within(below, other))

    return [path for name, one in listed.items() for path in within(name, one)]


def test_help_imports_nothing_heavy():
    code = "import sys; from kd_plugin.cli.main import main\n"
    code += f"for path in {paths()}: assert main([*path, '--help']) == 0\nassert main(['--help']) == 0\n"
    done = python(code + f"print([m for m in {HEAVY} if m in sys.modules])")
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-300:] + done.stderr


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["-c", "import kd_plugin"], 0.1),
        *[(["-m", "kd_plugin", *c, "--help"], 0.5) for c in ([], ["capture"], ["run"])],
    ],
    ids=str,
)
def test_importing_and_helping_take_no_time(words, most):
    seconds = []
    for _ in range(5):  # seconds of the processor, the least of five: other work beside it does not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < most, seconds


@pytest.mark.parametrize("path", paths(), ids=" ".join)
def test_every_command_and_sub_command_explains_itself(path, capsys):
    assert main.main([*path, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: kd-plugin {' '.join(path)}") and "-h, --help" in out
    assert re.search(r"[Ee]xit codes:", out)


def test_help_lists_commands_by_what_people_want_to_do(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(group + ":\n") for group in dict.fromkeys(one.group for one in main.COMMANDS.values())]
    assert len(places) >= 4 and places == sorted(places)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell, capsys):
    assert main.main(["completion", shell]) == 0
    assert "kd-plugin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kd-plugin li", {"lineage"}),
        ("kd-plugin lineage verify --k", {"--key"}),
        ("kd-plugin capture --max_new", {"--max_new_tokens"}),
        ("kd-plugin cache fidelity --bud", {"--budget_bytes"}),
        ("kd-plugin lineage export x --format sp", {"spdx"}),
    ],
)
def test_the_shell_is_answered(line, found, tmp_path):
    """As bash asks: argcomplete reads the line from the environment, and writes to file descriptor 8."""
    answer = tmp_path / "answer"
    code = f"import os; os.dup2(os.open({str(answer)!r}, os.O_WRONLY | os.O_CREAT), 8); os.dup2(2, 9); "
    code += "from kd_plugin.cli.main import main; main([])"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash"}
    done = python(code, _ARGCOMPLETE="1", **asked)
    assert {word.strip() for word in answer.read_text().split("\n")} == found, done.stderr


ASKING = {  # a shell that has evaluated what `completion` prints, and is asked for words
    "bash": """eval "$(kd-plugin completion bash)"; complete -p kd-plugin > /dev/null || exit 1
        COMP_WORDS=({line}); COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))
        COMP_TYPE=9; _python_argcomplete kd-plugin; printf '%s\\n' "${{COMPREPLY[@]}}" """,
    "fish": "kd-plugin completion fish | source; complete -C '{line}' | string split -f1 \\t",
}


@pytest.mark.parametrize("shell", ASKING)
def test_a_real_shell_completes(shell, tmp_path):
    """zsh, which completes at a terminal alone, was tried by hand."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "kd-plugin"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m kd_plugin "$@"\n')
    command.chmod(0o755)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    asked = ASKING[shell].format(line="kd-plugin lineage ver")
    done = subprocess.run([shell, "-c", asked], capture_output=True, text=True, env=variables)
    assert done.stdout.split() == ["verify"], done.stderr


def test_noise_that_means_nothing_is_filtered(caplog):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        main.quiet()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated.", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed.all_gather_x` is deprecated. Use another.", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated.", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in seen] == ["`something_else` is deprecated."]
    deepspeed = logging.getLogger("DeepSpeed")
    said = [deepspeed.makeRecord("DeepSpeed", logging.WARNING, "", 0, text, (), None) for text in
            ("Setting accelerator to CPU. If you have GPU ...", "a real one")]  # fmt: skip
    assert [bool(deepspeed.filter(record)) for record in said] == [False, True]
