"""A pilot from its settings to its outcome: what each method's steps cost, learning rates, and the runs compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.decisions import Comparison, accuracy, compare_all
from kd_plugin.evaluation.pilot.report import PilotOutcome, Result
from kd_plugin.evaluation.pilot.settings import PilotConfig, State, teachers_by_kind
from kd_plugin.evaluation.pilot.trials import METHODS, Method, Point, Runs, Sections, Steps, Trial, in_unit, scores_of
from kd_plugin.evaluation.recipes import Recipes
from kd_plugin.inputs import load_mixture, load_rows

Say = Callable[[str], None]

# What was measured, in docs/results.md; a pilot is run because your case may differ
_EXPECT = (
    "What to expect: where the teacher's text is right, its tokens alone are hard to beat (offline: {kd_weight: 0, "
    "ce_weight: 1}, of texts at T = 0.6). Where its distributions are broad, reverse KL on what the student writes "
    "beats forward KL on either text. See docs/pilot.md."
)


class Pilot:
    """A pilot.

    Args:
        config: its settings.
        state: what it decided before it was interrupted.
        recipes: runs its recipes.

    Raises:
        ConfigError: no method is left for these teachers.
    """

    def __init__(self, config: PilotConfig, state: State, recipes: Recipes) -> None:
        self.config, self.state = config, state
        teachers, text = teachers_by_kind(config.teachers or {})
        self.methods = _applicable(config.methods, teachers, text)
        self.sections = Sections(
            Path(config.output_dir),
            config.student,
            teachers,
            text,
            config.data or {},
            config.tasks,
            config.capture or {},
            config.offline or {},
            config.panel or {},
            config.text,
            config.lineage,
            config.launch,
        )
        self.runs = Runs(self.sections, recipes)

    def refused(self) -> bool:
        """Print the verdict on the terms of student, teachers and rows; return whether training would be refused."""
        by_teachers = {method.text: method for method in self.methods}
        return any([self.runs.refused(self._probe(method)) for method in by_teachers.values()])

    def plan(self) -> str:
        """Return what will be run, as text."""
        config = self.config
        scanned = len(config.learning_rates) if len(config.learning_rates) > 1 else 0
        each = scanned * config.scan_share + len(config.seeds)
        lines = [f"{method.name:<16}{method.says}" for method in self.methods]
        lines.append(
            f"{len(self.methods)} methods x ({scanned} learning rates x {config.scan_share:g} + {len(config.seeds)} "
            f"seeds) runs of {config.budget:g} {config.unit}: at most "
            f"{len(self.methods) * each * config.budget:g} {config.unit}, evaluations left out."
        )
        return "\n".join([*lines, _EXPECT])

    def run(self, say: Say) -> PilotOutcome:
        """Run all that is left, and compare.

        Raises:
            KDError: a run failed; what is done is kept.
        """
        found: dict[str, list[list[Point]]] = {}
        for method in self.methods:
            steps = self._steps(method, say)
            rate = self._rate(method, steps, say)
            found[method.name] = []
            for seed in self.config.seeds:
                trial = Trial(method, rate, seed, steps, "final", self.config.evaluations)
                found[method.name].append(self.runs.run(trial))
                say(f"{trial.name}: {fmean(found[method.name][-1][-1].shares):.3f}")
        return self._outcome(found)

    def _outcome(self, found: Mapping[str, list[list[Point]]]) -> PilotOutcome:
        results = tuple(self._result(METHODS[name], runs) for name, runs in found.items())
        pairs = compare_all({name: scores_of([run[-1] for run in runs]) for name, runs in found.items()})
        winner, why = choose(results, pairs)
        chosen = next(one for one in results if one.method is winner)
        return PilotOutcome(
            results, tuple(pairs), winner, why, self._recipe(chosen), self.config.unit, self.config.budget
        )

    def _result(self, method: Method, runs: Sequence[Sequence[Point]]) -> Result:
        shown = min(map(len, runs))
        curve = [
            (fmean(self._in_unit(run[i]) for run in runs), accuracy(scores_of([run[i] for run in runs])))
            for i in range(-shown, 0)
        ]
        steps = Steps(**self.state.steps[method.name])
        return Result(method, self.state.rates[method.name], steps, tuple(curve), *curve[-1], len(runs))

    def _recipe(self, chosen: Result) -> dict[str, Any]:
        """Return the winner's recipe: its method, learning rate and settings, on all rows, in its own directory."""
        evaluations = self.config.evaluations
        trial = Trial(chosen.method, chosen.learning_rate, self.config.seeds[0], chosen.steps, "final", evaluations)
        recipe = self.sections.recipe(trial)
        recipe["output_dir"] = str(self.sections.output_dir / "winner")
        recipe.pop("cache_dir", None)
        if "capture" in recipe:
            recipe["capture"].pop("limit")
        return recipe

    def _probe(self, method: Method) -> Trial:
        rows = self._batch("offline") * self.config.probe_steps if method.writes else 0
        count = self.config.probe_steps
        steps = Steps(count * int(method.offline), count * int(method.panel), rows)
        return Trial(method, min(self.config.learning_rates), self.config.scan_seed, steps, "probe")

    def _steps(self, method: Method, say: Say) -> Steps:
        """Return for how many steps the budget lasts, by what a few of them cost."""
        if method.name in self.state.steps:
            return Steps(**self.state.steps[method.name])
        probe = self._probe(method)
        points = self.runs.run(probe)
        costs = [self._in_unit(point) for point in points]
        captured = self.runs.captured(probe)
        row = 0.0 if captured is None else in_unit(captured, *self._unit) / probe.steps.rows
        before = row * probe.steps.rows
        steps, budget, batch = {"offline": 0, "panel": 0, "rows": 0}, self.config.budget, self._batch("offline")
        if method.offline:
            share = self.config.warmup_share if method.panel else 1.0
            step = (costs[0] - before) / probe.steps.offline
            used = batch / self.config.epochs * row  # of the capture, by each step
            steps["offline"] = self._whole(budget * share / (step + used) if step + used else math.inf)
            steps["rows"] = min(math.ceil(steps["offline"] * batch / self.config.epochs), self._rows)
            if steps["rows"] == self._rows:  # it is all captured, and gone through more often
                steps["offline"] = self._whole((budget * share - row * self._rows) / step)
        if method.panel:
            step = (costs[-1] - (costs[0] if method.offline else 0.0)) / probe.steps.panel
            share = 1.0 - self.config.warmup_share if method.offline else 1.0
            steps["panel"] = self._whole(budget * share / step if step else math.inf)
        if not all(steps[name] for name, present in (("offline", method.offline), ("panel", method.panel)) if present):
            raise ConfigError(
                f"budget {budget:g} {self.config.unit} lasts for less than {self.config.evaluations} steps of "
                f"{method.name}: {self.config.probe_steps} steps with their capture took {costs[-1]:g}. Give more, or "
                "evaluate less often."
            )
        self.state.steps[method.name] = steps
        self.state.write()
        say(f"{method.name}: {steps['offline'] + steps['panel']} steps, {steps['rows']} rows captured")
        return Steps(**steps)

    def _whole(self, steps: float) -> int:
        """Return whole evaluations' worth of steps."""
        if math.isinf(steps):
            raise ConfigError(
                f"Nothing costs anything in {self.config.unit}: set price_per_hour, or choose another unit."
            )
        return max(0, int(steps)) // self.config.evaluations * self.config.evaluations

    def _rate(self, method: Method, steps: Steps, say: Say) -> float:
        """Return the learning rate that does best in a part of the steps, the lower one of equals."""
        rates = sorted(self.config.learning_rates)
        if method.name not in self.state.rates and len(rates) > 1:
            part, reached = steps.share(self.config.scan_share), {}
            for rate in rates:
                trial = Trial(method, rate, self.config.scan_seed, part, "scan")
                reached[rate] = fmean(self.runs.run(trial)[-1].shares)
                say(f"{trial.name}: {reached[rate]:.3f}")
            rates = [max(rates, key=lambda rate: (reached[rate], -rate))]
        if method.name not in self.state.rates:
            self.state.rates[method.name] = rates[0]
            self.state.write()
        return self.state.rates[method.name]

    def _batch(self, stage: str) -> int:
        """Return the rows of an optimizer step."""
        given = getattr(self.sections, stage)
        processes = int((self.config.launch or {}).get("processes", 1))
        return (
            int(given.get("per_device_train_batch_size", 8))
            * int(given.get("gradient_accumulation_steps", 1))
            * processes
        )

    @cached_property
    def _rows(self) -> int:
        data = dict(self.config.data or {})
        if data.get("datasets"):
            return len(load_mixture(data["datasets"]))
        return len(load_rows(data["dataset"], split=data.get("split", "train"), name=data.get("dataset_name")))

    @property
    def _unit(self) -> tuple[str, float]:
        return self.config.unit, self.config.price_per_hour

    def _in_unit(self, point: Point) -> float:
        return in_unit(point.cost, *self._unit)


def choose(results: Sequence[Result], pairs: Sequence[Comparison]) -> tuple[Method, str]:
    """Return the method to take, and why: the simplest of those that nothing is really ahead of."""
    real = [pair for pair in pairs if pair.real]
    if not real:
        words = (
            "no difference between the methods is real at this budget" if len(results) > 1 else "it was the only one"
        )
        return results[0].method, f"{words}, so the simplest is taken"
    behind = {pair.second for pair in real}
    winner, *others = [one.method for one in results if one.method.name not in behind]
    worse = [pair.second for pair in real if pair.first == winner.name]
    words = f"it is really ahead of {', '.join(worse)}" if worse else "nothing is really ahead of it"
    if others:
        words += f"; {', '.join(other.name for other in others)}: not surely better, and less simple"
    return winner, words


def _applicable(
    asked: Sequence[str] | None, teachers: Mapping[str, Any], text: Mapping[str, Any]
) -> tuple[Method, ...]:
    """Return the methods that the teachers allow, the simplest first.

    Raises:
        ConfigError: one was asked for that needs a teacher which is not there; or none is left.
    """
    allowed = [one for one in METHODS.values() if (text if one.text else teachers)]
    for name in asked or ():
        if METHODS[name] not in allowed:
            need = "with signal: text" if METHODS[name].text else "that gives distributions"
            raise ConfigError(f"methods: {name} needs a teacher {need}, and teachers has none.")
    chosen = tuple(one for one in allowed if asked is None or one.name in asked)
    if not chosen:
        raise ConfigError("No method is left to try: name teachers, and methods that they allow.")
    return chosen
