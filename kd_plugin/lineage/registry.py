"""The registry of licences and terms of service, read from ``licenses.toml``."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from license_expression import ExpressionError, LicenseSymbol, get_spdx_licensing

from kd_plugin.errors import ConfigError, nearest, require_known_keys
from kd_plugin.lineage.names import (
    ServiceModels,
    fits_host,
    host_of,
    is_own_network,
    mentions,
    names_a_host,
    normalized,
)
from kd_plugin.lineage.sources import OWN, Terms, Voice, may_say_own

UNKNOWN = "unknown"
UNREAD_API = "unread-api-terms"  # the service of every server that is neither known nor the user's own
_MAX_WRITTEN = 1000  # characters of a licence's name or expression
_TABLES = ("version", "groups", "license", "service", "known")


@dataclass(frozen=True)
class Resolution:
    """What a written licence resolves to.

    Attributes:
        ids: registry entries that all bind; ``("unknown",)`` when it is not understood.
        expression: SPDX expression, or None when there is none.
        hint: a suggestion when the name is close to a known one, or an empty string.
    """

    ids: tuple[str, ...]
    expression: str | None = None
    hint: str = ""


@dataclass(frozen=True)
class KnownRepository:
    """A hub repository whose terms were read.

    Attributes:
        repo: hub id.
        license: the badge, a registry id.
        base: hub id of the model it was made from, whose terms it carries as well.
    """

    repo: str
    license: str
    base: str | None = None


@dataclass(frozen=True)
class Registry:
    """Licences and services by id.

    Attributes:
        version: version of the registry's contents.
        sha256: digest of what it was read from: this is the policy that a record names.
        terms: every entry.
        aliases: other spellings to ids.
        hosts: host pattern to service id.
        models: regular expression of a whole model name, normalized, to service id.
        closed: regular expression of how the names of a closed family begin, normalized, to service id; a model of
            next year begins so too.
        open: regular expressions of how names begin that belong to no closed family although they look like it; with
            the organisation before them where only its own are meant.
        families: regular expression in the name of a source, normalized, to the licence of that family of models.
        known: hub repositories whose terms were read, by id folded to lower case.
        texts: shipped texts by file name.
    """

    version: str
    sha256: str
    terms: Mapping[str, Terms]
    aliases: Mapping[str, str]
    hosts: Mapping[str, str]
    models: Mapping[str, str]
    known: Mapping[str, KnownRepository]
    texts: Mapping[str, str]
    families: Mapping[str, str] = field(default_factory=dict)
    closed: Mapping[str, str] = field(default_factory=dict)
    open: tuple[str, ...] = ()

    def resolve(self, written: str, voice: Voice = "stranger") -> Resolution:
        """Resolve a hub licence id, an SPDX expression, or ``own``, whatever its case.

        In ``A OR B`` the user may choose, and the milder is chosen; in ``A AND B`` both bind.

        Args:
            written: the words.
            voice: whose words they are; only the user's own can say ``own``.
        """
        text = written.strip()
        if len(text) > _MAX_WRITTEN:  # no licence is called so; and what is cut could be the half that forbids
            return Resolution((UNKNOWN,))
        direct = self._named(text, voice)
        if direct is not None:
            return Resolution((direct,), self.terms[direct].spdx)
        try:
            parsed = _licensing().parse(text, validate=False)
        except (ExpressionError, AttributeError, TypeError):
            parsed = None
        if parsed is None:
            return Resolution((UNKNOWN,), hint=nearest(_fold(text), list(self.aliases)))
        if isinstance(parsed, LicenseSymbol) or not getattr(parsed, "args", ()):
            return Resolution((UNKNOWN,), hint=nearest(_fold(text), list(self.aliases)))
        return self._resolve_tree(parsed, voice)

    def _named(self, text: str, voice: Voice) -> str | None:
        found = self.aliases.get(_fold(text))
        return None if found == OWN and not may_say_own(voice) else found

    def _resolve_tree(self, parsed: Any, voice: Voice) -> Resolution:
        if not getattr(parsed, "args", ()):
            found = self._named(str(parsed), voice)
            if found is None:
                return Resolution((UNKNOWN,), str(parsed), nearest(_fold(str(parsed)), list(self.aliases)))
            return Resolution((found,), self.terms[found].spdx)
        parts = [self._resolve_tree(arg, voice) for arg in parsed.args]
        hint = next((p.hint for p in parts if p.hint), "")
        word = " OR " if parsed.operator.strip().upper() == "OR" else " AND "
        expression = word.join(f"({p.expression})" if " " in (p.expression or "") else str(p.expression) for p in parts)
        if word == " OR ":
            mildest = min(parts, key=lambda p: (self.severity(p.ids), p.ids))
            return Resolution(mildest.ids, expression, hint if UNKNOWN in mildest.ids else "")
        ids = tuple(dict.fromkeys(i for p in parts for i in p.ids))
        return Resolution(ids, expression, hint)

    def severity(self, ids: tuple[str, ...]) -> int:
        """Rank a reading: what it would do as a teacher of distributions; no reading at all is unknown."""
        from kd_plugin.lineage.policy import severity_of

        return max((severity_of(self.terms[i]) for i in ids or (UNKNOWN,)), default=0)

    def services_of_endpoint(self, endpoint: str) -> tuple[str, ...]:
        """Return every service behind a URL or host; none where the server is on the user's own network.

        The package's closed services come first, and a user's registry can only add to them. A server elsewhere that
        no entry knows is an API whose terms were not read, and so is an address that cannot be read.
        """
        host = host_of(endpoint)
        if host is None:
            closed = [s for pattern, s in self.hosts.items() if s != UNREAD_API and mentions(endpoint, pattern)]
            return tuple(dict.fromkeys(closed)) or (UNREAD_API,)
        found = [(pattern, s) for pattern, s in self.hosts.items() if fits_host(host, pattern)]
        services = [s for _, s in found if s != UNREAD_API]
        # Whoever describes the terms of a server that the package has not read says which one; "*" names none
        described = any(s != UNREAD_API and names_a_host(pattern) for pattern, s in found)
        unread = any(s == UNREAD_API for _, s in found) or not is_own_network(host)
        return tuple(dict.fromkeys([*services, *([UNREAD_API] if unread and not described else [])]))

    def is_listed(self, endpoint: str) -> bool:
        """Whether nobody can declare a server their own: an entry names its host, or its address cannot be read."""
        host = host_of(endpoint)
        return host is None or any(fits_host(host, pattern) for pattern in self.hosts)

    def service_of_model(self, name: str) -> str | None:
        """Return the service that alone offers the model of this name, or None."""
        return self._services.offering(name)

    @cached_property
    def _services(self) -> ServiceModels:
        return ServiceModels(self.models, self.closed, self.open)

    def families_of(self, name: str) -> tuple[str, ...]:
        """Return the licences of the families of models that a name seems to belong to; this can raise doubt only."""
        folded = normalized(name)
        return tuple(dict.fromkeys(i for pattern, i in self.families.items() if re.search(pattern, folded)))

    def text(self, terms_id: str) -> str | None:
        """Return the verbatim text that the package ships for an entry, or None."""
        entry = self.terms.get(terms_id)
        return self.texts[entry.text] if entry is not None and entry.text else None

    def attachment(self, file_name: str) -> str:
        """Return the verbatim text of a policy that belongs to a licence."""
        return self.texts[file_name]

    def known_repository(self, repo: str | None) -> KnownRepository | None:
        """Return what was read of a hub repository, or None."""
        return self.known.get(repo.lower()) if repo else None


@cache
def default_registry() -> Registry:
    """Return the registry that ships with the package."""
    room = resources.files("kd_plugin.lineage")
    raw = room.joinpath("licenses.toml").read_bytes()
    return parse_registry(raw, "licenses.toml", lambda name: room.joinpath("texts", name).read_bytes())


def load_registry(path: Path) -> Registry:
    """Return the package's registry with a user's own TOML on top: its entries are added or replace ours.

    Texts are read from beside the file. The digest covers both, so a record names which policy it was checked by.

    Raises:
        ConfigError: unreadable or malformed (with line and column), an entry that misses something, or one that
            would exempt from a rule what only a recorded exception may: ``unknown``, and the closed APIs.
    """
    base = default_registry()
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"The registry {str(path)!r} cannot be read: {why}.") from error
    mine = parse_registry(raw, path.name, lambda name: (path.parent / PurePath(name).name).read_bytes(), base)
    _refuse_exemptions(mine, base, path.name)
    return replace(
        mine,
        version=f"{base.version}+{mine.version}",
        sha256=hashlib.sha256(f"{base.sha256} {mine.sha256}".encode()).hexdigest(),
        terms={**base.terms, **mine.terms},
        aliases={**base.aliases, **mine.aliases},
        # Ours come first and stand: a user may add hosts and models of closed APIs, and take none away
        hosts={**base.hosts, **{h: s for h, s in mine.hosts.items() if base.hosts.get(h, UNREAD_API) == UNREAD_API}},
        models={**base.models, **{name: s for name, s in mine.models.items() if name not in base.models}},
        known={**base.known, **{repo: one for repo, one in mine.known.items() if repo not in base.known}},
        texts={**base.texts, **mine.texts},
        families={
            **base.families,
            **{pattern: i for pattern, i in mine.families.items() if pattern not in base.families},
        },
        closed={**base.closed, **{p: s for p, s in mine.closed.items() if p not in base.closed}},
        open=base.open,  # what a user's file calls open opens nothing
    )


def parse_registry(raw: bytes, where: str, read: Callable[[str], bytes], base: Registry | None = None) -> Registry:
    """Read a registry from TOML.

    Args:
        raw: the TOML.
        where: what messages call it.
        read: returns the bytes of a text by its file name.
        base: registry whose licences known repositories may name as well.

    Raises:
        ConfigError: malformed TOML (with line and column), an unknown key, a text that is missing or not the one
            whose digest the entry gives, or an entry that misses something.
    """
    try:
        data = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid TOML: {error}.") from error
    require_known_keys(data, _TABLES, where)
    terms: dict[str, Terms] = {}
    aliases: dict[str, str] = {}
    hosts: dict[str, str] = {}
    models: dict[str, str] = {}
    texts: dict[str, str] = {}
    families: dict[str, str] = {}
    closed: dict[str, str] = {}
    open_names: list[str] = []
    for kind in ("license", "service"):
        for item in data.get(kind, []):
            entry = dict(item)
            terms_id = str(entry.get("id"))
            name = f"{where}: {kind} {terms_id!r}"
            spellings = entry.pop("aliases", [])
            hosts |= dict.fromkeys(entry.pop("hosts", []), terms_id)
            models |= dict.fromkeys(entry.pop("models", []), terms_id)
            families |= dict.fromkeys(entry.pop("families", []), terms_id)
            closed |= dict.fromkeys(entry.pop("closed", []), terms_id)
            open_names += entry.pop("open", [])
            shared = [c for group in entry.pop("groups", []) for c in _group(data.get("groups", {}), group, name)]
            entry["clauses"] = [_own(clause, terms_id) for clause in [*shared, *entry.get("clauses", [])]]
            if kind == "service":
                entry["inherits"] = []
            elif not entry.pop("no_text", False):
                entry["text"] = entry.get("text", f"{terms_id}.txt")
                texts[entry["text"]] = _read_text(read, entry["text"], entry.get("text_sha256"), name)
                entry["text_sha256"] = hashlib.sha256(texts[entry["text"]].encode()).hexdigest()
            found = Terms.from_mapping({"kind": kind, **entry}, name)
            texts |= {file: _read_text(read, file, None, name) for file in found.attachments.values()}
            terms[found.id] = found
            if kind == "license":
                aliases |= {_fold(s): found.id for s in [*spellings, *([found.spdx] if found.spdx else []), found.id]}
    known = [_known(item, {**(base.terms if base else {}), **terms}, where) for item in data.get("known", [])]
    return Registry(
        str(data.get("version")),
        hashlib.sha256(raw).hexdigest(),
        terms,
        aliases,
        hosts,
        models,
        {one.repo.lower(): one for one in known},
        texts,
        families,
        closed,
        tuple(open_names),
    )


def _refuse_exemptions(mine: Registry, base: Registry, where: str) -> None:
    """Refuse entries that would let pass what is unknown or closed, without the record that an exception is."""
    for terms_id in mine.terms:
        before = base.terms.get(terms_id)
        if terms_id == UNKNOWN or (before is not None and before.kind == "service"):
            raise ConfigError(
                f"{where}: {terms_id!r} cannot be replaced; where you may use such a source all the same, record an "
                "exception under `overrides`."
            )
    for spelling, target in mine.aliases.items():
        before_id = base.aliases.get(spelling)
        if before_id is not None and before_id != target:
            raise ConfigError(f"{where}: {spelling!r} already names {before_id!r}; it cannot stand for {target!r}.")


def _own(clause: Any, terms_id: str) -> Any:
    """Turn a shared clause's exception for derivatives of its own licence into that licence's id."""
    if not isinstance(clause, Mapping) or "unless_student_itself" not in clause:
        return clause
    return {**{k: v for k, v in clause.items() if k != "unless_student_itself"}, "unless_student": [terms_id]}


def _known(item: Mapping[str, Any], terms: Mapping[str, Terms], where: str) -> KnownRepository:
    try:
        one = KnownRepository(**item)
    except TypeError as error:
        raise ConfigError(f"{where}: known {item.get('repo')!r}: {error}.") from error
    if one.license not in terms:
        raise ConfigError(
            f"{where}: known {one.repo!r} names licence {one.license!r}.{nearest(one.license, list(terms))}"
        )
    return one


def _read_text(read: Callable[[str], bytes], name: str, expected: str | None, where: str) -> str:
    try:
        raw = read(name)
    except OSError as error:
        raise ConfigError(f"{where}: its text {name!r} cannot be read ({error}); give it, or say no_text.") from error
    found = hashlib.sha256(raw).hexdigest()
    if expected not in (None, found):
        raise ConfigError(f"{where}: its text {name!r} has sha256 {found}, the entry says {expected}.")
    return raw.decode()


def _group(groups: Mapping[str, Any], name: str, where: str) -> list[Any]:
    if name not in groups:
        raise ConfigError(f"{where}: no group {name!r}.{nearest(name, sorted(groups))}")
    return list(groups[name])


def _fold(text: str) -> str:
    return text.strip().lower().replace("_", "-").replace(" ", "-")


@cache
def _licensing() -> Any:
    return get_spdx_licensing()
