"""``kd-plugin capture``: store a teacher's outputs once, as a teacher cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_plugin.capturing.capture import ScoringSettings
from kd_plugin.errors import ConfigError, nearest, require_known_keys
from kd_plugin.inputs import MIXTURE
from kd_plugin.settings import option, settings, values_of

if TYPE_CHECKING:
    from kd_plugin.cache.targets import Generation, Targets
    from kd_plugin.teachers import LocalTeacher, ServerTeacher

_DESCRIPTION = """\
Score a dataset with a teacher, or let it generate completions first, and store its outputs: a directory of Parquet
shards that `kd-plugin offline` trains on. Run the same command again to go on after an interruption; run it several
times at once over one directory, on one machine or many, to share the work. The teacher's terms are checked before
its weights are loaded or its server is asked. With `targets: text` the teacher, any OpenAI-compatible server or a model
here, writes, and its text becomes an ordinary dataset; `kd-plugin capture --targets text --help` shows how.
Exit codes: 0 done, 1 refused or failed (finished units are kept), 130 interrupted.
"""


_MODES = ["score", "generate"]
_GENERATION_FIELDS = (
    "completions",
    "max_new_tokens",
    "sampling_temperature",
    "sampling_top_p",
    "sampling_top_k",
    "keep_unfinished",
)


@settings
class SourceSettings:
    """What is captured, and from whom."""

    dataset: str = option(
        default="",
        help="A .json, .jsonl or .parquet file, a directory of such files or of save_to_disk, or a hub id.",
    )
    teacher: dict[str, Any] | str = option(
        default="",
        help="A local model directory, a hub id, or a server as a mapping with url and model, and if need be "
        "tokenizer, repo (of the weights, for their terms), signal (top_k, or hidden for the whole distribution of a "
        "server that pools), top_k (all lists every token), server_dtype, api_key_env, timeout, max_concurrency, "
        "max_retries; for text also api, stream, request and prices, and nothing of tokens.",
    )
    output_dir: str = option(
        default="",
        help="The cache, or for text the dataset: a new directory, or one with the same capture, to go on.",
    )
    datasets: list[dict[str, Any]] | None = option(
        default=None, help=f"Several datasets in the place of dataset, {MIXTURE}."
    )
    split: str = option(default="train", help="Split of the dataset.")
    streaming: bool = option(
        default=False, help="Read the dataset twice as a stream, and never hold or download it whole."
    )
    dataset_name: str | None = option(default=None, help="Configuration of a hub dataset.")
    dataset_text_field: str = option(
        default="text", help="Column of plain text in rows without turns, as in SFTConfig."
    )
    limit: int | None = option(default=None, help="Capture the first so many rows alone.")
    teacher_name: str = option(default="teacher", help="How lineage calls the teacher.")
    revision: str | None = option(default=None, help="Branch, tag or commit of the teacher.")
    license: str | None = option(
        default=None, help="The teacher's licence where none can be found: a hub id such as apache-2.0, or own."
    )
    dtype: str = option(default="auto", help="dtype of the weights; auto takes the checkpoint's own.")
    device: str | None = option(
        default=None, help="Where the teacher runs; null takes the accelerator, if there is one."
    )


@settings
class TeachingSettings(SourceSettings):
    """What is captured, from whom, and what is kept of it; see :class:`CaptureConfig`."""

    mode: str = option(default="score", help="score the completions that the dataset holds, or generate them.")
    generate: dict[str, Any] | None = option(
        default=None,
        help="Let a student generate the completions, which the teacher scores, once: {by: STUDENT}, its directory or "
        "hub id. Sets mode: generate.",
    )
    completions: int = option(default=1, help="Completions that the teacher generates a prompt.")
    max_new_tokens: int = option(default=512, help="Tokens of a generated completion at most.")
    sampling_temperature: float = option(
        default=1.0, help="Temperature at which the teacher generates; 0 takes the likeliest token."
    )
    sampling_top_p: float = option(default=1.0, help="Sample from the likeliest tokens that reach this mass.")
    sampling_top_k: int = option(default=0, help="Sample from the k likeliest tokens; 0 from all.")
    keep_unfinished: bool = option(
        default=False, help="Keep generated completions that reach max_new_tokens without an end."
    )
    targets: str = option(default="top_k", help="What is kept of the distribution: top_k, top_p or sampled; or text.")
    k: int = option(default=64, help="Tokens kept by top_k.")
    p: float = option(default=0.98, help="Mass that top_p reaches.")
    cap: int = option(default=256, help="Tokens that top_p keeps at most.")
    draws: int = option(default=50, help="Tokens that sampled draws.")
    chat_template: str | None = option(
        default=None,
        help="A .jinja file that renders conversations in the place of the tokenizer's own template. Left out, "
        "assistant_only takes TRL's training template where the tokenizer's own does not mark the turns.",
    )
    student_tokenizer: str | None = option(
        default=None,
        help="Directory or hub id of the tokenizer of the students to be taught: rows are rendered and tokenized "
        "by it, and one cache teaches every student that has it. Left out, by the teacher's.",
    )
    view: dict[str, Any] | None = option(
        default=None,
        help="How the teacher reads a row, if not as the student does: a mapping with context (a Jinja template over "
        "the row's columns), system or chat_template (own, or a file), as a panel's view.",
    )


@settings
class CaptureConfig(ScoringSettings, TeachingSettings):
    """Settings of a capture."""


def main(argv: Sequence[str], append: bool = False) -> int:
    """Run the command with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import parse_settings, require_set, written_for

    if written_for("targets", argv) == "text" and not append:
        from kd_plugin.cli.text import main as capture_text

        return capture_text(argv)
    parsed = parse_settings(
        CaptureConfig,
        argv,
        command="cache append" if append else "capture",
        description=_DESCRIPTION,
        flags={"dry_run": "Count rows, tokens, bytes and hours from a few batches; store nothing."},
    )
    config = parsed.settings
    if parsed.shown():
        return 0
    needed = [*([] if config.datasets else ["dataset"]), "teacher", "output_dir"]
    require_set(config, needed, "kd-plugin cache append" if append else "")
    targets, generation, teacher = make_targets(config), make_generation(config), make_teacher(config)
    from kd_plugin.cache.manifest import read_manifest
    from kd_plugin.capturing import capture

    if append:
        read_manifest(Path(config.output_dir))  # a name that is misspelt would begin a cache
    rows = rows_of(config)
    options: dict[str, Any] = {
        **values_of(ScoringSettings, vars(config)),
        "targets": targets,
        "generate": generation,
        "by": None if config.generate is None else config.generate["by"],
        "chat_template": make_template(config),
        "student_tokenizer": config.student_tokenizer,
        "view": config.view,
    }
    if "dry_run" in parsed.flags:
        from kd_plugin.capturing.plan import estimate

        found = estimate(rows, teacher, **options)
        print(
            f"{found.rows} examples ({dropped_text(found.dropped)}), {found.input_tokens} tokens, {found.targets} "
            f"targets, about {found.bytes / 1e6:.1f} MB and {found.hours:.2f} hours in one process. Nothing was stored."
            + ("" if generation is None else " All extrapolated from one batch of completions.")
        )
        return 0
    cache = capture(rows, teacher, config.output_dir, append=append, **options)
    manifest = cache.manifest
    size = sum(unit.bytes for unit in manifest.units)
    print(
        f"{cache.path}: {len(cache)} examples ({dropped_text(manifest.dropped)}), {cache.tokens} targets, "
        f"{size / 1e6:.1f} MB, {size / cache.tokens:.1f} bytes a target with its tokens."
    )
    return 0


def rows_of(config: SourceSettings) -> Any:
    """Return the rows that ``dataset`` or ``datasets`` names, with plain text in the column ``text``.

    Raises:
        ConfigError: both are given, a mixture that cannot be, or a column that is not there.
        DataError: a dataset cannot be read.
    """
    from kd_plugin.inputs import load_mixture, load_rows

    if config.datasets and config.dataset:
        raise ConfigError("dataset and datasets are both set; choose one of them.")
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"limit is {config.limit}; expected at least 1 row.")
    if config.datasets:
        rows = load_mixture(config.datasets, streaming=config.streaming)
    else:
        rows = load_rows(config.dataset, split=config.split, name=config.dataset_name, streaming=config.streaming)
    if config.limit is not None:
        rows = rows.take(config.limit) if config.streaming else rows.select(range(min(config.limit, len(rows))))
    field = config.dataset_text_field
    if field == "text":
        return rows
    names = list(rows.column_names or next(iter(rows), {}))
    if field not in names:
        raise ConfigError(
            f"dataset_text_field: no column {field!r} in the rows.{nearest(field, names)} They have {', '.join(names)}."
        )
    return (rows.remove_columns("text") if "text" in names else rows).rename_column(field, "text")


def dropped_text(dropped: Mapping[str, int]) -> str:
    """Say what was not kept, and why."""
    if not dropped:
        return "0 rows dropped"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"{sum(dropped.values())} dropped: {reasons}"


def make_teacher(config: CaptureConfig) -> LocalTeacher | ServerTeacher:
    """Return the teacher that ``config`` names, with nothing loaded and nothing sent.

    Raises:
        ConfigError: unknown keys, no url, or a value out of range.
    """
    from kd_plugin.teachers import LocalTeacher, ServerTeacher

    known: dict[str, Any] = {"name": config.teacher_name, "revision": config.revision, "license": config.license}
    if isinstance(config.teacher, str):
        return LocalTeacher(config.teacher, dtype=config.dtype, device=config.device, **known)
    keys = [k for k in inspect.signature(ServerTeacher).parameters if k != "name"]
    require_known_keys(config.teacher, keys, "teacher")
    if "url" not in config.teacher:
        raise ConfigError(
            "teacher: a mapping describes a server and needs its url. For a model in this process give "
            "its directory or hub id alone."
        )
    return ServerTeacher(**{**known, **config.teacher})


def make_generation(config: CaptureConfig) -> Generation | None:
    """Return how the teacher generates, None where it scores the dataset's completions.

    Raises:
        ConfigError: an unknown mode, a number out of range, or settings of a mode that is not chosen.
    """
    from kd_plugin.cache import Generation

    if config.generate is not None and set(config.generate) != {"by"}:
        raise ConfigError(
            f"generate is {config.generate!r}; expected {{by: STUDENT}}. How it samples is said by completions, "
            "max_new_tokens, sampling_temperature and so on."
        )
    if config.mode == "generate" or config.generate is not None:
        return Generation(
            n=config.completions,
            max_new_tokens=config.max_new_tokens,
            temperature=config.sampling_temperature,
            top_p=config.sampling_top_p,
            top_k=config.sampling_top_k,
            keep_unfinished=config.keep_unfinished,
        )
    if config.mode != "score":
        raise ConfigError(
            f"mode: {config.mode!r} is unknown; expected score or generate.{nearest(config.mode, _MODES)}"
        )
    for name in _GENERATION_FIELDS:
        if getattr(config, name) != getattr(CaptureConfig, name):
            raise ConfigError(
                f"{name} is set, and mode is score, in which the teacher generates nothing. Set mode: generate, or "
                f"leave {name} out."
            )
    return None


def make_template(config: CaptureConfig) -> str | Callable[[Any], str | None] | None:
    """Return the chat template that ``config`` names, or what finds TRL's training template for a tokenizer.

    Raises:
        ConfigError: the file cannot be read.
    """
    if config.chat_template is not None:
        try:
            return Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template: {config.chat_template} cannot be read ({error}).") from error
    if not config.assistant_only:
        return None
    try:
        from trl import get_training_chat_template
    except ImportError:
        return None  # the tokenizer's own template may do; the capture says so if not
    return get_training_chat_template


def make_targets(config: CaptureConfig) -> Targets:
    """Return the targets that ``config`` asks for.

    Raises:
        ConfigError: unknown kind, or a number out of range.
    """
    from kd_plugin.cache import Sampled, TopK, TopP

    kinds = ["top_k", "top_p", "sampled", "text"]
    if config.targets == "top_k":
        return TopK(config.k)
    if config.targets == "top_p":
        return TopP(config.p, config.cap)
    if config.targets == "sampled":
        return Sampled(config.draws)
    if config.targets == "text":
        raise ConfigError(
            "targets: text makes a dataset and no teacher cache, so nothing can be appended to it. Capture the longer "
            "dataset into a directory of its own; `datasets.concatenate_datasets` joins two."
        )
    raise ConfigError(
        f"targets: {config.targets!r} is unknown; expected one of {', '.join(kinds)}.{nearest(config.targets, kinds)}"
    )
