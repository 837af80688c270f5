"""A hook of mkdocs: files of the repository that pages link to become files of the site, and no page is left out.

Pages are read in the repository, too, where their links go to `../integrations/...`; in the site the same files lie
below `files/`. The navigation has the order of `index.md`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
linked: dict[str, str] = {}


def target_of(page: str, link: str) -> str | None:
    """Return the path from the repository's root of a link that leaves docs/; None of one that stays."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_config(config):
    """Order the navigation as index.md lists the pages; a test holds that it lists all of them."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = dict.fromkeys(re.findall(r"\]\(([\w/-]+\.md)\)", index))
    config.nav = ["index.md", *pages]
    return config


def on_files(files, config):
    """Add the linked files, as text."""
    for page in list(files.documentation_pages()):
        for link, _ in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            path = target_of(page.src_uri, link)
            if path and (ROOT / path).is_file():
                linked[path] = f"files/{path}" + (".txt" if path.endswith((".md", ".py")) else "")
    for path, place in linked.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links to files of the repository go to their copies."""

    def moved(found):
        path = target_of(page.file.src_uri, found[1])
        if path not in linked:
            return found[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(linked[path], here)})"

    return LINK.sub(moved, markdown)
