"""`lineage.json`: a record of which any byte was changed never verifies as good, and is no evidence for a teacher."""

import json
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from kd_plugin.errors import KDError
from kd_plugin.lineage import RunLineage, Source, verify
from kd_plugin.lineage.record import canonical, sealed
from tests.lineage_fuzz.limits import PROFILE, held, is_allowed
from tests.lineage_fuzz.places import student, taught
from tests.lineage_fuzz.strategies import changed, mutated, places, raw

LICENCES = ("mit", "llama2")
# What says whose weights these are and what they were made from
EVIDENCE = ("subjects", "nodes", "edges")


@cache
def original(licence):
    verify(taught(licence))  # what is imported only once is not the first example's time
    return (taught(licence) / "lineage.json").read_bytes()


@cache
def record_of(licence):
    record = json.loads(original(licence))
    return record, tuple(places(record))


def bytes_of(record, how):
    """Write a record down: as it is, in its canonical form, or with its digest and seal made anew."""
    if how == "resealed" and isinstance(record.get("saved_at"), dict):
        content = {key: value for key, value in record.items() if key not in ("digest", "saved_at")}
        try:
            return canonical(sealed(content, str(record["saved_at"].get("time"))))
        except (ValueError, RecursionError):
            pass
    if how != "plain":
        try:
            return canonical(record)
        except (ValueError, RecursionError):
            pass
    return json.dumps(record).encode()


def meaning(record):
    """Return what a record says of subjects and sources, less what may be left out and no rule rests on.

    An edge's ``role`` is the name that the run gave to a teacher. Who makes the digest anew can take it out.
    """

    def bare(value):
        if isinstance(value, dict):
            kept = {key: bare(one) for key, one in value.items() if key not in ("sure", "voice", "role")}
            return {key: one for key, one in kept.items() if one not in ([], {}, False)}
        return [bare(one) for one in value] if isinstance(value, list) else value

    return json.dumps({key: bare(record.get(key)) for key in EVIDENCE}, sort_keys=True)


def seen_of(raw_record, licence):
    place = taught(licence)
    (place / "lineage.json").write_bytes(raw_record)
    report = verify(place)
    run = None
    try:
        given = [Source("t", ref=str(place))]
        run = RunLineage(method="x", student=Source("student", ref=str(student())), teachers=given).verdict
    except KDError:
        pass
    return report.exit_code, run


def look(target, raw_record, licence):
    try:
        return held(target, lambda: seen_of(raw_record, licence), raw_record)
    finally:
        (taught(licence) / "lineage.json").write_bytes(original(licence))


def test_what_was_found():
    """A key twice, of which other readers take the other value; evidence that no digest covers; a key less."""
    twice = original("mit").replace(b'"step":1', b'"step":1,"step":1')
    assert look("record bytes", twice, "mit") == (2, None)
    record, _ = record_of("mit")
    node = {**record["nodes"][0], "evidence": [{**record["nodes"][0]["evidence"][0], "x": None}]}
    more = {**record, "nodes": [node, *record["nodes"][1:]]}
    assert look("record values", bytes_of(more, "resealed"), "mit") == (2, None)
    again = {**record, "nodes": [*record["nodes"], record["nodes"][0]]}
    assert look("record values", bytes_of(again, "resealed"), "mit") == (2, None)
    for key in record:
        less = {name: value for name, value in record.items() if name != key}
        assert look("record values", bytes_of(less, "plain"), "mit") == (2, None)
    attached = {**record["terms"]["mit"], "attachments": {"a": "b.txt"}}
    other = {**record, "terms": {"mit": attached}}
    assert look("record values", bytes_of(other, "resealed"), "mit")[0] == 2


@PROFILE
@given(st.data(), st.sampled_from(LICENCES), st.sampled_from(["mutated", "mutated", "raw"]))
def test_bytes(data, licence, how):
    given_bytes = data.draw(mutated((original(licence),)) if how == "mutated" else raw())
    code, run = look("record bytes", given_bytes, licence)
    assert (code == 0) == (given_bytes == original("mit") and licence == "mit")
    if run is not None and is_allowed(run):  # white space that was added changes no evidence
        assert licence == "mit" and json.loads(given_bytes) == record_of(licence)[0]


@PROFILE
@given(st.data(), st.sampled_from(LICENCES), st.sampled_from(["plain", "canonical", "resealed", "resealed"]))
def test_values(data, licence, how):
    record, all_places = record_of(licence)
    other = data.draw(changed(record, all_places))
    written = bytes_of(other, how) if isinstance(other, dict) else json.dumps(other).encode()
    code, run = look("record values", written, licence)
    if meaning(other) != meaning(record):
        assert code != 0
    assert licence != "llama2" or run is None or not is_allowed(run)


DEEP = [json.loads("[" * depth + "]" * depth) for depth in range(100, 500, 7)]


@PROFILE
@given(st.sampled_from(DEEP))
def test_nested_details(deep):
    record, _ = record_of("mit")
    nodes = [{**node, "details": {"x": deep}} for node in record["nodes"]]
    code, _ = look("record values", bytes_of({**record, "nodes": nodes}, "resealed"), "mit")
    assert code != 0
