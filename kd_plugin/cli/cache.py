"""``kd-plugin cache``: inspect, verify and extend teacher caches."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kd_plugin.errors import CacheCorruptionError

_DESCRIPTION = """\
info      what a cache holds and who taught it; also of a capture that still runs
verify    read every byte; name each file that differs, the rows that are lost, and how to redo just those
fidelity  what each setting of a capture would keep of the teacher, before it is begun
merge     join caches of the same teacher and settings over different data into a new one; or put caches of several
          teachers over the same examples together, for training on all of them at once
append    capture more data into a finished cache: its directory, then the settings of `kd-plugin capture`
Exit codes: 0 good, 1 refused, damaged or unfinished, 2 wrong usage.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    if argv and argv[0] == "fidelity":
        from kd_plugin.cli.fidelity import main as fidelity

        return fidelity(argv[1:])
    if argv and argv[0] == "append":
        from kd_plugin.cli.capture import main as capture

        named = len(argv) > 1 and not argv[1].startswith("-")  # as the others take it
        return capture(["--output_dir", *argv[1:]] if named else argv[1:], append=True)
    parser = argparse.ArgumentParser(
        prog="kd-plugin cache", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|verify|fidelity|merge|append")
    info = commands.add_parser("info", help="what a cache holds")
    info.add_argument("directory", type=Path)
    info.add_argument("--json", action="store_true", help="the manifest, for programs")
    verify = commands.add_parser("verify", help="read every byte of a cache")
    verify.add_argument("directory", type=Path)
    merge = commands.add_parser("merge", help="join caches of the same settings")
    merge.add_argument("output_dir", type=Path, help="a new directory")
    merge.add_argument("caches", type=Path, nargs="+")
    merge.add_argument("--weights", type=float, nargs="+", help="of several teachers' caches; equal if left out")
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return _info(arguments.directory, arguments.json)
    if arguments.command == "verify":
        return _verify(arguments.directory)
    return _merge(arguments.caches, arguments.output_dir, arguments.weights)


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
