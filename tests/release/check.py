"""Build a release as it would be published, and check it. Writes what is to be published into ``dist/``.

python -m tests.release.check [--version 0.2.0] [--extras core trl]     (`make release-check`)

It needs the tools of .venv-tools (see the Makefile) and a package index. The checkout stays as it is: a release
is cut in a copy of its files.
"""

import argparse
import email.parser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.message import Message
from pathlib import Path

from tests.release import changelog, licenses

CHECKOUT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
EPOCH = "1735689600"  # 1 January 2025: what archives say of the age of each file
SPEC = "1.7"  # of CycloneDX

# What must work where a person installs the package with one extra, and nothing else
WORKS = {
    "core": "import kd_plugin.lineage, kd_plugin.cache.reader, kd_plugin.panel.step, kd_plugin.cli.lineage",
    "trl": "import kd_plugin.trl, kd_plugin.transformers, kd_plugin.cli.training",
    "lightning": "import kd_plugin.lightning",
    "verify": "from math_verify import parse, verify; assert verify(parse('$1/2$'), parse('$0.5$'))",
    "benchmarks": "import lm_eval",
    "plots": "import matplotlib.pyplot",
    "sign": "import kd_plugin.lineage.signing, model_signing",
    "deepspeed": "import deepspeed",
    "all": "import kd_plugin.trl, kd_plugin.lightning, deepspeed",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="to cut; left out, the version that is cut already, or else the next minor")
    parser.add_argument("--extras", nargs="+", choices=WORKS, default=list(WORKS), help="to install and try")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "dist", help="folder for what is to be published")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kd-plugin-release-") as scratch:
        check(Path(scratch), arguments.version, arguments.extras, arguments.output)
    return 0


def check(scratch: Path, version: str | None, extras: Sequence[str], output: Path) -> None:
    """Go through all steps; the first that fails ends the program with its reason."""
    tree = copy_of_tree(scratch / "one")
    version = cut_if_needed(tree, version)
    said(f"CHANGELOG.md and the package say {version}")
    workflows = sorted((tree / ".github" / "workflows").glob("*.yml"))
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    said(f"workflow files are valid: {', '.join(path.name for path in workflows)}")
    archives = build(tree, scratch / "dist-one")
    same_twice(tree, archives, scratch)
    run(TOOLS / "twine", "check", "--strict", *archives)
    said("metadata and long description are valid")
    wheel = next(path for path in archives if path.suffix == ".whl")
    metadata = metadata_of(wheel)
    listed, offered = set(WORKS) - {"core"}, set(metadata.get_all("Provides-Extra") or ()) - {"dev"}
    require(listed == offered, f"the extras are {sorted(offered)}; WORKS tries {sorted(listed)}")
    sites = []
    for extra in extras:
        python = install(scratch / "environments" / extra, wheel, extra)
        sites.append(next((python.parents[1] / "lib").glob("python*/site-packages")))
        run(python, "-c", WORKS[extra], cwd=scratch)
        shown = run(python.parent / "kd-plugin", "--version", cwd=scratch)
        require(shown.strip() == f"kd-plugin {version}", f"kd-plugin --version says {shown!r}")
        said(f"installs alone, with {'no extra' if extra == 'core' else f'[{extra}]'}, and works")
    output.mkdir(exist_ok=True)
    for old in output.glob("kd_plugin[-.]*"):
        old.unlink()
    for path in archives:
        shutil.copy(path, output)
    describe_dependencies(sites, metadata, output / "kd_plugin-licenses.md")
    bill_of_materials(python, tree, version, output / "kd_plugin.cdx.json")
    print(f"Ready to publish: {', '.join(sorted(path.name for path in output.glob('kd_plugin[-.]*')))}")


def copy_of_tree(target: Path) -> Path:
    """Copy the files of the checkout that git knows or does not ignore."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=CHECKOUT)
    for name in filter(None, listed.split("\0")):
        if (CHECKOUT / name).is_file() and not (CHECKOUT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, target / name)
    return target


def cut_if_needed(tree: Path, version: str | None) -> str:
    """Cut a release in the copy, unless the checkout is one: nothing is unreleased, and the newest is its version."""
    text = (tree / "CHANGELOG.md").read_text(encoding="utf-8")
    (current,) = changelog.VERSION_LINE.findall((tree / "kd_plugin" / "__init__.py").read_text(encoding="utf-8"))
    if text.split(changelog.UNRELEASED)[-1].lstrip().startswith(f"## {current} "):
        require(version in (None, current), f"the checkout is a release of {current}, not of {version}")
        return current
    major, minor, _ = current.split(".")
    version = version or f"{major}.{int(minor) + 1}.0"
    changelog.cut(tree, version)
    return version


def build(tree: Path, target: Path, **environment: str) -> list[Path]:
    """Build the source distribution, and the wheel from it, with the pinned build backend."""
    constraints = CHECKOUT / "constraints.txt"
    run(TOOLS / "uv", "build", "-q", "--build-constraints", constraints, "--out-dir", target, tree,
        env={"SOURCE_DATE_EPOCH": EPOCH, **environment})  # fmt: skip
    return sorted(path for path in target.iterdir() if path.name.endswith((".whl", ".tar.gz")))


def same_twice(tree: Path, archives: Sequence[Path], scratch: Path) -> None:
    """Build again elsewhere, with files of another age, in another time zone, and with other permissions."""
    other = scratch / "two" / "elsewhere"
    shutil.copytree(tree, other, copy_function=shutil.copyfile)
    for path in other.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (1, 1))
    again = build(other, scratch / "dist-two", TZ="Asia/Kathmandu", PYTHONHASHSEED="7")
    for one, two in zip(archives, again, strict=True):
        require(one.name == two.name and digest(one) == digest(two), f"{one.name} differs when it is built again")
        said(f"sha256 {digest(one)} {one.name}, built twice")


def install(environment: Path, wheel: Path, extra: str) -> Path:
    """Make an environment with the wheel and one extra, at the pinned versions; return its Python."""
    python, what = environment / "bin" / "python", str(wheel) if extra == "core" else f"{wheel}[{extra}]"
    run(TOOLS / "uv", "venv", "-q", "--python", sys.executable, environment)
    run(TOOLS / "uv", "pip", "install", "-q", "--python", python, "--constraints", CHECKOUT / "constraints.txt", what)
    run(TOOLS / "uv", "pip", "check", "-q", "--python", python)
    return python


def metadata_of(wheel: Path) -> Message:
    """Return a wheel's core metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def describe_dependencies(sites: Sequence[Path], metadata: Message, target: Path) -> None:
    """Write the licence of each dependency of any extra, and refuse one of our own choice under none that we accept."""
    required = [line for line in metadata.get_all("Requires-Dist") or () if "dev" not in line.partition("extra ==")[2]]
    direct = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required} - {"kd-plugin"}
    named = {licenses.canonical(one.name): one for site in sites for one in licenses.declared_in(site)}
    declared = [one for name, one in sorted(named.items()) if name != "kd-plugin"]
    bad = licenses.unaccepted(declared, direct)
    require(not bad, f"licences to decide about: {', '.join(f'{one.name} ({one.license})' for one in bad)}")
    target.write_text(licenses.as_table(declared, direct), encoding="utf-8")
    said(f"licences of {len(declared)} dependencies, {len(direct)} of them named by us: {target.name}")


def bill_of_materials(python: Path, tree: Path, version: str, target: Path) -> None:
    """Write a CycloneDX bill of materials of the package and what was installed with it; the tool validates it."""
    run(TOOLS / "cyclonedx-py", "environment", python, "--pyproject", tree / "pyproject.toml", "--mc-type", "library",
        "--spec-version", SPEC, "--output-reproducible", "--validate", "--output-file", target)  # fmt: skip
    bom = json.loads(target.read_text(encoding="utf-8"))
    bom["metadata"]["component"]["version"] = version  # which pyproject.toml leaves to the package
    target.write_text(json.dumps(bom, indent=2) + "\n", encoding="utf-8")
    said(f"bill of materials, CycloneDX {bom['specVersion']}, {len(bom['components'])} components: {target.name}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it prints.

    uv does not read pip's settings, so a folder of wheels that pip is told of is handed on to it.
    """
    finds = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env={**clean, **finds, **(env or {})})
    require(done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"release-check: {otherwise}")


def said(what: str) -> None:
    print(f"  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
