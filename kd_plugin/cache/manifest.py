"""What a teacher cache says of itself: ``manifest.json``, one small record a unit, and the tokens that its ids mean.

Every record is canonical JSON with its own digest, and is compared byte for byte with what it would be written
as, so that any flipped byte shows, also one in white space. The tokens are kept beside the targets so that a student
that shares a part of them can learn. They are no part of the manifest, whose fingerprint of them tells that the file is
right; a cache without that file teaches students of its own tokenizer alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kd_plugin.cache.files import fitting, publish_new, record_digest, seal, temporary_name, unseal
from kd_plugin.cache.targets import Generation, Sampled, Targets, TopK, describe, from_description
from kd_plugin.errors import CacheCorruptionError, CacheError
from kd_plugin.vocab import Vocabulary

FORMAT = "kd-plugin teacher cache"
# The first keeps each log-probability of sampled targets, the second names neither a template nor a time; both are read
FORMAT_VERSION = 3
_MAX_UNITS = 10_000_000  # ten billion rows at the usual size; missing ones are listed one by one
NOTHING_TO_SCORE = "nothing to score"
# Left out where not used
_LATER = ("generation", "filter", "assistant_only", "rendered_with", "rendered_at", "for_student", "view", "written_by")
VOCABULARY = "vocabulary.json"
POSITION_CONVENTION = "the target at position t is the distribution over token t+1"


@dataclass(frozen=True)
class Settings:
    """What gives stored targets their meaning; two captures share a directory only if all of it is equal.

    Attributes:
        teacher: hub id of the teacher or the name of its directory, None for a model that names none.
        revision: its revision, as asked for.
        weights: digest of a sample of the teacher's weights (see :func:`~kd_plugin.capturing.engines.weights_digest`).
        dtype: of the teacher's weights, such as ``bfloat16``; this and ``weights`` are None before they are loaded.
        tokenizer: fingerprint of the token-to-id map.
        chat_template: fingerprint of the chat template, or None.
        vocab_size: rows of the output head over which the softmax is taken.
        targets: what is kept of the distribution.
        temperature: by which the logits were divided.
        seed: of the draws.
        max_length: tokens kept of a row, or None.
        completion_only: whether only completions are scored; None where the row's form decides.
        shard_rows: dataset rows a unit.
        passed: columns that pass through.
        generation: how the teacher generated the completions; None where they were given.
        filter: which completions were kept; None for all.
        assistant_only: whether only the assistant's turns are scored.
        rendered_with: fingerprint of the chat template that rendered the rows, where it is not the tokenizer's own.
        rendered_at: the time that the chat template printed, ISO 8601; None where it prints none.
        for_student: whether rows were rendered and tokenized by a student's tokenizer, which ``tokenizer``,
            ``chat_template`` and ``vocab_size`` then speak of, and not by the teacher's.
        written_by: digest of a sample of the weights of the student that generated the completions; None where the
            teacher did, or they were given.
        view: how the teacher read them, as :attr:`~kd_plugin.views.view.View.identity` says; None for as they are.
    """

    teacher: str | None
    revision: str | None
    weights: str | None
    dtype: str | None
    tokenizer: str
    chat_template: str | None
    vocab_size: int
    targets: Targets
    temperature: float
    seed: int
    max_length: int | None
    completion_only: bool | None
    shard_rows: int
    passed: tuple[str, ...]
    generation: Generation | None = None
    filter: str | None = None
    assistant_only: bool = False
    rendered_with: str | None = None
    rendered_at: str | None = None
    for_student: bool = False
    view: Mapping[str, Any] | None = None
    written_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; settings that came later are left out where they are not used."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"targets": describe(self.targets), "passed": list(self.passed)}
        values["generation"] = None if self.generation is None else self.generation.to_json()
        return {name: v for name, v in values.items() if v not in (None, False) or name not in _LATER}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """Build from the values of :meth:`to_json`; raises CacheError or ConfigError where they are none."""
        made = fitting(cls, values, "settings", ignored=("targets", "generation"))
        made["targets"] = from_description(values["targets"])
        if "generation" in values:
            made["generation"] = Generation.from_json(values["generation"])
        if not made["shard_rows"] or not made["vocab_size"] or made["temperature"] <= 0:
            raise CacheError("settings: shard_rows, vocab_size and temperature must be above 0; it was edited.")
        return cls(**made)

    @property
    def scored(self) -> str:
        """Which tokens have a target, in words."""
        if self.generation is not None:
            tokens = "what the teacher generated" if self.written_by is None else "what the student generated"
        elif self.assistant_only:
            tokens = "the assistant's turns" + ("" if self.completion_only is False else ", in completions if any")
        elif self.completion_only is False:
            tokens = "every token"
        else:
            tokens = "completions, and every token of rows without a prompt"
        return tokens if self.max_length is None else f"{tokens}, within the first {self.max_length} tokens of a row"

    @property
    def lists_equally_many(self) -> bool:
        """Whether every position lists as many tokens: top-k does, unless tokens that a student lacks are left out."""
        return isinstance(self.targets, TopK) and not self.for_student

    @property
    def digest(self) -> str:
        """Sha256 that shards and units carry, so that a foreign one is recognised."""
        return record_digest(self.to_json())

    def differences(self, other: Settings, ignored: Collection[str] = ()) -> list[str]:
        """Say which settings differ, but for the ``ignored`` ones, as ``name: mine against theirs``."""
        mine, theirs = self.to_json(), other.to_json()
        names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n) and n not in ignored]
        return [f"{name}: {mine.get(name)!r} against {theirs.get(name)!r}" for name in names]


@dataclass(frozen=True)
class Part:
    """A dataset that was captured into the cache; its units are numbered on from those of the parts before it.

    Attributes:
        fingerprint: sha256 of the rows.
        rows: rows of the dataset.
        first_unit: number of its first unit.
    """

    fingerprint: str
    rows: int
    first_unit: int


@dataclass(frozen=True)
class Unit:
    """A shard that is done.

    Attributes:
        index: its number.
        first_row: the dataset row at which it starts.
        source_rows: dataset rows it covers.
        rows: examples it holds; fewer where rows had nothing to train on.
        input_tokens: tokens of its examples.
        tokens: scored positions, each with a target.
        entries: token ids listed over all positions.
        bytes: size of the shard.
        sha256: of the shard.
        dropped: completions that were not kept, by reason; None where all that can be dropped is a row without a
            token to score.
    """

    index: int
    first_row: int
    source_rows: int
    rows: int
    input_tokens: int
    tokens: int
    entries: int
    bytes: int
    sha256: str
    dropped: Mapping[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``dropped``, which came later, is left out where it is not used."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def file(self) -> str:
        """Path of the shard in the cache."""
        return f"data/{self.index:05d}.parquet"

    @property
    def rows_lost(self) -> str:
        """Which dataset rows are gone when the shard is."""
        return f"the {self.rows} examples of dataset rows {self.first_row} to {self.first_row + self.source_rows - 1}"


@dataclass(frozen=True)
class Manifest:
    """The summary of a cache.

    Attributes:
        settings: what gives the targets their meaning.
        parts: the datasets captured.
        units: the shards that are done, in order; while a capture runs, those found at the moment of reading.
        lineage: nodes and edges of who taught, as written by :func:`kd_plugin.lineage.outputs_record`.
        engine: what ran the teacher.
        created: UTC time of the first worker's start.
        finished: UTC time at which the last unit was stored, or None.
    """

    settings: Settings
    parts: tuple[Part, ...]
    units: tuple[Unit, ...]
    lineage: Mapping[str, Any]
    engine: Mapping[str, str]
    created: str
    finished: str | None = None

    @property
    def version(self) -> int:
        """The first version of the format that has what this cache holds."""
        settings = self.settings
        if settings.assistant_only or settings.rendered_with is not None or settings.rendered_at is not None:
            return 3
        means = isinstance(settings.targets, Sampled) and settings.targets.logprobs == "mean"
        return 2 if means or settings.generation is not None or settings.filter is not None else 1

    @property
    def vocab_size(self) -> int:
        """Number of tokens over which the softmax was taken."""
        return self.settings.vocab_size

    @property
    def unit_count(self) -> int:
        """Units that the whole cache has."""
        last = self.parts[-1]
        return last.first_unit + -(-last.rows // self.settings.shard_rows)

    @property
    def missing_units(self) -> list[int]:
        """Numbers of the units that are not there yet."""
        done = {unit.index for unit in self.units}
        return [index for index in range(self.unit_count) if index not in done]

    @property
    def complete(self) -> bool:
        """Whether every unit is there."""
        return len(self.units) == self.unit_count

    @property
    def rows(self) -> int:
        """Examples stored."""
        return sum(unit.rows for unit in self.units)

    @property
    def tokens(self) -> int:
        """Targets stored."""
        return sum(unit.tokens for unit in self.units)

    @property
    def dropped(self) -> dict[str, int]:
        """What of the finished units was not kept, by reason: rows, or completions where the teacher generated them."""
        counts: Counter[str] = Counter()
        for unit in self.units:
            none_left = {NOTHING_TO_SCORE: unit.source_rows - unit.rows}
            counts.update(none_left if unit.dropped is None else unit.dropped)
        return {reason: count for reason, count in sorted(counts.items()) if count}

    @property
    def content_digest(self) -> str:
        """Sha256 over the settings and the digests of all shards: the name of exactly these outputs."""
        return record_digest({"settings": self.settings.digest, "shards": [unit.sha256 for unit in self.units]})

    def rows_of(self, index: int) -> tuple[Part, int, int]:
        """Return the part of unit ``index``, and its first row and row count there."""
        part = next(p for p in reversed(self.parts) if p.first_unit <= index)
        first = (index - part.first_unit) * self.settings.shard_rows
        return part, first, min(self.settings.shard_rows, part.rows - first)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in the order in which people read them."""
        return {
            "format": FORMAT,
            "version": self.version,
            "position_convention": POSITION_CONVENTION,
            "created": self.created,
            "finished": self.finished,
            "rows": self.rows,
            "tokens": self.tokens,
            "settings": self.settings.to_json(),
            "engine": dict(self.engine),
            "parts": [asdict(part) for part in self.parts],
            "units": [unit.to_json() for unit in self.units],
            "lineage": self.lineage,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Build from the values of :meth:`to_json`; raises CacheError or ConfigError where they are none."""
        names = {f.name for f in fields(cls)}
        given = {name: value for name, value in values.items() if name in names}
        made = fitting(cls, given, "manifest", ignored=("settings", "parts", "units"))
        for name in ("parts", "units"):
            if not isinstance(values[name], list):
                raise CacheError(f"manifest.{name} is a {type(values[name]).__name__}; expected a list.")
        made["settings"] = Settings.from_json(values["settings"])
        made["parts"] = tuple(Part(**fitting(Part, part, "a part of the manifest")) for part in values["parts"])
        made["units"] = tuple(Unit(**fitting(Unit, unit, "a unit of the manifest")) for unit in values["units"])
        manifest = cls(**made)
        manifest._require_parts()
        return manifest

    def _require_parts(self) -> None:
        """Refuse parts whose units are not numbered on from one to the next, or are more than any cache has."""
        first = 0
        for part in self.parts:
            if part.first_unit != first:
                raise CacheError(f"A part of the manifest begins at unit {part.first_unit}; expected {first}.")
            first += -(-part.rows // self.settings.shard_rows)
        if not self.parts or first > _MAX_UNITS:
            raise CacheError(f"The manifest has {len(self.parts)} parts and {first} units; no cache has so many.")


def read_manifest(directory: Path) -> Manifest:
    """Read ``manifest.json`` alone.

    Raises:
        CacheError: there is none, or it is of a later format.
        CacheCorruptionError: it is damaged.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise CacheError(f"{directory} is no teacher cache: it has no manifest.json. Make one with kd-plugin capture.")
    values = unseal(
        path,
        "The shards are not affected. Restore manifest.json from a copy, or move it away and run the same capture "
        "again: units that are there are kept.",
    )
    if values.get("format") != FORMAT or values.get("version") not in range(1, FORMAT_VERSION + 1):
        raise CacheError(
            f"{path} says format {values.get('format')!r} version {values.get('version')!r}; this kd-plugin reads "
            f"{FORMAT!r} up to version {FORMAT_VERSION}. Read it with the kd-plugin that wrote it, or a newer one."
        )
    return Manifest.from_json(values)


def keep_tokens(directory: Path, vocabulary: Vocabulary) -> None:
    """Write the tokens beside a cache that has been begun, unless they are there."""
    if (directory / VOCABULARY).exists():
        return
    temporary = temporary_name(directory / "tmp", VOCABULARY)
    temporary.write_bytes(seal({"tokens": dict(vocabulary.tokens), "added": sorted(vocabulary.added)}))
    publish_new(temporary, directory / VOCABULARY)


def kept_tokens(directory: Path, fingerprint: str) -> Vocabulary | None:
    """Read the tokens of a cache; None where it has none.

    Args:
        directory: the cache.
        fingerprint: of its tokens, as the manifest has it.

    Raises:
        CacheCorruptionError: the file is damaged, or of other tokens.
    """
    path = directory / VOCABULARY
    if not path.is_file():
        return None
    way_out = "Put back an earlier copy, or delete it: the cache then teaches students of its own tokenizer."
    content = unseal(path, way_out)
    try:
        tokens = {str(token): int(index) for token, index in content["tokens"].items()}
        found = Vocabulary(tokens, {}, added=frozenset(map(str, content["added"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheCorruptionError(f"{path} is no list of tokens ({error}). {way_out}") from error
    if not tokens or found.fingerprint != fingerprint:
        raise CacheCorruptionError(f"{path} holds other tokens than the cache was captured with. {way_out}")
    return found
