"""Files that users name, for every command and host: datasets, and settings as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lineage.data import with_origin

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(reference: str, *, split: str = "train", name: str | None = None, streaming: bool = False) -> Any:
    """Return the ``datasets.Dataset`` that ``reference`` names, memory-mapped, so that its size does not matter.

    Args:
        reference: a ``.json``, ``.jsonl`` or ``.parquet`` file, a directory of such files or one that
            ``save_to_disk`` wrote, or a hub id.
        split: which split.
        name: configuration of a hub dataset.
        streaming: return an ``IterableDataset`` instead, which converts and downloads nothing beforehand; what
            ``save_to_disk`` wrote needs neither.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no such split.
    """
    import datasets

    path = Path(reference)
    try:
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise DataError(f"{path}: expected a file of the kind {', '.join(_FORMATS)}.")
            loaded = datasets.load_dataset(
                _FORMATS[path.suffix], data_files=str(path), split="train", streaming=streaming
            )
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(reference, name, split=split, streaming=streaming)
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The dataset {reference!r} (split {split!r}) cannot be read: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{reference} has no split {split!r}; it has {', '.join(loaded)}.")
        loaded = loaded[split]
    return with_origin(loaded, path) if path.exists() else loaded


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings, lines ``name: value``, from a YAML file.

    Raises:
        ConfigError: there is no such file, it is no YAML (with line and column), or it holds something else.
    """
    import yaml

    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}not valid YAML: {getattr(error, 'problem', error)}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected lines `name: value`, found {type(content).__name__}.")
    return content
