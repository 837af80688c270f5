"""The outcome for a lineage: decision, findings, duties; and recorded exceptions to it.

An exception is never a flag, always a record that names who approved what, why, and until when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from kd_plugin.errors import ConfigError, LicenseRefusedError, require_known_keys
from kd_plugin.lineage.sources import Terms

Decision = Literal["allow", "allow_with_duties", "overridden", "conditional", "unknown", "block"]
DECISIONS: tuple[Decision, ...] = ("allow", "allow_with_duties", "overridden", "conditional", "unknown", "block")
NO_ADVICE = "This is engineering output, not legal advice."

# What a declared fact means, in the words of the question that is put to the user.
FACTS: Mapping[str, str] = {
    "commercial": "is the student, or what is made with it, used commercially?",
    "distribute": "are the weights given or made available to others?",
    "eu_domiciled": "is the user domiciled, or does the company have its principal place of business, in the EU?",
    "mau_over_700m_at_release": (
        "had licensee and affiliates over 700 million monthly active users in the month before the model's release?"
    ),
    "mau_over_100m": "has a product or service with it over 100 million monthly active users?",
    "over_100m_mau_or_20m_usd_a_month": (
        "has a product with it over 100 million monthly active users, or over 20 million US dollars of revenue a month?"
    ),
    "over_100m_mau_or_30m_usd_a_year": (
        "has a product with it over 100 million monthly active users, or over 30 million US dollars of annual "
        "recurring revenue?"
    ),
    "mau_over_100m_at_release": (
        "had all products of the licensee over 100 million monthly active users in the month before its release?"
    ),
    "mau_over_10m_at_release": (
        "had licensee and affiliates over 10 million monthly active users in the month before the model's release?"
    ),
    "over_1m_usd_a_year": "have you and your affiliates over 1 million US dollars of annual revenue?",
    "commercial_and_over_10m_usd_a_year": (
        "is the use commercial, by a legal entity (with all under common control) of 10 million US dollars or more of "
        "annual revenue?"
    ),
    "over_20m_usd_a_month": (
        "had your company, or your employer, over 20 million US dollars of revenue worldwide in the preceding month?"
    ),
    "model_service_and_over_20m_usd_a_year": (
        "do you or affiliates run a model-as-a-service business, with over 20 million US dollars of revenue in all in "
        "12 months, and is the use commercial?"
    ),
    "distributed_commercially": "are the weights given or made available to others for commercial purposes?",
    "in_eu_uk_or_south_korea": (
        "is it, or what is made with it, used or distributed in the European Union, the United Kingdom or South Korea?"
    ),
    "competes_with_naver": "do you or affiliates offer a product or service that competes with one of NAVER's?",
    "nvidia_cosmos": "is the NVIDIA model a Cosmos (multimodal) model?",
}
BASES = ("written_authorisation", "contract", "permitted_exception", "risk_accepted")


@dataclass(frozen=True)
class Student:
    """What the user says of the checkpoint.

    Attributes:
        name: name under which it would be shipped.
        declared_license: licence under which it would be shipped, as registry ids; empty where it is not declared.
    """

    name: str | None = None
    declared_license: tuple[str, ...] = ()


@dataclass(frozen=True)
class Duty:
    """What whoever ships the checkpoint owes.

    Attributes:
        terms: registry id of the licence.
        cite: clause.
        kind: word for machines: ``notice``, ``license_text``, ``name_prefix``, ``display`` ...
        says: one sentence for people.
        value: what is asked for literally, if anything.
        node: id of the node whose terms ask it.
        path: node ids from the checkpoint to that node.
        basis: ``explicit`` by the clause's words, or ``precautionary``.
        status: ``met`` by the files of the checkpoint, ``unmet``, or ``attest``: only people can tell.
    """

    terms: str
    cite: str
    kind: str
    says: str
    value: str | None
    node: str
    path: tuple[str, ...]
    basis: Literal["explicit", "precautionary"]
    status: Literal["met", "unmet", "attest"] = "attest"

    def to_json(self) -> dict[str, Any]:
        """Return the duty as it stands in ``lineage.json``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


@dataclass(frozen=True)
class Finding:
    """Something that stands in the way, or that someone should know.

    Attributes:
        code: ``forbidden``, ``unknown_license``, ``fact_missing``, ``name_prefix`` ...
        severity: ``warning``, ``overridden``, ``conditional``, ``unknown``, ``violation`` or ``block``.
        trigger: when it bites: at ``training`` or at ``distribution``.
        node: id of the node it is about, or ``"self"``.
        subject: how people call that node.
        path: node ids from the checkpoint to the node.
        terms: registry id of the licence, empty where a rule of this policy speaks.
        cite: clause.
        clause: licence and clause in words, or the rule of this policy.
        evidence: what was read, and where.
        remedy: the way out.
    """

    code: str
    severity: Literal["warning", "overridden", "conditional", "unknown", "violation", "block"]
    trigger: Literal["training", "distribution"]
    node: str
    subject: str
    path: tuple[str, ...]
    clause: str
    evidence: str
    remedy: str
    terms: str = ""
    cite: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as it stands in ``lineage.json``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def __str__(self) -> str:
        return f"{self.subject}: {self.clause} ({self.evidence}). Way out: {self.remedy}"


@dataclass(frozen=True)
class Verdict:
    """The outcome for a checkpoint.

    Attributes:
        decision: most severe of ``allow`` < ``allow_with_duties`` < ``overridden`` < ``conditional`` < ``unknown``
            < ``block``. ``overridden`` means that only a recorded exception lets it stand.
        findings: what stands in the way, most severe first.
        obligations: duties of whoever ships the checkpoint.
        license_expression: SPDX expression of what binds the weights themselves.
    """

    decision: Decision
    findings: tuple[Finding, ...]
    obligations: tuple[Duty, ...]
    license_expression: str

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Findings that forbid training."""
        return tuple(f for f in self.findings if f.trigger == "training" and f.severity in ("unknown", "block"))

    @property
    def publication_stops(self) -> tuple[Finding, ...]:
        """Findings that forbid giving the checkpoint away."""
        return tuple(f for f in self.findings if f.severity in ("unknown", "block", "violation"))

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as it stands in ``lineage.json``."""
        return {
            "decision": self.decision,
            "license_expression": self.license_expression,
            "duties": [duty.to_json() for duty in self.obligations],
            "findings": [finding.to_json() for finding in self.findings],
        }


def refuse(findings: Sequence[Finding], headline: str, remedy: Callable[[Finding], str]) -> None:
    """Raise if there are findings.

    Args:
        findings: what stands in the way.
        headline: what is refused, without a full stop.
        remedy: the way out of a finding, in the user's own terms.

    Raises:
        LicenseRefusedError: names every finding.
    """
    if findings:
        lines = [f"- {replace(finding, remedy=remedy(finding))}" for finding in findings]
        raise LicenseRefusedError("\n".join([f"{headline}.", *lines, NO_ADVICE]))


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
        require_known_keys(data, known, where)
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
