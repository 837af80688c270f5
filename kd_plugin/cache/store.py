"""The directory of a cache, shared by any number of workers without a coordinator.

``manifest.json`` is written once at the start (settings, no units) and once at the end (all units). In between
each finished unit has a record of its own, ``units/00003.json``, so that no worker ever rewrites what another
writes. A shard has its name before its record has; so a record always speaks of a whole shard.

Claims only save work: a unit that two workers compute anyway is stored once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from kd_plugin.cache.files import (
    claim_text,
    explained,
    fitting,
    publish,
    publish_new,
    read_claim,
    remove_leftovers,
    seal,
    temporary_name,
    this_process,
    unseal,
)
from kd_plugin.cache.manifest import Manifest, Part, Settings, Unit, read_manifest
from kd_plugin.cache.schema import write_shard
from kd_plugin.errors import CacheCorruptionError, CacheError, ConfigError
from kd_plugin.lineage.declared import joined_records
from kd_plugin.lineage.hashing import sha256_file

_HEARTBEAT_SECONDS, _STALE_SECONDS = 20.0, 90.0
_WAY_OUT = "No finished unit is affected. Make room or fix the permissions, and run the same command again."
_OURS = {"manifest.json", "README.md", "vocabulary.json", "data", "units", "claims", "tmp", "mapped"}


@dataclass(frozen=True)
class UnitRecord:
    """A unit and when it was done."""

    unit: Unit
    finished: str


class Store:
    """The writing side of a cache directory.

    Args:
        directory: the cache; see :meth:`create_or_join`.
        manifest: the manifest as it was when the capture began.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._seen: dict[int, tuple[float, float]] = {}  # claim -> (its mtime, when we first saw that mtime)

    @classmethod
    def create_or_join(
        cls,
        directory: Path,
        settings: Settings,
        parts: Sequence[Part],
        lineage: Mapping[str, Any],
        engine: Mapping[str, str],
        append: bool = False,
        ignored: Collection[str] = (),
    ) -> Store:
        """Start a cache in an empty directory, or join the capture that is there.

        With ``append``, a finished cache of other data and the same settings gets the last of ``parts`` as one more.
        Settings named in ``ignored`` may differ: those of the capture that is there count.

        Raises:
            CacheError: the directory holds something else, or cannot be written.
            ConfigError: it holds a capture with other settings or another dataset; the message names each.
        """
        with explained(f"Writing to {directory}", "Nothing was changed there. Choose another output directory."):
            if not (directory / "manifest.json").exists():
                _require_ours(directory)
                for name in ("data", "units", "claims", "tmp"):
                    (directory / name).mkdir(parents=True, exist_ok=True)
                manifest = Manifest(settings, tuple(parts), (), lineage, engine, created=_now())
                temporary = temporary_name(directory / "tmp", "manifest.json")
                temporary.write_bytes(seal(manifest.to_json()))
                publish_new(temporary, directory / "manifest.json")
            require_same(directory, settings, parts[-1], ignored, append=append)
            if append:
                _extend(directory, parts[-1], lineage)
            store = cls(directory, read_manifest(directory))
            for name in ("claims", "tmp"):
                (directory / name).mkdir(exist_ok=True)
            remove_leftovers(directory / "tmp")
        return store

    def missing(self) -> list[int]:
        """Return the units that have no record, in order."""
        done = {int(path.stem) for path in _records(self.directory)}
        return [index for index in range(self.manifest.unit_count) if index not in done]

    def claim(self, index: int) -> Claim | None:
        """Take unit ``index``, or return None while another worker that lives has it."""
        path = self.directory / "claims" / f"{index:05d}"
        with explained(f"Claiming unit {index} in {self.directory}", _WAY_OUT):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if not self._abandoned(path):
                    return None
                # Two workers may both take over; the unit is then computed twice, and stored once.
                path.unlink(missing_ok=True)
                return self.claim(index)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(claim_text(this_process()))
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return Claim(path)

    def commit(
        self,
        index: int,
        table: pa.Table,
        *,
        input_tokens: int,
        tokens: int,
        entries: int,
        dropped: Mapping[str, int] | None = None,
    ) -> None:
        """Store a unit: its shard, then its record."""
        _, first_row, source_rows = self.manifest.rows_of(index)
        with explained(f"Storing unit {index} in {self.directory}", _WAY_OUT):
            temporary = temporary_name(self.directory / "tmp", f"{index:05d}.parquet")
            record = temporary_name(self.directory / "tmp", f"{index:05d}.json")
            try:
                write_shard(temporary, table, self.manifest.settings.digest, index)
                unit = Unit(
                    index=index,
                    first_row=first_row,
                    source_rows=source_rows,
                    rows=table.num_rows,
                    input_tokens=input_tokens,
                    tokens=tokens,
                    entries=entries,
                    bytes=temporary.stat().st_size,
                    sha256=sha256_file(temporary),
                    dropped=None if dropped is None else dict(sorted(dropped.items())),
                )
                final = _record_path(self.directory, index)
                if final.exists():
                    return  # another worker took it for abandoned and has finished it
                publish(temporary, self.directory / unit.file)
                record.write_bytes(_seal_record(UnitRecord(unit, _now()), self.manifest.settings))
                publish(record, final)
                # Not every engine gives the same bytes twice: of two that finish in the same instant the shard of
                # one may stand beside the record of the other. Then the unit counts as not done.
                if sha256_file(self.directory / unit.file) != unit.sha256:
                    final.unlink(missing_ok=True)
            finally:
                temporary.unlink(missing_ok=True)
                record.unlink(missing_ok=True)

    def finish(self) -> Manifest:
        """Write the final manifest, once every unit has its record; any worker may, all write the same.

        Raises:
            CacheError: units are missing.
        """
        manifest = gather(self.directory, self.manifest)
        if not manifest.complete:
            raise CacheError(f"{self.directory} lacks {len(manifest.missing_units)} units; it cannot be finished.")
        with explained(f"Finishing {self.directory}", "All units are stored. Run the same command again."):
            for name, content in (("README.md", card(manifest)), ("manifest.json", seal(manifest.to_json()))):
                path = self.directory / name
                if path.is_file() and path.read_bytes() == content:
                    continue
                temporary = temporary_name(self.directory / "tmp", name)
                temporary.write_bytes(content)
                publish(temporary, path)
            remove_leftovers(self.directory / "tmp")
            for path in (self.directory / "claims").iterdir():
                if path.name.isdecimal():
                    path.unlink(missing_ok=True)
        return manifest

    def _abandoned(self, claim: Path) -> bool:
        try:
            mtime = claim.stat().st_mtime
            owner = read_claim(claim.read_text(errors="replace"))
        except FileNotFoundError:
            return True
        if owner is not None and owner.gone:
            return True
        # By our own clock, since the clocks of hosts differ: stale when no heartbeat was seen for long enough.
        seen_mtime, since = self._seen.get(int(claim.name), (None, 0.0))
        if seen_mtime != mtime:
            self._seen[int(claim.name)] = (mtime, time.monotonic())
            return False
        return time.monotonic() - since > _STALE_SECONDS


class Claim:
    """A unit that this process works on; a thread touches its file so that others see that it lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_SECONDS):
            # Gone where another worker finished the capture; and a beat that fails costs at most the work done twice
            with contextlib.suppress(OSError):
                os.utime(self._path)


def require_same(
    directory: Path, settings: Settings, part: Part, ignored: Collection[str] = (), append: bool = False
) -> None:
    """Refuse to go on in ``directory`` with other settings, but for the ``ignored`` ones, or another dataset.

    With ``append`` another dataset is what is wanted, once the one before is whole.

    Raises:
        ConfigError: names each difference; nothing was changed.
    """
    there = read_manifest(directory)
    differences = there.settings.differences(settings, ignored)
    last = there.parts[-1]
    another = last != replace(part, first_unit=last.first_unit)
    if another and append:
        gathered = gather(directory, there)
        if not gathered.complete:
            raise ConfigError(
                f"{directory} is not finished: {len(gathered.missing_units)} units are missing. Finish that capture "
                "before data is appended."
            )
    elif another:
        differences.append(
            f"dataset: {last.rows} rows, fingerprint {last.fingerprint[:12]} against {part.rows} rows, fingerprint "
            f"{part.fingerprint[:12]}"
        )
    if differences:
        raise ConfigError(
            f"{directory} holds a capture with other settings (there against here): {'; '.join(differences)}. "
            "Nothing was changed. Choose another output directory, or the settings of the one that is there."
        )


def _extend(directory: Path, part: Part, lineage: Mapping[str, Any]) -> None:
    """Add ``part`` to the manifest, unless it is the last one already; several workers write the same."""
    there = read_manifest(directory)
    last = there.parts[-1]
    if last == replace(part, first_unit=last.first_unit):
        return
    parts = (*there.parts, replace(part, first_unit=there.unit_count))
    joined = joined_records(there.lineage, lineage)
    temporary = temporary_name(directory / "tmp", "manifest.json")
    temporary.write_bytes(seal(replace(there, parts=parts, units=(), finished=None, lineage=joined).to_json()))
    publish(temporary, directory / "manifest.json")


def gather(directory: Path, manifest: Manifest) -> Manifest:
    """Return ``manifest`` with the units whose records are in ``directory``."""
    records = []
    for path in _records(directory):
        # One that vanishes is of a unit that another worker found to be not done after all
        with contextlib.suppress(FileNotFoundError):
            records.append(read_unit_record(path, manifest.settings))
    units = tuple(record.unit for record in records)
    gathered = replace(manifest, units=units)
    return replace(gathered, finished=max(r.finished for r in records) if records and gathered.complete else None)


def read_unit_record(path: Path, settings: Settings) -> UnitRecord:
    """Read ``units/<index>.json``.

    Raises:
        CacheCorruptionError: it is damaged, or of another capture.
    """
    way_out = f"Delete {path} and run the same capture again: that one unit is done anew."
    values = unseal(path, way_out)
    finished, belongs = values.pop("finished", None), values.pop("settings", None)
    unit = Unit(**fitting(Unit, values, str(path)))
    if belongs != settings.digest or f"{unit.index:05d}" != path.stem or not isinstance(finished, str):
        raise CacheCorruptionError(f"{path} belongs to another capture. {way_out}")
    return UnitRecord(unit, finished)


def card(manifest: Manifest) -> bytes:
    """Return the README.md that lets ``datasets.load_dataset(directory)`` find the shards."""
    settings = manifest.settings
    text = (
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n\n# Teacher cache\n\n"
        f"What {settings.teacher or 'a teacher'} said at {manifest.tokens} positions of {manifest.rows} examples, "
        "stored by kd-plugin. `manifest.json` says how, and who taught under which terms.\n"
    )
    return text.encode()


def _seal_record(record: UnitRecord, settings: Settings) -> bytes:
    return seal({**record.unit.to_json(), "settings": settings.digest, "finished": record.finished})


def _records(directory: Path) -> list[Path]:
    """Return the files of the records, in order; systems and people leave other files beside them."""
    found = [path for path in (directory / "units").glob("*.json") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def _record_path(directory: Path, index: int) -> Path:
    return directory / "units" / f"{index:05d}.json"


def _require_ours(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise CacheError(f"{directory} is a file. Choose a directory for the cache.")
    foreign = sorted(p.name for p in directory.iterdir() if p.name not in _OURS) if directory.is_dir() else []
    if foreign:
        raise CacheError(
            f"{directory} is no teacher cache and is not empty (it holds {', '.join(foreign[:3])}). Nothing was "
            "changed. Choose a new or empty output directory."
        )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
