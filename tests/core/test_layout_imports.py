"""The arrows of the layout: core knows no host, hosts do not know each other, importing the package is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kd_plugin

PACKAGE = Path(kd_plugin.__file__).parent
HOSTS = ("kd_plugin.trl", "kd_plugin.lightning", "kd_plugin.transformers")
AXOLOTL = "kd_plugin.axolotl"
SHARED = "kd_plugin.trainers"
TRAINERS = ("trl", "lightning", "pytorch_lightning")
# What each layer may not import, not even inside a function. `cli` and `demo` may import everything.
FORBIDDEN = {
    "core": (*HOSTS, AXOLOTL, SHARED, "kd_plugin.cli", "kd_plugin.demo", *TRAINERS, "axolotl"),
    # Users' transformers trainers and TRL's stand on this room, and it knows neither
    "trainers": (*HOSTS, AXOLOTL, "kd_plugin.cli", "kd_plugin.demo", *TRAINERS, "axolotl"),
    "transformers": (*HOSTS[:2], AXOLOTL, "kd_plugin.cli", "kd_plugin.demo", *TRAINERS, "axolotl"),
    # Axolotl's trainer is a transformers trainer, so that host's mixins go before it
    "axolotl": (*HOSTS[:2], SHARED, "kd_plugin.cli", "kd_plugin.demo", *TRAINERS),
    "trl": (*HOSTS[1:], AXOLOTL, "kd_plugin.cli", "kd_plugin.demo", "lightning", "pytorch_lightning"),
    "lightning": ("kd_plugin.trl", "kd_plugin.transformers", AXOLOTL, SHARED, "kd_plugin.cli", "kd_plugin.demo", "trl"),
    "cli": (),
    "demo": (),
}


def imported_modules(source: str) -> set[str]:
    """Names of all modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrow"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def broken_arrows(layer: str, source: str) -> set[str]:
    return {
        module
        for module in imported_modules(source)
        for banned in FORBIDDEN[layer]
        if module == banned or module.startswith(banned + ".")
    }


def layer_of(path: Path) -> str:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__main__":
        return "cli"
    return room if room in FORBIDDEN else "core"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_breaks_an_arrow(path):
    assert broken_arrows(layer_of(path), path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("layer", "source", "broken"),
    [
        ("core", "import trl", {"trl"}),
        ("core", "def f():\n    from trl.trainer import utils", {"trl.trainer", "trl.trainer.utils"}),
        ("core", "from kd_plugin import trl", {"kd_plugin.trl"}),
        ("core", "from kd_plugin.cli.main import main", {"kd_plugin.cli.main", "kd_plugin.cli.main.main"}),
        ("trl", "import lightning.pytorch", {"lightning.pytorch"}),
        ("lightning", "from trl import SFTTrainer", {"trl", "trl.SFTTrainer"}),
        ("transformers", "from kd_plugin.trl.start import x", {"kd_plugin.trl.start", "kd_plugin.trl.start.x"}),
        ("lightning", "import kd_plugin.transformers", {"kd_plugin.transformers"}),
        ("lightning", "import kd_plugin.trainers", {"kd_plugin.trainers"}),
        ("trl", "import kd_plugin.transformers", {"kd_plugin.transformers"}),
        ("trainers", "import kd_plugin.transformers", {"kd_plugin.transformers"}),
        ("transformers", "import kd_plugin.axolotl", {"kd_plugin.axolotl"}),
        ("axolotl", "from kd_plugin.trl import x", {"kd_plugin.trl", "kd_plugin.trl.x"}),
        ("axolotl", "import kd_plugin.transformers", set()),
        ("trl", "import kd_plugin.trainers.offline", set()),
        ("core", "import transformers", set()),
        ("core", "import trlx", set()),
        ("trl", "from trl import SFTTrainer", set()),
        ("cli", "from kd_plugin.trl import OfflineKDTrainer", set()),
    ],
)
def test_the_arrow_test_can_fail(layer, source, broken):
    assert broken_arrows(layer, source) == broken


# The core from its foundations up: a room imports those on lines above its own, and its neighbours.
ORDER = (
    ("errors", "upstream"),
    ("settings", "sharding"),
    ("signals", "vocab", "models", "limits", "verifying"),
    ("lineage",),
    ("inputs",),
    ("divergence",),
    ("cache",),
    ("teachers",),
    ("student",),
    ("rollouts",),
    ("views",),
    ("capturing",),
    ("text", "importing"),
    ("panel",),
    ("monitor",),
    ("planner",),
    ("evaluation", "launch"),
)
LINE = {room: number for number, rooms in enumerate(ORDER) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(source: str) -> set[str]:
    """Rooms of the core that a file needs when it runs; what only a type checker reads may point anywhere."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = (module.split(".") for module in imported_modules(ast.unparse(tree)))
    return {parts[1] for parts in found if parts[0] == "kd_plugin" and len(parts) > 1 and parts[1] in LINE}


CORE = [path for path in sorted(PACKAGE.rglob("*.py")) if layer_of(path) == "core" and room_of(path) != "__init__"]


def test_every_room_of_the_core_has_its_place():
    assert {room_of(path) for path in CORE} == set(LINE)


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_room_imports_one_that_is_built_on_it(path):
    room = room_of(path)
    found = rooms_imported(path.read_text(encoding="utf-8"))
    assert {other for other in found if LINE[other] > LINE[room]} == set()


def test_the_order_test_can_fail():
    assert rooms_imported("def f():\n    from kd_plugin.panel.loss import x\nimport kd_plugin.cache") == {
        "panel",
        "cache",
    }
    assert rooms_imported("if TYPE_CHECKING:\n    from kd_plugin.panel import x") == set()


TEACHERS = {
    node.name
    for path in (PACKAGE / "teachers").rglob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef) and node.name.endswith("Teacher")
}


def asked_classes(source: str) -> set[str]:
    """Classes of teachers that a file asks for with ``isinstance`` or ``issubclass``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            names = {getattr(n, "id", getattr(n, "attr", "")) for kind in node.args[1:] for n in ast.walk(kind)}
            found |= names & TEACHERS
    return found


def test_what_a_teacher_can_do_decides_and_not_its_class():
    outside = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "teachers"]
    asked = {str(path.relative_to(PACKAGE)): asked_classes(path.read_text(encoding="utf-8")) for path in outside}
    assert {path: classes for path, classes in asked.items() if classes} == {}


def test_the_class_test_can_fail():
    assert {"Teacher", "InProcessTeacher", "SelfTeacher", "AdapterTeacher"} < TEACHERS
    assert asked_classes("isinstance(t, LocalTeacher | teachers.ServerTeacher)") == {"LocalTeacher", "ServerTeacher"}
    assert asked_classes("isinstance(t, TeacherCache); t.capabilities") == set()


def test_no_file_is_longer_than_a_chapter():
    lines = {
        str(p.relative_to(PACKAGE)): len(p.read_text(encoding="utf-8").splitlines()) for p in PACKAGE.rglob("*.py")
    }
    assert {path: count for path, count in lines.items() if count > 400} == {}


# Public in two rooms each, and documented in both
IN_TWO_ROOMS = {
    "Evaluation": {"evaluation", "text"},
    "Verdict": {"lineage", "verifying"},
}


def test_a_class_has_a_name_of_its_own():
    rooms: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                rooms.setdefault(node.name, []).append(room_of(path))
    twice = {name: found for name, found in rooms.items() if len(found) > len(IN_TWO_ROOMS.get(name, {""}))}
    assert twice == {}


def missing_files(docstring: str, room: Path) -> set[str]:
    """Files that a docstring names and that are neither in its room nor where the name says."""
    named = set(re.findall(r"[\w/]*\w\.py\b", docstring))
    return {name for name in named if not any((base / name).is_file() for base in (room, PACKAGE, PACKAGE.parent))}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_names_files_that_are_there(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert missing_files(docstring, path.parent) == set()


def test_the_test_of_named_files_can_fail():
    assert missing_files("loss.py adds, modes/route.py and step.py", PACKAGE / "panel") == {"modes/route.py"}


def test_the_function_capture_is_not_shadowed_by_a_room():
    """A package named ``capture`` would take the function's place as soon as anything imported it."""
    done = run_python("import kd_plugin.capturing.engines, kd_plugin; print(callable(kd_plugin.capture))")
    assert done.stdout.strip() == "True", done.stderr


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)


HEAVY = ("torch", "transformers", "datasets", "trl", "lightning", "pytorch_lightning", "deepspeed", "accelerate")


def test_importing_the_package_imports_nothing_heavy():
    done = run_python(f"import kd_plugin, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_core_imports_no_trainer():
    names = [n for n in kd_plugin.__all__ if n != "__version__"]
    code = f"import kd_plugin, sys; [getattr(kd_plugin, n) for n in {names}]\n"
    code += "print([m for m in ('trl', 'lightning', 'pytorch_lightning', 'deepspeed') if m in sys.modules])"
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_import_test_can_fail():
    done = run_python(f"import kd_plugin, sys, datasets; print([m for m in {HEAVY} if m in sys.modules])")
    assert "'datasets'" in done.stdout, done.stderr


def test_every_export_resolves_and_is_listed():
    for name in kd_plugin.__all__:
        assert getattr(kd_plugin, name) is not None
        assert name in dir(kd_plugin)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'TeacherCash'"):
        _ = kd_plugin.TeacherCash


def test_every_test_folder_is_a_package():
    """A folder named `trl` without `__init__.py` would shadow the real one; see pytest's rootdir handling."""
    tests = Path(__file__).parents[1]
    missing = {p.parent for p in tests.rglob("*.py") if not (p.parent / "__init__.py").is_file()}
    assert missing == set()


def test_what_offline_kd_imports_is_in_every_trl_that_is_supported():
    """TRL before 1.15 has no trainer that the panel could stand on; `make test-versions` runs with 1.9."""
    seen, ahead = set(), ["kd_plugin.trl"]
    while ahead:
        name = ahead.pop()
        path = PACKAGE.parent.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not what stands below an `if`
            if isinstance(node, ast.ImportFrom) and node.module.startswith("trl"):
                assert not [one.name for one in node.names if one.name.startswith("Distillation")], path
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("kd_plugin.trl"):
                ahead += [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
    assert {"kd_plugin.trl.config", "kd_plugin.trl.offline_trainer"} <= seen
