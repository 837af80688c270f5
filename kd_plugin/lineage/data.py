"""Where rows come from: what a dataset, a loader or a list shows of its origin, and what its rows say of their writers.

Rows keep their origin through ``map``, ``filter``, ``select`` and ``save_to_disk``. What is put together in memory has
none: it is noted as undeclared data, and a ``datasets`` entry of the user's declarations speaks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kd_plugin.lineage.hashing import sha256_file
from kd_plugin.lineage.origins import COLUMNS
from kd_plugin.lineage.record import digest_of
from kd_plugin.lineage.sources import RowFacts, Source
from kd_plugin.upstream import source_of_stream

TEXT_RECORD, TEXT_SCHEMA = "teacher_text.json", "kd-plugin/text/1"
IN_MEMORY = "data in memory"
CACHE = "kd-plugin-cache://"  # rows of a teacher cache, by its digest: the cache's own record speaks for them
_FILE = "file://"
_HUB = "hf://datasets/"
_PREPARED = re.compile(r"/datasets/([^/]+?)___([^/]+)/[^/]+/[^/]+/([^/]+)/[^/]+\.arrow$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BATCH = 10_000  # rows that are read at a time
_STREAMED = 1000  # rows of a stream that are looked at
_MAX_VALUES = 1000  # distinct values that are kept
_MAX_DEPTH = 6
_MAX_STEPS = 200  # iterables inside one stream
_MAX_WORDS = 1 << 16


def read_text_record(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Read what a capture of text says of its dataset, and compare the dataset's files with it.

    Args:
        directory: of the dataset.

    Returns:
        The lineage of the rows as a teacher's outputs, or None; and why there is none, None where nothing claims any.
    """
    path = directory / TEXT_RECORD
    if not path.is_file():
        return None, None
    try:
        record = json.loads(path.read_bytes())
        content = {key: value for key, value in record.items() if key != "digest"}
        if record.get("schema") != TEXT_SCHEMA or record["digest"] != digest_of(content):
            return None, f"{TEXT_RECORD} is not as it was written"
        promised = {str(name): (file["sha256"], file["size"]) for name, file in record["files"].items()}
        outputs = {**record["outputs"], "digest": record["digest"]}
        lineage = dict(record["lineage"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        return None, f"{TEXT_RECORD} cannot be read ({type(error).__name__})"
    there = {one.name: one for one in directory.glob("*.parquet")}
    if set(there) != set(promised):
        return None, f"{TEXT_RECORD} names other files than are here"
    for name, (digest, size) in promised.items():
        if there[name].stat().st_size != size or sha256_file(there[name]) != digest:
            return None, f"{name} is not the file that {TEXT_RECORD} names"
    return {**lineage, "outputs": outputs}, None


def with_origin(rows: Any, *places: str | Path) -> Any:
    """Write into the description of a dataset where it was read from, which ``datasets`` forgets of files.

    Args:
        rows: a ``datasets.Dataset`` or ``IterableDataset``; it is changed, and returned.
        places: files or directories, or addresses as ``download_checksums`` has them.
    """
    urls = [str(p) if "://" in str(p) else _FILE + str(Path(p).resolve()) for p in places]
    known = rows.info.download_checksums or {}
    rows.info.download_checksums = {**known, **{url: {"num_bytes": 0, "checksum": None} for url in urls}}
    return rows


def dataset_sources(*datasets: Any) -> list[Source]:
    """Name what ``datasets`` come from: hub datasets, files with their cards, or rows that were made in memory.

    Args:
        datasets: ``datasets.Dataset``, ``IterableDataset``, mappings or lists of them, lists of rows, torch datasets
            that hold any of these, or None.
    """
    found: list[Source] = []
    for dataset in datasets:
        for one in _parts(dataset, 0):
            found += _sources_of(one)
    return list(dict.fromkeys(found))


def _parts(dataset: Any, depth: int) -> Iterator[Any]:
    """Yield the datasets inside a mapping, a list, or a torch dataset."""
    if dataset is None or depth > _MAX_DEPTH:
        return
    if isinstance(dataset, Mapping):
        for one in dataset.values():
            yield from _parts(one, depth + 1)
    elif hasattr(dataset, "info") and hasattr(dataset, "features"):
        yield dataset
    elif isinstance(dataset, list | tuple):
        if all(isinstance(one, Mapping) for one in dataset):
            yield dataset
        else:
            for one in dataset:
                yield from _parts(one, depth + 1)
    else:
        inside = [getattr(dataset, name, None) for name in ("dataset", "datasets", "rows")]
        held = [one for one in inside if one is not None and not callable(one)]
        if not held:
            yield dataset
        for one in held:
            yield from _parts(one, depth + 1)


def _sources_of(rows: Any) -> list[Source]:
    said = RowFacts(_named_in_rows(rows), *_description(rows))
    facts = said if said != RowFacts() else None
    origins, whole = _origins(rows)
    named = [_source(origin, facts) for origin in origins if not origin.startswith(CACHE)]
    from_cache = [Source(origin, "dataset", signal="text") for origin in origins if origin.startswith(CACHE)]
    if whole and (named or from_cache):
        return [*named, *from_cache]
    return [*named, *from_cache, Source(IN_MEMORY, "dataset", signal="text", rows=None if named else facts)]


def _source(origin: str, facts: RowFacts | None) -> Source:
    if origin.startswith(_HUB):
        repo, _, revision = "/".join(origin.removeprefix(_HUB).split("/")[:2]).partition("@")
        return Source(repo, "dataset", repo, revision or None, signal="text", rows=facts)
    path = Path(origin.removeprefix(_FILE))
    place = path if path.is_dir() else path.parent
    return Source(path.name, "dataset", str(place), signal="text", rows=facts, found_beside=True)


def _origins(rows: Any) -> tuple[list[str], bool]:
    """Return where rows were read from, and whether that is all of them."""
    info = getattr(rows, "info", None)
    urls = list(getattr(info, "download_checksums", None) or {})
    known = [_short(url) for url in urls if url.startswith((_HUB, CACHE, _FILE))]
    if known:
        return list(dict.fromkeys(known)), True
    shards = _shards(rows)
    if shards:
        below = [_origins(one) for one in shards]
        return list(dict.fromkeys(one for found, _ in below for one in found)), all(whole for _, whole in below)
    files = [str(file["filename"]) for file in getattr(rows, "cache_files", None) or []]
    streamed = [] if files else _streamed_files(rows)
    found = [_of_file(file) for file in files] + [_short(url) for url in streamed]
    whole = bool(found) and None not in found and not _holds_memory(rows)
    return list(dict.fromkeys(one for one in found if one is not None)), whole


def _short(url: str) -> str:
    """Shorten the address of a file on the hub to its repository and revision."""
    if not url.startswith(_HUB):
        return url if url.startswith((CACHE, _FILE)) else _FILE + url
    return _HUB + "/".join(url.removeprefix(_HUB).split("/")[:2])


def _of_file(file: str) -> str | None:
    """Return where an Arrow file that ``datasets`` keeps was made from, or None where that is not written there."""
    prepared = _PREPARED.search(Path(file).as_posix())
    if prepared:
        revision = f"@{prepared[3]}" if _COMMIT.fullmatch(prepared[3]) else ""
        return f"{_HUB}{prepared[1]}/{prepared[2]}{revision}"
    folder = Path(file).parent
    return _FILE + str(folder) if (folder / "state.json").is_file() else None


def _streamed_files(rows: Any) -> list[str]:
    """Return the files that a stream reads, as far as its iterables tell."""
    keys = ("base_files", "original_files", "files")
    found = [str(file) for options in _readers(rows) for key in keys for file in options.get(key, ()) or ()]
    return list(dict.fromkeys(url for url in found if url.startswith(_HUB) or "://" not in url))


def _shards(rows: Any) -> list[Any]:
    """Return the datasets in memory or on disk that a stream was made of."""
    shards = [shard for options in _readers(rows) for shard in options.get("shards", ()) or ()]
    return [shard for shard in shards if hasattr(shard, "info")]


def _readers(rows: Any) -> list[Mapping[str, Any]]:
    """Return the options of what reads for a stream, inside the maps, filters and joins around it."""
    found, frontier = [], [source_of_stream(rows)]
    for _ in range(_MAX_STEPS):
        step = frontier.pop() if frontier else None
        if step is None:
            break
        options = getattr(step, "kwargs", None)
        if isinstance(options, Mapping):
            found.append(options)
        frontier += [one for one in (getattr(step, "ex_iterable", None), *getattr(step, "ex_iterables", ())) if one]
    return found


def _holds_memory(rows: Any) -> bool:
    """Whether some of the rows were made in memory and lie in no file."""
    from datasets.table import InMemoryTable

    table = getattr(rows, "data", None)
    blocks = [block for row in getattr(table, "blocks", None) or [[table]] for block in row]
    return any(isinstance(block, InMemoryTable) for block in blocks)


def _description(rows: Any) -> tuple[tuple[tuple[str, str], ...], str]:
    """Return the licences and the words of the description that travels with a dataset."""
    info = getattr(rows, "info", None)
    licence, words = getattr(info, "license", None), getattr(info, "description", None)
    stated = isinstance(licence, str) and licence.strip()
    described = words[:_MAX_WORDS] if isinstance(words, str) else ""
    return ((("the dataset's description", str(licence).strip()),) if stated else ()), described


def _named_in_rows(rows: Any) -> tuple[tuple[str, str], ...]:
    """Return the distinct values of columns that name generators, each with its column, at any depth."""
    features = getattr(rows, "features", None)
    if features is not None and not _may_name(features):
        return ()
    if hasattr(rows, "column_names") and hasattr(rows, "select_columns"):
        if features is not None:
            rows = rows.select_columns([name for name in features if _may_name({name: features[name]})])
        batches: Iterable[Any] = islice(rows, _STREAMED) if features is None or not hasattr(rows, "__len__") else ()
        if hasattr(rows, "__len__"):
            batches = (row for i in range(0, len(rows), _BATCH) for row in _distinct(rows, i))
    elif isinstance(rows, Sequence) and not isinstance(rows, str):
        batches = rows
    else:
        return ()
    found: dict[tuple[str, str], None] = {}
    for row in batches:
        for column, value in _values(row, "", 0):
            found.setdefault((column, value[:200]))
        if len(found) >= _MAX_VALUES:
            break
    return tuple(found)


def _distinct(rows: Any, first: int) -> Iterator[dict[str, Any]]:
    """Yield the distinct values of a batch, a row each; Arrow counts plain columns, which are most."""
    table = rows.with_format("arrow")[first : min(first + _BATCH, len(rows))]
    for name in table.column_names:
        column = table.column(name)
        plain = str(column.type) in ("string", "large_string")
        yield from ({name: value} for value in (column.unique() if plain else column).to_pylist())


def _may_name(features: Any) -> bool:
    """Whether columns, or fields inside them, are called as generators are."""
    if isinstance(features, Mapping):
        return any(_is_named(name) or _may_name(inside) for name, inside in features.items())
    if isinstance(features, list | tuple):
        return any(map(_may_name, features))
    return hasattr(features, "feature") and _may_name(features.feature)


def _values(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if value.strip() and _is_named(name):
            yield name, value.strip()
    elif depth < _MAX_DEPTH:
        inside = value.items() if isinstance(value, Mapping) else ((name, v) for v in value) if _is_list(value) else ()
        for key, one in inside:
            yield from _values(one, str(key), depth + 1)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_named(name: Any) -> bool:
    return str(name).strip().lower().replace("-", "_").replace(" ", "_") in COLUMNS
