"""`manifest.json` and the records of units: a changed cache is refused in the project's own words."""

import hashlib
import json
from functools import cache

import rfc8785
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_plugin.cache import TeacherCache
from kd_plugin.cache.files import seal
from kd_plugin.errors import CacheError, KDError
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.lineage.graph import Edge, Evidence, Graph, Node
from tests.lineage_fuzz.limits import PROFILE, held, is_allowed
from tests.lineage_fuzz.places import captured, student
from tests.lineage_fuzz.strategies import changed, mutated, places, raw


@cache
def original():
    whole = TeacherCache(captured())  # what is imported only once is not the first example's time
    assert is_allowed(verdict_of(whole))
    whole.dataset()
    (mapped,) = [str(path.relative_to(captured())) for path in captured().glob("mapped/*/mapped.json")]
    return {name: (captured() / name).read_bytes() for name in ("manifest.json", "units/00000.json", mapped)}


def place_of(which):
    return list(original())[("manifest", "unit", "mapped").index(which)]


@cache
def values_of(which):
    values = json.loads(original()[place_of(which)])
    values.pop("digest")
    return values, tuple(places(values))


@cache
def forbidden():
    """Return the lineage of a cache whose teacher's terms forbid it."""
    teacher = Node("model", "t", licenses=("llama2",), evidence=(Evidence("README.md", "llama2", ("llama2",)),))
    outputs = Node("teacher_outputs", "outputs of t")
    return Graph.of([teacher, outputs], [Edge(outputs.id, teacher.id, "distilled_logits", "t")]).to_json()


def verdict_of(opened):
    base = Source("student", ref=str(student()))
    return RunLineage(method="x", student=base, outputs=[opened.source]).verdict


def see():
    opened = TeacherCache(captured())
    if opened.tokens:
        index = opened.dataset()[0]["teacher_index"] if len(opened) else []
        opened.signal(torch.tensor([one for one in index if one >= 0], dtype=torch.int64))
    return verdict_of(opened)


def look(target, **files):
    original()
    try:
        for name, content in files.items():
            (captured() / place_of(name)).write_bytes(content)
        return held(target, see, b"\n".join(files.values()))
    finally:
        for name, content in original().items():
            (captured() / name).write_bytes(content)


def sealed(values):
    """Write a record with a digest that fits; None where it has none."""
    try:
        return seal(values)
    except (ValueError, RecursionError, TypeError, AttributeError):
        return None


@PROFILE
@given(st.data(), st.sampled_from(["manifest", "unit", "mapped"]), st.sampled_from(["mutated", "mutated", "raw"]))
def test_bytes(data, which, how):
    name = place_of(which)
    given_bytes = data.draw(mutated((original()[name],)) if how == "mutated" else raw())
    seen = look("cache bytes", **{which: given_bytes})
    assert given_bytes == original()[name] or isinstance(seen, CacheError)


@PROFILE
@given(st.data(), st.booleans())
def test_values(data, forbids):
    values, all_places = values_of("manifest")
    other = data.draw(changed(values, all_places))
    if forbids and isinstance(other, dict):
        other["lineage"] = forbidden()
    files = {"manifest": sealed(other)}
    if data.draw(st.booleans()):  # the record of its unit says the same
        try:
            belongs = hashlib.sha256(rfc8785.dumps(other["settings"])).hexdigest()
            files["unit"] = sealed({**values_of("unit")[0], **other["units"][0], "settings": belongs})
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
    if None in files.values():
        return
    seen = look("cache values", **files)
    assert not (forbids and is_allowed(seen))


def test_what_was_found():
    """A mapped form that leaves out one of its files."""
    values, _ = values_of("mapped")
    for i in range(len(values["files"])):
        less = [one for j, one in enumerate(values["files"]) if j != i]
        assert isinstance(look("cache values", mapped=seal({**values, "files": less})), CacheError)


@PROFILE
@given(st.data(), st.sampled_from(["unit", "mapped"]))
def test_parts(data, which):
    values, all_places = values_of(which)
    other = data.draw(changed(values, all_places))
    written = sealed(other) if isinstance(other, dict) else None
    if written is not None:
        seen = look("cache values", **{which: written})
        told = {**other, "finished": values.get("finished")} != values  # when it was done is not compared
        assert which == "mapped" or not told or isinstance(seen, KDError)


@PROFILE
@given(st.data(), st.booleans())
def test_lineage(data, forbids):
    values, _ = values_of("manifest")
    before = forbidden() if forbids else values["lineage"]
    written = sealed({**values, "lineage": data.draw(changed(before, tuple(places(before))))})
    if written is not None:
        seen = look("cache values", manifest=written)
        assert not (forbids and is_allowed(seen))
