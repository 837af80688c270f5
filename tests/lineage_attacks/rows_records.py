"""B: is this record about these weights, and does it say what its own evidence says?"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from kd_plugin.lineage import RunLineage, Source, outputs_record, shipping
from kd_plugin.lineage.card import update_card
from kd_plugin.lineage.graph import Edge, Evidence, Graph, Node
from kd_plugin.lineage.hashing import sha256_text
from kd_plugin.lineage.policy import evaluate
from kd_plugin.lineage.record import canonical, sealed
from kd_plugin.lineage.registry import default_registry
from kd_plugin.lineage.shipping import bom_text
from kd_plugin.lineage.verdict import Student
from kd_plugin.text.dataset import publish_dataset
from kd_plugin.text.selecting import Selection
from kd_plugin.text.spending import Budget
from tests.core.lineage_help import RUN, checkpoint, model_dir
from tests.lineage_attacks.attack import attack, checked, gate, verdict

REGISTRY = default_registry()
SMALL = {"use": {"distribute": True, "mau_over_700m_at_release": False}, "student": {"name": "Llama-x"}}


def taught(place: Path, licence: str = "llama3.1", name: str = "checkpoint-1") -> Path:
    """Make a checkpoint that a teacher of this licence taught, with its record."""
    student = Source("student", ref=model_dir(place, f"{name}-base", "apache-2.0"))
    teacher = Source("t", ref=model_dir(place, f"{name}-teacher", licence))
    saved = checkpoint(place / "out", name)
    RunLineage(method="x", student=student, teachers=[teacher], config={"run": RUN, **SMALL}).write(saved, step=1)
    return saved


def used(place: Path, saved: Path, **config: Any) -> str:
    return gate(place, teacher=Source("t", ref=str(saved)), config=config)


def innocent_record_beside(place: Path, front: str) -> Path:
    """Put the record of innocent weights beside others."""
    foreign = Path(model_dir(place, "foreign", front))
    shutil.copy(taught(place, "mit", "innocent") / "lineage.json", foreign)
    return foreign


ABOUT = "B weights"
attack(ABOUT, "a record beside its own weights", "conditional", lambda d: used(d, taught(d)))
for front in ("license: llama2", "license: mit", "license: apache-2.0"):
    attack(ABOUT, f"an innocent record beside foreign weights, {front}", "unknown" if "2" not in front or "0" in front
           else "block", lambda d, f=front: used(d, innocent_record_beside(d, f)))  # fmt: skip


def changed(place: Path, change: Callable[[Path], Any], **config: Any) -> str:
    saved = taught(place, "mit")
    change(saved)
    return used(place, saved, **config)


def same_size(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"X")


attack(ABOUT, "weights of the same size, one byte other", "unknown", lambda d: changed(d, same_size))
attack(ABOUT, "weights missing", "unknown", lambda d: changed(d, lambda p: (p / "model.safetensors").unlink()))
attack(ABOUT, "a further shard", "unknown", lambda d: changed(d, lambda p: (p / "extra.safetensors").write_bytes(b"x")))
attack(ABOUT, "a GGUF file beside them", "unknown", lambda d: changed(d, lambda p: (p / "q4.gguf").write_bytes(b"x")))
attack(ABOUT, "weights renamed", "unknown", lambda d: changed(
    d, lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin")))  # fmt: skip
attack(
    ABOUT,
    "weights that are a link to the same bytes",
    "allow",
    lambda d: changed(
        d, lambda p: [shutil.move(p / "model.safetensors", d / "w"), (p / "model.safetensors").symlink_to(d / "w")]
    ),
)
attack(ABOUT, "one byte other, and the user declares mit", "allow", lambda d: changed(
    d, same_size, teachers={"t": {"license": "mit"}}))  # fmt: skip
attack(ABOUT, "moved and renamed as a whole", "allow", lambda d: used(
    d, Path(shutil.move(taught(d, "mit"), d / "Mistral-small"))))  # fmt: skip
attack(ABOUT, "the base of an adapter with foreign weights", "unknown", lambda d: gate(d, teacher=Source(
    "t", ref=adapter_on(d, innocent_record_beside(d, "license: mit")))))  # fmt: skip


def adapter_on(place: Path, base: Path) -> str:
    directory = model_dir(place, "adapter", "license: mit")
    (Path(directory) / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return directory


# Traces of a record that is not there
TRACES = "B traces"


def without_record(place: Path, *keep: str) -> Path:
    saved, copy = taught(place), place / "copy"
    copy.mkdir()
    for name in ("model.safetensors", *keep):
        if (saved / name).is_dir():
            shutil.copytree(saved / name, copy / name)
        else:
            shutil.copy(saved / name, copy)
    if "README.md" not in keep:
        (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return copy


for keep in (
    ("README.md", "NOTICE", "LICENSES", "bom.cdx.json"), ("README.md",), ("NOTICE",), ("bom.cdx.json",),
):  # fmt: skip
    attack(TRACES, f"copied with {', '.join(keep)} and without the record", "unknown", lambda d, k=keep: used(
        d, without_record(d, *k)))  # fmt: skip


def edited_card(place: Path, edit: Callable[[str], str]) -> Path:
    copy = without_record(place, "README.md")
    (copy / "README.md").write_text(edit((copy / "README.md").read_text()))
    return copy


attack(TRACES, "only the card's section is left", "unknown", lambda d: used(d, edited_card(
    d, lambda t: "---\nlicense: apache-2.0\n---\n" + t[t.index("<!-- kd-plugin"):])))  # fmt: skip
attack(TRACES, "only the card's distillation block is left", "unknown", lambda d: used(d, edited_card(
    d, lambda t: t[: t.index("<!-- kd-plugin")])))  # fmt: skip
attack(TRACES, "the record is a link to nowhere", "unknown", lambda d: used(d, dangling(d)))
attack(TRACES, "an honest tag 'distillation'", "allow", lambda d: gate(
    d, teacher=Source("t", ref=model_dir(d, "m", "license: apache-2.0\ntags: [distillation]"))))  # fmt: skip
attack(TRACES, "an honest folder LICENSES", "allow", lambda d: gate(d, teacher=Source("t", ref=reuse(d))))


def dangling(place: Path) -> Path:
    copy = without_record(place)
    (copy / "lineage.json").symlink_to(place / "nowhere")
    return copy


def reuse(place: Path) -> str:
    directory = model_dir(place, "m", "license: apache-2.0")
    (Path(directory) / "LICENSES").mkdir()
    return directory


# Records redone by hand, every digest with them
FORGED = "B forged"


def forge(saved: Path, change: Callable[[Node], Node], policy: dict[str, Any] | None = None) -> Path:
    """Change nodes of a record and redo what follows from it: verdict, files, digests."""
    record = json.loads((saved / "lineage.json").read_text())
    old = Graph.from_json(record)
    new = {i: change(node) for i, node in old.nodes.items()}
    ids = {i: node.id for i, node in new.items()}
    edges = [Edge(ids.get(e.source, e.source), ids[e.target], e.kind, e.role) for e in old.edges]
    graph = Graph.of(new.values(), edges)
    named = {i for node in graph.nodes.values() for i in (*node.licenses, *node.services)}
    terms = {i: REGISTRY.terms[i] for i in sorted(named)}
    record["policy"].update(policy or {})
    rules = record["policy"]["rules"]
    student = Student(record["student"]["name"], tuple(record["student"]["declared_license"]))
    found = evaluate(graph, terms, record["policy"]["facts"], student, (), record["run"]["date"], rules)
    found = shipping.settle(found, graph, terms)
    record.update(graph.to_json(), terms={i: t.to_json() for i, t in terms.items()}, effective=found.to_json())
    texts = {f"LICENSES/{n}": t for n, t in shipping.license_files(graph, terms, REGISTRY).items()}
    texts |= {"NOTICE": shipping.notice_text(graph, terms, found), "bom.cdx.json": bom_text(record)}
    for name, text in texts.items():
        (saved / name).write_text(text)
    record["files"] = [
        {"path": name, "sha256": sha256_text(text), "size": len(text.encode())} for name, text in sorted(texts.items())
    ]
    time = record.pop("saved_at")["time"]
    record.pop("digest")
    record = sealed(record, time)
    (saved / "lineage.json").write_bytes(canonical(record))
    update_card(saved, record)
    return saved


def of_llama(**values: Any) -> Callable[[Node], Node]:
    return lambda node: replace(node, **values) if "llama3.1" in node.licenses else node


attack(FORGED, "nothing changed, all redone", "good", lambda d: checked(forge(taught(d), lambda node: node)))
for name, values in {
    "licenses: [mit], evidence llama3.1": {"licenses": ("mit",)},
    "licenses: []": {"licenses": ()},
    "licenses: [own]": {"licenses": ("own",)},
    "licenses and evidence empty": {"licenses": (), "evidence": ()},
    "undeclared": {"licenses": (), "evidence": (), "undeclared": True},
    "a stranger's own": {"licenses": ("own",), "evidence": (Evidence("README.md", "own", ("own",)),)},
}.items():
    attack(FORGED, f"verify: {name}", "tampered", lambda d, v=values: checked(forge(taught(d), of_llama(**v))))
    right = "conditional" if "evidence llama" in name or name in ("licenses: []", "licenses: [own]") else "unknown"
    attack(FORGED, f"as a teacher: {name}", right, lambda d, v=values: used(d, forge(taught(d), of_llama(**v))))
attack(FORGED, "licenses: [mit], and another policy is named", "tampered", lambda d: checked(
    forge(taught(d), of_llama(licenses=("mit",)), {"sha256": "0" * 64})))  # fmt: skip
attack(FORGED, "licenses: [mit], and older rules are named", "tampered", lambda d: checked(
    forge(taught(d), of_llama(licenses=("mit",)), {"rules": 1})))  # fmt: skip
attack(FORGED, "rules of the future", "tampered", lambda d: checked(forge_rules(taught(d), 99)))
attack(FORGED, "rules that are no number", "tampered", lambda d: checked(forge_rules(taught(d), "x")))


def forge_rules(saved: Path, rules: Any) -> Path:
    record = json.loads((saved / "lineage.json").read_text())
    record["policy"]["rules"] = rules
    time = record.pop("saved_at")["time"]
    record.pop("digest")
    (saved / "lineage.json").write_bytes(canonical(sealed(record, time)))
    return saved


def on_forged_cache(place: Path, **values: Any) -> str:
    """Train on a cache whose teacher's node was changed, with ids that fit."""
    teacher = Source("t", ref=model_dir(place, "expert", "llama3.1"))
    before = Graph.from_json(outputs_record(teacher, [Source("rows", "dataset", license="mit", signal="text")]))
    new = {i: of_llama(**values)(node) for i, node in before.nodes.items()}
    edges = [replace(e, source=new[e.source].id, target=new[e.target].id) for e in before.edges]
    if values.get("alone"):
        edges, new = [], {i: n for i, n in new.items() if n.kind == "teacher_outputs"}
    cache = Source("cache", "teacher_outputs", record=Graph.of(new.values(), edges).to_json())
    student = Source("student", ref=model_dir(place, "s", "mit"))
    return verdict(lambda: RunLineage(method="x", student=student, outputs=[cache]))


attack(FORGED, "a cache as it was captured", "conditional", on_forged_cache)
for name, values in {
    "licenses: [mit], evidence llama3.1": ({"licenses": ("mit",)}, "conditional"),
    "licenses: []": ({"licenses": ()}, "conditional"),
    "licenses and evidence empty": ({"licenses": (), "evidence": ()}, "unknown"),
    "model gpt-4o, services: []": ({"model": "gpt-4o"}, "block"),
    "endpoint api.openai.com, services: []": ({"endpoint": "api.openai.com"}, "block"),
}.items():
    attack(FORGED, f"a cache's teacher: {name}", values[1], lambda d, v=values[0]: on_forged_cache(d, **v))


def bare_cache(place: Path) -> str:
    node = Node("teacher_outputs", "outputs of nobody")
    cache = Source("cache", "teacher_outputs", record=Graph.of([node], []).to_json())
    student = Source("student", ref=model_dir(place, "s", "mit"))
    return verdict(lambda: RunLineage(method="x", student=student, outputs=[cache]))


attack(FORGED, "a cache that nobody filled", "unknown", bare_cache)

# Weights that verify must not pass over
ASIDE = "B aside"


def aside(place: Path, folder: str, name: str = "model.safetensors") -> Path:
    saved = taught(place)
    (saved / folder).mkdir(parents=True)
    (saved / folder / name).write_bytes(b"other weights")
    return saved


for folder, right in {
    "sub": "tampered", ".hidden": "tampered", "a/b/c": "tampered", "a/.b": "tampered", "optimizer": "tampered",
    "checkpoint-9": "incomplete", "checkpoint-9/.x": "incomplete", "scheduler.pt": "tampered",
}.items():  # fmt: skip
    attack(ASIDE, f"weights in {folder}/", right, lambda d, f=folder: checked(aside(d, f)))
attack(ASIDE, "what FSDP keeps in optimizer_0/", "good", lambda d: checked(aside(d, "optimizer_0", "__0_0.distcp")))


def linked(place: Path) -> Path:
    saved = taught(place)
    (saved / "expert").symlink_to(Path(model_dir(place, "evil", "mit")))
    return saved


def hidden_by_an_empty_record(place: Path, content: str) -> Path:
    saved = aside(place, "extra")
    (saved / "extra" / "lineage.json").write_text(content)
    return saved


def looped(place: Path) -> Path:
    saved = taught(place)
    (saved / "loop").symlink_to(saved)
    return saved


attack(ASIDE, "a linked directory", "tampered", lambda d: checked(linked(d)))
attack(ASIDE, "a link to itself", "good", lambda d: checked(looped(d)))
attack(ASIDE, "a directory with an empty lineage.json", "tampered", lambda d: checked(hidden_by_an_empty_record(d, "")))
attack(ASIDE, "a directory with another's lineage.json", "tampered", lambda d: checked(
    hidden_by_an_empty_record(d, (taught(d, "mit", "other") / "lineage.json").read_text())))  # fmt: skip

# Cards whose licence must be seen
CARD = "B card"


def rewritten(place: Path, edit: Callable[[str], bytes]) -> Path:
    saved = taught(place)
    (saved / "README.md").write_bytes(edit((saved / "README.md").read_text()))
    return saved


def relicensed(text: str) -> str:
    return text.replace("license: apache-2.0", "license: cc0-1.0", 1)


for name, edit in {
    "a byte-order mark": lambda t: b"\xef\xbb\xbf" + relicensed(t).encode(),
    "a blank line before": lambda t: b"\n" + relicensed(t).encode(),
    "blanks before the marks": lambda t: b"  " + relicensed(t).encode(),
    "Windows line ends": lambda t: relicensed(t).replace("\n", "\r\n").encode(),
}.items():
    attack(CARD, f"another licence behind {name}", "violation", lambda d, e=edit: checked(rewritten(d, e)))
attack(CARD, "another licence, and no section any more", "violation", lambda d: checked(
    rewritten(d, lambda t: relicensed(t[: t.index("<!-- kd-plugin")]).encode())))  # fmt: skip
FRONTS = {
    "a byte-order mark": b"\xef\xbb\xbf---\nlicense: llama2\n---\n",
    "a byte-order mark and Windows line ends": b"\xef\xbb\xbf---\r\nlicense: llama2\r\n---\r\n",
    "a blank line": b"\n---\nlicense: llama2\n---\n",
    "old Macintosh line ends": b"---\rlicense: llama2\r---\r",
    "a capital letter": b"---\nLicense: llama2\n---\n",
    "two spellings": b"---\nlicense: mit\nLicence: llama2\n---\n",
}
for name, raw in FRONTS.items():
    attack(CARD, f"llama2 behind {name}", "block", lambda d, r=raw: gate(d, teacher=Source("t", ref=with_card(d, r))))
attack(CARD, "llama2 in UTF-16", "unknown", lambda d: gate(
    d, teacher=Source("t", ref=with_card(d, "---\nlicense: llama2\n---\n".encode("utf-16")))))  # fmt: skip


def with_card(place: Path, raw: bytes) -> str:
    directory = model_dir(place, "m")
    (Path(directory) / "README.md").write_bytes(raw)
    return directory


# A dataset that a teacher wrote, and the record beside it
TEXT = "B text"


def written(place: Path, licence: str = "mit", name: str = "text", **config: Any) -> Path:
    """Make a dataset of a teacher's text, as a capture ends."""
    directory = place / name
    directory.mkdir()
    teacher = Source("t", ref=model_dir(place, f"{name}-teacher", licence), signal="text")
    publish_dataset(
        directory, [pa.table({"prompt": [name], "completion": ["b"]})], lineage=outputs_record(teacher, config=config),
        sampling={}, selection=Selection(kept=1), budget=Budget(), complete=True,
    )  # fmt: skip
    return directory


def read(place: Path, directory: Path) -> str:
    return gate(place, data=Source(directory.name, "dataset", str(directory), signal="text", found_beside=True))


def replaced(place: Path, name: str) -> Path:
    mine, other = written(place), written(place, name="other")
    shutil.copy(other / name, mine / name)
    return mine


def without(place: Path, name: str) -> Path:
    mine = written(place)
    (mine / name).unlink()
    return mine


def further(place: Path) -> Path:
    mine = written(place)
    shutil.copy(mine / "train-00000.parquet", mine / "train-00001.parquet")
    return mine


def said_mit(place: Path) -> Path:
    mine = written(place, "llama3.1")
    path = mine / "teacher_text.json"
    path.write_bytes(path.read_bytes().replace(b'"llama3.1"', b'"mit"'))
    return mine


attack(TEXT, "text beside its own record", "allow", lambda d: read(d, written(d)))
attack(TEXT, "text of a Llama 3.1 teacher", "conditional", lambda d: read(d, written(d, "llama3.1")))
attack(TEXT, "rows of another text", "unknown", lambda d: read(d, replaced(d, "train-00000.parquet")))
attack(TEXT, "the record of another text", "unknown", lambda d: read(d, replaced(d, "teacher_text.json")))
attack(TEXT, "the record left behind", "unknown", lambda d: read(d, without(d, "teacher_text.json")))
attack(TEXT, "further rows beside it", "unknown", lambda d: read(d, further(d)))
attack(TEXT, "a record that was edited", "unknown", lambda d: read(d, said_mit(d)))
attack(TEXT, "a stranger who calls the teacher own", "unknown", lambda d: read(
    d, written(d, "unheard-of", teachers={"t": {"license": "own"}})))  # fmt: skip
