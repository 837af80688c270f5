"""Joining what the run has with what the user declares of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.lineage.config import Declaration, LineageConfig
from kd_plugin.lineage.registry import UNKNOWN, Registry, default_registry, load_registry
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.verdict import Student


def registry_of(config: LineageConfig) -> Registry:
    """Return the package's registry, with the user's own on top where one is declared."""
    return default_registry() if config.registry is None else load_registry(config.registry)


@dataclass(frozen=True)
class Declared:
    """A source with what the user declares of it, and the hub id that the user declares, if any."""

    source: Source
    repo: str | None = None

    @classmethod
    def of(cls, source: Source, declaration: Declaration) -> Declared:
        """Join a source with what is declared of it."""
        return cls(declaration.applied_to(source), declaration.repo)


def shipped_student(config: LineageConfig, registry: Registry) -> Student:
    """Return what the user says of the checkpoint.

    Raises:
        ConfigError: the licence under which it would be shipped is not known.
    """
    written = config.student.declared_license
    if written is None:
        return Student(config.student.name)
    resolution = registry.resolve(written)
    if UNKNOWN in resolution.ids:
        raise ConfigError(
            f"lineage.student.declared_license is {written!r}, which the registry does not know.{resolution.hint} "
            "Expected a hub licence id, an SPDX expression, or 'own'."
        )
    return Student(config.student.name, resolution.ids)


def match_teachers(teachers: Sequence[Source], config: LineageConfig) -> list[Declared]:
    """Join declarations to teachers by name; without any teacher, the declared ones are the teachers."""
    known = [t.name for t in teachers]
    if not teachers:
        return [Declared.of(Source(name), declaration) for name, declaration in sorted(config.teachers.items())]
    for name in config.teachers:
        if name not in known:
            raise ConfigError(
                f"lineage.teachers names {name!r}, which is no teacher of this run; its teachers are "
                f"{', '.join(map(repr, known))}.{nearest(name, known)}"
            )
    return [Declared.of(t, config.teachers.get(t.name, Declaration())) for t in teachers]


def match_datasets(datasets: Sequence[Source], config: LineageConfig) -> list[Declared]:
    """Join declarations to datasets by name or hub id; the others are datasets of their own."""
    left = list(config.datasets)
    matched = []
    for source in datasets:
        mine = next((d for d in left if {d.repo, d.name} & {source.name, source.ref} - {None}), None)
        if mine is not None:
            left.remove(mine)
        matched.append(Declared.of(source, mine or Declaration()))
    names = [d.name or d.repo or f"dataset {i + 1}" for i, d in enumerate(left)]
    extra = [Source(name, "dataset", signal="text") for name in names]
    return matched + [Declared.of(source, d) for source, d in zip(extra, left, strict=True)]
