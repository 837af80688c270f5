"""The trials of a pilot: which methods there are, the recipe of each run, what it cost and what it reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.cache.manifest import read_manifest
from kd_plugin.errors import KDError
from kd_plugin.evaluation.cost import Cost
from kd_plugin.evaluation.in_loop import EVALUATIONS
from kd_plugin.evaluation.recipes import Done, Recipes, shape_of, student_path
from kd_plugin.evaluation.results import Evaluation, load_evaluation, shares_of

_QUIET = {"report_to": "none", "disable_tqdm": True, "save_total_limit": 1}


@dataclass(frozen=True)
class Method:
    """A way to distil.

    Attributes:
        name: as ``methods`` names it.
        says: what it is.
        writes: who writes what is captured: ``teacher``, ``student``, or None where nothing is.
        offline: whether it trains on a capture.
        panel: whether the student generates while it trains.
        text: whether its teachers correct by text.
    """

    name: str
    says: str
    writes: str | None = None
    offline: bool = False
    panel: bool = False
    text: bool = False


# The simplest first: it is taken where nothing is better
METHODS = {
    one.name: one
    for one in (
        Method("offline_teacher", "offline KD on what the teacher generated", "teacher", offline=True),
        Method("offline_student", "offline KD on what the student generated, scored once", "student", offline=True),
        Method("panel", "on-policy: the panel scores what the student generates now", panel=True),
        Method("warmup_panel", "offline KD on the teacher's text, then the panel", "teacher", offline=True, panel=True),
        Method("text_correction", "on-policy, corrected by text", panel=True, text=True),
    )
}


@dataclass(frozen=True)
class Steps:
    """How long a method trains.

    Attributes:
        offline: optimizer steps on the capture.
        panel: optimizer steps on policy.
        rows: rows that are captured.
    """

    offline: int = 0
    panel: int = 0
    rows: int = 0

    def share(self, of_it: float) -> Steps:
        """Return a part of the training on the same capture."""
        part = [max(1, round(steps * of_it)) if steps else 0 for steps in (self.offline, self.panel)]
        return replace(self, offline=part[0], panel=part[1])


@dataclass(frozen=True)
class Trial:
    """One training of a pilot.

    Attributes:
        method: how.
        learning_rate: of all its stages.
        seed: of the training.
        steps: how long.
        kind: ``probe``, ``scan`` or ``final``.
        evaluations: how often its student is evaluated, the last time at its end.
    """

    method: Method
    learning_rate: float
    seed: int
    steps: Steps
    kind: str
    evaluations: int = 1

    @property
    def name(self) -> str:
        """Of its directory."""
        rate = f"lr{self.learning_rate:g}"
        return f"{self.method.name}-{self.kind}-{rate}-seed{self.seed}"


@dataclass(frozen=True)
class Point:
    """What a student had cost and reached at an evaluation.

    Attributes:
        cost: captures included.
        evaluation: on the tasks.
    """

    cost: Cost
    evaluation: Evaluation

    @property
    def shares(self) -> list[float]:
        """(Q,) of every question of every task the share of its answers that are right."""
        return [share for name in self.evaluation.results for share in shares_of(self.evaluation.path / name)]


@dataclass(frozen=True)
class Sections:
    """What all runs of a pilot have in common, in a recipe's form.

    Attributes:
        output_dir: of the pilot.
        student: as a recipe has it.
        teachers: those that give distributions.
        text_teachers: those that correct by text.
        data: the rows.
        tasks: a file of tasks, or its mapping.
        capture: settings of captures.
        offline: settings of offline KD.
        panel: settings of the panel.
        text: how text is evaluated and corrected, in a panel's block.
        lineage: declarations.
        launch: how training starts.
    """

    output_dir: Path
    student: Any
    teachers: Mapping[str, Any]
    text_teachers: Mapping[str, Any]
    data: Mapping[str, Any]
    tasks: Any
    capture: Mapping[str, Any]
    offline: Mapping[str, Any]
    panel: Mapping[str, Any]
    text: Mapping[str, Any] | None = None
    lineage: Any = None
    launch: Any = None

    def recipe(self, trial: Trial) -> dict[str, Any]:
        """Return the recipe of a run, as ``kd-plugin run`` takes it."""
        method, steps = trial.method, trial.steps
        content: dict[str, Any] = {
            "output_dir": str(self.output_dir / "runs" / trial.name),
            "student": self.student,
            "teachers": dict(self.text_teachers if method.text else self.teachers),
            "data": dict(self.data),
            "lineage": self.lineage,
            "launch": self.launch,
        }
        if method.writes is not None:
            content["cache_dir"] = str(self.output_dir / "captures" / f"{method.writes}-{steps.rows}")
            content["capture"] = {**self.capturing(method), "limit": steps.rows}
        for stage, present, count in (("offline", method.offline, steps.offline), ("panel", method.panel, steps.panel)):
            if present:
                content[stage] = {**getattr(self, stage), **self._training(trial, count)}
        if method.text and self.text is not None:
            content["panel"]["panel"] = {**(self.panel.get("panel") or {}), "text": dict(self.text)}
        return {key: value for key, value in content.items() if value is not None}

    def capturing(self, method: Method) -> dict[str, Any]:
        """Return a capture's settings for a method: who writes."""
        if method.writes == "student":
            return {"keep_unfinished": True, **self.capture, "generate": {"by": student_path(self.student)}}
        return {"mode": "generate", **self.capture}

    def _training(self, trial: Trial, steps: int) -> dict[str, Any]:
        every = max(1, steps // trial.evaluations)
        tasks = _one_question(self.tasks) if trial.kind == "probe" else self.tasks
        evaluated = {"eval_tasks": tasks, "eval_strategy": "steps", "eval_steps": every}
        saved = {"save_strategy": "steps", "save_steps": every}
        return {
            **_QUIET, **evaluated, **saved, "learning_rate": trial.learning_rate, "seed": trial.seed,
            "max_steps": steps,
        }  # fmt: skip


class Runs:
    """Runs trials, each once; what is done is kept, and what was interrupted goes on.

    Args:
        sections: what they have in common.
        recipes: runs their recipes.
    """

    def __init__(self, sections: Sections, recipes: Recipes) -> None:
        self.sections, self._recipes = sections, recipes

    def refused(self, trial: Trial) -> bool:
        """Print what the terms of a trial allow; return whether its training would be refused."""
        return self._recipes.refused(self.sections.recipe(trial))

    def run(self, trial: Trial) -> list[Point]:
        """Run what is left of a trial; return its evaluations, each with what it had cost, in order.

        Raises:
            KDError: a stage failed; its words are in ``log.txt`` of the run.
        """
        return self._points(trial, self._done(trial))

    def captured(self, trial: Trial) -> Cost | None:
        """Return what the captures of a trial that was run took; None where it has none."""
        found = [self._captured(trial.method, one) for one in self._done(trial) if one.command == "capture"]
        return sum(found, Cost()) if found else None

    def _done(self, trial: Trial) -> list[Done]:
        recipe = self.sections.recipe(trial)
        return self._recipes.run(recipe, Path(recipe["output_dir"]) / "log.txt")

    def _points(self, trial: Trial, stages: Sequence[Done]) -> list[Point]:
        found, before = [], Cost()
        for stage in stages:
            if stage.command == "capture":
                before += self._captured(trial.method, stage)
                continue
            steps = int(stage.config["max_steps"])
            places = [(int(p.name.removeprefix("step-")), p) for p in (stage.result / EVALUATIONS).glob("step-*")]
            there = [load_evaluation(place) for step, place in sorted(places) if step <= steps]
            if not there or there[-1].cost is None:
                raise KDError(f"{trial.name}: {stage.result} holds no evaluation. Delete it and run the pilot again.")
            found += [Point(before + (one.cost or Cost()), one) for one in there]
            before = found[-1].cost
        return found

    def _captured(self, method: Method, stage: Done) -> Cost:
        """Return what a capture took: who writes reads and writes each token once, and the teacher scores each once."""
        tokens = sum(unit.input_tokens for unit in read_manifest(stage.result).units)
        teacher, student = stage.config["teacher"], student_path(self.sections.student)
        scored = _pass_of(teacher) * tokens
        written = _pass_of(student if method.writes == "student" else teacher) * tokens
        if method.writes == "student":
            return Cost(written, scored, stage.seconds)
        return Cost(0.0, scored + written, stage.seconds)


def _pass_of(model: Any) -> float:
    """Return the operations of a token in a forward pass, by the model's configuration; 0 where it is unknown."""
    shape = shape_of(model.get("repo") if isinstance(model, Mapping) else model)
    return 0.0 if shape is None else 2.0 * (shape.total - (0 if shape.tied else shape.head_numel))


def _one_question(tasks: Any) -> Any:
    """Return tasks of one question and one answer each: what a probe asks to learn what training costs."""
    content = yaml.safe_load(Path(tasks).read_text(encoding="utf-8")) if isinstance(tasks, str) else dict(tasks)
    own = content.get("tasks") or {}
    few = {"limit": 1, "completions": 1, "max_new_tokens": 1}
    return {
        **content,
        "tasks": {n: {**({"rows": one} if isinstance(one, str) else one), **few} for n, one in own.items()},
    }


def in_unit(cost: Cost, unit: str, price_per_hour: float) -> float:
    """Return a cost as one number: ``flops``, ``seconds``, or ``money`` for hours here and what servers were paid."""
    if unit == "flops":
        return cost.flops
    return cost.seconds if unit == "seconds" else cost.seconds / 3600 * price_per_hour + cost.money


def scores_of(points: Sequence[Point]) -> list[list[float]]:
    """Return the (S, Q) scores of the last evaluations of several seeds."""
    return [point.shares for point in points]
