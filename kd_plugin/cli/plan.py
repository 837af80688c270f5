"""``kd-plugin plan``: whether a run fits, with which settings, at which price, and the files that launch it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_plugin.cli.parsing import parse_settings
from kd_plugin.cli.plan_report import plot_peaks, print_engines, print_plan, print_text_bills
from kd_plugin.errors import ConfigError
from kd_plugin.launch.configs import training_arguments, write_all
from kd_plugin.launch.jobs.parts import parts_of
from kd_plugin.launch.jobs.write import write_jobs
from kd_plugin.planner.cost import BreakEven, Option, TextBill, bills, break_even, options, recommended, text_bills
from kd_plugin.planner.run import Cluster, Pair, PlannedRun, pairs
from kd_plugin.planner.settings import PlanSettings, engines_of, planned
from kd_plugin.planner.time import Engines, best_split, engine_step, gpu_hours, hidden_state_bytes, traffic
from kd_plugin.text.spending import Prices

_DESCRIPTION = """\
Says before you rent machines whether a student and its teachers fit, for each ZeRO stage and offload, recommends the
fastest that does, and with --output writes the files that launch it. Architectures are read from a config.json or
known by name; no network, no GPU and no weights are needed. Exit codes: 0 something fits, 3 nothing does,
or training would refuse a teacher for its tokens or terms.
"""
EXIT_NOTHING_FITS = 3


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    flags = {"json": "print the plan as JSON, all figures in bytes, seconds and GPU hours"}
    parsed = parse_settings(PlanSettings, argv, command="plan", description=_DESCRIPTION, flags=flags)
    settings = parsed.settings
    if parsed.shown():
        return 0
    run, cluster = planned(settings)
    beside = engines_of(settings)
    found = options(run, cluster)
    looked = pairs(settings.student, [one.name for one in run.teachers if one.name not in settings.text_teachers])
    best = None if any(pair.refused for pair in looked) else recommended(found)
    if "json" in parsed.flags:
        shown = as_json(settings, run, cluster, found, best, looked)
        if beside is not None and best is not None:
            split = best_split(best.run, best.seconds, cluster, beside)
            shown["engines"] = _engines(best, cluster, beside) | {"best_split": dataclasses.asdict(split)}
        print(json.dumps(shown, indent=2))
    else:
        even = _break_even(settings, run, cluster)
        costs = bills(run, cluster, settings.rows, settings.epochs)
        print_plan(run, cluster, found, best, looked, costs, even, settings.rows, settings.epochs)
        if beside is not None and best is not None:
            print_engines(best, cluster, beside)
        print_text_bills(_text_bills(settings, run), settings.corrected)
    if settings.plot is not None:
        plot_peaks(run, cluster, found, best, Path(settings.plot))
    if best is not None and settings.output is not None:
        written = _write(settings, best, cluster, beside)
        if "json" not in parsed.flags:
            print("Written: " + ", ".join(map(str, written)))
    return 0 if best is not None else EXIT_NOTHING_FITS


def _write(settings: PlanSettings, best: Option, cluster: Cluster, beside: Engines | None) -> list[Path]:
    """Write what launches the recommended layout; with engines beside it also what starts them and the servers."""
    directory = Path(str(settings.output))
    written = write_all(best.run, best.layout, cluster, directory, settings.nvme_path)
    if beside is None:
        return written
    parts = parts_of(
        best.run,
        cluster,
        beside,
        lora_rank=settings.lora_rank,
        deepspeed=str(directory / "deepspeed.json"),
        arguments=training_arguments(best.run, best.layout),
    )
    return [*written, *write_jobs(parts, directory, directory)]


def _engines(best: Option, cluster: Cluster, beside: Engines) -> dict[str, Any]:
    step = engine_step(best.run, best.seconds, cluster, beside)
    hours = gpu_hours(step, cluster, beside)
    return {
        "seconds": {**dataclasses.asdict(step), "total": step.total},
        "hidden_state_bytes": hidden_state_bytes(best.run, cluster, beside),
        "gpu_hours": hours,
        "cost": hours * cluster.price,
    }


def as_json(
    settings: PlanSettings,
    run: PlannedRun,
    cluster: Cluster,
    found: Sequence[Option],
    best: Option | None,
    looked: Sequence[Pair],
) -> dict[str, Any]:
    """Return the plan for programs: bytes, seconds, GPU hours."""
    even = _break_even(settings, run, cluster)
    return {
        "settings": dataclasses.asdict(settings),
        "student": {"parameters": run.student.total, "trainable": run.student.trainable},
        "ranks": cluster.ranks,
        "usable_bytes": cluster.usable,
        "options": [_option(option, cluster) for option in found],
        "recommended": None if best is None else best.layout.name,
        "pairs": [dataclasses.asdict(pair) for pair in looked],
        "bills": [
            dataclasses.asdict(bill) | {"hours": bill.hours, "tokens_per_second": bill.tokens_per_second}
            for bill in bills(run, cluster, settings.rows, settings.epochs)
        ],
        "text_bills": [dataclasses.asdict(bill) for bill in _text_bills(settings, run)],
        "break_even": None if even is None else dataclasses.asdict(even),
    }


def _option(option: Option, cluster: Cluster) -> dict[str, Any]:
    sent = traffic(option.run, option.layout.stage, cluster.ranks)
    return {
        "name": option.layout.name,
        **dataclasses.asdict(option.layout),
        "memory": option.memory.to_json(),
        "gather_for_generation": option.run.gather_for_generation,
        "seconds": {**dataclasses.asdict(option.seconds), "total": option.seconds.total},
        "sent_bytes": {**dataclasses.asdict(sent), "total": sent.total},
        "fits": option.fits,
        "verdict": option.verdict,
    }


def _text_bills(settings: PlanSettings, run: PlannedRun) -> list[TextBill]:
    if not 0.0 <= settings.corrected <= 1.0:
        raise ConfigError(f"corrected is {settings.corrected}; expected a share from 0 to 1.")
    prices = {}
    for name, given in settings.text_teachers.items():
        try:
            prices[name] = Prices.of(given)
        except ConfigError as error:
            raise ConfigError(f"text_teachers: {name}: {error}") from error
    responses = settings.rows * settings.epochs
    return text_bills(prices, run, responses, corrected=settings.corrected, voted=settings.voted)


def _break_even(settings: PlanSettings, run: PlannedRun, cluster: Cluster) -> BreakEven | None:
    if not (settings.api_input or settings.api_output):
        return None
    return break_even(run, cluster, input_price=settings.api_input, output_price=settings.api_output)
