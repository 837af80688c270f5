"""Files that users name, for every command and host: datasets, and settings as YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.errors import DataError, UsageError

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

    from kd_plugin.lineage.data import with_origin

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


@dataclass(frozen=True)
class YamlFile:
    """Lines ``name: value`` of a YAML file, with where each stands.

    Attributes:
        path: the file.
        nodes: the values, as PyYAML's nodes.
        lines: the line of each name, counted from 1.
    """

    path: Path
    nodes: Mapping[str, Any]
    lines: Mapping[str, int]

    @classmethod
    def read(cls, path: str | Path) -> YamlFile:
        """Read a file.

        Raises:
            UsageError: there is no such file, it is no YAML (with line and column), it holds something else, or it
                names a setting twice.
        """
        import yaml

        if not Path(path).is_file():
            raise UsageError(f"{path}: there is no such file.")
        try:
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
            if isinstance(root, yaml.MappingNode):
                yaml.SafeLoader("").flatten_mapping(root)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}.") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: expected UTF-8 text: {error}.") from error
        if not isinstance(root, yaml.MappingNode):
            found = "nothing" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else repr(root.value)
            raise UsageError(f"{path}: expected lines `name: value`, found {found}.")
        nodes: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in root.value:
            line = key.start_mark.line + 1
            if key.value in nodes:
                raise UsageError(f"{path}, line {line}: {key.value} is set twice; first in line {lines[key.value]}.")
            nodes[key.value], lines[key.value] = value, line
        return cls(Path(path), nodes, lines)

    @property
    def content(self) -> dict[str, Any]:
        """The settings as plain values."""
        import yaml

        return {key: yaml.safe_load(yaml.serialize(node)) for key, node in self.nodes.items()}

    def where(self, key: str) -> str:
        """Return ``FILE, line N`` of a setting."""
        return f"{self.path}, line {self.lines[key]}"

    def place(self, message: str, aside: Collection[str] = ()) -> str | None:
        """Return ``FILE, line N`` of what an error is about, as far as its text tells; None if it does not.

        That is the innermost key that the message puts into quotes or before a colon, or that it begins with; else a
        value that it quotes.

        Args:
            message: of the error.
            aside: settings that do not count, since the command line had them.
        """
        nodes = {key: node for key, node in self.nodes.items() if key not in aside}
        for tells, of_keys in ((_names, True), (_quotes, False), (_repeats, False)):
            for key, node in nodes.items():
                own = tells(message, key if of_keys else _text(node))
                found = _line_within(node, message, tells, of_keys) or (self.lines[key] if own else None)
                if found is not None:
                    return f"{self.path}, line {found}"
        return None


def _names(message: str, key: str) -> bool:
    word = re.escape(key)
    loose = rf"|(?<![\w.]){word}(?!\w)" if "_" in key else ""
    return bool(re.search(rf"'{word}'|^{word}(?![\w.])|(?<!\w){word}[:=]{loose}", message))


def _quotes(message: str, value: str) -> bool:
    return any(word in value for word in re.findall(r"'([^']{3,})'", message))


def _repeats(message: str, value: str) -> bool:
    return len(value) > 2 and value in message


def _text(node: Any) -> str:
    return node.value if isinstance(node.value, str) else ""


def _line_within(node: Any, message: str, tells: Callable[[str, str], bool], of_keys: bool) -> int | None:
    """Return the line of the innermost key, or else value, below a node that a message tells."""
    if isinstance(node.value, str):
        return None
    for pair in node.value:
        key, value = pair if isinstance(pair, tuple) else (None, pair)
        found = _line_within(value, message, tells, of_keys)
        marked = key if of_keys else value
        if found is None and marked is not None and tells(message, _text(marked)):
            found = marked.start_mark.line + 1
        if found is not None:
            return int(found)
    return None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings, lines ``name: value``, from a YAML file.

    Raises:
        UsageError: there is no such file, it is no YAML (with line and column), it holds something else, or it names a
            setting twice.
    """
    return YamlFile.read(path).content
