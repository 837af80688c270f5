"""``kd-plugin cache``: inspect, verify and extend teacher caches; what each setting of a capture would keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_plugin.cli.parsing import Parser, parse_settings, require_set
from kd_plugin.errors import CacheCorruptionError, UsageError

if TYPE_CHECKING:
    from kd_plugin.cache import Targets
    from kd_plugin.capturing.fidelity import Fidelity

_DESCRIPTION = """\
info      what a cache holds and who taught it; also of a capture that still runs
verify    read every byte; name each file that differs, the rows that are lost, and how to redo just those
fidelity  what each setting of a capture would keep of the teacher, before it is begun
merge     join caches of the same teacher and settings over different data into a new one; or put caches of several
          teachers over the same examples together, for training on all of them at once
append    capture more data into a finished cache: its directory, then the settings of `kd-plugin capture`
import    read teacher outputs of DistillKit, or in Axolotl's form: their place, a new directory, settings
Exit codes: 0 good, 1 refused, damaged or unfinished, 2 wrong usage.
"""
_INFO = """\
Print what a cache holds and who taught it; of a capture that still runs, how far it is.
Exit codes: 0 printed, 1 there is no cache, 2 wrong usage.
"""
_VERIFY = """\
Read every byte of a cache. Each file that differs is named, with the rows that are lost and how to redo just those.
Exit codes: 0 good, 1 damaged or unfinished, 2 wrong usage.
"""
_MERGE = """\
Join caches of the same teacher and settings over different data into a new one. Caches of several teachers, or with
--weights, over the same examples are put together instead, for training on all of them at once.
Exit codes: 0 done, 1 refused, 2 wrong usage.
"""
_FIDELITY = """\
Score some sequences with the teacher, and compare the gradient that the student would get from stored targets with the
one from the full distribution: for top-k at several k, and for sampled targets at several draws.
Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
"""
_IMPORT = """\
Read teacher outputs that another tool stored into a teacher cache. What cannot be read faithfully is refused, with the
reason; the teacher's licence decides as in a capture.

  kd-plugin cache import LOGITS CACHE --format distillkit --teacher Qwen/Qwen3-32B
  kd-plugin cache import rows.jsonl CACHE --format axolotl --teacher Qwen/Qwen3-32B --logprobs_field logprobs

Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    if argv and argv[0] == "fidelity":
        return fidelity_command(argv[1:])
    if argv and argv[0] == "import":
        return import_command(argv[1:])
    if argv and argv[0] == "append":
        from kd_plugin.cli.capture import main as capture

        named = len(argv) > 1 and not argv[1].startswith("-")  # as the others take it
        return capture(["--output_dir", *argv[1:]] if named else argv[1:], append=True)
    parser = Parser("kd-plugin cache", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|verify|fidelity|merge|append|import")
    info = commands.add_parser("info", description=_INFO)
    info.add_argument("directory", type=Path, help="a cache, or one that is being captured")
    info.add_argument("--json", action="store_true", help="the manifest, for programs")
    verify = commands.add_parser("verify", description=_VERIFY)
    verify.add_argument("directory", type=Path, help="a cache")
    merge = commands.add_parser("merge", description=_MERGE)
    merge.add_argument("output_dir", type=Path, help="a new directory")
    merge.add_argument("caches", type=Path, nargs="+", help="what is joined")
    merge.add_argument("--weights", type=float, nargs="+", help="of several teachers' caches; equal if left out")
    for name in ("fidelity", "append", "import"):  # which were looked for above, and an error lists
        commands.add_parser(name, add_help=False)
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return _info(arguments.directory, arguments.json)
    if arguments.command == "verify":
        return _verify(arguments.directory)
    return _merge(arguments.caches, arguments.output_dir, arguments.weights)


def import_command(argv: Sequence[str]) -> int:
    """Run ``kd-plugin cache import SOURCE OUTPUT ARGV`` and return its exit code."""
    from kd_plugin.importing import import_outputs
    from kd_plugin.importing.run import ImportSettings

    places = list(takewhile(lambda word: not word.startswith("-"), argv[:2]))
    unplaced = UsageError("name what is read, then a new directory, then settings: SOURCE OUTPUT --teacher MODEL",
                          "kd-plugin cache import")  # fmt: skip
    if len(places) < 2 and any(not word.startswith("-") for word in argv):
        raise unplaced
    parsed = parse_settings(ImportSettings, argv[len(places) :], command="cache import", description=_IMPORT)
    if parsed.shown():
        return 0
    if len(places) < 2:
        raise unplaced
    values = {f.name: getattr(parsed.settings, f.name) for f in fields(parsed.settings)}
    cache = import_outputs(*places, **values)
    print(f"{cache.path}: {len(cache)} examples, {cache.tokens} targets.")
    return 0


def _merge(caches: Sequence[Path], output_dir: Path, weights: Sequence[float] | None) -> int:
    from kd_plugin.cache import TeacherCache
    from kd_plugin.cache.merge import keep_together
    from kd_plugin.cache.merge import merge as merge_caches

    opened = [TeacherCache(path, verify=False) for path in caches]
    settings = [cache.manifest.settings for cache in opened]
    if any(settings[0].differences(other) for other in settings[1:]) or weights is not None:
        keep_together(opened, output_dir, weights)
        print(f"{output_dir}: {len(opened)} caches over the same {len(opened[0])} examples. Train on it as on a cache.")
        return 0
    merged = merge_caches(caches, output_dir)
    print(f"{merged.path}: {len(merged)} examples, {merged.tokens} targets.")
    return 0


def _info(directory: Path, as_json: bool) -> int:
    from kd_plugin.cache.manifest import read_manifest
    from kd_plugin.cache.merge import is_together, read_together
    from kd_plugin.cache.store import gather
    from kd_plugin.cache.targets import describe
    from kd_plugin.cli.capture import dropped_text

    if is_together(directory):
        for path, weight in read_together(directory).members.items():
            print(f"{path}, weight {weight:g}")
            _info(Path(path), as_json)
        return 0
    manifest = gather(directory, read_manifest(directory))
    if as_json:
        print(json.dumps(manifest.to_json(), indent=1))
        return 0
    settings = manifest.settings
    size, entries = sum(u.bytes for u in manifest.units), sum(u.entries for u in manifest.units)
    done = "finished" if manifest.complete else f"{len(manifest.units)} of {manifest.unit_count} units"
    tokens = manifest.tokens
    described = describe(settings.targets)
    kept = ", ".join(f"{name} {value}" for name, value in described.items() if name != "kind")
    listed = f", {entries / tokens:.1f} tokens listed a position" if tokens else ""
    each = f", {size / tokens:.1f} bytes a position with its tokens" if tokens else ""
    placed = f"in {settings.dtype}" if settings.dtype else "on a server"
    lines = {
        "teacher": f"{settings.teacher or 'unnamed'} {placed}, temperature {settings.temperature}",
        "targets": f"{described['kind']} ({kept}){listed}",
        "state": f"{done}, begun {manifest.created}, finished {manifest.finished or 'not yet'}",
        "examples": f"{manifest.rows} ({dropped_text(manifest.dropped)})",
        "positions": f"{manifest.tokens} with a target",
        "size": f"{size / 1e6:.1f} MB{each}",
        "vocabulary": f"{settings.vocab_size} tokens, fingerprint {settings.tokenizer[:12]}",
        "digest": manifest.content_digest,
    }
    if settings.generation is not None:
        lines["written"] = ", ".join(f"{name} {value}" for name, value in settings.generation.to_json().items())
    lines["scored"] = settings.scored
    if settings.rendered_at is not None:
        lines["rendered"] = f"by a chat template that printed the time {settings.rendered_at}"
    if settings.filter is not None:
        lines["filter"] = settings.filter
    for name, value in lines.items():
        print(f"{name:<11} {value}")
    return 0


def _verify(directory: Path) -> int:
    from kd_plugin.cache.manifest import read_manifest
    from kd_plugin.cache.merge import is_together, open_members
    from kd_plugin.cache.reader import problems
    from kd_plugin.cache.store import gather

    if is_together(directory):
        return max(_verify(cache.path) for cache in open_members(directory))
    found = problems(directory)
    if found:
        raise CacheCorruptionError("\n".join(found))
    manifest = gather(directory, read_manifest(directory))
    if not manifest.complete:
        print(f"{directory}: {len(manifest.units)} units are whole, {len(manifest.missing_units)} are not done yet.")
        return 1
    print(f"{directory}: every byte is as it was written ({len(manifest.units)} units, {manifest.tokens} targets).")
    return 0


@dataclass(frozen=True)
class FidelityConfig:
    """Settings of a probe.

    Attributes:
        dataset: A .json, .jsonl or .parquet file, a directory of such files or of save_to_disk, or a hub id.
        teacher: A local model directory or a hub id.
        student: The model that will be trained; a local directory or a hub id with the teacher's tokenizer.
        output: Directory for fidelity.json and fidelity.png; null writes neither.
        budget_bytes: Bytes a position that you would spend; the best setting within is recommended.
        k: Numbers of tokens to try for top_k.
        draws: Numbers of draws to try for sampled.
        sequences: Rows to probe, spread evenly over the dataset.
        max_length: Tokens kept from the start of a row; null keeps all.
        completion_only: Score completions only; null does so where rows have a prompt and a completion.
        temperature: The logits are divided by it before the softmax.
        tail: What training will do with what top_k leaves out; bucket, keep or renormalise.
        split: Split of the dataset.
        dataset_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of the teacher.
        license: The teacher's licence where none can be found; a hub id such as apache-2.0, or own.
        dtype: dtype of the teacher's weights; auto takes the checkpoint's own.
        student_dtype: dtype of the student's weights; float32 gives figures that rounding does not blur.
        device: Where both run; null takes the accelerator, if there is one.
        batch_tokens: Tokens of a forward pass, padding included.
        seed: Seed of the draws.
        lineage: Declarations of teachers and use, as a mapping or the path of a YAML file.
    """

    dataset: str = ""
    teacher: str = ""
    student: str = ""
    output: str | None = None
    budget_bytes: float | None = None
    k: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    draws: list[int] = field(default_factory=lambda: [12, 25, 50, 100, 200])
    sequences: int = 200
    max_length: int | None = 512
    completion_only: bool | None = None
    temperature: float = 1.0
    tail: str = "bucket"
    split: str = "train"
    dataset_name: str | None = None
    revision: str | None = None
    license: str | None = None
    dtype: str = "auto"
    student_dtype: str = "float32"
    device: str | None = None
    batch_tokens: int = 4096
    seed: int = 0
    lineage: dict[str, Any] | str | None = None


def fidelity_command(argv: Sequence[str]) -> int:
    """Run ``kd-plugin cache fidelity ARGV`` and return its exit code."""
    parsed = parse_settings(FidelityConfig, argv, command="cache fidelity", description=_FIDELITY)
    config = parsed.settings
    if parsed.shown():
        return 0
    require_set(config, ("dataset", "teacher", "student"), "kd-plugin cache fidelity")
    if config.output is not None:
        import matplotlib  # noqa: F401  a missing plot is said before the probe, not after it
    found = _probe(config)
    print(table(found))
    if config.output is not None:
        directory = Path(config.output)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "fidelity.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
        plot(found, directory / "fidelity.png", config.budget_bytes)
        print(f"\nfidelity.json and fidelity.png are in {directory}.")
    if config.budget_bytes is not None:
        best = found.recommend(config.budget_bytes)
        print(
            f"\nWithin {config.budget_bytes:g} bytes a position: {best.name}, {best.bytes:.1f} bytes, cosine "
            f"{best.cosine:.4f}."
        )
    return 0


def _probe(config: FidelityConfig) -> Fidelity:
    from transformers import AutoModelForCausalLM

    from kd_plugin.cache import Sampled, TopK
    from kd_plugin.capturing.fidelity import fidelity
    from kd_plugin.inputs import load_rows
    from kd_plugin.models import as_tokenizer
    from kd_plugin.teachers import LocalTeacher

    settings: list[Targets] = [*(TopK(k) for k in config.k), *(Sampled(draws) for draws in config.draws)]
    teacher = LocalTeacher(
        config.teacher,
        revision=config.revision,
        license=config.license,
        dtype=config.dtype,
        device=config.device,
    )
    rows = load_rows(config.dataset, split=config.split, name=config.dataset_name)
    return fidelity(
        rows,
        teacher,
        lambda: AutoModelForCausalLM.from_pretrained(config.student, dtype=config.student_dtype),
        settings=settings,
        sequences=config.sequences,
        max_length=config.max_length,
        completion_only=config.completion_only,
        temperature=config.temperature,
        tail=config.tail,  # type: ignore[arg-type]
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        tokenizer=as_tokenizer(config.student),
        lineage=config.lineage,
    )


def table(found: Fidelity) -> str:
    """Return the measurements as text, one line a setting."""
    head = (
        f"{found.positions} positions of {found.sequences} sequences; the student is {found.student_kl:.3f} nats from "
        "the teacher."
    )
    titles = f"{'bytes':>8}{'listed':>8}{'mass':>8}{'target KL':>11}{'student KL':>12}{'cosine':>9}{'norm':>8}"
    lines = [head, "", f"{'targets':<14}{titles}"]
    for m in found.measurements:
        lines.append(
            f"{m.name:<14}{m.bytes:>8.1f}{m.listed:>8.1f}{m.mass:>8.3f}{m.target_kl:>11.3f}{m.student_kl:>12.3f}"
            f"{m.cosine:>9.4f}{m.norm_ratio:>8.3f}"
        )
    return "\n".join(lines)


def plot(found: Fidelity, path: str | Path, budget_bytes: float | None = None) -> None:
    """Draw cosine and norm ratio of the gradients against bytes a position, truncated and sampled apart.

    Args:
        found: what was measured.
        path: a .png, .svg or .pdf file.
        budget_bytes: where to draw the budget, or None.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    from kd_plugin.cache import Sampled

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    series = {
        "truncated": [m for m in found.measurements if not isinstance(m.targets, Sampled)],
        "sampled": [m for m in found.measurements if isinstance(m.targets, Sampled)],
    }
    for axes, measure, title in zip(
        panels,
        ("cosine", "norm_ratio"),
        ("cosine to the exact gradient", "norm, as a share of the exact one"),
        strict=True,
    ):
        for (label, measured), marker, below in zip(series.items(), "os", (True, False), strict=True):
            measured = sorted(measured, key=lambda m: m.bytes)
            axes.plot([m.bytes for m in measured], [getattr(m, measure) for m in measured], marker=marker, label=label)
            for m in measured:  # the words of the two series on two sides of their lines
                axes.annotate(
                    m.name.split()[1], (m.bytes, getattr(m, measure)), textcoords="offset points",
                    xytext=(0, -7 if below else 7), ha="center", va="top" if below else "bottom", fontsize=8,
                    color=axes.lines[-1].get_color(), bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                )  # fmt: skip
        axes.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
        if budget_bytes is not None:
            said = f"budget: {budget_bytes:g} bytes"
            axes.axvline(budget_bytes, color="0.5", linestyle="--", linewidth=0.8, zorder=0, label=said)
        axes.margins(0.08, 0.14)
        axes.set(xscale="log", xlabel="bytes per position", title=title)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(loc="best", frameon=False)
    figure.suptitle(f"Student's gradient from stored targets, over {found.positions} positions")
    figure.savefig(path)
