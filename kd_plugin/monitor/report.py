"""A run's own logs as one self-contained HTML page: losses, divergences by teacher, lengths, guards, evaluation.

Logs are ``trainer_state.json`` of the latest checkpoint (TRL and transformers) or ``metrics.csv`` (Lightning's
``CSVLogger``). Charts are plain SVG, which follows the reader's light or dark mode; there is no script.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError

Series = Mapping[str, Sequence[tuple[float, float]]]
# Titles of the charts, the unit, and which keys each shows; a key is shown in the first that takes it
_CHARTS = (
    ("Loss", "nats per token", r"(train_|eval_|val_)?(loss|kd_loss|ce_loss|.*_kl)"),
    ("Divergence by teacher", "nats per token", r"divergence/.*"),
    ("Response length", "tokens", r"completions/(mean|min|max)_length"),
    ("Length of finished responses", "tokens", r"completions/(mean|min|max)_terminated_length"),
    ("Truncated, repeated and looping responses", "share", r"(completions/clipped_ratio|rollouts/.*)"),
    ("Agreement and overlap with teachers", "share", r"(agreement|support_overlap)/.*|mean_token_accuracy"),
    ("Disagreement of teachers", "share, or nats", r"disagreement(/.*)?|jensen_shannon/.*"),
    ("Entropy", "nats", r"(entropy/.*|entropy)"),
    ("Guards", "", r"alarm.*"),
    ("Cost until an evaluation", "operations, seconds, money", r"(eval|val)[_/]cost[_/].*"),
    ("Length of answers to the own set", "tokens", r"(eval|val)[_/].*[_/]tokens"),
    ("Evaluation", "", r"(eval|val|evaluate)[_/].*"),
    ("Reward and verification", "", r"(reward|verified|right).*"),
    ("Gradient norm", "", r"grad_norm"),
    ("Learning rate", "", r"(learning_rate|lr-.*)"),
    ("Time", "seconds", r"time/.*|step_time"),
    ("Economics", "tokens, or money", r"economics/.*"),
)
_ASIDE = re.compile(
    r"(train|eval)_(runtime|samples_per_second|steps_per_second)|total_flos|epoch|step|num_tokens|tokens/.*"
)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 230, 62, 10, 10, 30
_FEW = 12  # points of a line that are marked
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e")
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0}
@media(prefers-color-scheme:dark){:root{--paper:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d}}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:16px;max-width:1200px;
background:var(--paper);color:var(--ink)}
h1{font-size:20px;overflow-wrap:anywhere}h2{font-size:15px;margin:0 0 4px}h2 span{color:var(--soft);font-weight:normal}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
section{border:1px solid var(--line);border-radius:6px;padding:12px;min-width:0}
svg{width:100%;height:auto;display:block}
text{font:11px system-ui,sans-serif;fill:var(--soft)}.g{stroke:var(--line);stroke-width:.7}
.s{fill:none;stroke-width:1.8}@media(max-width:560px){text{font-size:17px}.s{stroke-width:2.6}}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0 0;padding:0;font-size:13px;color:var(--soft)}
li{overflow-wrap:anywhere}li i{display:inline-block;width:12px;height:3px;vertical-align:middle;margin-right:5px}
li b{color:var(--ink);font-variant-numeric:tabular-nums}p{color:var(--soft)}
table{border-collapse:collapse;display:block;overflow-x:auto;font-size:14px}
.wide{grid-column:1/-1}th,td{padding:3px 10px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
"""


def read_logs(directory: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Return what a run logged: by key its (step, value) pairs, in the order of the steps; NaN and infinite ones too.

    Args:
        directory: output_dir of a run, one of its checkpoints, or Lightning's log directory.

    Raises:
        ConfigError: there are no logs, or they cannot be read.
    """
    place = Path(directory)
    states = [place / "trainer_state.json", *place.glob("checkpoint-*/trainer_state.json")]
    states = sorted((one for one in states if one.is_file()), key=lambda one: one.stat().st_mtime)
    tables = sorted(place.rglob("metrics.csv"), key=lambda one: one.stat().st_mtime)
    try:
        if states:
            entries: Iterable[Mapping[str, object]] = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
        elif tables:
            entries = list(csv.DictReader(tables[-1].read_text(encoding="utf-8").splitlines()))
        else:
            raise ConfigError(
                f"{place} holds no logs: neither trainer_state.json, which every checkpoint of TRL has, "
                "nor metrics.csv of Lightning's CSVLogger. Name the output_dir of a run."
            )
        found: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            step = float(str(entry.get("step") or 0))
            for key, value in entry.items():
                try:
                    number = float(str(value))
                except ValueError:
                    continue
                if not _ASIDE.fullmatch(key):
                    found.setdefault(key, []).append((step, number))
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"The logs in {place} cannot be read: {error}.") from error
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def report(logs: Series, title: str) -> str:
    """Return the page.

    Args:
        logs: as :func:`read_logs` returns them.
        title: heading of the page.
    """
    left = dict(logs)
    sections = []
    for name, unit, pattern in _CHARTS:
        taken = {key: left.pop(key) for key in list(left) if re.fullmatch(pattern, key)}
        if taken:
            sections.append(section(name, unit, taken))
    sections += [section(key, "", {key: points}) for key, points in left.items()]
    steps = max((points[-1][0] for points in logs.values()), default=0)
    said = f"{steps:g} steps. Each number after a name is its last value." if sections else "Nothing was logged yet."
    return page(title, said, sections)


def page(title: str, said: str, sections: Sequence[str]) -> str:
    """Return a self-contained page.

    Args:
        title: its heading.
        said: a sentence below it, as text.
        sections: HTML, side by side where there is room.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{escape(title)}</h1><p>{escape(said)}</p><main>{"".join(sections)}</main></body></html>
"""


def table_section(name: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its heading, as wide as the page; the first row names the columns."""
    cells = ((("td" if number else "th"), row) for number, row in enumerate(rows))
    lines = "".join(f"<tr>{''.join(f'<{tag}>{escape(cell)}' for cell in row)}</tr>" for tag, row in cells)
    return f'<section class="wide"><h2>{escape(name)}</h2><table>{lines}</table></section>'


def section(name: str, unit: str, series: Series, **drawn: Any) -> str:
    """Return a chart with its heading and its legend; ``drawn`` as :func:`chart` takes it."""
    drawable = {key: [point for point in points if math.isfinite(point[1])] for key, points in series.items()}
    legend = "".join(
        f'<li><i style="background:{_COLOURS[i % len(_COLOURS)]}"></i>{escape(key)} <b>{points[-1][1]:.4g}</b>'
        f"{_not_finite(points, len(drawable[key]))}</li>"
        for i, (key, points) in enumerate(series.items())
    )
    about = f" <span>{escape(unit)}</span>" if unit else ""
    lines = chart(name, drawable, **drawn) if any(drawable.values()) else ""
    return f"<section><h2>{escape(name)}{about}</h2>{lines}<ul>{legend}</ul></section>"


def _not_finite(points: Sequence[tuple[float, float]], finite: int) -> str:
    """Say how many of the values cannot be drawn, and since when."""
    if finite == len(points):
        return ""
    first = next(step for step, value in points if not math.isfinite(value))
    return f" ({len(points) - finite} not finite, first at {first:g})"


def chart(
    name: str,
    series: Series,
    *,
    over: str = "steps",
    bars: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Draw lines as SVG; few points are dots, too.

    Args:
        name: what is drawn.
        series: by key its (x, y) points.
        over: what x counts; steps are whole.
        bars: by key the (lower, upper) ends of an interval at each of its points.
        levels: by key what is to be reached, a broken line.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    ys += [end for ends in (bars or {}).values() for pair in ends for end in pair] + [*(levels or {}).values()]
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 6, within=True, whole=over == "steps"), _ticks(min(ys), max(ys), 5)
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if x_high == x_low else (x - x_low) / (x_high - x_low)
        return _LEFT + across * wide, _TOP + high - (y - y_low) / (y_high - y_low) * high

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)} over {escape(over)}">']
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<path class="g" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        anchor = "end" if x > _WIDTH - 4 * _RIGHT else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{tick:g}</text>')
    for i, (key, points) in enumerate(series.items()):
        colour, spots = _COLOURS[i % len(_COLOURS)], [place(*point) for point in points]
        if len(spots) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(
                f'<polyline class="s" stroke="{colour}" points="{line}"><title>{escape(key)}</title></polyline>'
            )
        if len(spots) <= _FEW:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        for (at, _), (least, most) in zip(points, (bars or {}).get(key, ()), strict=False):
            (across, bottom), (_, top) = place(at, least), place(at, most)
            parts.append(f'<path class="s" stroke="{colour}" opacity=".6" d="M{across:.1f} {bottom:.1f}V{top:.1f}"/>')
        if levels and key in levels:
            _, y = place(x_low, levels[key])
            line = f"M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"
            parts.append(f'<path class="s" stroke="{colour}" stroke-dasharray="5 4" d="{line}"/>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float, most: int, *, within: bool = False, whole: bool = False) -> list[float]:
    """Return round numbers from below ``low`` to above ``high``, or within them; of steps whole ones."""
    if high == low:
        if within:
            return [low]
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    step = max(1.0, step) if whole else step
    first, last = (math.ceil, math.floor) if within else (math.floor, math.ceil)
    return [k * step for k in range(first(low / step), last(high / step) + 1)]
