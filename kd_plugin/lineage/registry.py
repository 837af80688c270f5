"""The registry of licences and terms of service, read from ``licenses.toml``."""

from __future__ import annotations

import fnmatch
import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from license_expression import ExpressionError, LicenseSymbol, get_license_index, get_spdx_licensing

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.lineage.terms import Terms

UNKNOWN = "unknown"


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
class Registry:
    """Licences and services by id.

    Attributes:
        version: version of the registry's contents.
        sha256: digest of what it was read from: this is the policy that a record names.
        terms: every entry.
        aliases: other spellings to ids.
        hosts: host pattern to service id.
        models: pattern of a model name to service id.
    """

    version: str
    sha256: str
    terms: Mapping[str, Terms]
    aliases: Mapping[str, str]
    hosts: Mapping[str, str]
    models: Mapping[str, str]

    def resolve(self, written: str) -> Resolution:
        """Resolve a hub licence id, an SPDX expression, or ``own``, whatever its case.

        In ``A OR B`` the user may choose, and the milder is chosen; in ``A AND B`` both bind.
        """
        text = written.strip()
        direct = self.aliases.get(_fold(text))
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
        return self._resolve_tree(parsed)

    def _resolve_tree(self, parsed: Any) -> Resolution:
        if not getattr(parsed, "args", ()):
            found = self.aliases.get(_fold(str(parsed)))
            if found is None:
                return Resolution((UNKNOWN,), str(parsed), nearest(_fold(str(parsed)), list(self.aliases)))
            return Resolution((found,), self.terms[found].spdx)
        parts = [self._resolve_tree(arg) for arg in parsed.args]
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

    def service_of_endpoint(self, endpoint: str) -> str | None:
        """Return the service behind a URL or host, or None."""
        host = (urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or "").rstrip(".").lower()
        return next((s for pattern, s in self.hosts.items() if fnmatch.fnmatchcase(host, pattern)), None)

    def service_of_model(self, name: str) -> str | None:
        """Return the service that alone offers the model of this name, or None.

        Gateways write a vendor before the name (``openai/gpt-4o``) and vendors a ``:`` or ``@`` after it.
        Open weights of the same vendors (gpt2, gpt-oss, gpt-neo) match no pattern.
        """
        last = name.strip().lower().rsplit("/", 1)[-1]
        for candidate in (last, last.rsplit(".", 1)[-1] if last.startswith(("us.", "eu.", "anthropic.")) else last):
            for pattern, service in self.models.items():
                if fnmatch.fnmatchcase(candidate, pattern):
                    return service
        return None

    def text(self, terms_id: str) -> str | None:
        """Return the verbatim text that the package ships for an entry, or None."""
        entry = self.terms.get(terms_id)
        return _text(entry.text) if entry is not None and entry.text else None

    def attachment(self, file_name: str) -> str:
        """Return the verbatim text of a policy that belongs to a licence."""
        return _text(file_name)


@cache
def default_registry() -> Registry:
    """Return the registry that ships with the package."""
    raw = resources.files("kd_plugin.lineage").joinpath("licenses.toml").read_bytes()
    return parse_registry(raw, "licenses.toml")


def parse_registry(raw: bytes, where: str) -> Registry:
    """Read a registry from TOML.

    Raises:
        ConfigError: malformed TOML (with line and column), an unknown key, or an entry that misses something.
    """
    try:
        data = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not valid TOML: {error}.") from error
    groups = data.get("groups", {})
    terms: dict[str, Terms] = {}
    aliases: dict[str, str] = {}
    hosts: dict[str, str] = {}
    models: dict[str, str] = {}
    for kind in ("license", "service"):
        for item in data.get(kind, []):
            entry = dict(item)
            name = f"{where}: {kind} {entry.get('id')!r}"
            own_aliases = entry.pop("aliases", [])
            hosts |= dict.fromkeys(entry.pop("hosts", []), entry.get("id", ""))
            models |= dict.fromkeys(entry.pop("models", []), entry.get("id", ""))
            shared = [clause for group in entry.pop("groups", []) for clause in _group(groups, group, name)]
            entry["clauses"] = [*shared, *entry.get("clauses", [])]
            if kind == "license" and not entry.pop("no_text", False):
                entry["text"] = entry.get("text", f"{entry.get('id')}.txt")
                entry["text_sha256"] = hashlib.sha256(_text(entry["text"]).encode()).hexdigest()
            if kind == "service":
                entry["inherits"] = []
            found = Terms.from_mapping({"kind": kind, **entry}, name)
            terms[found.id] = found
            if kind == "license":
                spellings = [found.id, *own_aliases, *([found.spdx] if found.spdx else [])]
                aliases |= {_fold(spelling): found.id for spelling in spellings}
    return Registry(str(data.get("version")), hashlib.sha256(raw).hexdigest(), terms, aliases, hosts, models)


def _group(groups: Mapping[str, Any], name: str, where: str) -> list[Any]:
    if name not in groups:
        raise ConfigError(f"{where}: no group {name!r}.{nearest(name, sorted(groups))}")
    return list(groups[name])


def _fold(text: str) -> str:
    return text.strip().lower().replace("_", "-").replace(" ", "-")


@cache
def _text(name: str) -> str:
    return resources.files("kd_plugin.lineage").joinpath("texts", name).read_text(encoding="utf-8")


@cache
def _licensing() -> Any:
    return get_spdx_licensing()


def spdx_ids() -> frozenset[str]:
    """Return every SPDX licence id, folded to lower case."""
    return frozenset(str(i["spdx_license_key"]).lower() for i in get_license_index() if i.get("spdx_license_key"))
