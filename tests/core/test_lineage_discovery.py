import hashlib
from importlib import resources

import pytest

from kd_plugin.errors import LicenseRefusedError, LineageError
from kd_plugin.lineage import RunLineage, Source, load_record, verify
from kd_plugin.lineage.discovery import discover
from kd_plugin.lineage.graph import SELF, Evidence, Graph, Node
from kd_plugin.lineage.readings import recognise
from kd_plugin.lineage.registry import default_registry
from tests.core.lineage_help import checkpoint, model_dir, run_of

REGISTRY = default_registry()


def text_of(name):
    return resources.files("kd_plugin.lineage").joinpath("texts", f"{name}.txt").read_text()


def find(directory, **kwargs):
    return discover(Source("x", ref=directory, **kwargs), REGISTRY)


def test_every_shipped_text_is_recognised_as_itself():
    for terms_id, entry in REGISTRY.terms.items():
        if entry.text:
            assert recognise(REGISTRY.text(terms_id), REGISTRY).id == terms_id


def test_a_licence_file_is_recognised_with_holder_filled_in_and_lines_rewrapped(tmp_path):
    text = text_of("mit").replace("Copyright (c) [year] [fullname]", "Copyright (c) 2025 DeepSeek")
    node = find(model_dir(tmp_path, "m", license_text=text.replace("\n", "  \n\n"))).node
    assert node.licenses == ("mit",)
    assert node.copyright == ("Copyright (c) 2025 DeepSeek",)


@pytest.mark.parametrize("added", ["It may not be used commercially.", "Research only.", "No model may be trained."])
def test_a_licence_with_an_added_condition_is_no_longer_that_licence(tmp_path, added):
    node = find(model_dir(tmp_path, "m", card="mit", license_text=text_of("mit") + added)).node
    assert node.licenses == ("unknown",)
    (seen,) = [e.value for e in node.evidence if e.where == "LICENSE"]
    assert seen.startswith("a text that resembles MIT License and differs by: ")


def test_where_sources_disagree_the_more_severe_counts_and_shows(tmp_path):
    run = RunLineage(
        method="sft",
        student=Source("s", ref=model_dir(tmp_path, "s", card="mit", license_text=text_of("llama3.1")), license="own"),
    )
    assert run.graph.nodes and next(iter(run.graph.nodes.values())).licenses == ("llama3.1",)
    (finding,) = [f for f in run.verdict.findings if f.code == "sources_disagree"]
    assert "declared: own" in finding.evidence and "README.md: mit" in finding.evidence


def test_a_base_model_brings_its_terms_along_whatever_the_badge_says(tmp_path):
    base = model_dir(tmp_path / "org", "base", "llama3.1")
    found = find(model_dir(tmp_path, "derived", "mit"))
    assert len(found.graph.nodes) == 1
    (tmp_path / "derived" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
    found = find(str(tmp_path / "derived"))
    assert sorted(n.licenses for n in found.graph.nodes.values()) == [("llama3.1",), ("mit",)]
    assert [e.kind for e in found.graph.edges] == ["adapter_of"]


def test_a_base_that_cannot_be_read_is_unknown_unless_the_user_answers_for_the_model(tmp_path):
    directory = model_dir(tmp_path, "m", "license: mit\nbase_model: nobody/base")
    student = Source("s", ref=directory)
    assert RunLineage(method="sft", student=student).verdict.decision == "unknown"
    run = RunLineage(method="sft", student=student, config={"student": {"license": "mit"}})
    assert run.verdict.decision == "allow_with_duties"
    assert [f.code for f in run.verdict.findings] == ["base_not_read"]


def test_two_cards_that_name_each_other_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_dir(tmp_path / "org", "a", "license: mit\nbase_model: org/b")
    model_dir(tmp_path / "org", "b", "license: mit\nbase_model: org/a")
    assert len(find("org/a").graph.nodes) == 2


def test_a_checkpoint_of_ours_brings_its_ancestors(tmp_path):
    before = run_of(tmp_path, "gemma")
    saved = checkpoint(tmp_path / "out")
    before.write(saved, step=1)
    after = RunLineage(method="sft", student=Source("student", ref=str(saved)))
    assert after.verdict.license_expression == before.verdict.license_expression
    assert {d.terms for d in after.verdict.obligations} == {d.terms for d in before.verdict.obligations}


def test_an_edited_parent_record_is_an_error(tmp_path):
    saved = checkpoint(tmp_path / "out")
    run_of(tmp_path, "gemma").write(saved, step=1)
    record = saved / "lineage.json"
    record.write_text(record.read_text().replace('"gemma"', '"mit"'))
    with pytest.raises(LineageError, match="was changed"):
        RunLineage(method="sft", student=Source("student", ref=str(saved)))


def test_hostile_cards_execute_nothing_and_say_nothing(tmp_path):
    bomb = "a: &a [x,x]\nb: &b [*a,*a]\nlicense: mit"
    assert find(model_dir(tmp_path, "bomb", bomb)).node.licenses == ("unknown",)
    code = "license: !!python/object/apply:os.system ['touch /tmp/owned']"
    assert find(model_dir(tmp_path, "code", code)).node.licenses == ("unknown",)


def test_huge_and_outward_leading_licence_files_are_not_read(tmp_path):
    huge = model_dir(tmp_path, "huge", "mit", license_text="x" * (2 << 20))
    assert find(huge).node.licenses == ("unknown",)
    secret = tmp_path / "secret.txt"
    secret.write_text("Copyright (c) 2025 Secret")
    leads_out = model_dir(tmp_path, "out", "mit")
    (tmp_path / "out" / "LICENSE").symlink_to(secret)
    node = find(leads_out).node
    assert node.licenses == ("unknown",)
    assert "Secret" not in str(node.to_json())


def test_no_path_of_the_machine_is_recorded(tmp_path):
    node = find(model_dir(tmp_path, "m", "mit")).node
    assert str(tmp_path) not in str(node.to_json())
    gone = discover(Source("d", "dataset", ref="/data/of/someone/train.jsonl"), REGISTRY).node
    assert (gone.name, gone.repo) == ("train.jsonl", None)
    server = discover(Source("t", endpoint="https://user:pass@host:1/v1", model="m", license="mit"), REGISTRY).node
    assert server.endpoint == "host"


def test_the_hubs_cache_gives_repo_and_commit(tmp_path, monkeypatch):
    commit = "a" * 40
    repo = tmp_path / "models--org--m"
    blob = repo / "blobs" / "1"
    blob.parent.mkdir(parents=True)
    blob.write_text("---\nlicense: gemma\n---\n")
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").symlink_to("../../blobs/1")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    node = find("org/m").node
    assert (node.repo, node.revision, node.licenses) == ("org/m", commit, ("gemma",))


def test_a_node_says_how_sure_its_licence_is(tmp_path):
    def node(*evidence):
        return Node("model", "x", evidence=tuple(Evidence(*e) for e in evidence))

    assert node().sure == "nothing"
    assert node(("hub", "not asked", ())).sure == "nothing"
    assert node(("README.md", "mit", ("mit",))).sure == "stated"
    assert node(("declared", "mit", ("mit",))).sure == "declared"
    assert node(("LICENSE.txt", "MIT License", ("mit",)), ("README.md", "mit", ("mit",))).sure == "text"
    disputed = node(("declared", "mit", ("mit",)), ("README.md", "gemma", ("gemma",)))
    assert disputed.sure == "disputed"
    assert Node.from_json(disputed.to_json()) == disputed
    with pytest.raises(LineageError, match="says that it is 'text'"):
        Node.from_json({**disputed.to_json(), "sure": "text"})


def test_other_is_something_only_with_both_a_name_and_a_link(tmp_path):
    name = "license: other\nlicense_name: mit"
    assert find(model_dir(tmp_path, "a", name)).node.licenses == ("unknown",)
    assert find(model_dir(tmp_path, "b", f"{name}\nlicense_link: LICENSE")).node.licenses == ("mit",)
    assert find(model_dir(tmp_path, "c", "license: other\nlicense_link: LICENSE")).node.licenses == ("unknown",)


@pytest.mark.parametrize("file", ["config.json", "dataset_info.json"])
def test_a_licence_in_a_config_is_read_and_the_more_severe_counts(tmp_path, file):
    directory = model_dir(tmp_path, "m", "mit")
    (tmp_path / "m" / file).write_text('{"license": "cc-by-nc-4.0", "model_type": "x"}')
    node = find(directory).node
    assert node.licenses == ("cc-by-nc-4.0",) and node.sure == "disputed"
    (tmp_path / "m" / file).write_text("[" * 100_000)  # whoever loads it will say so
    assert find(directory).node.licenses == ("mit",)


def test_a_card_that_is_padded_or_leads_elsewhere_does_not_go_unread(tmp_path):
    padded = model_dir(tmp_path, "padded", license_text=text_of("mit"))
    (tmp_path / "padded" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n" + "x" * (2 << 20))
    assert find(padded).node.licenses == ("cc-by-nc-4.0",)
    (tmp_path / "padded" / "README.md").write_text("---\nx: " + "x" * (2 << 20) + "\nlicense: cc-by-nc-4.0\n---\n")
    assert find(padded).node.licenses == ("unknown",)
    out = model_dir(tmp_path, "out", license_text=text_of("mit"))
    (tmp_path / "out" / "README.md").symlink_to(tmp_path / "padded" / "README.md")
    assert find(out).node.licenses == ("unknown",)


def test_a_card_that_lists_licences_without_end_is_not_understood(tmp_path):
    names = ", ".join(f"made-up-{i}" for i in range(500))
    node = find(model_dir(tmp_path, "m", f"license: [mit, {names}]")).node
    assert node.licenses == ("unknown",) and [e.value for e in node.evidence] == [
        "501 licences, more than a card can mean"
    ]
    assert find(model_dir(tmp_path, "n", f"license: [{', '.join(['mit'] * 900)}]")).node.licenses == ("mit",)


def test_a_student_of_merged_weights_names_each_of_its_parents_by_hash(tmp_path):
    trained = checkpoint(tmp_path / "out")
    run_of(tmp_path, "gemma").write(trained, step=1)
    plain = model_dir(tmp_path, "adapter", "llama3.1")
    base, saved = model_dir(tmp_path, "base", "mit"), checkpoint(tmp_path, "merged")
    declared = {"student": {"merged_from": [str(trained), plain]}}
    run = RunLineage(method="sft", student=Source("student", ref=base), config=declared)
    run.write(saved, step=1)
    record = load_record(saved)
    graph = Graph.from_json(record)
    mine = [edge for edge in graph.edges if edge.source == SELF]
    assert sorted(edge.kind for edge in mine) == ["initialized_from", "merged_from", "merged_from"]
    parents = [graph.nodes[edge.target] for edge in mine if edge.kind == "merged_from"]
    assert {node.digest for node in parents} == {load_record(trained)["digest"], None}
    weights = hashlib.sha256((tmp_path / "adapter" / "model.safetensors").read_bytes()).hexdigest()
    assert {"model.safetensors": weights} in [node.weights for node in parents]
    assert not any(node.repo for node in parents), "a path is no repository"
    assert {"gemma", "llama3.1"} <= {i for node in graph.nodes.values() for i in node.licenses}
    assert {d.terms for d in run.verdict.obligations} >= {"llama3.1"}
    assert verify(saved).exit_code == 0


def test_a_merged_parent_without_terms_is_refused_until_they_are_declared(tmp_path):
    base, parent = model_dir(tmp_path, "base", "mit"), model_dir(tmp_path, "adapter")

    def gate(item):
        config = {"student": {"merged_from": [item]}}
        RunLineage(method="sft", student=Source("student", ref=base), config=config).require_trainable()

    with pytest.raises(LicenseRefusedError, match=r"merged_from: \[\{repo: \.\.\./adapter, license: apache-2.0\}\]"):
        gate(parent)
    gate({"repo": parent, "license": "own"})


def test_what_an_entry_asks_to_be_shown_stands_in_its_own_text():
    for entry in REGISTRY.terms.values():
        text = " ".join((REGISTRY.text(entry.id) or "").split())
        for clause in entry.clauses if text else ():
            assert clause.value is None or clause.value in text, (entry.id, clause.value)


@pytest.mark.parametrize("old, new", [("100 million", "10 million"), ("20 million", "30 million"), ("K2.5", "K2.9")])
def test_a_text_with_another_amount_or_another_name_to_show_is_another_licence(old, new):
    changed = text_of("kimi-k2.5").replace(old, new)
    assert recognise(changed, REGISTRY).id is None
    assert recognise(text_of("kimi-k2.5").replace("2026", "2027"), REGISTRY).id == "kimi-k2.5"
