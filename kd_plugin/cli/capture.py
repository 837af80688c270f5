"""``kd-plugin capture``: store a teacher's outputs once, as a teacher cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd_plugin.errors import ConfigError, nearest

if TYPE_CHECKING:
    from kd_plugin.cache.targets import Targets

_DESCRIPTION = """\
Score a dataset with a teacher and store what it said: a directory of Parquet shards that `kd-plugin offline` trains
on. Run the same command again to go on after an interruption; run it several times at once over one directory, on one
machine or many, to share the work. The teacher's terms are checked before its weights are loaded.
Exit codes: 0 done, 1 refused or failed (finished units are kept), 130 interrupted.
"""


@dataclass(frozen=True)
class CaptureConfig:
    """Settings of a capture.

    Attributes:
        dataset: A .json, .jsonl or .parquet file, a directory of such files or of save_to_disk, or a hub id.
        teacher: A local model directory or a hub id.
        output_dir: The cache: a new directory, or one with the same capture, which then goes on.
        split: Split of the dataset.
        dataset_name: Configuration of a hub dataset.
        teacher_name: How lineage calls the teacher.
        revision: Branch, tag or commit of the teacher.
        license: The teacher's licence where none can be found: a hub id such as apache-2.0, or own.
        dtype: dtype of the weights; auto takes the checkpoint's own.
        device: Where the teacher runs; null takes the accelerator, if there is one.
        targets: What is kept of the distribution: top_k, top_p or sampled.
        k: Tokens kept by top_k.
        p: Mass that top_p reaches.
        cap: Tokens that top_p keeps at most.
        draws: Tokens that sampled draws.
        temperature: The logits are divided by it before the softmax.
        max_length: Tokens kept from the start of a row; null keeps all.
        completion_only: Score completions only; null does so where rows have a prompt and a completion.
        shard_rows: Dataset rows a unit, the most that an interruption costs.
        batch_tokens: Tokens of a forward pass, padding included.
        seed: Seed of sampled.
        lineage: Declarations of teachers and use, as a mapping or the path of a YAML file.
    """

    dataset: str = ""
    teacher: str = ""
    output_dir: str = ""
    split: str = "train"
    dataset_name: str | None = None
    teacher_name: str = "teacher"
    revision: str | None = None
    license: str | None = None
    dtype: str = "auto"
    device: str | None = None
    targets: str = "top_k"
    k: int = 64
    p: float = 0.98
    cap: int = 256
    draws: int = 50
    temperature: float = 1.0
    max_length: int | None = None
    completion_only: bool | None = None
    shard_rows: int = 1024
    batch_tokens: int = 16_384
    seed: int = 0
    lineage: dict[str, Any] | str | None = None


def main(argv: Sequence[str], append: bool = False) -> int:
    """Run the command with ``argv`` and return its exit code."""
    from kd_plugin.cli.config import as_yaml, parse_settings

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
    targets = make_targets(config)
    from kd_plugin.cache import capture
    from kd_plugin.cache.datafiles import load_rows
    from kd_plugin.teachers import LocalTeacher

    teacher = LocalTeacher(
        config.teacher,
        name=config.teacher_name,
        revision=config.revision,
        license=config.license,
        dtype=config.dtype,
        device=config.device,
    )
    rows = load_rows(config.dataset, split=config.split, name=config.dataset_name)
    options: dict[str, Any] = {
        "targets": targets,
        "temperature": config.temperature,
        "max_length": config.max_length,
        "completion_only": config.completion_only,
        "shard_rows": config.shard_rows,
        "batch_tokens": config.batch_tokens,
        "seed": config.seed,
        "lineage": config.lineage,
    }
    if "dry_run" in parsed.flags:
        from kd_plugin.cache.plan import estimate

        found = estimate(rows, teacher, **options)
        print(
            f"{found.rows} examples ({found.dropped} rows dropped), {found.input_tokens} tokens, {found.targets} "
            f"targets, about {found.bytes / 1e6:.1f} MB and {found.hours:.2f} hours in one process. Nothing was stored."
        )
        return 0
    cache = capture(rows, teacher, config.output_dir, append=append, **options)
    manifest = cache.manifest
    size = sum(unit.bytes for unit in manifest.units)
    print(
        f"{cache.path}: {len(cache)} examples ({manifest.dropped_rows} rows dropped), {cache.tokens} targets, "
        f"{size / 1e6:.1f} MB, {size / cache.tokens:.1f} bytes a target with its tokens."
    )
    return 0


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
