"""``kd-plugin capture`` with ``targets: text``: have teachers write, and store what is right as a dataset."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_plugin.cli.capture import SourceSettings, dropped_text, rows_of
from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.settings import option, settings, values_of
from kd_plugin.text.settings import TextSettings

if TYPE_CHECKING:
    from kd_plugin.text import Writer

_DESCRIPTION = """\
Have one or several teachers write about the prompts of a dataset, keep what is right, and store it as an ordinary
dataset with its lineage: prompt and completion as messages, the reasoning apart. `kd-plugin offline` with
`teacher_text` trains on it, and so does any trainer that reads datasets. A teacher is any OpenAI-compatible server, or
a model here. Run the same command again to go on after an interruption: no answer that came is lost, none is asked for
twice. Run it with other rules to select again from the same answers. Terms are checked before the first request.
Exit codes: 0 done (also where the ceiling was reached), 1 refused or failed (answers are kept), 130 interrupted.
"""


@settings
class TextCaptureConfig(TextSettings, SourceSettings):
    """Settings of a capture of text."""

    targets: str = option(default="text", help="text: what this command stores.")
    teachers: dict[str, Any] | None = option(
        default=None,
        help="Several teachers by name, each as `teacher`, in the place of it: all answer every prompt, and may vote.",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import parse_settings, require_set
    from kd_plugin.text import capture_text

    parsed = parse_settings(
        TextCaptureConfig,
        argv,
        command="capture",
        description=_DESCRIPTION,
        flags={"dry_run": "Say how many texts are asked for and what they cost at most; ask nobody."},
    )
    config = parsed.settings
    if parsed.shown():
        return 0
    require_set(config, [*([] if config.datasets else ["dataset"]), "output_dir"])
    writers = make_writers(config)
    rows = rows_of(config)
    if "dry_run" in parsed.flags:
        print(_estimate(config, writers, rows))
        return 0
    found = capture_text(rows, writers, config.output_dir, **values_of(TextSettings, vars(config)))
    tokens = {name: f"{usage['read']} read, {usage['written']} written" for name, usage in found.usage.items()}
    used = "; ".join(f"{name}: {words}" for name, words in tokens.items()) or "not told by the server"
    print(
        f"{found.path}: {found.rows} rows ({dropped_text(found.dropped)}). Tokens: {used}. Spent: {found.spent:.2f} by "
        f"the prices given."
        + (f" {found.contaminated} contaminated: contaminated.jsonl." if found.contaminated else "")
    )
    if found.missing:
        print(
            f"Without all that {', '.join(found.missing)} would have written, which cannot be reached: run the same "
            "command again to have it asked."
        )
    if not found.complete and not found.missing:
        print(
            f"The ceiling of {config.ceiling:g} is reached: the rest was not asked. Run the same command with a higher "
            "ceiling to go on; what is there is not paid for again."
        )
    return 0


def make_writers(config: TextCaptureConfig) -> list[Writer]:
    """Return the teachers that ``config`` names, with nothing loaded and nothing sent.

    Raises:
        ConfigError: neither ``teacher`` nor ``teachers``, or both; unknown keys, no url, or a value out of range.
    """
    if bool(config.teacher) == bool(config.teachers):
        given = "both are" if config.teacher else "neither is"
        raise ConfigError(f"teacher and teachers: {given} given; name one teacher, or several by their names.")
    shared: dict[str, Any] = {"revision": config.revision, "license": config.license}
    if config.teachers:
        return [make_writer(one, str(name), config, {}, f"teachers.{name}") for name, one in config.teachers.items()]
    return [make_writer(config.teacher, config.teacher_name, config, shared, "teacher")]


def make_writer(given: Any, name: str, config: Any, shared: Mapping[str, Any], where: str) -> Writer:
    """Return the writer that ``given`` describes; ``config`` has the dtype and the device of one here."""
    from kd_plugin.text import LocalWriter, ServerWriter

    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"model": given}
    if "url" in options:
        known = [k for k in inspect.signature(ServerWriter).parameters if k != "name"]
        require_known_keys(options, known, where)
        return ServerWriter(**{"name": name, **shared, **options})
    known = ["model", "batch_size", "prices", "revision", "license", "dtype", "device"]
    require_known_keys(options, known, where)
    if "model" not in options:
        raise ConfigError(f"{where}: expected url, of a server, or model, of one that is loaded here.")
    return LocalWriter(**{"name": name, "dtype": config.dtype, "device": config.device, **shared, **options})


def _estimate(config: TextCaptureConfig, writers: Sequence[Writer], rows: Any) -> str:
    """Say what a capture asks for, and what it costs at most, by its first prompts."""
    from kd_plugin.text.capture import most_of

    count, most = most_of(rows, writers, **values_of(TextSettings, vars(config)))
    texts = count * config.completions * len(writers)
    return (
        f"{count} prompts, {texts} texts of at most {config.max_new_tokens} tokens; at most {most:.2f} by the prices "
        "given, if each took all its tokens. Nothing was asked."
    )
