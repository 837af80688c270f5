"""The stages of the demo, each with one line of progress and a few lines around the calls that a user would write."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.demo.model import PreparedTeacher, cut_student
from kd_plugin.demo.prompts import (
    DOMAINS,
    GENERAL,
    MATH,
    Asked,
    Question,
    StudentMeasure,
    answer,
    fast_dtype,
    held_out_kl,
    open_model,
    questions,
)
from kd_plugin.demo.state import DemoConfig, DemoState
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.teachers import LocalTeacher

# Names inside the output directory
MODELS, SPECIALIST, START, ANSWERS, CACHE, OFFLINE, PANEL = (
    "models", "teacher-math", "student-start", "answers.json", "cache", "offline", "panel",
)  # fmt: skip

# Which held-out question is shown, counted from 1: a product of two digits, and the first general one
_SAMPLE = {MATH: 7, GENERAL: 1}

# How the lineage calls the bundled prompts; both are declared, since they come from this package and not from a hub.
ARITHMETIC = {"repo": "open-thought/reasoning-gym", "license": "apache-2.0"}
QUESTIONS = {"repo": "kd-plugin/demo-questions", "license": "apache-2.0"}


@dataclass(frozen=True)
class DemoParts:
    """What every stage works with.

    Attributes:
        config: the demo's settings.
        state: the directory, with what is done.
        console: where progress is shown.
        teacher: the general teacher.
        tokenizer: the tokenizer that teachers and student share.
    """

    config: DemoConfig
    state: DemoState
    console: Console
    teacher: PreparedTeacher
    tokenizer: Any

    def path(self, name: str) -> Path:
        """Where a stage's output lies."""
        return self.state.directory / name

    def lineage(self, stage: str, *datasets: dict[str, str]) -> dict[str, Any]:
        """Return the ``lineage`` field of a run. Licences of models are discovered from their cards."""
        run = self.state.run
        return {
            "run": {"id": f"{run['id']}/{stage}", "date": run["date"]},
            "datasets": list(datasets),
            "use": {"commercial": True, "distribute": True},
        }

    def training(self, name: str, steps: int, learning_rate: float) -> dict[str, Any]:
        """Arguments that the three trainings share. All are transformers' own."""
        return {
            "output_dir": str(self.path(name)),
            "max_steps": steps,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, steps // 10),
            "per_device_train_batch_size": self.config.batch_size,
            "gradient_checkpointing": False,  # memory is no concern here, time is
            "bf16": False,  # the weights have the fastest dtype already, so autocast has nothing to do
            "model_init_kwargs": {"dtype": fast_dtype()},
            "seed": self.config.seed,
            "save_strategy": "no",  # saved once, at the end
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }


def gate(stage: DemoParts) -> str:
    """Ask whether the planned run may be trained and shipped; return the verdict in words.

    Raises:
        LicenseRefusedError: the teacher's terms forbid it. No model was loaded.
    """
    source = Source(name=GENERAL, ref=stage.teacher.ref, license=stage.config.teacher_license or None)
    run = RunLineage(
        method="teacher_panel",
        student=Source(name="student", ref=stage.teacher.ref, license=source.license),
        teachers=[source],
        config=stage.lineage("plan", ARITHMETIC, QUESTIONS),
    )
    run.require_trainable()
    return f"{str(run.verdict.decision).replace('_', ' ')}; the questions are Apache-2.0 by this package's own word"


def train_specialist(stage: DemoParts) -> dict[str, float]:
    """Make the math teacher: TRL's own ``SFTTrainer``, with the lineage callback, on reasoning-gym problems."""
    from trl import SFTConfig, SFTTrainer

    from kd_plugin.trl import LicenseLineageCallback

    config = stage.config
    rows = [
        {"prompt": q.prompt, "completion": [{"role": "assistant", "content": q.answer}]}
        for q in questions("train", MATH, config.specialist_steps * config.batch_size)
    ]
    stage.state.claim(SPECIALIST)
    trainer = SFTTrainer(
        model=stage.teacher.ref,
        args=SFTConfig(**stage.training(SPECIALIST, config.specialist_steps, config.specialist_learning_rate)),
        train_dataset=Dataset.from_list(rows),
        processing_class=stage.tokenizer,
        callbacks=[LicenseLineageCallback(stage.lineage(SPECIALIST, ARITHMETIC))],
    )
    return _train(trainer, stage, "math teacher", SPECIALIST)


def make_student(stage: DemoParts) -> dict[str, Any]:
    """Cut the student from the teacher."""
    stage.state.claim(START)
    kept = stage.config.kept_layers()
    cut_student(stage.teacher, stage.path(START), kept, stage.config.teacher_license or None, stage.lineage(START))
    return {"layers": len(kept)}


def write_answers(stage: DemoParts) -> dict[str, Any]:
    """Let the general teacher answer all training questions, and each teacher its domain's held-out ones."""
    config, state = stage.config, stage.state
    train = [q for d in DOMAINS for q in questions("train", d, config.limit("train", d))]
    held_out = {d: questions("held_out", d, config.limit("held_out", d)) for d in DOMAINS}
    total = len(train) + sum(map(len, held_out.values()))
    found: dict[str, Any] = {}
    with Bar("teachers answer", total, stage.console) as bar:
        general, math = (open_model(p, stage.tokenizer).model for p in (stage.teacher.ref, stage.path(SPECIALIST)))
        limit, written = config.max_completion_length, 0
        for name, model, asked in [
            ("train", general, train),
            (GENERAL, general, held_out[GENERAL]),
            (MATH, math, held_out[MATH]),
        ]:
            answers = answer(model, stage.tokenizer, asked, limit, partial(_advance, bar, written))
            found[name] = [asdict(a) for a in answers]
            written += len(asked)
    path = state.claim(ANSWERS)
    path.write_text(json.dumps(found), encoding="utf-8")
    return {"answers": total}


def fill_cache(stage: DemoParts) -> dict[str, Any]:
    """Capture the general teacher's distribution at every token of its answers."""
    config = stage.config
    train = [q for d in DOMAINS for q in questions("train", d, config.limit("train", d))]
    rows = [
        {"prompt": q.prompt, "completion": [{"role": "assistant", "content": a.text}], "domain": q.domain}
        for q, a in zip(train, _answers(stage, "train"), strict=True)
    ]
    teacher = open_teacher(stage)
    stage.state.claim(CACHE, clean=False)  # an interrupted capture goes on where it was
    cache = capture(
        Dataset.from_list(rows),
        teacher,
        stage.path(CACHE),
        targets=TopK(config.top_k),
        lineage=stage.lineage(CACHE, ARITHMETIC, QUESTIONS),
        progress=stage.console.is_terminal,
    )
    return {"rows": len(cache), "tokens": cache.tokens}


def train_offline(stage: DemoParts) -> dict[str, float]:
    """Offline KD: fit the student to the cache, without a teacher in memory."""
    from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer

    config = stage.config
    stage.state.claim(OFFLINE)
    trainer = OfflineKDTrainer(
        model=str(stage.path(START)),
        args=OfflineKDConfig(
            **stage.training(OFFLINE, config.offline_steps, config.offline_learning_rate),
            divergence="forward_kl",
            lineage=stage.lineage(OFFLINE, ARITHMETIC, QUESTIONS),
        ),
        teacher_cache=TeacherCache(stage.path(CACHE)),
        processing_class=stage.tokenizer,
    )
    return _train(trainer, stage, "offline KD", OFFLINE)


def train_panel(stage: DemoParts) -> dict[str, float]:
    """Run the teacher panel: the student generates, the teacher of each question's domain scores every token."""
    from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer

    config = stage.config
    per_domain = [questions("train", d, config.limit("train", d)) for d in DOMAINS]
    rows = [{"prompt": q.prompt, "teacher_id": q.domain} for asked in per_domain for q in asked]
    stage.state.claim(PANEL)
    trainer = TeacherPanelTrainer(
        model=str(stage.path(OFFLINE)),
        teacher_models={
            MATH: open_model(stage.path(SPECIALIST), stage.tokenizer, MATH),
            GENERAL: open_teacher(stage),
        },
        args=TeacherPanelConfig(
            **stage.training(PANEL, config.panel_steps, config.panel_learning_rate),
            divergence="reverse_kl",
            combine="route",
            max_completion_length=config.max_completion_length,
            lineage=stage.lineage(PANEL, ARITHMETIC, QUESTIONS),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=stage.tokenizer,
    )
    return _train(trainer, stage, "teacher panel", PANEL)


def measure(stage: DemoParts, name: str) -> dict[str, Any]:
    """Measure the student in directory ``name`` on held-out questions."""
    config = stage.config
    student = open_model(stage.path(name), stage.tokenizer)
    teachers = {
        GENERAL: open_model(stage.teacher.ref, stage.tokenizer),
        MATH: open_model(stage.path(SPECIALIST), stage.tokenizer),
    }
    kl = {d: held_out_kl(student, teachers[d], _answers(stage, d)) for d in DOMAINS}
    shown = sample_questions(config)
    texts = [a.text for a in answer(student.model, stage.tokenizer, list(shown.values()), config.max_completion_length)]
    return asdict(StudentMeasure(kl=kl, samples=dict(zip(shown, texts, strict=True))))


def open_teacher(stage: DemoParts) -> LocalTeacher:
    """Return the general teacher, under the licence that the user declares or that its card names."""
    return LocalTeacher(
        stage.teacher.ref, name=GENERAL, license=stage.config.teacher_license or None, dtype=fast_dtype()
    )


def sample_questions(config: DemoConfig) -> dict[str, Question]:
    """Return the held-out question of each domain whose answers are shown."""
    return {d: questions("held_out", d, min(_SAMPLE[d], config.limit("held_out", d)))[-1] for d in DOMAINS}


def _answers(stage: DemoParts, name: str) -> list[Asked]:
    rows = json.loads(stage.path(ANSWERS).read_text(encoding="utf-8"))[name]
    return [Asked(tuple(r["prompt_ids"]), tuple(r["completion_ids"]), r["text"]) for r in rows]


def _train(trainer: Any, stage: DemoParts, label: str, name: str) -> dict[str, float]:
    """Train with the demo's bar, save, and return the first and last loss."""
    with training_bar(trainer, label, stage.console):
        trainer.train()
    trainer.save_model(str(stage.path(name)))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    del trainer
    gc.collect()  # trainers hold reference cycles, and with them a model and its optimizer
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def _advance(bar: Bar, before: int, done: int) -> None:
    """Move ``bar`` to ``done`` of the questions that came after ``before`` others."""
    bar.advance(before + done)


_PLAIN_SECONDS = 15.0


class Bar:
    """Shows how far a loop of known length is.

    Args:
        label: what is being done.
        total: number of steps.
        console: where it is shown; a bar needs a terminal, elsewhere a line comes every 15 seconds.
    """

    def __init__(self, label: str, total: int, console: Console) -> None:
        self.label, self.total, self._console = label, total, console
        self._started = self._told = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, to: int, note: str = "") -> None:
        """Show that ``to`` steps are done, with a word about the last one."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=to, note=note)
            return
        now = time.monotonic()
        if now - self._told >= _PLAIN_SECONDS and 0 < to < self.total:
            left = (now - self._started) / to * (self.total - to)
            self._console.print(f"  {self.label} {to}/{self.total} {note} about {left:.0f} s left", highlight=False)
            self._told = now


class TrainerBar(TrainerCallback):
    """Drives a :class:`Bar` from a transformers trainer."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._note = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the newest loss."""
        if logs and "loss" in logs:
            self._note = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self._bar.advance(state.global_step, self._note)


@contextmanager
def training_bar(trainer: Any, label: str, console: Console) -> Iterator[None]:
    """Show a trainer's progress as the demo's own bar instead of the trainer's."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with Bar(label, trainer.args.max_steps, console) as bar:
        trainer.add_callback(TrainerBar(bar))
        yield


def make_console() -> Console:
    """Return the console of the demo: stdout, plain where it is no terminal."""
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())
