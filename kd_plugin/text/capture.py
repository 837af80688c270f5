"""Capture of text: what teachers write about a dataset's prompts, once, as an ordinary dataset with its lineage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from kd_plugin.cache.targets import Generation
from kd_plugin.capturing.capture import CaptureGate
from kd_plugin.capturing.rows import open_rows
from kd_plugin.capturing.work import Progress
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.settings import built, takes
from kd_plugin.text.collecting import Collection, Plan
from kd_plugin.text.contamination import load_items
from kd_plugin.text.dataset import publish_dataset
from kd_plugin.text.selecting import Selection, select, training_rows
from kd_plugin.text.settings import PASS_RATE, TextSettings
from kd_plugin.text.spending import Budget
from kd_plugin.text.store import AnswerStore
from kd_plugin.text.voting import Vote
from kd_plugin.text.writers import Ask, Writer
from kd_plugin.verifying import make_verifier

_DOMAIN = "domain"  # a column that travels where the rows have it, as in a teacher cache
# What decides what is asked and how it is verified; all else may differ when answers are selected again
_ASKED = (
    "completions", "max_new_tokens", "sampling_temperature", "sampling_top_p", "sampling_top_k", "system", "seed",
    "shard_rows", "vote",
)  # fmt: skip


@dataclass(frozen=True)
class CapturedText:
    """A dataset that teachers wrote.

    Attributes:
        path: its directory, which ``datasets.load_dataset`` reads.
        rows: of the dataset.
        dropped: answers that are not in it, by reason.
        contaminated: prompts and answers that hold an item of an evaluation set; listed in ``contaminated.jsonl``.
        usage: tokens read and written by each teacher, by its name.
        spent: what that cost, by the teachers' prices.
        complete: whether all was answered; False where the ceiling was reached, or a teacher is missing.
        missing: teachers that could not be reached to the end, where the capture went on without them.
    """

    path: Path
    rows: int
    dropped: Mapping[str, int]
    contaminated: int
    usage: Mapping[str, Mapping[str, int]]
    spent: float
    complete: bool
    missing: tuple[str, ...] = ()


@takes(TextSettings)
def capture_text(  # noqa: D417
    dataset: Any, teachers: Writer | Sequence[Writer], output_dir: str | Path, *, progress: bool = True, **fields: Any
) -> CapturedText:
    """Have ``teachers`` write about the prompts of ``dataset``, select what is right, and store it as a dataset.

    Run the same call again to go on after an interruption: no answer that came is lost, and none is asked for twice.
    Run it with other rules of selection to select again from the same answers, without asking anybody.

    Args:
        dataset: rows with ``prompt`` (a text or messages) or ``messages``, as ``datasets.Dataset``, stream or list.
        teachers: who writes: one or several, which all answer every prompt.
        output_dir: the dataset; a new or empty directory, or one that holds the same capture.
        progress: show how far it is, on standard error.

    Raises:
        LicenseRefusedError: the terms of a teacher or of the rows forbid training on its outputs; nothing was sent.
        ConfigError: a setting is wrong, or the directory holds another capture.
        DataError: a row has no prompt, an evaluation set cannot be read, or no answer is left.
        ServerError: a server is away for good; what was answered is kept.
        CacheError: the directory cannot be written, or is damaged.
    """
    settings = built(TextSettings, fields)
    writers = [teachers] if isinstance(teachers, Writer) else list(teachers)
    _require_names(writers, settings.min_teachers)
    gate = CaptureGate([writer.source for writer in writers], dataset, settings.lineage)
    for writer in writers:
        writer.gate(partial(gate.admit, writer.name))
    plan = _plan(dataset, settings)
    rows, verifier = plan.rows, plan.verifier
    items = load_items(settings.decontaminate, settings.ngram, settings.overlap) if settings.decontaminate else None
    budget = Budget(settings.ceiling)
    asked = {
        "format": 1,
        "rows": rows.fingerprint(),
        "count": len(rows),
        "teachers": {writer.name: dict(writer.identity) for writer in writers},
        "verifier": None if verifier is None else verifier.name,
        **{name: getattr(settings, name) for name in _ASKED},
    }
    store = AnswerStore(Path(output_dir), asked)
    with store.alone():
        done = min(sum(map(store.finished, range(plan.units))) * plan.unit_rows, len(rows))
        collection = Collection(plan, store, writers, budget, settings.min_teachers)
        with Progress(len(rows), done, progress, "capture") as bar:
            collection.run(bar)

        def tables() -> Iterator[pa.Table]:
            for unit in range(plan.units):
                table = store.table(unit)
                if table is not None:
                    yield table

        complete = not collection.ceiling_reached and not collection.missing
        chosen = select(tables, settings, items)
        _require_kept(chosen, budget)
        completions_api = any(dict(writer.identity).get("api") == "completions" for writer in writers)
        publish_dataset(
            store.directory,
            training_rows(tables, chosen, settings, not completions_api, {w.name: _model(w) for w in writers}),
            lineage=gate.record,
            sampling=asdict(plan.generation) | {"seed": settings.seed},
            selection=chosen,
            budget=budget,
            complete=complete,
        )
    return CapturedText(
        store.directory,
        chosen.kept,
        dict(chosen.dropped),
        len(chosen.found),
        {name: asdict(usage) for name, usage in budget.usage.items()},
        budget.spent,
        complete,
        tuple(collection.missing),
    )


def most_of(dataset: Any, writers: Sequence[Writer], **fields: Any) -> tuple[int, float]:
    """Return how many prompts a capture has, and what it costs at most; nobody is asked.

    Raises:
        ConfigError: a setting is wrong.
        DataError: a row has no prompt.
    """
    settings = built(TextSettings, fields)
    plan, most = _plan(dataset, settings), 0.0
    for unit in range(plan.units):
        for row in plan.rows_of(unit):
            ask = Ask(plan.prompt(row, f"a row of unit {unit}"), plan.generation)
            most += plan.generation.n * sum(writer.prices.most(ask) for writer in writers)
    return len(plan.rows), most


def _plan(dataset: Any, settings: TextSettings) -> Plan:
    verifier = make_verifier(settings.verify, settings.answer_column)
    facts = tuple(name for name in settings.balance or () if name != PASS_RATE)
    columns = None if verifier is not None and verifier.columns is None else (*facts, _DOMAIN)
    more = columns if columns is None or verifier is None else (*columns, *(verifier.columns or ()))
    rows = open_rows(dataset, settings.shard_rows, more)
    missing = [name for name in facts if name not in rows.columns]
    if missing:
        raise ConfigError(f"balance: the rows have no column {missing[0]!r}; they have {', '.join(rows.columns)}.")
    generation = Generation(
        settings.completions,
        settings.max_new_tokens,
        settings.sampling_temperature,
        settings.sampling_top_p,
        settings.sampling_top_k,
    )
    kept_facts = tuple(dict.fromkeys([*facts, *([_DOMAIN] if _DOMAIN in rows.columns else [])]))
    vote = Vote.of(settings.vote)
    plan = Plan(rows, settings.shard_rows, generation, settings.seed, settings.system, verifier, vote, kept_facts)
    plan.prompt(rows.slice(0, 1)[0], "row 0")
    return plan


def _model(writer: Writer) -> str:
    """Return the name of the model that writes, without a path, which differs between machines."""
    source = writer.source
    named = source.ref if source.ref is not None and not Path(source.ref).is_dir() else source.model
    return named or (Path(source.ref).resolve().name if source.ref is not None else writer.name)


def _require_names(writers: Sequence[Writer], least: int | None) -> None:
    if not writers:
        raise ConfigError("No teacher is given; expected one that writes, such as ServerWriter(url, model).")
    for writer in writers:
        if not isinstance(writer, Writer):
            raise ConfigError(
                f"{type(writer).__name__} does not write: it has no `answers`. Use ServerWriter or LocalWriter of "
                "kd_plugin.text."
            )
    names = [writer.name for writer in writers]
    if len(set(names)) < len(names):
        raise ConfigError(f"Teachers have the same name: {', '.join(names)}. Give each its own.")
    if least is not None and least > len(writers):
        raise ConfigError(f"min_teachers is {least}, and there are {len(writers)} teachers.")


def _require_kept(chosen: Selection, budget: Budget) -> None:
    if chosen.kept:
        return
    if not chosen.dropped:
        raise ConfigError(
            f"ceiling={budget.ceiling:g} is below what the first text may cost at its most expensive, so nothing was "
            "asked. Raise it, or lower max_new_tokens."
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(chosen.dropped.items()))
    raise DataError(
        f"Nothing is left: every answer was dropped ({reasons}). The answers are kept in {json.dumps('answers')}; look "
        "at some, then run the same command with other rules of selection, which asks nobody again."
    )
