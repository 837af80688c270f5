"""Recorded exceptions: never a flag, always a record that names who approved what, why, and until when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.lineage.terms import Terms
from kd_plugin.lineage.verdict import Finding

BASES = ("written_authorisation", "contract", "permitted_exception", "risk_accepted")


@dataclass(frozen=True, order=True)
class Override:
    """One exception. It holds only where every field matches exactly.

    Attributes:
        rule: code of the finding: ``forbidden``, ``unknown_license`` ...
        terms: registry id of the licence or terms of service.
        cite: clause, as the finding names it.
        terms_sha256: digest of the registry entry at the time of approval; changed terms void the exception.
        subject: the source it is for, as the finding names it.
        basis: ``written_authorisation``, ``contract``, ``permitted_exception`` or ``risk_accepted``.
        approved_by: who.
        approved_on: ISO date.
        expires: ISO date, the last day on which it holds.
        scope: what it is for, in words.
        reason: why.
    """

    rule: str
    terms: str
    cite: str
    terms_sha256: str
    subject: str
    basis: str
    approved_by: str
    approved_on: str
    expires: str
    scope: str
    reason: str

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> Override:
        """Read and check an exception.

        Raises:
            ConfigError: a field is missing, empty, unknown or malformed.
        """
        known = list(cls.__dataclass_fields__)
        for key in data:
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}.{nearest(str(key), known)}")
        values = {key: str(data.get(key) or "").strip() for key in known}
        missing = [key for key in known if not values[key]]
        if missing:
            raise ConfigError(f"{where}: an exception is a record; it lacks {', '.join(missing)}.")
        if values["basis"] not in BASES:
            raise ConfigError(f"{where}.basis is {values['basis']!r}; expected one of {', '.join(BASES)}.")
        for key in ("approved_on", "expires"):
            require_date(values[key], f"{where}.{key}")
        if values["expires"] < values["approved_on"]:
            raise ConfigError(f"{where} expires on {values['expires']}, before it was approved.")
        return cls(**values)

    def to_json(self) -> dict[str, str]:
        """Return the exception as it stands in ``lineage.json``."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def require_date(written: str, where: str) -> None:
    """Refuse what is no date in the one form that is compared as text: four, two and two digits.

    Raises:
        ConfigError: another form of ISO 8601, or no day of any calendar.
    """
    try:
        real = date.fromisoformat(written).isoformat() == written
    except ValueError:
        real = False
    if not real:
        raise ConfigError(f"{where} is {written!r}; expected a date such as 2027-01-31.")


def read_overrides(items: Iterable[Mapping[str, Any]], where: str) -> tuple[Override, ...]:
    """Read a list of exceptions in canonical order; see :meth:`Override.from_mapping`."""
    return tuple(sorted({Override.from_mapping(item, f"{where}[{i}]") for i, item in enumerate(items)}))


def in_force(overrides: Iterable[Override], today: str) -> tuple[Override, ...]:
    """Return the exceptions that hold on the ISO date ``today``, whatever date a run gives itself."""
    return tuple(one for one in overrides if one.approved_on <= today <= one.expires)


def apply_overrides(finding: Finding, terms: Mapping[str, Terms], overrides: Sequence[Override], on: str) -> Finding:
    """Return ``finding`` as overridden where an exception holds on the ISO date ``on``, else as it is."""
    if finding.severity not in ("block", "unknown", "violation") or finding.terms not in terms:
        return finding
    digest = terms[finding.terms].digest
    for one in overrides:
        matches = (one.rule, one.terms, one.cite, one.subject) == (
            finding.code, finding.terms, finding.cite, finding.subject,
        )  # fmt: skip
        if matches and one.terms_sha256 == digest and one.approved_on <= on <= one.expires:
            reason = (
                f"excepted by {one.approved_by} on {one.approved_on} until {one.expires} ({one.basis}): {one.reason}"
            )
            return replace(finding, severity="overridden", remedy=reason)
    hint = f"an exception must name rule {finding.code!r}, terms {finding.terms!r}, cite {finding.cite!r}, "
    hint += f"subject {finding.subject!r} and terms_sha256 {digest}"
    is_contract = terms[finding.terms].kind == "service"
    return (
        replace(finding, remedy=f"{finding.remedy}; {hint}") if finding.severity == "block" or is_contract else finding
    )
