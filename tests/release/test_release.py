import re
import tomllib

import pytest
import yaml

from tests.release import changelog, check, licenses

TEXT = """# Changelog

## Unreleased

### Added

- Something new.

## 0.1.0 (2026-01-01)

- The first.
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "kd_plugin").mkdir()
    (tmp_path / "kd_plugin" / "__init__.py").write_text('"""About."""\n\n__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(TEXT)
    return tmp_path


def test_a_cut_dates_what_is_unreleased_and_begins_anew(tree):
    assert changelog.cut(tree, "0.2.0", "2026-12-01") == "### Added\n\n- Something new."
    text = (tree / "CHANGELOG.md").read_text()
    assert text == TEXT.replace("## Unreleased\n", "## Unreleased\n\n## 0.2.0 (2026-12-01)\n")
    assert (tree / "kd_plugin" / "__init__.py").read_text() == '"""About."""\n\n__version__ = "0.2.0"\n'
    with pytest.raises(SystemExit, match="nothing to release"):
        changelog.cut(tree, "0.3.0")


@pytest.mark.parametrize(
    ("version", "reason"),
    [("0.2", "no version"), ("v0.2.0", "no version"), ("0.1.0", "does not come after 0.1.0"), ("0.0.9", "after 0.1.0")],
)
def test_a_wrong_version_changes_nothing(tree, version, reason):
    with pytest.raises(SystemExit, match=reason):
        changelog.cut(tree, version)
    assert (tree / "CHANGELOG.md").read_text() == TEXT


def test_a_checkout_that_is_cut_is_released_as_it_is(tree):
    assert check.cut_if_needed(tree, None) == "0.2.0"  # the next minor
    assert check.cut_if_needed(tree, None) == "0.2.0"
    with pytest.raises(SystemExit, match=r"a release of 0\.2\.0, not of 0\.3\.0"):
        check.cut_if_needed(tree, "0.3.0")


def test_this_checkout_can_be_cut():
    text = (check.CHECKOUT / "CHANGELOG.md").read_text()
    assert text.count(changelog.UNRELEASED) == 1
    assert changelog.VERSION_LINE.findall((check.CHECKOUT / "kd_plugin" / "__init__.py").read_text())


def distribution(site, name, **fields):
    directory = site / f"{name}-1.0.dist-info"
    directory.mkdir()
    lines = [f"{key.replace('_', '-')}: {value}" for key, values in fields.items() for value in values]
    (directory / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines]))
    return directory


def test_licences_are_read_from_every_form_of_metadata(tmp_path):
    distribution(tmp_path, "modern", License_Expression=["Apache-2.0 OR MIT"])
    distribution(tmp_path, "older", Classifier=["License :: OSI Approved", "License :: OSI Approved :: BSD License"])
    distribution(tmp_path, "oldest", License=["Apache 2.0 License"])
    (distribution(tmp_path, "textual", License_File=["LICENSE"]) / "LICENSE").write_text("\n  MIT License\n\nText")
    distribution(tmp_path, "copyleft", License_Expression=["AGPL-3.0-only"])
    distribution(tmp_path, "silent")
    found = {one.name: one.license for one in licenses.declared_in(tmp_path)}
    assert found == {
        "modern": "Apache-2.0 OR MIT",
        "older": "BSD License",
        "oldest": "Apache 2.0 License",
        "textual": "MIT License",
        "copyleft": "AGPL-3.0-only",
        "silent": "",
    }
    bad = licenses.unaccepted(licenses.declared_in(tmp_path), ["Modern", "older", "copyleft", "silent"])
    assert {one.name for one in bad} == {
        "copyleft",
        "silent",
    }  # what others depend on is listed, and not ours to choose


def test_each_extra_is_installed_and_tried():
    offered = tomllib.loads((check.CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(check.WORKS) == {"core", *offered} - {"dev"}


def test_workflows_call_the_targets_that_people_call():
    targets = set(re.findall(r"^([a-z-]+):", (check.CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for path in (check.CHECKOUT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}  # more is given to a job that needs it
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"]
            called |= {word for step in job["steps"] for word in re.findall(r"make ([a-z-]+)", step.get("run", ""))}
    assert called <= targets
    assert {"lint", "test", "docs", "release-check", "test-versions"} <= called
