"""Pages name files that exist; docs/architecture.md answers first questions, and its picture is that of its text."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
IMAGES = ROOT / "docs" / "images"
PAGES = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ASKED = ("hidden state", "meet the student's", "loss divided", "lineage written", "vLLM answer parsed")


def test_every_path_of_the_page_exists():
    paths = re.findall(r"`((?:kd_plugin|tests|docs)/[\w./]*|CONTRIBUTING\.md)`", PAGE)
    assert len(paths) > 30 and [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_of_every_page_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:kd_plugin|tests|docs|integrations|examples)/[\w./-]*)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_answers_what_a_reader_asks_first():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    for question in ASKED:
        assert any(question in row and "`kd_plugin/" in row for row in rows), question


def test_names_beside_a_file_are_in_it():
    for path, name in re.findall(r"`(kd_plugin/[\w/]+\.py)`, `([\w.]+)`", PAGE):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(re.search(rf"(class|def) {part}\b", text) for part in name.split(".")), (path, name)


def test_the_picture_is_drawn_from_its_text(monkeypatch):
    monkeypatch.syspath_prepend(IMAGES)
    from draw import draw, read

    for text in IMAGES.glob("*.txt"):
        drawn = draw(text.read_text(encoding="utf-8"))
        assert drawn == text.with_suffix(".svg").read_text(encoding="utf-8"), "run python docs/images/draw.py"
    source = (IMAGES / "architecture.txt").read_text(encoding="utf-8")
    named = re.findall(
        r"[\w/]+/(?:\w+\.py)?", " ".join(line for *_, lines in read(source)[0].values() for line in lines)
    )
    assert len(named) > 20 and [path for path in named if not (ROOT / "kd_plugin" / path).exists()] == []
    sys.modules.pop("draw")


def test_the_page_is_linked():
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "docs/architecture.md" in (ROOT / page).read_text(encoding="utf-8"), page
    assert "architecture.md" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
