"""Whether a record is about the weights beside it: the digests of all its subjects, before it counts as evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_plugin.errors import LineageError
from kd_plugin.lineage.background import LARGE
from kd_plugin.lineage.digests import DIGESTS
from kd_plugin.lineage.hashing import name_in, weight_files
from kd_plugin.lineage.place import weights_of
from kd_plugin.lineage.readings import printable
from kd_plugin.lineage.shares import Place


@dataclass
class Proofs:
    """Compares records with weights: small ones at once, large ones in the background until :meth:`settle`.

    Attributes:
        may_wait: whether large weights may be hashed while a model is loaded, with :meth:`settle` before training.
        waiting: lineage directories whose weights are being hashed, with what is expected of each file.
    """

    may_wait: bool = False
    waiting: dict[Path, Mapping[Path, str]] = field(default_factory=dict)

    def problem(self, directory: Path, record: Mapping[str, Any], elsewhere: Mapping[str, str]) -> str | None:
        """Return why a record does not speak for the weights beside it, or None.

        Args:
            directory: where the record lies.
            record: the record, whose own digest holds.
            elsewhere: sha256 of weights that are not here, by name, as the hub has them.
        """
        weights = weights_of(directory)
        promised = {str(s.get("path")): (s.get("sha256"), s.get("size")) for s in record["subjects"]}
        try:
            there = {name_in(weights, path): path for path in weight_files(weights)}
        except LineageError as error:
            return str(error)
        if not promised:
            return "it names no weights"
        for name in sorted(there.keys() - promised.keys()):
            return f"it does not know the weight file {printable(name)}"
        for name, (digest, size) in sorted(promised.items(), key=lambda item: item[0]):
            if name not in there and elsewhere.get(name) != digest:
                return f"it names {printable(name)}, which is not here"
            if name in there and there[name].stat().st_size != size:
                return f"{printable(name)} is not of the size that it names"
        expected = {there[name]: str(digest) for name, (digest, _) in promised.items() if name in there}
        if self.may_wait and sum(path.stat().st_size for path in expected) >= LARGE:
            if Place.from_environment().leads_run:  # the others' word is the first process's: one reading a run
                self.waiting[directory] = expected
                for path in expected:
                    DIGESTS.start(path)
            return None
        return _differing(expected, directory)

    def settle(self) -> bool:
        """Wait for what is hashed in the background; whether all of it holds."""
        waiting, self.waiting = self.waiting, {}
        return all(_differing(expected, directory) is None for directory, expected in waiting.items())


def _differing(expected: Mapping[Path, str], directory: Path) -> str | None:
    found = DIGESTS.of(list(expected), f"weights of {printable(directory.name)}")
    for (path, digest), seen in zip(expected.items(), found, strict=True):
        if seen != digest:
            return f"sha256 of {printable(path.name)} is {seen[:16]}..., it names {digest[:16]}..."
    return None
