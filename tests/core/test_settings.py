"""Settings are declared once: what the declaration gives to those who take it, and that each field is used."""

import ast
import dataclasses
import inspect
import pydoc
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

import kd_plugin
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.panel.settings import PanelSettings, RolloutSettings, TeacherSettings, WatchSettings
from kd_plugin.settings import built, mappings, mutable, option, part_of, settings, takes

GROUPS = [LineageSettings, OfflineSettings, PanelSettings, RolloutSettings, TeacherSettings, WatchSettings]


@settings
class Few:
    """A few.

    Raises:
        ValueError: never.
    """

    weight: float = option(default=1.0, help="How much it counts.")
    names: dict[str, int] | str | None = option(default=None, help="By name.")
    bounds: list[float] = option(help="Low and high.", factory=lambda: [0.5, 2.0])

    def doubled(self) -> float:
        return self.weight * 2


class Base:
    def __init__(self, model: str, **fields) -> None:
        """Take a model and a few."""
        self.few = built(Few, fields)


@takes(Few)
class Taker(Base):
    """Takes them.

    Args:
        model: a path.

    Raises:
        ConfigError: it does.
    """

    def __init__(self, model: str, weight: float = 3.0, **fields) -> None:
        super().__init__(model, weight=weight, **fields)


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_has_its_sentence_and_stays_as_it_is(group):
    made = group()
    for field in dataclasses.fields(group):
        sentence = field.metadata["help"]
        assert (sentence[0].isupper() and sentence.endswith(".")) or sentence[0] in "'0123456789f", field.name
        assert f"    {field.name}: {sentence[:20]}" in group.__doc__
    with pytest.raises(FrozenInstanceError):
        setattr(made, dataclasses.fields(group)[0].name, 1)


def test_the_docstring_lists_the_fields_before_what_is_raised():
    assert Few.__doc__.index("weight: How much") < Few.__doc__.index("Raises:")


def test_a_mutable_dataclass_takes_them_whole():
    @dataclass
    class Host(mutable(Few)):
        own: int = 0

    host = Host(weight=2.0, own=1)
    host.weight = 4.0
    assert host.doubled() == 8.0 and Host().bounds is not Host().bounds
    assert part_of(Few, host) == Few(weight=4.0)
    assert [f.metadata.get("help", "") for f in dataclasses.fields(Host)][:1] == ["How much it counts."]
    assert mappings(Few) == ["names"]


def test_keyword_arguments_are_shown_one_by_one():
    assert str(inspect.signature(Taker)) == (
        "(model: str, weight: float = 3.0, *, names: dict[str, int] | str | None = None, "
        "bounds: list[float] = [0.5, 2.0])"
    )
    shown = pydoc.render_doc(Taker, renderer=pydoc.plaintext)
    assert "bounds: Low and high." in shown and shown.index("Low and high") < shown.index("Raises:")
    assert Taker("m", bounds=[1.0]).few == Few(weight=3.0, bounds=[1.0])

    class Own(Taker):
        def __init__(self, other: int) -> None:
            super().__init__("m")

    assert list(inspect.signature(Own).parameters) == ["other"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown setting 'wieght'. Did you mean 'weight'"):
        built(Few, {"wieght": 1})


@pytest.mark.parametrize("group", [OfflineSettings, PanelSettings])
def test_every_field_is_read_where_it_decides_something(group):
    """An option that a host declares and nothing reads is a trap; see also tests/hosts/test_settings_arrive.py."""
    read = set()
    for path in Path(kd_plugin.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value).split(".")[-1]
                if owner in ("settings", "args", "offline", "self", "cfg"):
                    read.add(node.attr)
            elif isinstance(node, ast.Constant) and path.parent.name in ("panel", "divergence"):
                read.add(node.value)  # by name, as in `draw_settings`
    assert {field.name for field in dataclasses.fields(group)} <= read
