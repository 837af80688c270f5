"""The wheel alone, in a fresh environment with the extra `trl`, runs the demo's first minute. `make wheel-test`."""

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.wheel


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", target, CHECKOUT)
    return target


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"kd_plugin"}
    for needed in ("py.typed", "lineage/licenses.toml", "demo/data/arithmetic.json", "demo/data/general.json"):
        assert f"kd_plugin/{needed}" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_source_distribution_can_be_tested(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"README.md", "LICENSE", "Makefile", "constraints.txt", "tests/tiny.py", "docs/quickstart.md"} <= names


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """The wheel with its extra `trl`, and nothing else."""
    (wheel,) = built.glob("*.whl")
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-qq", "-c", CHECKOUT / "constraints.txt", f"{wheel}[trl]", cwd=environment)
    return environment


def test_the_wheel_alone_runs_a_recipe(environment, student_dir, teacher_dir, tmp_path):
    rows = [{"prompt": f"{i} and {i}?", "completion": f" {2 * i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((CHECKOUT / "examples" / "recipe.yaml").read_text())
    recipe |= {"student": {"model_name_or_path": str(student_dir)}, "teachers": {"expert": {"model": str(teacher_dir)}}}
    few = {"max_steps": 2, "use_cpu": True, "bf16": False}
    recipe["offline"] |= few
    recipe["panel"] |= {**few, "max_completion_length": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = environment / "bin" / "kd-plugin"
    run(command, "run", "recipe.yaml", cwd=tmp_path)
    run(command, "lineage", "verify", tmp_path / "work" / "panel", cwd=tmp_path)


def test_the_wheel_alone_runs_the_demos_first_minute(environment, tmp_path):
    python, command = environment / "bin" / "python", environment / "bin" / "kd-plugin"
    assert run(command, "--version", cwd=tmp_path).startswith("kd-plugin ")
    shown = run(command, "demo", "--smoke", "--output_dir", tmp_path / "demo", cwd=tmp_path)
    assert "Held-out questions" in shown
    for name in ("teacher-math", "offline", "panel"):
        run(command, "lineage", "verify", tmp_path / "demo" / name, cwd=tmp_path)
    where = run(python, "-c", "import kd_plugin; print(kd_plugin.__file__)", cwd=tmp_path)
    assert str(environment) in where
