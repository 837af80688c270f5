"""Front matter of cards: a hostile card is unknown or refused, never allowed, and ends no process."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from kd_plugin.lineage import RunLineage, Source
from tests.lineage_fuzz import oracle
from tests.lineage_fuzz.limits import PROFILE, held, is_allowed
from tests.lineage_fuzz.places import card_dir, student
from tests.lineage_fuzz.strategies import mutated, raw, written

licences = st.sampled_from(
    (*oracle.OPEN, *oracle.OPEN, *oracle.FORBIDS, *oracle.NOBODY_KNOWS, "other", "", "MIT", None)
)
odd = st.sampled_from([5, 1.5, True, {}, [], {"name": "llama2"}, [["llama2"]], {"x": "mit"}])
bases = st.sampled_from((*oracle.OPEN_BASES, *oracle.OPEN_BASES, *oracle.OTHER_BASES))
base_fields = st.one_of(
    bases,
    st.lists(bases, max_size=3),
    st.lists(st.just(oracle.OPEN_BASES[0]), min_size=49, max_size=52).flatmap(
        lambda many: bases.map(lambda last: [*many, last])
    ),
    st.tuples(bases, st.integers(1, 20)).map(lambda pair: _nested(*pair)),
    st.fixed_dictionaries({}, optional={"name": bases, "model": bases}),
    st.sampled_from([5, True, "", [None], {"x": 1}]),
)
names = st.sampled_from((*oracle.CLOSED, "Qwen/Qwen2.5-7B", "a person"))
writers = st.one_of(names, st.lists(names, max_size=3), names.map(lambda name: {"model": name}))
cards = st.fixed_dictionaries(
    {},
    optional={
        "license": st.one_of(licences, licences, licences, st.lists(licences, max_size=3), odd),
        "License": licences,
        "licence": st.one_of(licences, st.just("license")),
        "license_name": licences,
        "license_link": st.sampled_from(["LICENSE", "https://example.org/terms", 5]),
        "base_model": base_fields,
        "generated_by": writers,
        "details": st.dictionaries(st.sampled_from(oracle.WRITERS), writers, max_size=2),
        "tags": st.lists(st.sampled_from(["distilled", "en", "1.10"]), max_size=2),
        "model-index": st.just([{"name": "x", "results": [{"metrics": [{"value": 1.0}]}]}]),
    },
)
SEEDS = tuple(
    card.encode()
    for card in (
        "---\nlicense: llama2\nlanguage:\n- en\n---\n\n# A model\n",
        "---\nlicense: own\ntags:\n- x\n---\nText.\n",
        "---\nlicense: mit\nbase_model:\n- Qwen/Qwen2.5-7B\n- meta-llama/Llama-2-7b-hf\n---\n",
        "---\nlicense: cc-by-nc-4.0\npipeline_tag: text-generation\n---\nWritten by people.\n",
        "---\nlicense: mit\n---\nWe thank GPT-4o. [a](b)\n",
    )
)
marks = st.tuples(
    st.sampled_from(["", "", "\ufeff", "\n", "  \n\n"]),
    st.sampled_from(["---\n", "---\n", "--- \n", "---\r\n"]),
    st.sampled_from(["---\n", "---\n\nText.\n", "---  \n# Title\n", "---"]),
)


def _nested(base, depth):
    for _ in range(depth):
        base = [base]
    return base


def decision(card, kind="model"):
    place = Source("t", kind, ref=str(card_dir(card, kind)), signal="text" if kind == "dataset" else "logits")
    given = {"teachers": [place]} if kind == "model" else {"datasets": [place]}
    return RunLineage(method="x", student=Source("student", ref=str(student())), **given).verdict


def found(**fields):
    """Return a card that a run found, as an example."""
    return (fields, json.dumps(fields) + "\n"), ("", "---\n", "---\n"), "model"


@PROFILE
@given(written(cards), marks, st.sampled_from(["model", "dataset"]))
@example(*found(license="mit", base_model=_nested("meta-llama/Llama-2-7b-hf", 20)))
@example(*found(license="mit", base_model=[*[oracle.OPEN_BASES[0]] * 51, "nobody/nothing"]))
@example(*found(license="mit", base_model={"name": oracle.OPEN_BASES[0], "model": "nobody/nothing"}))
@example(*found(license="mit", base_model="a" * 300))
def test_fields(card, around, kind):
    fields, text = card
    before, begin, end = around
    whole = f"{before}{begin}{text}{end}".encode()
    seen = held("card fields", lambda: decision(whole, kind), whole)
    assert not (is_allowed(seen) and oracle.denies_fields(fields, dataset=kind == "dataset")), whole


@PROFILE
@given(st.one_of(mutated(SEEDS), mutated(SEEDS), raw()), st.sampled_from(["model", "dataset"]))
@example(b"---\nlicense: llama2\n---\n", "dataset")
@example(SEEDS[2], "dataset")
@example(b"---\nlicense: !!bool x\n---\n", "model")
@example(b"---\nlicense: !!int ''\n---\n", "model")
@example(b"---\nlicense: !!timestamp x\n---\n", "dataset")
@example(b"---\nlicense: mit\n" + b"\n" * 500_000, "model")
@example(b"---" + b"\n" * 3000, "model")
@example(b"---\nlicense: mit\n---\n" + b"](" * 131_072, "dataset")
@example(b"---\nlicense: mit\n---\n" + b" ".join(b"w%d-a-b" % i for i in range(40_000)), "dataset")
def test_text(card, kind):
    seen = held("card text", lambda: decision(card, kind), card)
    assert not (is_allowed(seen) and oracle.denies_text(card.decode("utf-8", "replace"))), card[:500]
