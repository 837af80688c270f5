"""The pytest plugin under which TRL's tests run: local models and data, and either TRL's trainers or ours.

It reads three variables: ``KD_PEERS_CACHE`` is what :mod:`tests.peers.hub` made, ``KD_PEERS_CLASSES`` is ``trl`` or
``kd_plugin``, ``KD_PEERS_REPORT`` is the JSON file that gets each test's outcome.
"""

import importlib
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl

CACHE = Path(os.environ["KD_PEERS_CACHE"])
MODEL = re.compile(r"trl-internal-testing/(?:tiny|small)-[\w.-]+")
TIMEOUT = 1200  # seconds; several can be slow on a busy machine
# Every dataset that the running test has loaded
LOADED: list[Any] = []


def load_dataset(name: str, config: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
    """Return a local dataset as ``datasets.load_dataset`` would return the hub's."""
    found = datasets.load_from_disk(str(CACHE / "data" / name / (config or "")))
    if split is None:
        LOADED.extend(found.values())
        return found
    part, rows = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", split).groups()
    chosen = found[part] if rows is None else found[part].select(range(int(rows)))
    LOADED.append(chosen)
    return chosen.to_iterable_dataset() if streaming else chosen


def pytest_configure() -> None:
    """Put the stand-ins in place, before the tests are imported."""
    datasets.disable_caching()
    datasets.load_dataset = load_dataset
    for module in ("import_utils", "trainer.sft_trainer", "trainer.distillation_trainer"):
        importlib.import_module(f"trl.{module}").__getattr__ = _of_another_version
    if os.environ["KD_PEERS_CLASSES"] == "kd_plugin":
        from kd_plugin.trl import OfflineKDConfig, TeacherPanelConfig, TeacherPanelTrainer
        from tests.peers import offline

        offline.LOADED = LOADED
        trl.DistillationConfig, trl.DistillationTrainer = TeacherPanelConfig, TeacherPanelTrainer
        trl.SFTConfig, trl.SFTTrainer = OfflineKDConfig, offline.CapturingTrainer


def _of_another_version(name: str) -> Callable[..., Any]:
    """Stand for an internal name that the tests' version of TRL has and the installed one has not."""
    package = re.fullmatch(r"is_(\w+)_available", name)
    if package:
        return lambda: importlib.util.find_spec(package[1]) is not None
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: pytest.skip(f"the installed TRL has no {name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of a model that has no stand-in, on both sides."""
    for item in items:
        model = getattr(item, "callspec", None) and item.callspec.params.get("model_id")
        body = inspect.getsource(item.function).split("    def ", 1)[-1]
        missing = [name for name in ([model] if model else MODEL.findall(body)) if not _is_there(name)]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"no stand-in for {missing[0]}"))
        item.add_marker(pytest.mark.timeout(TIMEOUT))


def _is_there(name: str) -> bool:
    return (CACHE / "hub" / f"models--{name.replace('/', '--')}").is_dir()


@pytest.fixture(autouse=True)
def _fresh():
    """Start each test from one seed, with nothing loaded."""
    torch.manual_seed(0)
    LOADED.clear()


@pytest.fixture
def lazy_shared_datadir(request: pytest.FixtureRequest) -> Path:
    """Return the tests' data directory, as the plugin pytest-datadir does."""
    return request.path.parent / "data"


class Outcomes:
    """Keeps what became of each test, and why."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a report; a failure outside of the test's body counts as one."""
        name = report.nodeid.removeprefix("trl_tests/")  # a parameter may have a slash too
        if report.when == "call" or report.outcome != "passed":
            self.found[name] = {"outcome": report.outcome, "why": _why(report)}

    def pytest_sessionfinish(self) -> None:
        """Write all outcomes."""
        Path(os.environ["KD_PEERS_REPORT"]).write_text(json.dumps(self.found, indent=1))


def _why(report: pytest.TestReport) -> str:
    """Return one line that says why a test failed or was skipped."""
    if report.outcome == "skipped":
        return str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr).split("\n")[0]
    crash = getattr(report.longrepr, "reprcrash", None)
    return "" if crash is None else " ".join(crash.message.split())[:400]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Watch the outcomes."""
    session.config.pluginmanager.register(Outcomes())
