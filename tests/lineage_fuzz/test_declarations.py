"""The user's `lineage` file and its exceptions: nothing but a full exception that holds today opens what is closed."""

from datetime import UTC, datetime, timedelta
from functools import cache

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kd_plugin.lineage import RunLineage, Source
from tests.lineage_fuzz import oracle
from tests.lineage_fuzz.limits import PROFILE, held, is_allowed
from tests.lineage_fuzz.places import ROOT, card_dir, student
from tests.lineage_fuzz.strategies import junk, mutated, raw, tokens, written

FORBIDDEN = b"---\nlicense: llama2\n---\n"
# Every question is answered, so that a verdict that allows needs no condition
FACTS = (
    "commercial", "distribute", "eu_domiciled", "mau_over_700m_at_release", "mau_over_100m",
    "over_100m_mau_or_20m_usd_a_month",
)  # fmt: skip
USE = dict.fromkeys(FACTS, False)
TODAY = datetime.now(UTC).date()
DAYS = {str(n): (TODAY + timedelta(days=n)).isoformat() for n in (-400, -1, 0, 1, 400)}


def sources():
    """Return teachers that nobody may learn from: by their terms, by their service, and by nothing known."""
    return {
        "terms": Source("t", ref=str(card_dir(FORBIDDEN))),
        "service": Source("t", endpoint="https://api.openai.com/v1", model="gpt-4o", signal="text"),
    }


def verdict_of(text, which):
    path = ROOT / "lineage.yaml"
    path.write_bytes(text)
    base = Source("student", ref=str(student()))
    return RunLineage(method="x", student=base, teachers=[sources()[which]], config=path).verdict


@cache
def wanted(which):
    """Return what an exception for this teacher must name, one for each thing that is in the way."""
    findings = verdict_of(b"{}", which).refusals
    base = Source("student", ref=str(student()))
    run = RunLineage(method="x", student=base, teachers=[sources()[which]])
    return tuple(
        {"rule": f.code, "terms": f.terms, "cite": f.cite, "subject": f.subject,
         "terms_sha256": run.registry.terms[f.terms].digest}
        for f in findings
    )  # fmt: skip


def full(which, approved="-1", expires="400"):
    """Return exceptions for all that is in the way of a teacher."""
    said = {"basis": "contract", "approved_by": "A. Person", "scope": "research", "reason": "agreed"}
    return [{**one, **said, "approved_on": DAYS[approved], "expires": DAYS[expires]} for one in wanted(which)]


licences = st.sampled_from([*oracle.OPEN, *oracle.NOBODY_KNOWS, "llama2", "other", "", None, "mit OR apache-2.0"])
odd = st.one_of(junk, tokens)
models = st.sampled_from([*oracle.CLOSED, *oracle.OPEN_BASES, *oracle.OTHER_BASES, "", "\0"])
fields = {
    "repo": models, "revision": st.sampled_from(["main", "x"]), "license": licences, "license_name": licences,
    "license_link": st.just("https://example.org"), "reason": st.text(max_size=5), "name": models,
}  # fmt: skip
reached = {
    "endpoint": st.sampled_from(
        ["http://localhost:8000", "https://api.openai.com/v1", "http://[", "//", "http:x", "\0"]
    ),
    "endpoint_terms": st.sampled_from(["own", "mine", "openai-terms"]),
    "model": models,
}
generators = st.lists(st.one_of(models, st.fixed_dictionaries({}, optional=reached)), max_size=3)
sane = st.fixed_dictionaries(
    {},
    optional={
        "teachers": st.fixed_dictionaries({}, optional={"t": st.fixed_dictionaries({}, optional={
            **fields, **reached, "signal": st.sampled_from(["text", "logits", "x"])})}),
        "student": st.fixed_dictionaries({}, optional={
            **fields, "declared_license": licences, "merged_from": st.lists(models, max_size=2)}),
        "datasets": st.lists(st.fixed_dictionaries({}, optional={**fields, "generated_by": generators}), max_size=2),
        "use": st.dictionaries(st.sampled_from([*FACTS, "x"]), st.booleans(), max_size=2),
        "run": st.fixed_dictionaries(
            {},
            optional={"id": st.text(max_size=3), "date": st.sampled_from([*DAYS.values(), "20260101", "0001-01-01"])},
        ),
        "registry": st.sampled_from(["none.toml", "", ".", "\0", "a" * 300]),
    },
)  # fmt: skip


@st.composite
def declared(draw):
    """Draw declarations, some of them with a value that has no place there."""
    made = draw(sane)
    if made and draw(st.integers(0, 3)) == 0:
        key = draw(st.sampled_from(sorted(made)))
        value = draw(odd.filter(yaml_can_say))
        if isinstance(made[key], dict) and draw(st.booleans()):
            made[key][draw(st.sampled_from(["license", "repo", "x", "date"]))] = value
        else:
            made[key] = value
    return made


def yaml_can_say(value):
    try:
        return yaml.safe_load(yaml.safe_dump(value)) == value
    except (yaml.YAMLError, RecursionError, ValueError):
        return False


@PROFILE
@given(written(declared()), st.sampled_from(["terms", "service"]))
@example(({}, "registry: '\\0'\n".replace("'", '"')), "terms")
@example(({}, f"teachers: {{t: {{repo: {'a' * 300}}}}}\n"), "service")
def test_fields(declaration, which):
    text = declaration[1].encode("utf-8", "surrogatepass")
    seen = held("lineage YAML fields", lambda: verdict_of(text, which), text)
    assert not is_allowed(seen), text


SEEDS = tuple(
    yaml.safe_dump(one, sort_keys=False).encode()
    for one in (
        {"teachers": {"t": {"license": "mit", "reason": "mine", "endpoint_terms": "own"}}, "use": {"commercial": True}},
        {"student": {"name": "x", "declared_license": "mit", "merged_from": [{"repo": "a/b", "license": "mit"}]}},
        {
            "datasets": [
                {"repo": "a/b", "license": "mit", "generated_by": ["gpt-4o", {"model": "a/b", "license": "mit"}]}
            ]
        },
        {"run": {"id": "x", "date": "2026-11-24", "repo": "r", "commit": "c"}, "overrides": []},
    )
)


@PROFILE
@given(st.one_of(mutated(SEEDS), mutated(SEEDS), raw()), st.sampled_from(["terms", "service"]))
@example(b"use:\n  commercial: !!bool x\n", "terms")
@example(b"student:\n  declared_license: " + b"(mit and " * 5000 + b"mit" + b")" * 5000, "terms")
def test_text(text, which):
    seen = held("lineage YAML text", lambda: verdict_of(text, which), text)
    assert not is_allowed(seen), text[:500]


others = st.sampled_from(
    [*DAYS.values(), "20300101", "2030-1-1", "2030-02-30", "2030-W01-1", " 2030-01-01", "never", ""]
)


@PROFILE
@given(st.data(), st.sampled_from(["terms", "service"]), st.sampled_from(list(DAYS)), st.sampled_from(list(DAYS)))
def test_exceptions(data, which, approved, expires):
    exceptions = full(which, approved, expires)
    for one in exceptions:
        for key in data.draw(st.lists(st.sampled_from(sorted(one)), max_size=1)):
            match data.draw(st.sampled_from(["drop", "other", "junk", "day", "case"])):
                case "drop":
                    del one[key]
                case "other":
                    one[key] = data.draw(st.sampled_from([*one.values(), "risk_accepted", "unknown"]))
                case "junk":
                    one[key] = data.draw(odd.filter(yaml_can_say))
                case "day":
                    one[data.draw(st.sampled_from(["approved_on", "expires"]))] = data.draw(others)
                case "case":
                    one[key] = one[key].upper()
    text = data.draw(written(st.just({"overrides": exceptions, "use": USE})))[1].encode("utf-8", "surrogatepass")
    begun = datetime.now(UTC).date()
    seen = held("overrides", lambda: verdict_of(text, which), text)
    covered = any(  # a day may end meanwhile
        all(any(oracle.holds(one, need, day) for one in exceptions) for need in wanted(which))
        for day in (begun, datetime.now(UTC).date())
    )
    assert covered or not is_allowed(seen), text


@PROFILE
@given(st.data(), st.sampled_from(["terms", "service"]))
def test_exceptions_of_text(data, which):
    text = yaml.safe_dump({"overrides": full(which, "-400", "-1"), "use": USE}, sort_keys=False).encode()
    changed = data.draw(mutated((text,)))
    seen = held("overrides", lambda: verdict_of(changed, which), changed)
    assert not is_allowed(seen) or changed.count(DAYS["-1"].encode()) < len(wanted(which)), changed


def test_an_exception_that_holds_opens_what_it_names():
    for which in ("terms", "service"):
        text = yaml.safe_dump({"overrides": full(which), "use": USE}).encode()
        assert is_allowed(verdict_of(text, which))
