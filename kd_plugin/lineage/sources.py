"""How a run names what it learns from: enough to find the terms, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["model", "dataset", "teacher_outputs"]
Signal = Literal["logits", "text"]


@dataclass(frozen=True)
class RowFacts:
    """What rows, and the description that travels with them, say of themselves: a stranger's word.

    Attributes:
        named: distinct values of columns that name generators, each with its column.
        licenses: licences that the description names, each with where.
        words: the description.
    """

    named: tuple[tuple[str, str], ...] = ()
    licenses: tuple[tuple[str, str], ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Source:
    """A model, a dataset, or stored teacher outputs, as the user or another record declares it.

    Attributes:
        name: how this run calls it: ``student``, ``math``, the dataset's name.
        kind: what it is.
        ref: hub id or local directory; None for an endpoint.
        revision: branch, tag or commit, as asked for.
        license: declared licence: a hub id, an SPDX expression, or ``own``; None leaves it to discovery.
        endpoint: URL of a server, if the source is reached through one.
        endpoint_terms: ``own`` where the user declares that a server with a public name is the user's own.
        model: model name that is sent to the endpoint.
        signal: what reaches the student: distributions, or text only.
        generated_by: names of the models that wrote a dataset.
        generators: models that wrote a dataset and of which more than the name is declared.
        writers_declared: whether the user says who wrote a dataset, if only that no model did.
        named_in: the words that name this source, where only a card does.
        reason: why the declared licence holds although the source's name says otherwise, in the user's words.
        served: names that the server itself gives for what it serves.
        found_beside: whether ``ref`` was inferred from where the rows lie, so that finding nothing there means nothing.
        rows: what the rows of a dataset say of themselves, whatever its card says.
        record: a lineage node (and its ancestors) that the source brings along, such as a cache's manifest
            or a checkpoint's ``lineage.json``; None leaves it to discovery.
    """

    name: str
    kind: Kind = "model"
    ref: str | None = None
    revision: str | None = None
    license: str | None = None
    endpoint: str | None = None
    endpoint_terms: str | None = None
    model: str | None = None
    signal: Signal = "logits"
    generated_by: tuple[str, ...] = ()
    generators: tuple[Source, ...] = ()
    writers_declared: bool = False
    named_in: str | None = None
    reason: str | None = None
    served: tuple[str, ...] = ()
    rows: RowFacts | None = None
    found_beside: bool = False
    record: Mapping[str, Any] | None = field(default=None, compare=False)
