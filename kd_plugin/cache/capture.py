"""Capture: store what a teacher says about a dataset, once, so that nothing of it is ever computed again."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_plugin.cache.draws import uniforms
from kd_plugin.cache.examples import Example, Rows, Tokenization
from kd_plugin.cache.extract import Extracted, extract
from kd_plugin.cache.manifest import Part, Settings
from kd_plugin.cache.progress import Progress
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.schema import CapturedRow, to_table
from kd_plugin.cache.store import Store, require_same
from kd_plugin.cache.targets import Sampled, Targets, TopK
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.teachers import LocalTeacher
from kd_plugin.vocab import Vocabulary

_POLL_SECONDS = 0.5
_WEIGHT_SAMPLES = 16  # values of each weight that enter its digest


@dataclass(frozen=True)
class Prepared:
    """A capture whose terms, rows and settings have been checked, before the teacher is loaded.

    Attributes:
        rows: the dataset.
        tokenization: turns its rows into examples.
        settings: of the cache, without the weights' digest and dtype.
        lineage: nodes and edges of who teaches.
    """

    rows: Rows
    tokenization: Tokenization
    settings: Settings
    lineage: Mapping[str, Any]


def capture(
    dataset: Any,
    teacher: LocalTeacher,
    output_dir: str | Path,
    *,
    targets: Targets = TopK(64),  # noqa: B008  frozen
    temperature: float = 1.0,
    tokenizer: Any = None,
    max_length: int | None = None,
    completion_only: bool | None = None,
    shard_rows: int = 1024,
    batch_tokens: int = 16_384,
    seed: int = 0,
    lineage: Mapping[str, Any] | str | Path | None = None,
    progress: bool = True,
    append: bool = False,
) -> TeacherCache:
    """Score ``dataset`` with ``teacher`` and store its outputs in ``output_dir``.

    Run the same call again to go on after an interruption: finished units are kept. Run it in several processes
    or on several machines over one directory to share the work; each returns when all of it is done.

    Args:
        dataset: a ``datasets.Dataset`` or a list of rows, in any form that ``SFTTrainer`` takes: ``text``,
            ``messages``, ``prompt`` and ``completion`` (strings or messages), or ``input_ids`` with
            ``completion_mask`` or ``labels``.
        teacher: the teacher; its weights are loaded after its terms and all settings have been checked.
        output_dir: the cache; a new or empty directory, or one that holds the same capture.
        targets: what is kept of the distribution.
        temperature: the teacher's logits are divided by it before the softmax.
        tokenizer: the tokenizer of the dataset; None takes the teacher's. It must have the same tokens.
        max_length: tokens kept from the start of a row, as in ``SFTConfig``; None keeps all.
        completion_only: score completions only; None does so where rows have a prompt and a completion.
        shard_rows: dataset rows a unit, the most that an interruption costs.
        batch_tokens: tokens of a forward pass, padding included. Lower it when memory runs out; stored values
            then differ in rounding.
        seed: of the draws of sampled targets.
        lineage: the declarations that ``kd-plugin lineage check`` reads: a mapping or a YAML file.
        progress: show how far it is, on standard error.
        append: add ``dataset`` to the finished cache of other data that is in ``output_dir``.

    Raises:
        LicenseRefusedError: the teacher's terms forbid training on its outputs; nothing was loaded.
        ConfigError: a setting is wrong, or the directory holds a capture with other settings.
        VocabularyError: the tokenizer's tokens are not the teacher's.
        DataError: a row has no form that can be scored, or no row has anything to score.
        CacheError: the directory cannot be written, or is damaged.
        NonFiniteError: the teacher's logits are not finite.
    """
    prepared = prepare(
        dataset,
        teacher,
        targets=targets,
        temperature=temperature,
        tokenizer=tokenizer,
        max_length=max_length,
        completion_only=completion_only,
        shard_rows=shard_rows,
        batch_tokens=batch_tokens,
        seed=seed,
        lineage=lineage,
    )
    rows, settings = prepared.rows, prepared.settings
    part = Part(rows.fingerprint(), len(rows), first_unit=0)
    directory = Path(output_dir)
    # What can be compared without the weights is compared before they are loaded.
    if (directory / "manifest.json").exists():
        require_same(directory, settings, part, ignored=("weights", "dtype"), append=append)
    model = _placed(teacher)
    dtype = str(teacher.head.weight.dtype).removeprefix("torch.")
    settings = replace(settings, weights=weights_digest(model), dtype=dtype)
    store = Store.create_or_join(directory, settings, [part], prepared.lineage, _engine(), append)
    _do_units(store, rows, prepared.tokenization, teacher, batch_tokens, progress)
    manifest = store.finish()
    if not manifest.rows:
        raise DataError(f"None of the {len(rows)} rows has a token to score: all were cut or masked away.")
    return TeacherCache(output_dir)


def prepare(
    dataset: Any,
    teacher: LocalTeacher,
    *,
    targets: Targets,
    temperature: float = 1.0,
    tokenizer: Any = None,
    max_length: int | None = None,
    completion_only: bool | None = None,
    shard_rows: int = 1024,
    batch_tokens: int = 16_384,
    seed: int = 0,
    lineage: Mapping[str, Any] | str | Path | None = None,
) -> Prepared:
    """Check everything that can be checked before the teacher's weights are loaded; see :func:`capture`."""
    from kd_plugin.lineage import outputs_record

    _require_positive(temperature=temperature, shard_rows=shard_rows, batch_tokens=batch_tokens)
    record = outputs_record(teacher.source, config=lineage)
    vocabulary = teacher.vocabulary
    if tokenizer is None:
        tokenizer = teacher.tokenizer
    else:
        Vocabulary.from_tokenizer(tokenizer).require_same_tokens(vocabulary, "dataset's tokenizer", "teacher")
    rows = Rows(dataset)
    tokenization = Tokenization(tokenizer, vocabulary.size, max_length, completion_only)
    tokenization(rows[0], "row 0")
    settings = Settings(
        teacher=_portable(teacher.source.ref),
        revision=teacher.source.revision,
        weights=None,
        dtype=None,
        tokenizer=vocabulary.fingerprint,
        chat_template=Vocabulary.from_tokenizer(tokenizer).template_fingerprint,
        vocab_size=vocabulary.size,
        targets=targets,
        temperature=float(temperature),
        seed=seed,
        max_length=max_length,
        completion_only=completion_only,
        shard_rows=shard_rows,
        passed=rows.passed_columns,
    )
    return Prepared(rows, tokenization, settings, record)


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a sample of every weight: enough to tell a teacher from a retrained one of the same name."""
    names, samples = [], []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _WEIGHT_SAMPLES)
        names.append(f"{name} {tuple(parameter.shape)}")
        samples.append(flat[::stride][:_WEIGHT_SAMPLES].float())
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(torch.cat([sample.cpu() for sample in samples]).numpy().tobytes())
    return digest.hexdigest()


def _do_units(
    store: Store, rows: Rows, tokenization: Tokenization, teacher: LocalTeacher, batch_tokens: int, shown: bool
) -> None:
    """Do the units that have no record; wait for those that other workers have."""
    missing = store.missing()
    to_do = sum(store.manifest.rows_of(index)[2] for index in missing)
    with Progress(len(rows), len(rows) - to_do, shown, "capture") as bar:
        while missing:
            worked = False
            for index in missing:
                claim = store.claim(index)
                if claim is None:
                    continue
                with claim:
                    # It may have been finished between our listing and our claim.
                    if index in store.missing():
                        _do_unit(store, index, rows, tokenization, teacher, batch_tokens, bar)
                        worked = True
            missing = store.missing()
            if missing and not worked:
                time.sleep(_POLL_SECONDS)


def _do_unit(
    store: Store,
    index: int,
    rows: Rows,
    tokenization: Tokenization,
    teacher: LocalTeacher,
    batch_tokens: int,
    bar: Progress,
) -> None:
    settings = store.manifest.settings
    _, first, count = store.manifest.rows_of(index)
    examples = [tokenization(rows[i], f"row {i}") for i in range(first, first + count)]
    kept = [example for example in examples if example is not None]
    bar.advance(count - len(kept), 0)
    done: list[CapturedRow | None] = [None] * len(kept)
    for batch in batches([len(example.input_ids) for example in kept], batch_tokens):
        chosen = [kept[i] for i in batch]
        for i, targets in zip(batch, score(chosen, teacher, settings), strict=True):
            done[i] = CapturedRow(kept[i], targets)
        bar.advance(len(batch), sum(len(example.input_ids) for example in chosen))
    captured = [row for row in done if row is not None]
    table = to_table(captured, settings.passed, settings.targets)
    store.commit(
        index,
        table,
        input_tokens=sum(len(row.example.input_ids) for row in captured),
        tokens=sum(len(row.targets.counts) for row in captured),
        entries=sum(len(row.targets.ids) for row in captured),
    )


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows, longest first, so that rows times longest stays within ``batch_tokens``; at least one row each."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    grouped: list[list[int]] = []
    for i in order:
        if grouped and (len(grouped[-1]) + 1) * lengths[grouped[-1][0]] <= batch_tokens:
            grouped[-1].append(i)
        else:
            grouped.append([i])
    return grouped


def score(examples: Sequence[Example], teacher: LocalTeacher, settings: Settings) -> list[Extracted]:
    """Return each example's targets, from one forward pass over all of them."""
    longest = max(len(example.input_ids) for example in examples)
    ids = np.zeros((len(examples), longest), np.int64)
    attention = np.zeros((len(examples), longest), np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = example.input_ids
        attention[row, : len(example.input_ids)] = 1
    positions = np.concatenate([row * longest + example.scored for row, example in enumerate(examples)])
    random = None
    if isinstance(settings.targets, Sampled):
        draws = settings.targets.draws
        random = np.concatenate([uniforms(settings.seed, e.example_id, len(e.scored), draws) for e in examples])
    device = teacher.head.weight.device
    signal = teacher.score(
        torch.from_numpy(ids).to(device), torch.from_numpy(attention).to(device), torch.from_numpy(positions).to(device)
    )
    extracted = extract(signal.hidden, signal.head, settings.targets, temperature=settings.temperature, uniforms=random)
    return _split(extracted, [len(example.scored) for example in examples])


def _split(extracted: Extracted, positions: Sequence[int]) -> list[Extracted]:
    ends = np.cumsum(positions)
    entry_ends = np.concatenate([[0], np.cumsum(extracted.counts, dtype=np.int64)])
    parts = []
    for end, count in zip(ends, positions, strict=True):
        at = slice(end - count, end)
        entries = slice(entry_ends[end - count], entry_ends[end])
        parts.append(
            Extracted(
                extracted.counts[at],
                extracted.ids[entries],
                extracted.logprobs[entries],
                extracted.tail_logmass[at],
                None if extracted.draws is None else extracted.draws[entries],
                None if extracted.mean_logprob is None else extracted.mean_logprob[at],
            )
        )
    return parts


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}={value}: expected a number above 0.")


def _placed(teacher: LocalTeacher) -> nn.Module:
    """Return the teacher's model, on this process's accelerator unless the user chose a device."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if teacher.device is None and accelerator is not None:
        teacher.device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        teacher.model.to(teacher.device)
    return teacher.model


def _portable(ref: str | None) -> str | None:
    """Name a local directory without the path to it, which differs between machines; its weights have a digest."""
    return Path(ref).resolve().name if ref is not None and Path(ref).is_dir() else ref


def _engine() -> dict[str, str]:
    from importlib.metadata import version

    from kd_plugin import __version__

    return {
        "name": "transformers",
        "transformers": version("transformers"),
        "torch": version("torch"),
        "kd-plugin": __version__,
    }
