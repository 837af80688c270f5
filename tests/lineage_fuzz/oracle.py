"""What may not be allowed, by rules written here by hand; nothing of the package is asked.

The rules are weaker than the package's: they name what must be refused, and leave the rest open.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

OPEN = ("mit", "apache-2.0", "bsd-3-clause", "isc")
FORBIDS = ("llama2", "llama3", "cc-by-nc-4.0", "qwen-research", "mistral-research")
NOBODY_KNOWS = ("own", "LicenseRef-own", "unknown", "modified-mit", "proprietary", "see LICENSE", "mit-ish", "no")
OPEN_BASES = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M")
OTHER_BASES = (
    "meta-llama/Llama-2-7b-hf",
    "nobody/nothing",
    "https://example.org/x",
    "two words",
    "a" * 300,
    "漢" * 150,
)
CLOSED = ("gpt-4o", "claude-3-opus-20240229", "gemini-1.5-pro", "OpenAI GPT-4o", "gpt-35-turbo", "grok-3")
WRITERS = ("generated_by", "generator", "teacher_model", "synthesized_by")

_PLAIN = re.compile(
    r"(?P<key>[a-z_]+): *(?P<value>[A-Za-z0-9][A-Za-z0-9./-]*)? *|- *(?P<item>[A-Za-z0-9][A-Za-z0-9./-]*)"
)


def denies_fields(card: Mapping[str, Any], *, dataset: bool) -> bool:
    """Whether a card with these fields may not pass, however it is written down."""
    said = [one for key, value in card.items() if key.strip().lower() in ("license", "licence") for one in _flat(value)]
    said = [one for one in said if one is not None and not (one == "license" and "licence" in card)]
    if card.get("license_name") and card.get("license_link"):
        said = [card["license_name"] if str(one).lower() == "other" else one for one in said]
    words = [str(one).strip().lower() for one in said]
    bases = [one for one in _flat(card.get("base_model")) if one is not None]
    written = [name for key, value in _everywhere(card) if key in WRITERS for name in _flat(value)]
    return (
        not words
        or any(word not in OPEN for word in words)
        or any(base not in OPEN_BASES for base in bases)
        or (dataset and any(name in CLOSED for name in written))
    )


def denies_text(card: str) -> bool:
    """Whether a card of this text may not pass; only cards of the plainest lines are judged by what they say."""
    if not re.search(
        r"mit|apache|bsd|isc|cc|zlib|lic|gpl|mpl|c-uda|od|pddl|wtfpl|eupl|open|ms-pl", card, re.IGNORECASE
    ):
        return True  # no licence is named at all
    lines = card.split("\n")
    if lines[0] != "---" or "---" not in lines[1:]:
        return False
    front = [_PLAIN.fullmatch(line) for line in lines[1 : lines.index("---", 1)] if line.strip()]
    keys = [line["key"] for line in front if line and line["key"]]
    if not all(front) or len(set(keys)) != len(keys) or "license_name" in keys:
        return False
    fields: dict[str, list[str]] = {}
    at = ""
    for line in front:
        at = line["key"] or at
        fields.setdefault(at, []).extend(one for one in (line["value"], line["item"]) if one)
    licences = [one.lower() for one in fields.get("license", [])]
    return any(one in (*FORBIDS, *(n.lower() for n in NOBODY_KNOWS)) for one in licences) or any(
        base in OTHER_BASES for base in fields.get("base_model", [])
    )


def holds(exception: Mapping[str, Any], wanted: Mapping[str, str], today: date) -> bool:
    """Whether an exception covers what it must: every field, word for word, and today between its two days.

    Blanks around a value are no part of it.
    """
    exception = {key: "" if value is None else str(value).strip() for key, value in exception.items()}
    if set(exception) != {*wanted, "basis", "approved_by", "approved_on", "expires", "scope", "reason"}:
        return False
    if not all(exception.values()):
        return False
    if exception["basis"] not in ("written_authorisation", "contract", "permitted_exception", "risk_accepted"):
        return False
    days = [_day(exception[key]) for key in ("approved_on", "expires")]
    if None in days or not days[0] <= today <= days[1]:
        return False
    return all(exception[key] == value for key, value in wanted.items())


def _day(written: str) -> date | None:
    match = re.fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})", written)
    try:
        return None if match is None else date(*(int(part) for part in match.groups()))
    except ValueError:
        return None


def _flat(value: Any) -> Iterator[Any]:
    """Yield what a field names; of mappings that name models, each name."""
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, Mapping) and value and set(value) <= {"name", "model"}:
        yield from _flat(list(value.values()))
    else:
        yield value


def _everywhere(card: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(card, Mapping):
        for key, value in card.items():
            yield str(key), value
            yield from _everywhere(value)
    elif isinstance(card, list):
        for one in card:
            yield from _everywhere(one)
