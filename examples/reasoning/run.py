"""Where does on-policy distillation pay? ``python -m examples.reasoning.run --output_dir out``.

Trains a teacher and a student's start from scratch on problems whose solutions are long, captures what the teacher
writes, chooses a learning rate for each method on a seed of its own, trains the student by every method and seed, and
draws the map: starts of three qualities. Writes ``results.json``, ``results.md`` and the plots. What is finished is not
done again, so an interrupted run goes on with the same command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from examples.reasoning.methods import CAPTURES, METHODS, Method, Training, capture_for, tasks_of, warm_up
from examples.reasoning.models import ROWS, make_starts, make_teacher
from examples.reasoning.problems import LENGTHS, held_out, held_out_prompts, problems
from examples.reasoning.report import Run, write_report
from examples.side_by_side import Results, workers

MAPPED = (
    "SFT on teacher text",
    "SFT on teacher text of T = 1",
    "offline KD, top-k",
    "offline KD, own samples",
    "on-policy, reverse KL",
)
SCAN_SEED = 1000  # none of the seeds that are compared


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        output_dir: everything is written here.
        methods: names of those that are compared; left out, all. More may be added later.
        teacher_updates: of the teacher.
        starts: updates of the student before any method begins; the middle one is the main comparison's.
        updates: of every method; offline methods go on to twice as many, which cost about as much.
        rows: of each capture; what reads more of them reads them again.
        evaluate_every: updates.
        learning_rates: that are tried for each method, for half of the updates.
        questions: held-out problems of each length.
        seeds: of the main comparison.
        map_seeds: of each other start.
        workers: trainings side by side.
    """

    output_dir: Path
    methods: tuple[str, ...] = tuple(METHODS)
    teacher_updates: int = 1500
    starts: tuple[int, int, int] = (500, 600, 800)
    updates: int = 80
    rows: int = 3840
    evaluate_every: int = 20
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    questions: int = 60
    seeds: int = 5
    map_seeds: int = 3
    workers: int = 2


def main_start(options: Options) -> int:
    """Return the start of the main comparison."""
    return options.starts[len(options.starts) // 2]


def start_path(options: Options, updates: int) -> Path:
    """Return where a start is."""
    return options.output_dir / f"start-{updates}"


def captures_of(options: Options, start: int) -> dict[str, Path]:
    """Return where what methods fit is; the teacher's is the same for all starts."""
    return {name: options.output_dir / (f"own-{start}" if name == "own" else name) for name in CAPTURES}


@dataclass(frozen=True)
class Job:
    """One training, by what tells it from the others."""

    method: str
    start: int
    learning_rate: float
    seed: int
    updates: int

    @property
    def name(self) -> str:
        """Of its directory and in the results."""
        return f"{self.method} / start {self.start} / rate {self.learning_rate:g} / seed {self.seed}"


def main(options: Options) -> None:
    """Do what is not done yet, and write the report after every training."""
    root = options.output_dir
    root.mkdir(parents=True, exist_ok=True)
    for steps, found in held_out(options.questions).items():
        (root / f"steps-{steps}.jsonl").write_text("".join(json.dumps(one.row) + "\n" for one in found))
    sizes = {key: value for key, value in asdict(options).items() if key not in ("output_dir", "methods", "workers")}
    results = Results(root / "results.json", sizes)
    with workers(options.workers) as pool:
        for step in (_models(options), _captures(options)):
            for future in as_completed([pool.submit(one) for one in step]):
                future.result()
        scans = [
            Job(name, main_start(options), rate, SCAN_SEED, options.updates // 2)
            for name in options.methods
            for rate in options.learning_rates
        ]
        results.fill(pool, {job.name: partial(train, options, job) for job in scans}, says=_said)
        rates = {
            name: _best_rate([job for job in scans if job.method == name], results.found) for name in options.methods
        }
        final = [
            Job(name, start, rates[name], seed, options.updates * (2 if METHODS[name].offline else 1))
            for start, names, seeds in _compared(options)
            for seed in range(seeds)
            for name in names
        ]

        def report(found: Mapping[str, Any]) -> None:
            runs = [Run(**found[job.name]) for job in final if job.name in found]
            write_report(runs, rates, main_start(options), options.updates, root)

        results.fill(pool, {job.name: partial(train, options, job) for job in final}, after=report, says=_said)
    report(results.found)


def _said(run: Mapping[str, Any]) -> str:
    return f"long {Run(**run).last('long'):.3f}"


def _best_rate(jobs: Sequence[Job], found: Mapping[str, Any]) -> float:
    """Return the learning rate with the best last accuracy on long problems, the lower one of equals."""
    return max(jobs, key=lambda job: (Run(**found[job.name]).last("long"), -job.learning_rate)).learning_rate


def _compared(options: Options) -> Iterable[tuple[int, Sequence[str], int]]:
    yield main_start(options), options.methods, options.seeds
    for start in options.starts:
        if start != main_start(options):
            yield start, [name for name in MAPPED if name in options.methods], options.map_seeds


def _models(options: Options) -> list[Callable[[], None]]:
    """Return what trains the models that are not there."""
    prompts = held_out_prompts(options.questions)
    teacher, starts = options.output_dir / "teacher", {n: start_path(options, n) for n in options.starts}
    jobs: list[Callable[[], None]] = []
    if not (teacher / "README.md").exists():  # written last
        jobs.append(partial(make_teacher, teacher, options.teacher_updates, prompts))
    if not all((directory / "README.md").exists() for directory in starts.values()):
        jobs.append(partial(make_starts, starts, prompts))
    return jobs


def _captures(options: Options) -> list[Callable[[], None]]:
    """Return the captures; those that are finished return at once."""
    asked = problems(options.rows, LENGTHS, 3, held_out_prompts(options.questions))
    wanted = {path: (name, start) for start in options.starts for name, path in captures_of(options, start).items()}
    return [
        partial(capture_for, name, options.output_dir / "teacher", start_path(options, start), asked, path)
        for path, (name, start) in wanted.items()
    ]


def train(options: Options, job: Job) -> dict[str, Any]:
    """Train a student, and read what it reached and what that cost, captures included."""
    directory = options.output_dir / "runs" / job.name.replace(" / ", "-").replace(" ", "_").replace(",", "")
    shutil.rmtree(directory, ignore_errors=True)
    method, captures = METHODS[job.method], captures_of(options, job.start)
    Training(
        method,
        start_path(options, job.start),
        options.output_dir / "teacher",
        captures,
        problems(options.updates * ROWS, LENGTHS, 100 + job.seed, held_out_prompts(options.questions)),
        tasks_of(options.output_dir),
        job.updates,
        options.evaluate_every if job.seed != SCAN_SEED else job.updates,
        job.learning_rate,
        job.seed,
    ).run(directory)
    found = Run.read(
        directory, **{key: value for key, value in asdict(job).items() if key != "updates"},
        capture=None if method.cache is None else captures[method.cache], rows=_rows_read(method, options),
        teacher=options.output_dir / "teacher", start_model=start_path(options, job.start),
    )  # fmt: skip
    return asdict(found)


def _rows_read(method: Method, options: Options) -> int:
    """Return how many rows of its capture a method reads: a warm-up has a third of the updates."""
    return options.rows if method.offline else min(options.rows, warm_up(options.updates) * ROWS)


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
