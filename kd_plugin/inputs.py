"""Files that users name, for every command and host: datasets and their mixtures, and settings as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, DataError, UsageError, nearest, require_known_keys
from kd_plugin.settings import require_types

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MIXTURE = (  # for the help of settings that take one
    "in TRL's form: a list of mappings with path, and if need be name, data_files, split, columns (a list, or {theirs: "
    "ours}), fraction, template ({column: text with {their column}}) and formatting (package.module:function)"
)


def load_rows(
    reference: str, *, split: str = "train", name: str | None = None, streaming: bool = False, **more: Any
) -> Any:
    """Return the ``datasets.Dataset`` that ``reference`` names, memory-mapped, so that its size does not matter.

    Args:
        reference: a ``.json``, ``.jsonl`` or ``.parquet`` file, a directory of such files or one that
            ``save_to_disk`` wrote, or a hub id.
        split: which split, or a slice of it such as ``train[:1000]``; of a single file and a saved dataset, which have
            one split, only the slice counts.
        name: configuration of a hub dataset.
        streaming: return an ``IterableDataset`` instead, which converts and downloads nothing beforehand; what
            ``save_to_disk`` wrote needs neither.
        **more: of ``datasets.load_dataset``, such as ``data_files``.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no such split.
    """
    import datasets

    from kd_plugin.lineage.data import with_origin

    path = Path(reference)
    require_file(path)
    kind, part = _FORMATS.get(path.suffix), split if "[" in split else ""
    try:
        if path.is_file():
            if kind is None:
                raise DataError(f"{path}: expected a file of the kind {', '.join(_FORMATS)}.")
            if not path.stat().st_size:
                raise DataError(f"{path} is empty; expected rows.")
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded, part = datasets.load_dataset(reference, name, split=split, streaming=streaming, **more), ""
    except StopIteration as error:  # what `datasets` does over a file of empty lines
        raise DataError(f"{path} holds no rows.") from error
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        if isinstance(error, DataError):
            raise
        broken = _broken_json(path) if path.is_file() and kind == "json" else None
        said = broken or f"The dataset {reference!r} (split {split!r}) cannot be read: {error.__cause__ or error}"
        raise DataError(said) from error
    if isinstance(loaded, datasets.DatasetDict):
        named = split.partition("[")[0]
        if named not in loaded:
            raise DataError(f"{reference} has no split {named!r}; it has {', '.join(loaded)}.")
        loaded = loaded[named]
    loaded = _slice(loaded, part, reference) if part else loaded
    if path.exists():
        return with_origin(loaded, path)
    is_builder = loaded.info.builder_name == reference  # of files; those of a hub id are the hub's
    return with_origin(loaded, *local_files(more)) if is_builder else loaded


def require_file(path: Path) -> None:
    """Refuse, by a DataError, what has the name of a file of rows and is not there."""
    if path.suffix in _FORMATS and not path.exists():
        raise DataError(f"{path}: there is no such file.")


def _slice(rows: Any, part: str, reference: str) -> Any:
    """Return those of loaded rows that ``NAME[FROM:TO]`` asks for, in rows or percent, as of a hub id."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        raise DataError(f"{reference}: a stream has no part {part!r}; set limit instead.")
    try:
        asked = datasets.ReadInstruction.from_spec(part).to_absolute({part.partition("[")[0]: len(rows)})
    except (AssertionError, ValueError) as error:
        raise DataError(f"{reference}: split {part!r}: expected such as train, train[:1000] or train[10%:].") from error
    return rows.select([i for one in asked for i in range(len(rows))[one.from_ : one.to]])


def local_files(named: Mapping[str, Any]) -> list[Path]:
    """Return what ``data_dir`` and ``data_files``, as ``datasets.load_dataset`` takes them, name on this machine."""

    def flat(one: Any) -> list[str]:
        inside = one.values() if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else None
        return [str(one)] if inside is None else [name for part in inside for name in flat(part)]

    place = Path(named.get("data_dir") or "")
    found = [match for name in flat(named.get("data_files") or []) for match in glob(str(place / name), recursive=True)]
    return [Path(one) for one in sorted(found)] or [one for one in (place,) if named.get("data_dir") and one.exists()]


def _broken_json(path: Path) -> str | None:
    """Return where a file, a value a line or one list, is no JSON, and why; None if it is."""
    with path.open(encoding="utf-8", errors="replace") as file:
        as_list = file.read(1) == "["
        file.seek(0)
        for number, text in enumerate([file.read()] if as_list else file, 1):
            try:
                json.loads(text if text.strip() else "null")
            except json.JSONDecodeError as error:
                line = error.lineno if as_list else number
                return f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}."
    return None


@dataclass(frozen=True)
class DatasetPart:
    """One dataset of a mixture, in the form of TRL's ``datasets:``, with what makes its rows those of the others.

    Attributes:
        path: as :func:`load_rows` takes it, or a builder's name with ``data_files``, as in ``datasets.load_dataset``.
        name: configuration of a hub dataset.
        data_dir: of a hub dataset or a builder.
        data_files: of a hub dataset or a builder.
        split: which split.
        columns: columns that are kept, as a list; or those that are kept under another name, ``{theirs: ours}``.
        fraction: share of the mixture; then every part has one, and no dataset is seen twice in an epoch.
        template: columns that are written anew from the row's, such as ``{prompt: "Q: {question}"}``.
        formatting: import path ``package.module:function`` of a function from a row to a row, called before `template`.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    split: str = "train"
    columns: list[str] | dict[str, str] | None = None
    fraction: float | None = None
    template: dict[str, str] | None = None
    formatting: str | None = None

    def __post_init__(self) -> None:
        require_types(DatasetPart, vars(self))
        for key, kinds, expected in (
            ("columns", (list, dict), "a list, or a mapping {theirs: ours}"),
            ("template", (dict,), "a mapping {column: text with {their column}}"),
            ("data_files", (str, list, dict), "a path, a list of them, or a mapping by split"),
        ):
            value = getattr(self, key)
            texts = value.values() if isinstance(value, dict) and key != "data_files" else value
            if value is None or (isinstance(value, kinds) and all(isinstance(one, str) for one in texts)):
                continue
            raise ConfigError(f"{key}: expected {expected}, found {value!r}.")
        if self.fraction is not None and not self.fraction > 0:
            raise ConfigError(f"fraction is {self.fraction:g}; expected a share above 0.")

    def load(self, *, streaming: bool = False) -> Any:
        """Return its rows.

        Raises:
            ConfigError: the function cannot be imported, or a template names a column that is not there.
            DataError: the dataset cannot be read, or lacks a column.
        """
        rows = load_rows(
            self.path, split=self.split, name=self.name, streaming=streaming, data_dir=self.data_dir,
            data_files=self.data_files,
        )  # fmt: skip
        if self.formatting is not None:
            rows = rows.map(imported(self.formatting))
        names = _columns(rows)
        if self.template is not None:
            written = _Written(self.template, self.path)
            rows = rows.map(written, remove_columns=[name for name in names if name not in self.template])
            names = list(self.template)
        if self.columns is not None:
            kept = self.columns if isinstance(self.columns, dict) else {name: name for name in self.columns}
            for name in kept:
                if name not in names:
                    raise DataError(
                        f"{self.path} has no column {name!r}.{nearest(name, names)} It has {', '.join(names)}."
                    )
            rows = rows.select_columns(list(kept))
            moved = {theirs: ours for theirs, ours in kept.items() if theirs != ours}
            rows = rows.rename_columns(moved) if moved else rows
        return rows


def _columns(rows: Any) -> list[str]:
    """Return the columns of rows; of a stream that does not know them, those of its first row."""
    return list(rows.column_names or next(iter(rows), {}))


@dataclass(frozen=True)
class _Written:
    """Writes columns by templates; a class, so that ``datasets`` can tell by its contents whether it has run before."""

    template: dict[str, str]
    path: str

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        try:
            return {name: text.format_map(row) for name, text in self.template.items()}
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"template of {self.path}: {error}; the row has {', '.join(row)}.") from error


def load_mixture(parts: Sequence[Mapping[str, Any]], *, streaming: bool = False, where: str = "datasets") -> Any:
    """Return the rows of several datasets as one, one after another, as TRL's ``get_dataset`` does.

    Args:
        parts: the attributes of :class:`DatasetPart`, each.
        streaming: read them as streams; then no part may have a fraction.
        where: what messages call it.

    Raises:
        ConfigError: an unknown key, no path, fractions of some parts only, or columns that differ.
        DataError: a dataset cannot be read.
    """
    import datasets

    known = [field.name for field in fields(DatasetPart)]
    made = []
    for number, part in enumerate(parts):
        require_known_keys(part, known, f"{where}[{number}]")
        if not part.get("path"):
            raise ConfigError(f"{where}[{number}]: path is not set; name a file, a directory or a hub id.")
        try:
            made.append(DatasetPart(**part))
        except ConfigError as error:
            raise ConfigError(f"{where}[{number}]: {error}") from error
    shares = [part.fraction for part in made]
    if not made or (None in shares and set(shares) != {None}):
        raise ConfigError(f"{where}: " + ("nothing is listed." if not made else "give every part a fraction, or none."))
    if streaming and shares[0] is not None:
        raise ConfigError(f"{where}: fraction needs the number of rows, which a stream does not know.")
    loaded = [part.load(streaming=streaming) for part in made]
    names = [sorted(_columns(rows)) for rows in loaded]
    if any(one != names[0] for one in names):
        listed = "; ".join(f"{part.path}: {', '.join(one)}" for part, one in zip(made, names, strict=True))
        raise ConfigError(
            f"{where}: the parts have different columns ({listed}). Choose them with columns or template."
        )
    if shares[0] is not None:
        total = sum(share or 0.0 for share in shares)
        portions = [(share or 0.0) / total for share in shares]
        size = min(len(rows) / portion for rows, portion in zip(loaded, portions, strict=True))
        loaded = [rows.select(range(round(portion * size))) for rows, portion in zip(loaded, portions, strict=True)]
    origins = {url: said for rows in loaded for url, said in (rows.info.download_checksums or {}).items()}
    together = datasets.concatenate_datasets(loaded)
    together.info.download_checksums = origins or None
    return together


def imported(path: str) -> Any:
    """Return what an import path ``package.module:name`` names.

    Raises:
        ConfigError: it names nothing that can be imported.
    """
    module, colon, name = path.partition(":")
    try:
        if not colon:
            raise ImportError("expected package.module:function")
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path!r} cannot be imported: {error}.") from error


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

        That is the innermost key that the message puts into quotes or before a colon, or that it begins with; else one
        of several words that it mentions; else a value that it quotes.

        Args:
            message: of the error.
            aside: settings that do not count, since the command line had them.
        """
        nodes = {key: node for key, node in self.nodes.items() if key not in aside}
        for tells, of_keys in ((_names, True), (_mentions, True), (_quotes, False), (_repeats, False)):
            for key, node in nodes.items():
                own = tells(message, key if of_keys else _text(node))
                found = _line_within(node, message, tells, of_keys) or (self.lines[key] if own else None)
                if found is not None:
                    return f"{self.path}, line {found}"
        return None


def _names(message: str, key: str) -> bool:
    word = re.escape(key)
    return bool(re.search(rf"'{word}'|^{word}(?![\w.])|(?<!\w){word}[:=]", message))


def _mentions(message: str, key: str) -> bool:
    return "_" in key and bool(re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", message))


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
