"""C: where do the rows come from? No way to training, a capture's included, is without a node or a finding."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, interleave_datasets, load_dataset, load_from_disk

from kd_plugin.inputs import load_rows
from kd_plugin.lineage import Source
from kd_plugin.lineage.data import dataset_sources, with_origin
from tests.core.lineage_help import model_dir
from tests.lineage_attacks.attack import attack, capture_gate, gate

HUB = {"hf://datasets/acme/x@" + "0" * 40 + "/train.parquet": {"num_bytes": 1, "checksum": None}}
ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(4)]
NOTES = ("undeclared_dataset", "writers_not_declared")


def hub() -> Dataset:
    rows = Dataset.from_list(ROWS)
    rows.info.download_checksums = dict(HUB)
    return rows


def judged(place: Path, rows: Any, **config: Any) -> str:
    """Ask both gates about these rows; they must agree."""
    found = dataset_sources(rows)
    assert found, "no node and no finding"
    base = model_dir(place, "captured-teacher", "apache-2.0")
    trained = [gate(place, *NOTES, data=one, config=config) for one in found]
    captured = capture_gate(Source("t", ref=base), *found, config=config)
    refused = [one for one in trained if one in ("block", "unknown")]
    assert bool(refused) == (captured != "allow")
    return next(iter(refused), trained[0])


# From the hub, with nothing known of it: refused, whatever is done to it that keeps its origin
ORIGIN = "C origin"
for name, make in {
    "as it is": lambda d, h: h,
    "map": lambda d, h: h.map(lambda row: {"z": 1}),
    "filter": lambda d, h: h.filter(lambda row: True),
    "select": lambda d, h: h.select([0]),
    "shuffle": lambda d, h: h.shuffle(seed=0),
    "train_test_split": lambda d, h: h.train_test_split(0.5)["train"],
    "a mapping of splits": lambda d, h: {"a": h, "b": h},
    "a list of datasets": lambda d, h: [h],
    "inside a torch dataset": lambda d, h: Held(h),
    "a stream": lambda d, h: h.to_iterable_dataset(),
    "a stream, mapped": lambda d, h: h.to_iterable_dataset().map(lambda row: row),
    "a stream, interleaved": lambda d, h: interleave_datasets(
        [h.to_iterable_dataset(), Dataset.from_list(ROWS).to_iterable_dataset()]
    ),
    "joined with itself": lambda d, h: concatenate_datasets([h, h]),
}.items():
    attack(ORIGIN, f"a hub dataset, {name}", "unknown", lambda d, m=make: judged(d, m(d, hub())))
for name, make in {
    "concatenated with rows in memory": lambda d, h: concatenate_datasets([h, Dataset.from_list(ROWS)]),
    "concatenated the other way round": lambda d, h: concatenate_datasets([Dataset.from_list(ROWS), h]),
    "interleaved": lambda d, h: interleave_datasets([h, Dataset.from_list(ROWS)]),
    "from_list(list(...))": lambda d, h: Dataset.from_list(list(h)),
    "a list of its rows": lambda d, h: list(h),
    "from_dict": lambda d, h: Dataset.from_dict(h.to_dict()),
    "from_pandas": lambda d, h: Dataset.from_pandas(h.to_pandas()),
    "from_generator": lambda d, h: Dataset.from_generator(lambda: iter(ROWS), cache_dir=str(d / "c")),
    "Parquet and back": lambda d, h: parquet(d, h),
    "JSON and back": lambda d, h: written(d, h),
    "CSV and back": lambda d, h: comma(d, h),
    "inside an object of one's own": lambda d, h: object(),
}.items():
    attack(ORIGIN, f"a hub dataset, {name}", "note undeclared_dataset", lambda d, m=make: judged(d, m(d, hub())))
attack(ORIGIN, "rows in memory that the user declares", "allow", lambda d: judged(
    d, ROWS, datasets=[{"name": "mine", "license": "own"}]))  # fmt: skip


class Held:
    def __init__(self, rows: Any) -> None:
        self.dataset = rows


def parquet(place: Path, rows: Dataset) -> Dataset:
    rows.to_parquet(str(place / "p.parquet"))
    return load_dataset("parquet", data_files=str(place / "p.parquet"), split="train", cache_dir=str(place / "c"))


def comma(place: Path, rows: Dataset) -> Dataset:
    rows.to_csv(str(place / "p.csv"))
    return load_dataset("csv", data_files=str(place / "p.csv"), split="train", cache_dir=str(place / "c"))


def written(place: Path, rows: Any) -> Dataset:
    (place / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_dataset("json", data_files=str(place / "p.jsonl"), split="train", cache_dir=str(place / "c"))


def prepared(place: Path) -> Dataset:
    """Rows as ``load_dataset("acme/x")`` leaves them: an Arrow file in a folder that is named after the repository."""
    folder = place / "datasets" / "acme___x" / "default" / "0.0.0" / ("1" * 40)
    folder.mkdir(parents=True)
    Dataset.from_list(ROWS).save_to_disk(str(place / "plain"))
    (place / "plain" / "data-00000-of-00001.arrow").rename(folder / "x-train.arrow")
    return Dataset.from_file(str(folder / "x-train.arrow"))


attack(ORIGIN, "what load_dataset prepared of a hub dataset", "unknown", lambda d: judged(d, prepared(d)))
attack(ORIGIN, "and concatenated with rows in memory", "unknown", lambda d: judged(
    d, concatenate_datasets([prepared(d), Dataset.from_list(ROWS)])))  # fmt: skip

# Rows in files beside a card
BESIDE = "C beside"


def beside(place: Path, card: str, loader: str = "file", body: str = "") -> Any:
    """Rows in a directory with this card, loaded as the commands load them."""
    folder = place / "ds"
    if loader == "saved":
        Dataset.from_list(ROWS).save_to_disk(str(folder))
    else:
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "README.md").write_text(f"---\n{card}\n---\n{body}\n")
    reference = folder / "train.jsonl" if loader in ("file", "stream") else folder
    return load_rows(str(reference), streaming=loader == "stream")


NC = {"use": {"commercial": True}}
for loader in ("file", "directory", "saved", "stream"):
    attack(BESIDE, f"cc-by-nc, commercial use, {loader}", "block", lambda d, w=loader: judged(
        d, beside(d, "license: cc-by-nc-4.0", w), **NC))  # fmt: skip
    attack(BESIDE, f"generated_by gpt-4o, {loader}", "block", lambda d, w=loader: judged(
        d, beside(d, "license: mit\ngenerated_by: gpt-4o", w)))  # fmt: skip
attack(BESIDE, "load_from_disk beside a card", "block", lambda d: judged(
    d, (beside(d, "license: mit\ngenerated_by: gpt-4o", "saved"), load_from_disk(str(d / "ds")))[1]))  # fmt: skip
attack(BESIDE, "a card that says nothing of terms", "note undeclared_dataset", lambda d: judged(
    d, beside(d, "pretty_name: x")))  # fmt: skip
attack(BESIDE, "an MIT card", "allow", lambda d: judged(d, beside(d, "license: mit")))
attack(BESIDE, "a card: own", "unknown", lambda d: judged(d, beside(d, "license: own")))

# Fields of a card decide alone
FIELD = "C field"
for front in (
    "generated_by: gpt-4o", "generated_by: [gpt-4o]", "Generated-By: gpt-4o", "generator: {model: gpt-4o}",
    "generators: [{name: claude-3-opus}]", "teacher_model: gpt-4o", "source_model: gpt-4o", "model: gpt-4o",
    "model_name: openai/gpt-4o", "synthetic_data: {generator_model: gpt-4o}", "tags: [gpt-4o]",
    "configs: [{config_name: a, generation_model: gpt-4o}]",
):  # fmt: skip
    attack(FIELD, f"{front}, and the user says that none wrote it", "block", lambda d, f=front: judged(
        d, beside(d, f"license: mit\n{f}"), datasets=[{"name": "train.jsonl", "generated_by": []}]))  # fmt: skip
attack(FIELD, "model: BERT", "allow", lambda d: judged(d, beside(d, "license: mit\nmodel: BERT")))
attack(FIELD, "generated_by: nobody/knows", "unknown", lambda d: judged(
    d, beside(d, "license: mit\ngenerated_by: nobody/knows")))  # fmt: skip

# Prose asks, and the answer decides
PROSE = "C prose"
for words in (
    "The answers were generated by GPT-4o.", "Answers generated with **GPT-4o**.", "Model: GPT\u20114o",
    "| Generator | gpt-4o |", "This is a GPT-4 generated dataset.", "Data collected through the OpenAI API.",
    "Unlike data generated by GPT-4o, all of this is human.", "Die Antworten wurden von GPT-4o erzeugt.",
    "Synthesized by Claude 3.5 Sonnet.", "Traces distilled from Gemini 2.5 Pro.",
):  # fmt: skip
    attack(PROSE, ascii(words), "note writers_not_declared", lambda d, w=words: judged(
        d, beside(d, "license: mit", body=w)))  # fmt: skip
UNLIKE = "Unlike data generated by GPT-4o, all of this is human."
attack(PROSE, "and the user says that none wrote it", "allow", lambda d: judged(
    d, beside(d, "license: mit", body=UNLIKE), datasets=[{"name": "train.jsonl", "generated_by": []}]))  # fmt: skip
attack(
    PROSE,
    "and the user says that gpt-4o did",
    "block",
    lambda d: judged(
        d, beside(d, "license: mit", body=UNLIKE), datasets=[{"name": "train.jsonl", "generated_by": ["gpt-4o"]}]
    ),
)

# A column that names who wrote each row
COLUMN = "C column"
for column in ("model", "generator", "source_model", "generated_by", "model_name", "Model", "teacher-model"):
    attack(COLUMN, f"{column}: gpt-4o in one row of a thousand", "block", lambda d, c=column: judged(
        d, Dataset.from_list([{**ROWS[0], c: "human"}] * 999 + [{**ROWS[0], c: "gpt-4o"}])))  # fmt: skip
GPT = {"model": "gpt-4o"}
for name, make in {
    "in a list of rows": lambda d: [{**row, **GPT} for row in ROWS],
    "in a mapping": lambda d: Dataset.from_list([{**row, "meta": GPT} for row in ROWS]),
    "in messages": lambda d: Dataset.from_list([{"messages": [{"role": "user", "content": "x", **GPT}]}]),
    "in a list of names": lambda d: Dataset.from_list([{**ROWS[0], "models": ["gpt-4o", "x"]}]),
    "in a stream": lambda d: Dataset.from_list([{**row, **GPT} for row in ROWS]).to_iterable_dataset(),
    "in a JSON file": lambda d: written(d, [{**row, **GPT} for row in ROWS]),
    "of a hub dataset": lambda d: with_origin(Dataset.from_list([{**row, **GPT} for row in ROWS]), *HUB),
}.items():
    attack(COLUMN, f"gpt-4o {name}", "block", lambda d, m=make: judged(d, m(d)))
attack(COLUMN, "rows of gpt-4o that were filtered out", "note undeclared_dataset", lambda d: judged(
    d, Dataset.from_list([{**ROWS[0], **GPT}, ROWS[1]]).filter(lambda row: row["model"] is None)))  # fmt: skip
attack(COLUMN, "a Llama model of the hub", "conditional", lambda d: judged(
    d, Dataset.from_list([{**row, "model": "meta-llama/Llama-3.1-8B-Instruct"} for row in ROWS])))  # fmt: skip
attack(COLUMN, "names that nobody can look up", "note undeclared_dataset", lambda d: judged(
    d, Dataset.from_list([{**row, "model": "model-a"} for row in ROWS])))  # fmt: skip
MINE = {"name": "mine", "license": "own", "generated_by": []}
attack(COLUMN, "gpt-4o, and the user says that none wrote it", "block", lambda d: judged(
    d, [{**row, **GPT} for row in ROWS], datasets=[MINE]))  # fmt: skip
attack(COLUMN, "the dataset's description: cc-by-nc-4.0", "block", lambda d: judged(d, described(), **NC))


def described() -> Dataset:
    rows = Dataset.from_list(ROWS)
    rows.info.license = "cc-by-nc-4.0"
    return rows
