"""``kd-plugin capture``: store a teacher's outputs once, as a teacher cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_plugin.errors import ConfigError, nearest

if TYPE_CHECKING:
    from kd_plugin.cache.targets import Generation, Targets
    from kd_plugin.teachers import LocalTeacher, ServerTeacher

_DESCRIPTION = """\
Score a dataset with a teacher, or let it write completions first, and store what it said: a directory of Parquet
shards that `kd-plugin offline` trains on. Run the same command again to go on after an interruption; run it several
times at once over one directory, on one machine or many, to share the work. The teacher's terms are checked before
its weights are loaded or its server is asked.
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
_SERVER_KEYS = (
    "url",
    "model",
    "tokenizer",
    "repo",
    "top_k",
    "timeout",
    "max_concurrency",
    "max_retries",
    "api_key_env",
)


@dataclass(frozen=True)
class CaptureConfig:
    """Settings of a capture.

    Attributes:
        dataset: A .json, .jsonl or .parquet file, a directory of such files or of save_to_disk, or a hub id.
        teacher: A local model directory, a hub id, or a vLLM server as a mapping with url and model, and if need be
            tokenizer, repo (of the weights, for their terms), top_k (all lists every token), api_key_env, timeout,
            max_concurrency, max_retries.
        output_dir: The cache: a new directory, or one with the same capture, which then goes on.
        split: Split of the dataset.
        streaming: Read the dataset twice as a stream, and never hold or download it whole.
        dataset_name: Configuration of a hub dataset.
        teacher_name: How lineage calls the teacher.
        revision: Branch, tag or commit of the teacher.
        license: The teacher's licence where none can be found: a hub id such as apache-2.0, or own.
        dtype: dtype of the weights; auto takes the checkpoint's own.
        device: Where the teacher runs; null takes the accelerator, if there is one.
        mode: score the completions that the dataset holds, or generate them.
        completions: Completions that the teacher writes a prompt.
        max_new_tokens: Tokens of a written completion at most.
        sampling_temperature: Temperature at which the teacher writes; 0 takes the likeliest token.
        sampling_top_p: Write from the likeliest tokens that reach this mass.
        sampling_top_k: Write from the k likeliest tokens; 0 from all.
        keep_unfinished: Keep written completions that reach max_new_tokens without an end.
        filter: Which completions are kept; exact_match or math_verify against answer_column, or a function as
            package.module:function, called with the completion and the row.
        answer_column: Column of the reference answer.
        targets: What is kept of the distribution: top_k, top_p or sampled.
        k: Tokens kept by top_k.
        p: Mass that top_p reaches.
        cap: Tokens that top_p keeps at most.
        draws: Tokens that sampled draws.
        temperature: The logits are divided by it before the softmax.
        max_length: Tokens kept from the start of a row; null keeps all.
        completion_only: Score completions only; null does so where rows have a prompt and a completion.
        assistant_only: Score the assistant's turns only, as assistant_only_loss trains on them; a template that does
            not mark them is replaced by TRL's training template, as it is in training.
        chat_template: A .jinja file that renders conversations in the place of the tokenizer's own template.
        date: Day that a template which prints today's date is given, such as 2026-11-29; null takes that of the capture
            which is there, else today.
        shard_rows: Dataset rows a unit, the most that an interruption costs.
        batch_tokens: Tokens of a forward pass, padding included.
        seed: Seed of sampled.
        lineage: Declarations of teachers and use, as a mapping or the path of a YAML file.
    """

    dataset: str = ""
    teacher: dict[str, Any] | str = ""
    output_dir: str = ""
    split: str = "train"
    streaming: bool = False
    dataset_name: str | None = None
    teacher_name: str = "teacher"
    revision: str | None = None
    license: str | None = None
    dtype: str = "auto"
    device: str | None = None
    mode: str = "score"
    completions: int = 1
    max_new_tokens: int = 512
    sampling_temperature: float = 1.0
    sampling_top_p: float = 1.0
    sampling_top_k: int = 0
    keep_unfinished: bool = False
    filter: str | None = None
    answer_column: str = "answer"
    targets: str = "top_k"
    k: int = 64
    p: float = 0.98
    cap: int = 256
    draws: int = 50
    temperature: float = 1.0
    max_length: int | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    chat_template: str | None = None
    date: str | None = None
    shard_rows: int = 1024
    batch_tokens: int = 16_384
    seed: int = 0
    lineage: dict[str, Any] | str | None = None


def main(argv: Sequence[str], append: bool = False) -> int:
    """Run the command with ``argv`` and return its exit code."""
    from kd_plugin.cli.main import as_yaml, parse_settings

    parsed = parse_settings(
        CaptureConfig,
        ["--dry_run" if argument == "--dry-run" else argument for argument in argv],
        command="cache append" if append else "capture",
        description=_DESCRIPTION,
        flags={"dry_run": "Count rows, tokens, bytes and hours from a few batches; store nothing."},
    )
    config = parsed.settings
    if parsed.print_only:
        print(as_yaml(config))
        return 0
    for name in ("dataset", "teacher", "output_dir"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is not set. Give --{name}, or `{name}:` in the --config file.")
    targets, generation, teacher = make_targets(config), make_generation(config), make_teacher(config)
    from kd_plugin.capturing import capture
    from kd_plugin.inputs import load_rows

    rows = load_rows(config.dataset, split=config.split, name=config.dataset_name, streaming=config.streaming)
    options: dict[str, Any] = {
        "targets": targets,
        "generate": generation,
        "filter": config.filter,
        "answer_column": config.answer_column,
        "temperature": config.temperature,
        "max_length": config.max_length,
        "completion_only": config.completion_only,
        "assistant_only": config.assistant_only,
        "chat_template": make_template(config),
        "date": config.date,
        "shard_rows": config.shard_rows,
        "batch_tokens": config.batch_tokens,
        "seed": config.seed,
        "lineage": config.lineage,
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
    for key in config.teacher:
        if key not in _SERVER_KEYS:
            raise ConfigError(
                f"teacher: unknown key {key!r}; a server takes {', '.join(_SERVER_KEYS)}."
                f"{nearest(str(key), list(_SERVER_KEYS))}"
            )
    if "url" not in config.teacher:
        raise ConfigError(
            "teacher: a mapping describes a server and needs its url. For a model in this process give "
            "its directory or hub id alone."
        )
    return ServerTeacher(**config.teacher, **known)


def make_generation(config: CaptureConfig) -> Generation | None:
    """Return how the teacher writes, None where it scores what is there.

    Raises:
        ConfigError: an unknown mode, a number out of range, or settings of a mode that is not chosen.
    """
    from kd_plugin.cache import Generation

    if config.mode == "generate":
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
                f"{name} is set, and mode is score, in which the teacher writes nothing. Set mode: generate, or leave "
                f"{name} out."
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

    kinds = ["top_k", "top_p", "sampled"]
    if config.targets == "top_k":
        return TopK(config.k)
    if config.targets == "top_p":
        return TopP(config.p, config.cap)
    if config.targets == "sampled":
        return Sampled(config.draws)
    raise ConfigError(
        f"targets: {config.targets!r} is unknown; expected one of {', '.join(kinds)}.{nearest(config.targets, kinds)}"
    )
