"""Import stored outputs: the settings that Python, the command and YAML share, and the capture of what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_plugin.cache.alignment import require_aligned
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.targets import TopP
from kd_plugin.capturing.capture import capture
from kd_plugin.errors import ConfigError
from kd_plugin.importing.axolotl import AxolotlOutputs
from kd_plugin.importing.distillkit import CONFIG, DistillKitOutputs
from kd_plugin.importing.teacher import StoredOutputs, StoredRows, StoredTeacher
from kd_plugin.inputs import read_yaml
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.lineage.sources import Source
from kd_plugin.models import as_tokenizer
from kd_plugin.settings import built, option, require_known, settings, takes

FORMATS = ("distillkit", "axolotl")
_ALL = 1 - 1e-6  # of a list's mass; what is beyond is counted to the tail


@settings
class ImportSettings(LineageSettings):
    """What is read, who said it, and how much is kept."""

    format: str = option(default="distillkit", help=f"Whose form it is: {' or '.join(FORMATS)}.")
    teacher: str = option(
        default="", help="Hub id or directory of the model that gave the outputs; its licence decides as in a capture."
    )
    revision: str | None = option(default=None, help="Branch, tag or commit of the teacher.")
    license: str | None = option(
        default=None, help="The teacher's licence where none can be found; a hub id such as apache-2.0, or own."
    )
    tokenizer: str | None = option(
        default=None,
        help="Directory or hub id of the tokenizer that the rows were made with; null takes the teacher's.",
    )
    split: str = option(default="train", help="Split of a hub dataset.")
    k: int | None = option(default=None, help="Tokens kept at a position; null keeps all that are listed.")
    temperature: float = option(default=1.0, help="By which the teacher's logits were divided.")
    compression: str | None = option(
        default=None,
        help=f"distillkit: YAML with the settings of its compression; null takes {CONFIG} beside the rows.",
    )
    logprobs_field: str = option(default="logprobs", help="axolotl: column of the log-probabilities.")
    messages_field: str = option(default="messages", help="axolotl: column of the conversation.")
    shard_rows: int = option(default=1024, help="Rows a unit, the most that an interruption costs.")

    def __post_init__(self) -> None:
        require_known("format", self.format, FORMATS)


@takes(ImportSettings)
def import_outputs(  # noqa: D417
    source: str | Path, output_dir: str | Path, *, progress: bool = True, **fields: Any
) -> TeacherCache:
    """Read teacher outputs that another tool stored into a teacher cache.

    Run the same call again to go on after an interruption.

    Args:
        source: a file, a directory or a hub id with the rows.
        output_dir: the cache; a new or empty directory, or one that holds the same import.
        progress: show how far it is, on standard error.

    Raises:
        LicenseRefusedError: the terms of the teacher or of the rows forbid training on its outputs.
        ConfigError: a setting is wrong, or what gives the stored bytes their meaning is not there.
        DataError: the rows cannot be read faithfully; the message says why.
        CacheError: the targets belong to the token beside; or the directory cannot be written.
    """
    asked = built(ImportSettings, fields)
    if not asked.teacher:
        raise ConfigError("teacher is not set: name the model that gave the outputs. Its terms decide.")
    tokenizer = as_tokenizer(asked.tokenizer or asked.teacher)
    outputs = _opened(str(source), asked, tokenizer)
    terms = Source("teacher", ref=asked.teacher, revision=asked.revision, license=asked.license)
    teacher = StoredTeacher(outputs, terms, tokenizer)
    cache = capture(
        StoredRows(outputs),
        teacher,
        output_dir,
        targets=TopP(_ALL, asked.k or outputs.listed),  # lists differ in length, which those of TopK do not
        temperature=asked.temperature,
        shard_rows=asked.shard_rows,
        lineage=asked.lineage,
        progress=progress,
    )
    require_aligned(cache)
    return cache


def _opened(source: str, asked: ImportSettings, tokenizer: Any) -> StoredOutputs:
    if asked.format == "axolotl":
        return AxolotlOutputs(
            source,
            tokenizer,
            logprobs_field=asked.logprobs_field,
            messages_field=asked.messages_field,
            split=asked.split,
            temperature=asked.temperature,
        )
    beside = Path(source, CONFIG)
    found = asked.compression or (str(beside) if beside.is_file() else None)
    settings = None if found is None else read_yaml(found)
    return DistillKitOutputs(source, settings, split=asked.split, temperature=asked.temperature)
