"""The `kd-plugin` command: dispatch, exit codes, one clear line for an error."""

import sys
import types

import pytest

from kd_plugin import __version__
from kd_plugin.cli import main as cli
from kd_plugin.errors import ConfigError, LineageError


@pytest.fixture
def command(monkeypatch):
    """Put a command named `probe` in place; returns a function that sets what it does."""

    def install(function):
        module = types.ModuleType("kd_probe_command")
        module.main = function
        monkeypatch.setitem(sys.modules, "kd_probe_command", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("kd_probe_command:main", "a probe"))

    return install


def test_arguments_and_exit_code_pass_through(command):
    seen = []
    command(lambda argv: seen.append(list(argv)) or 3)
    assert cli.main(["probe", "show", "--json"]) == 3
    assert seen == [["show", "--json"]]


def test_a_known_error_is_one_line_on_stderr(command, capsys):
    def fail(argv):
        raise ConfigError("top_k is 0; expected at least 1.")

    command(fail)
    assert cli.main(["probe"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "kd-plugin probe: top_k is 0; expected at least 1.\n"


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_debug_shows_the_traceback(command, monkeypatch, way):
    def fail(argv):
        assert "--debug" not in argv
        raise LineageError("broken")

    command(fail)
    if way == "environment":
        monkeypatch.setenv("KD_PLUGIN_DEBUG", "1")
    with pytest.raises(LineageError):
        cli.main(["probe", "--debug"] if way == "flag" else ["probe"])


def test_an_unknown_error_keeps_its_traceback(command):
    def fail(argv):
        raise RuntimeError("a bug")

    command(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["probe"])


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["demoo"]) == 2
    assert "there is no command 'demoo'. Did you mean 'demo'?" in capsys.readouterr().err


def test_interruption_has_its_own_code(command, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    command(interrupt)
    assert cli.main(["probe"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [("demo", "Run the same command again"), ("panel", "--resume_from_checkpoint true"), ("plan", "interrupted.\n")],
)
def test_an_interruption_says_how_to_go_on(name, said, capsys, monkeypatch):
    def interrupt(self, argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Command, "run", interrupt)
    assert cli.main([name]) == 130
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        ("Go on with it by trainer.train(resume_from_checkpoint=True).", "by `--resume_from_checkpoint true`."),
        ("12 rows are missing. allow_partial=True trains without.", "missing. `allow_partial: true` trains"),
    ],
)
def test_a_way_out_is_said_as_it_is_typed(command, python, typed, capsys):
    def fail(argv):
        raise ConfigError(python)

    command(fail)
    assert cli.main(["probe"]) == 2
    assert typed in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kd-plugin {__version__}\n"


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, entry in cli.COMMANDS.items():
        assert f"  {name} " in out
        assert entry.summary in out


def test_no_arguments_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_listed_command_exists_and_explains_itself(name, capsys):
    try:
        code = cli.main([name, "--help"])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    assert code in (0, None)
    assert f"kd-plugin {name}" in capsys.readouterr().out
