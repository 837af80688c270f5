"""Collecting and training in turn: for teachers that cannot keep pace with the trainer.

In each round the student of the round before answers the prompts, its text teachers evaluate and correct, and all of
it is kept as a dataset; then the student trains on that dataset, and no teacher is asked. What is done is not done
again: a run that was killed goes on with the batch, or the round, that it had not finished.

    output_dir/rounds/round-0000/      what was said, as kd_plugin/text/rounds.py writes it
    output_dir/round-0000/             the student after the round, with its lineage
    output_dir/                        the student after the last
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd_plugin.errors import ConfigError
from kd_plugin.inputs import load_rows
from kd_plugin.lineage.data import TEXT_RECORD
from kd_plugin.lineage.record import RECORD
from kd_plugin.panel.block import panel_from
from kd_plugin.sharding import most_of_any_rank
from kd_plugin.text.rounds import ROUNDS
from kd_plugin.trl.panel_trainer import TeacherPanelConfig, TeacherPanelTrainer

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)
# What a panel that is passed whole says itself
_SAID_BY_THE_PANEL = ("panel", "teacher_models", "teacher_weights", "domain_weights", "routes", "text", "reward")


def train_in_rounds(
    rounds: int,
    model: str,
    args: TeacherPanelConfig,
    train_dataset: Any,
    *,
    peft_config: PeftConfig | None = None,
    trainer_class: Callable[..., TeacherPanelTrainer] = TeacherPanelTrainer,
) -> TeacherPanelTrainer:
    """Alternate collecting with training, and return the last round's trainer; the student is in ``output_dir``.

    Args:
        rounds: how many.
        model: path or hub id of the student.
        args: of the trainer; ``max_steps`` are those of one round, which takes as many rows as they need. Without
            them a round takes every row.
        train_dataset: rows with ``prompt``.
        peft_config: of an adapter for the student.
        trainer_class: makes the trainers.

    Raises:
        ConfigError: fewer than one round, no text teacher, nothing to collect, or a sharded student.
        ServerError: too few teachers can be reached; what was collected is kept.
    """
    panel = panel_from(None, None, args)
    if rounds < 1 or not panel.text_teachers:
        raise ConfigError(
            f"rounds is {rounds} and the panel has {len(panel.text_teachers)} text teachers; expected at least one of "
            "both: a round keeps what teachers with signal: text say."
        )
    if args.deepspeed is not None or args.fsdp:
        raise ConfigError("rounds takes the student from one trainer to the next, which shards cannot do. Use one GPU.")
    if args.resume_from_checkpoint:
        raise ConfigError("rounds goes on by itself with what output_dir holds: leave resume_from_checkpoint out.")
    base, student, adapter = Path(str(args.output_dir)), model, peft_config
    trainer: TeacherPanelTrainer | None = None
    stopped = False  # by the ceiling
    for number in range(rounds):
        done, kept = base / f"round-{number:04d}", base / ROUNDS / f"round-{number:04d}"
        if (done / RECORD).is_file():
            student = _loaded(done, args) if (done / "adapter_config.json").is_file() else str(done)
            adapter = None
            continue
        common = {"processing_class": None, "peft_config": adapter}
        if not (kept / TEXT_RECORD).is_file():
            collector = trainer_class(student, None, _own(args, done, collecting=True), train_dataset, **common)
            rows = _rows_of(train_dataset, number, args, collector.accelerator.num_processes)
            stopped = collect(collector, rows, number, base)
            if stopped and not (kept / TEXT_RECORD).is_file():
                break
            student, common = collector.accelerator.unwrap_model(collector.model), {**common, "peft_config": None}
        recorded = panel_from(None, None, args)
        recorded.text = dataclasses.replace(recorded.text, recorded=True)
        said = load_rows(str(kept))
        own = _own(args, done, collecting=False)
        trainer = trainer_class(student, None, own, said, teacher_models=recorded, **common)
        trainer.train()
        trainer.save_model(str(done))
        student, adapter = trainer.accelerator.unwrap_model(trainer.model), None
        logger.info("Round %d of %d is done; its student is in %s.", number + 1, rounds, done)
        if stopped:
            break
    if trainer is None and stopped:
        raise ConfigError(f"text: ceiling={panel.text.ceiling} was reached in rounds before. Raise it to go on.")
    if trainer is None:
        raise ConfigError(f"{base} holds {rounds} finished rounds already. Ask for more, or name another output_dir.")
    trainer.save_model(str(base))
    return trainer


def collect(trainer: TeacherPanelTrainer, rows: Any, number: int, base: Path) -> bool:
    """Let a trainer's student answer rows and its text teachers correct, and keep it; nothing is trained on.

    Args:
        trainer: with text teachers.
        rows: those of all ranks.
        number: of the round. Batches that it holds of an earlier attempt are not asked about again.
        base: directory of the run.

    Returns:
        Whether the ceiling stopped it.
    """
    args, host = trainer.args, trainer.panel_step.host
    step, size = trainer.panel_step, args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert step.corrector is not None and step.corrector.rounds is not None
    writer = step.corrector.rounds
    writer.home = base / ROUNDS
    writer.take(number)
    assert writer.directory is not None
    directory, step.collecting = writer.directory, True
    own = range(host.rank, len(rows) - len(rows) % host.ranks, host.ranks)
    batches = [own[start : start + size] for start in range(0, len(own), size)]
    mine = sorted(directory.glob(f"train-*-rank-{host.rank}-*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    done = -most_of_any_rank([-len(mine)], host.device)[0]
    for path in mine[done:]:
        path.unlink()  # another rank lacks this batch, and all ask about it together
    trainer.model.train()
    for batch in batches[done:]:
        if step.corrector.stopped:
            break
        with torch.no_grad():
            trainer._generate_and_score_completions([dict(rows[i]) for i in batch])
    step.finish()
    step.collecting = False
    return step.corrector.stopped


def _own(args: TeacherPanelConfig, directory: Path, *, collecting: bool) -> TeacherPanelConfig:
    """Return the arguments of one trainer of a round."""
    own = copy.copy(args)
    own.output_dir = str(directory)
    if not collecting:
        own.max_steps, own.num_train_epochs = -1, 1.0
        for name in _SAID_BY_THE_PANEL:
            setattr(own, name, None)
    return own


def _rows_of(dataset: Any, number: int, args: TeacherPanelConfig, ranks: int) -> Any:
    """Return the rows of a round, the dataset's in a random order that goes on over the rounds."""
    count = len(dataset)
    if args.max_steps > 0:
        count = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    chosen: list[int] = []
    begin, epoch = number * count, number * count // len(dataset)
    while len(chosen) < count:
        generator = torch.Generator().manual_seed(args.seed + epoch)
        order = torch.randperm(len(dataset), generator=generator).tolist()
        first = max(begin - epoch * len(dataset), 0)
        chosen += order[first : first + count - len(chosen)]
        epoch += 1
    return dataset.select(chosen)


def _loaded(directory: Path, args: TeacherPanelConfig) -> Any:
    """Return a student with its adapter, which goes on training."""
    from peft import AutoPeftModelForCausalLM

    options = {k: v for k, v in (args.model_init_kwargs or {}).items() if v is not None}
    return AutoPeftModelForCausalLM.from_pretrained(str(directory), is_trainable=True, **options)
