"""The experiment's table and plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from examples.merge_experts.tasks import DOMAINS

Accuracies = Mapping[str, Mapping[str, float]]


def grouped(results: Accuracies) -> dict[str, list[Mapping[str, float]]]:
    """Group the results of one recipe over its seeds."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, found in results.items():
        groups.setdefault(name.split(" / seed ")[0], []).append(found)
    return groups


def recovered(results: Accuracies, found: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each expert's gain over the base that a student has in the expert's own domain."""
    base, shares = results["base"], {}
    for domain in DOMAINS:
        gain = results[f"expert: {domain}"][domain] - base[domain]
        shares[domain] = (found[domain] - base[domain]) / gain if gain > 0 else math.nan
    return shares


def write_report(results: Accuracies, directory: Path) -> None:
    """Write ``results.md`` and ``results.png``: accuracy in each domain, and the least share of a gain recovered.

    A recipe's numbers are the means of its seeds, with the lowest and the highest seed beside them.
    """
    lines = [
        "| model | " + " | ".join(DOMAINS) + " | least gain recovered | seeds |",
        "|---|" + "---:|" * (len(DOMAINS) + 2),
    ]
    groups = grouped(results)
    for name, runs in groups.items():
        means = {domain: mean(run[domain] for run in runs) for domain in DOMAINS}
        least = "" if name.startswith(("base", "expert")) else f"{min(recovered(results, means).values()):.2f}"
        cells = " | ".join(_cell([run[domain] for run in runs]) for domain in DOMAINS)
        seeds = "" if name in results else len(runs)
        lines.append(f"| {name} | {cells} | {least} | {seeds} |")
    (directory / "results.md").write_text("\n".join(lines) + "\n")
    _plot(groups, directory / "results.png")


def _cell(values: Sequence[float]) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def _plot(groups: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(groups)
    for i, (name, runs) in enumerate(groups.items()):
        values = [[run[domain] for run in runs] for domain in DOMAINS]
        means = [mean(seeds) for seeds in values]
        below = [m - min(seeds) for m, seeds in zip(means, values, strict=True)]
        above = [max(seeds) - m for m, seeds in zip(means, values, strict=True)]
        places = [d + i * width for d in range(len(DOMAINS))]
        axes.bar(places, means, width, label=name, yerr=[below, above], error_kw={"elinewidth": 0.8})
    axes.set_xticks([d + 0.4 - width / 2 for d in range(len(DOMAINS))], list(DOMAINS))
    axes.set_ylabel("held-out accuracy")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
