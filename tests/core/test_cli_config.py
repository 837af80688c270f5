"""Settings from defaults, YAML and the command line."""

from dataclasses import dataclass

import pytest
import yaml

from kd_plugin.cli.parsing import as_yaml, parse_settings
from kd_plugin.errors import ConfigError
from kd_plugin.launch.doctor import LaunchSettings


@dataclass(frozen=True)
class Probe:
    """Settings of a probe.

    Attributes:
        rate: How fast.
        name: What it is called; may hold
            more than one line.
        steps: How many.
    """

    rate: float = 0.5
    name: str = ""
    steps: int = 3

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}.")


def parse(*argv, **kwargs):
    return parse_settings(Probe, argv, command="probe", description="A probe.", **kwargs)


def test_defaults():
    parsed = parse()
    assert parsed.settings == Probe()
    assert not parsed.print_only
    assert parsed.flags == frozenset()


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("rate: 0.25\nsteps: 7\n")
    assert parse("--config", str(file), "--steps", "9").settings == Probe(rate=0.25, steps=9)
    assert parse(f"--config={file}", "--steps=9").settings == Probe(rate=0.25, steps=9)


def test_the_file_wins_over_given_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\n")
    assert parse("--config", str(file), defaults=Probe(rate=0.1, steps=2)).settings == Probe(rate=0.1, steps=7)


@pytest.mark.parametrize("argv", [["--config"], ["--print_config"], ["--config", "--steps", "5"]])
def test_config_without_a_file_asks_for_the_settings(argv):
    parsed = parse(*argv)
    assert parsed.print_only
    assert parsed.settings.steps == (5 if "--steps" in argv else 3)


def test_printed_settings_can_be_read_back(tmp_path):
    settings = Probe(rate=1e-4, name="a: 'b' # c", steps=4)
    text = as_yaml(settings)
    assert "# What it is called; may hold more than one line.\nname:" in text
    assert yaml.safe_load(text) == {"rate": 1e-4, "name": "a: 'b' # c", "steps": 4}
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert parse("--config", str(file)).settings == settings


def test_a_float_without_a_point_is_a_float_again(tmp_path):
    """YAML 1.1 reads `1e-4` as a string, which is how people write learning rates."""
    file = tmp_path / "c.yaml"
    file.write_text("rate: 1e-4\n")
    assert parse("--config", str(file)).settings.rate == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3\n", r"unknown key 'stepz'. Did you mean 'steps'\? Known: rate, name, steps."),
        ("steps: [1\n", r"c.yaml, line 2, column 1: not valid YAML"),
        ("- 1\n", r"expected lines `name: value`, found a list"),
        ("", r"expected lines `name: value`, found nothing"),
        ("steps: many\n", r"steps"),
        ("steps: 0\n", r"steps must be at least 1, got 0"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        parse("--config", str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], r"unknown option --step. Did you mean '--steps'\?"),
        (["--steps", "x"], "steps"),
        (["--steps"], "steps"),
        (["stray"], "stray"),
        (["--config", "missing.yaml"], "there is no such file"),
    ],
)
def test_a_bad_command_line_is_one_clear_error(argv, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_flags_are_no_settings(capsys):
    parsed = parse("--fresh", flags={"fresh": "Start again.", "smoke": "Tiny."})
    assert parsed.flags == {"fresh"}
    assert "fresh" not in as_yaml(parsed.settings)


def test_help_shows_each_field_with_its_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    assert "How fast." in capsys.readouterr().out


@pytest.mark.parametrize("words", [["[a, b]"], ["a", "b"]], ids=["one YAML list", "words"])
def test_a_sequence_is_a_list(words):
    made = parse_settings(LaunchSettings, ["--teachers", *words], command="doctor", description="").settings
    assert made.teachers == ["a", "b"] and made.servers == []
