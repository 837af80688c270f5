"""Real English prose that every Python has: the docstrings of its standard library."""

import ast
import sys
import sysconfig
import textwrap
from pathlib import Path

_LEFT_OUT = {"test", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "pydoc_data", "turtledemo"}
_FEWEST_WORDS = 30


def paragraphs() -> list[str]:
    """Return paragraphs of running text from docstrings, in a fixed order, each once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found |= dict.fromkeys(_running(ast.get_docstring(node) or ""))
    return list(found)


def documents(words: int) -> list[str]:
    """Join paragraphs to documents of at least ``words`` words."""
    joined, current = [], ""
    for paragraph in paragraphs():
        current = f"{current}\n\n{paragraph}".strip()
        if len(current.split()) >= words:
            joined.append(current)
            current = ""
    return joined


def _running(docstring: str) -> list[str]:
    """Take the paragraphs that are sentences: no code, no lists, no tables."""
    kept = []
    for paragraph in docstring.split("\n\n"):
        text = " ".join(textwrap.dedent(paragraph).split())
        letters = sum(c.isalpha() or c in " ,." for c in text)
        if len(text.split()) >= _FEWEST_WORDS and letters > 0.95 * len(text) and text[-1] in ".:":
            kept.append(text)
    return kept


if __name__ == "__main__":
    texts = paragraphs()
    print(f"{len(texts)} paragraphs, {sum(len(t.split()) for t in texts)} words of Python {sys.version.split()[0]}")
