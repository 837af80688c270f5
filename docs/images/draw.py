"""Draws NAME.svg from each NAME.txt: boxes on a grid, and arrows between neighbours in a row.

Needs nothing but Python: ``python docs/images/draw.py``.
"""

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, GAP, LINE, MARGIN = 176, 26, 17, 12
COLUMNS = 5
STYLE = (
    "text{font:12px sans-serif;fill:#1f2328;text-anchor:middle}.t{font-weight:bold}.f{font-family:monospace}"
    ".p{fill:#fff}.b{fill:#eef3fa;stroke:#57606a}.w{fill:#f6f1e4;stroke:#57606a}.a{stroke:#57606a;fill:none}"
    ".h{fill:#57606a}@media (prefers-color-scheme:dark){text{fill:#e6edf3}.p{fill:#0d1117}"
    ".b{fill:#13253d;stroke:#8b949e}.w{fill:#332b14;stroke:#8b949e}.a{stroke:#8b949e}.h{fill:#8b949e}}"
)


def read(text: str) -> tuple[dict[str, tuple[int, int, int, list[str]]], list[tuple[str, str]]]:
    """Return the boxes by name, as column, row, width and lines, and the arrows."""
    boxes, arrows = {}, []
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "box":
            place, *lines = (part.strip() for part in rest.split("|"))
            name, column, row, width = place.split()
            boxes[name] = (int(column), int(row), int(width), lines)
        elif kind == "arrow":
            start, end = rest.split()
            arrows.append((start, end))
    return boxes, arrows


def draw(text: str) -> str:
    """Return the picture as SVG, readable on light and on dark pages."""
    boxes, arrows = read(text)
    rows = sorted({row for _, row, _, _ in boxes.values()})
    heights = {row: LINE * max(len(b[3]) for b in boxes.values() if b[1] == row) + 2 * MARGIN for row in rows}
    tops = {row: MARGIN + sum(heights[r] + GAP for r in rows if r < row) for row in rows}
    size = MARGIN * 2 + COLUMNS * WIDTH + (COLUMNS - 1) * GAP, MARGIN + sum(heights[r] + GAP for r in rows)
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}">',
        f"<style>{STYLE}</style>",
        f'<rect class="p" width="{size[0]}" height="{size[1]}"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="h" d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    left = {name: MARGIN + column * (WIDTH + GAP) for name, (column, _, _, _) in boxes.items()}
    for name, (_, row, width, lines) in boxes.items():
        across = width * WIDTH + (width - 1) * GAP
        found.append(
            f'<rect class="{"b" if width == 1 else "w"}" x="{left[name]}" y="{tops[row]}" width="{across}" '
            f'height="{heights[row]}" rx="6"/>'
        )
        for i, line in enumerate(lines):
            style = ' class="t"' if i == 0 else ' class="f"' if "/" in line else ""
            y = tops[row] + MARGIN + LINE * (i + 1) - 5
            found.append(f'<text x="{left[name] + across / 2:g}" y="{y}"{style}>{escape(line)}</text>')
    for start, end in arrows:
        y = tops[boxes[start][1]] + heights[boxes[start][1]] / 2
        found.append(f'<path class="a" d="M{left[start] + WIDTH} {y:g}H{left[end] - 1}" marker-end="url(#tip)"/>')
    return "\n".join([*found, "</svg>", ""])


if __name__ == "__main__":
    for source in HERE.glob("*.txt"):
        source.with_suffix(".svg").write_text(draw(source.read_text(encoding="utf-8")), encoding="utf-8")
