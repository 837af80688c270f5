"""The plot of ``kd-plugin cache fidelity``."""

from __future__ import annotations

from pathlib import Path

from kd_plugin.cache.targets import Sampled
from kd_plugin.capturing.fidelity import Fidelity


def plot(found: Fidelity, path: str | Path, budget_bytes: float | None = None) -> None:
    """Draw cosine and norm ratio of the gradients against bytes a position, truncated and sampled apart.

    Args:
        found: what was measured.
        path: a .png, .svg or .pdf file.
        budget_bytes: where to draw the budget, or None.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    series = {
        "truncated": [m for m in found.measurements if not isinstance(m.targets, Sampled)],
        "sampled": [m for m in found.measurements if isinstance(m.targets, Sampled)],
    }
    for axes, field, title in zip(
        panels,
        ("cosine", "norm_ratio"),
        ("cosine to the exact gradient", "norm, as a share of the exact one"),
        strict=True,
    ):
        for (label, measured), marker in zip(series.items(), "os", strict=True):
            measured = sorted(measured, key=lambda m: m.bytes)
            axes.plot([m.bytes for m in measured], [getattr(m, field) for m in measured], marker=marker, label=label)
            for m in measured:
                axes.annotate(
                    m.name.split()[1], (m.bytes, getattr(m, field)), textcoords="offset points", xytext=(4, 5)
                )
        axes.axhline(1.0, color="0.7", linewidth=0.8)
        if budget_bytes is not None:
            axes.axvline(budget_bytes, color="0.5", linestyle="--", linewidth=0.8)
        axes.set(xscale="log", xlabel="bytes a position", title=title)
    panels[0].legend()
    figure.suptitle(f"Student's gradient from stored targets, over {found.positions} positions")
    figure.savefig(path)
