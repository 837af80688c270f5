"""A dataset's rows by number, with what identifies them; held, memory-mapped or streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from kd_plugin.capturing.tokenization import PASS_THROUGH, USED_COLUMNS
from kd_plugin.errors import DataError
from kd_plugin.limits import refuse_images

_FINGERPRINT_ROWS = 1000  # rows hashed at a time

Row = Mapping[str, Any]


class RowSource(Protocol):
    """What a capture needs of a dataset."""

    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def slice(self, first: int, count: int) -> Sequence[Row]:
        """Return ``count`` rows from number ``first`` on."""
        ...

    def fingerprint(self) -> str:
        """Return the sha256 of the used columns: the same on every machine, and however the rows are held."""
        ...


def open_rows(dataset: Any, unit_rows: int, more: Sequence[str] | None = ()) -> RowSource:
    """Return the rows of ``dataset``.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset``, or a sequence or re-iterable of mappings.
        unit_rows: rows that are asked for at a time, by which a stream is compared with its first reading.
        more: columns that are used beside those of TRL's forms, such as a reference answer; None uses all.

    Raises:
        DataError: the dataset is empty or none of these, or its rows hold images.
    """
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping):
        return Rows(dataset, more)
    if hasattr(dataset, "__iter__") and not isinstance(dataset, Mapping | str):
        return StreamedRows(dataset, unit_rows, more)
    raise DataError(
        f"capture needs a datasets.Dataset, an IterableDataset or a list of rows, got {type(dataset).__name__}. "
        "For a DatasetDict name the split: dataset['train']."
    )


def passed_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Return those of ``columns`` that are stored beside the tokens."""
    return tuple(name for name in PASS_THROUGH if name in columns)


class Rows:
    """Rows that can be asked for in any order.

    Args:
        dataset: a ``datasets.Dataset``, or a sequence of mappings.
        more: see :func:`open_rows`.

    Raises:
        DataError: the dataset is empty.
    """

    def __init__(self, dataset: Any, more: Sequence[str] | None = ()) -> None:
        if not len(dataset):
            raise DataError("The dataset to capture has no rows.")
        self._dataset = dataset
        if hasattr(dataset, "column_names"):
            refuse_images(dataset.column_names, "The dataset to capture")
        if hasattr(dataset, "column_names") and more is not None:
            keep = [name for name in dataset.column_names if name in USED_COLUMNS or name in more]
            self._dataset = dataset.select_columns(keep) if keep else dataset
        self._more = more
        self.columns = tuple(self[0])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        return _as_row(self._dataset[index], index)

    def slice(self, first: int, count: int) -> list[Row]:
        """Return ``count`` rows from number ``first`` on."""
        if not hasattr(self._dataset, "column_names"):
            return [self[i] for i in range(first, first + count)]
        columns = self._dataset[first : first + count]  # one read of the table, not one a row
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def fingerprint(self) -> str:
        """Return the sha256 of the used columns."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _FINGERPRINT_ROWS):
            digest.update(_content(self.slice(start, min(_FINGERPRINT_ROWS, len(self) - start)), self._more))
        return digest.hexdigest()


class StreamedRows:
    """Rows that come in one order only and are never held: two readings, and memory that does not grow.

    The first reading counts the rows and takes their fingerprint; the second one is the capture's, which skips
    what other workers do. Each unit is compared with the first reading, since a stream that is shuffled anew at
    each reading would store the wrong rows.

    Args:
        stream: a ``datasets.IterableDataset``, or anything that can be iterated more than once.
        unit_rows: see :func:`open_rows`.
        more: likewise.

    Raises:
        DataError: the stream is empty, or can be read once only.
    """

    def __init__(self, stream: Any, unit_rows: int, more: Sequence[str] | None = ()) -> None:
        if iter(stream) is stream:
            raise DataError(
                f"A {type(stream).__name__} can be read once only, and a capture reads twice: first to know the rows, "
                "then to do them. Pass an IterableDataset, a list, or datasets.IterableDataset.from_generator(...)."
            )
        self._stream, self._unit_rows, self._more = stream, unit_rows, more
        self._units: list[bytes] = []  # 32 bytes a unit
        self._count, digest = 0, hashlib.sha256()
        waiting: list[Row] = []
        rows = self._read()
        while unit := list(islice(rows, unit_rows)):
            if not self._count:
                self.columns: tuple[str, ...] = tuple(unit[0])
            self._count += len(unit)
            self._units.append(self._digest(unit))
            waiting += unit
            while len(waiting) >= _FINGERPRINT_ROWS:
                digest.update(_content(waiting[:_FINGERPRINT_ROWS], more))
                del waiting[:_FINGERPRINT_ROWS]
        if not self._count:
            raise DataError("The dataset to capture has no rows.")
        digest.update(_content(waiting, more) if waiting else b"")
        self._fingerprint = digest.hexdigest()
        self._position, self._rows = 0, self._read()

    def __len__(self) -> int:
        return self._count

    def slice(self, first: int, count: int) -> list[Row]:
        """Return ``count`` rows from number ``first`` on, reading over those before.

        Raises:
            DataError: a whole unit was asked for, and differs from what the first reading found.
        """
        if first < self._position:
            self._position, self._rows = 0, self._read()
        next(islice(self._rows, first - self._position, first - self._position), None)
        rows = list(islice(self._rows, count))
        self._position = first + len(rows)
        unit, offset = divmod(first, self._unit_rows)
        whole = not offset and count == min(self._unit_rows, self._count - first)
        if len(rows) < count or (whole and self._digest(rows) != self._units[unit]):
            raise DataError(
                f"The stream gave other rows at {first} to {first + count - 1} than when it was first read. Nothing "
                "of them was stored. Shuffle it with a fixed seed, or save it first and capture the saved dataset."
            )
        return rows

    def fingerprint(self) -> str:
        """Return the sha256 of the used columns, from the first reading."""
        return self._fingerprint

    def _read(self) -> Iterator[Row]:
        for index, row in enumerate(self._stream):
            kept = _as_row(row, index)
            if self._more is not None:
                kept = {name: value for name, value in kept.items() if name in USED_COLUMNS or name in self._more}
            yield kept or row

    def _digest(self, rows: Sequence[Row]) -> bytes:
        return hashlib.sha256(_content(rows, self._more)).digest()


def _as_row(row: Any, index: int) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"Row {index} of the dataset is {type(row).__name__}; expected a mapping of columns.")
    refuse_images(row, f"Row {index} of the dataset to capture")
    return row


def _content(rows: Sequence[Row], more: Sequence[str] | None) -> bytes:
    """Return what identifies ``rows``: canonical JSON of the used columns that are set."""
    used = [
        {
            key: value
            for key, value in row.items()
            if value is not None and (more is None or key in USED_COLUMNS or key in more)
        }
        for row in rows
    ]
    return json.dumps(used, sort_keys=True, ensure_ascii=True, default=_plain_value).encode()


def _plain_value(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise DataError(f"A column holds a {type(value).__name__}, which is neither text nor numbers.")
