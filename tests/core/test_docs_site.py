"""The documentation as a site: `make docs` builds it; what its hook does, where mkdocs is installed."""

import importlib
import inspect
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(tmp_path):
    there = [path for path in (shutil.which("mkdocs"), ROOT / ".venv-docs" / "bin" / "mkdocs") if path]
    mkdocs = next((path for path in there if Path(path).exists()), None)
    if mkdocs is None:
        pytest.skip("mkdocs is not installed; `make docs` installs it")
    for name in ("docs", "mkdocs.yml", "kd_plugin", "integrations", "examples", "CONTRIBUTING.md", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name) if name != "docs" else shutil.copytree(ROOT / name, tmp_path / name)
    return lambda: subprocess.run([str(mkdocs), "build"], cwd=tmp_path, capture_output=True, text=True), tmp_path


def test_it_builds_and_a_broken_link_fails(build):
    run, place = build
    done = run()
    assert done.returncode == 0, done.stderr
    assert "TeacherCache" in (place / "site" / "reference.html").read_text()
    with (place / "docs" / "quickstart.md").open("a") as page:
        page.write("\n[gone](nowhere.md)\n")
    assert run().returncode != 0


ROOMS = (  # whose public names are for users
    "trl", "lightning", "transformers", "lineage", "cache", "teachers", "panel", "views", "divergence", "text",
    "verifying", "evaluation",
)  # fmt: skip


def test_the_reference_has_every_public_class_and_function():
    import kd_plugin

    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = [line.removeprefix("::: ") for line in text.splitlines() if line.startswith("::: ")]
    there = {}
    for name in named:
        module, _, attribute = name.rpartition(".")
        there[name] = getattr(importlib.import_module(module), attribute)
    assert set(kd_plugin.__all__) - {"__version__"} <= {name.rsplit(".", 1)[1] for name in named}
    for room in ROOMS:
        module = importlib.import_module(f"kd_plugin.{room}")
        public = {name: getattr(module, name) for name in module.__all__}
        for name, found in public.items():
            if inspect.isclass(found) or inspect.isfunction(found):
                assert any(found is one for one in there.values()), f"add `::: kd_plugin.{room}.{name}` to reference.md"
