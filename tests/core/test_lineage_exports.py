import io
import json
import os
import threading
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from kd_plugin.cli.lineage import main
from kd_plugin.errors import ConfigError
from kd_plugin.lineage import RunLineage, Source, load_record, outputs_record, verify
from kd_plugin.lineage import run as run_module
from kd_plugin.lineage.card import card_text
from kd_plugin.lineage.shipping import bom_text
from tests.core.lineage_help import RUN, checkpoint, model_dir, run_of

TRL_CARD = """---
base_model: org/base
library_name: transformers
model_name: out
tags:
- generated_from_trainer
- trl
licence: license
---

# Model Card for out

This model was trained with TRL.
"""


@pytest.fixture
def saved(tmp_path):
    directory = checkpoint(tmp_path / "out")
    (directory / "README.md").write_text(TRL_CARD)
    student = Source("student", ref="Qwen/Qwen2.5-7B", revision="a" * 40, license="apache-2.0")
    teachers = [
        Source("g", ref=model_dir(tmp_path, "<script>alert(1)</script>|x".replace("/", "_"), "gemma")),
        Source("r1", ref="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", license="mit", signal="text"),
    ]
    data = [{"repo": "someone/prompts", "license": "cc-by-4.0"}]
    use = {"distribute": True, "mau_over_700m_at_release": False}
    config = {"run": RUN, "datasets": data, "use": use, "student": {"name": "Llama-acme"}}
    RunLineage(method="teacher_panel", student=student, teachers=teachers, config=config).write(directory, step=3)
    return directory


def problem_of(text: str) -> object:
    """What the project's own library has against a CycloneDX document, by the schema of the version it names."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    version = schema.SchemaVersion.from_version(json.loads(text)["specVersion"])
    try:
        return validation.JsonStrictValidator(version).validate_str(text)
    except ImportError as error:  # its extra for validation is not installed
        pytest.skip(str(error))


def test_the_bill_of_materials_is_strictly_valid_cyclonedx(saved, capsys):
    text = (saved / "bom.cdx.json").read_text()
    bom = json.loads(text)
    assert bom["specVersion"] == "1.7" and problem_of(text) is None
    assert problem_of(text.replace('"machine-learning-model"', '"teacher"')) is not None
    assert main(["export", str(saved), "--format", "cyclonedx-1.6"]) == 0
    older = capsys.readouterr().out
    assert json.loads(older) == {**bom, "specVersion": "1.6"} and problem_of(older) is None
    refs = {c["bom-ref"] for c in bom["components"]} | {"self"}
    assert {d["ref"] for d in bom["dependencies"]} == refs
    assert {r for d in bom["dependencies"] for r in d["dependsOn"]} == refs - {"self"}


def test_a_checkpoint_with_an_older_bill_of_materials_verifies_until_it_is_edited(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path / "out")
    with monkeypatch.context() as before:  # what this package wrote before CycloneDX 1.7
        before.setattr(run_module, "bom_text", lambda record: bom_text(record, "1.6"))
        run_of(tmp_path, "mit").write(directory, step=1)
    path = directory / "bom.cdx.json"
    assert json.loads(path.read_text())["specVersion"] == "1.6"
    assert verify(directory).exit_code == 0
    path.write_text(path.read_text().replace('"1.6"', '"1.7"'))
    assert verify(directory).exit_code == 2


def test_the_spdx_export_names_every_source_and_its_relations(saved, tmp_path):
    output = tmp_path / "sbom.json"
    assert main(["export", str(saved), "--format", "spdx", "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    graph = document["@graph"]
    ids = [e["spdxId"] for e in graph if "spdxId" in e]
    assert len(ids) == len(set(ids))
    for relationship in (e for e in graph if e["type"] == "Relationship"):
        assert relationship["from"] in ids and set(relationship["to"]) <= set(ids)
    record = load_record(saved)
    packages = [e for e in graph if e["type"] in ("ai_AIPackage", "dataset_DatasetPackage")]
    assert len(packages) == len(record["nodes"]) + 1
    assert {e["relationshipType"] for e in graph if e["type"] == "Relationship"} == {
        "contains", "descendantOf", "hasDeclaredLicense", "trainedOn",
    }  # fmt: skip


def test_the_spdx_export_is_valid_spdx_3_0_1(saved, capsys):
    from spdx_python_model import v3_0_1 as spdx  # made by the SPDX project from the model's SHACL

    assert main(["export", str(saved), "--format", "spdx"]) == 0
    text = capsys.readouterr().out

    def check(document: str) -> None:
        """Check types, patterns and vocabularies on reading, and numbers of properties on writing."""
        objects = spdx.SHACLObjectSet()
        spdx.JSONLDDeserializer().read(io.BytesIO(document.encode()), objects)
        assert not objects.missing_ids
        spdx.JSONLDSerializer().write(objects, io.BytesIO())

    check(text)
    for broken in (
        text.replace("hasDeclaredLicense", "hasSomeLicense"),
        text.replace("T00:00:00Z", ""),
        text.replace('"dataset_datasetType"', '"dataset_type"'),
        text.replace('"algorithm": "sha256",', ""),
    ):
        assert broken != text
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            check(broken)


def test_the_card_keeps_trls_words_and_says_what_is_so(saved):
    text = (saved / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert "licence" not in front
    assert front["license"] == "other" and front["license_link"] == "NOTICE"
    assert front["license_name"] == "apache-2.0-and-gemma"
    assert front["base_model"] == "Qwen/Qwen2.5-7B" and front["base_model_relation"] == "finetune"
    assert front["tags"] == ["generated_from_trainer", "trl", "distillation"]
    assert {t["name"] for t in front["distillation"]["teachers"]} == {"g", "r1"}
    assert "This model was trained with TRL." in text
    assert "## License lineage" in text and "Built with Llama." in text and "not legal advice" in text
    assert "<script>" not in text.split("---\n", 2)[2]


def test_a_card_written_twice_has_one_section(saved):
    once = (saved / "README.md").read_text()
    assert card_text(once, load_record(saved)) == once


def test_the_hub_accepts_the_front_matter(saved):
    from huggingface_hub import ModelCard

    data = ModelCard((saved / "README.md").read_text()).data
    assert data.license == "other" and data.base_model == "Qwen/Qwen2.5-7B"
    assert data.to_dict()["distillation"]["method"] == "teacher_panel"


def test_a_plain_licence_is_named_by_its_hub_id(tmp_path):
    directory = checkpoint(tmp_path / "out")
    run_of(tmp_path, "mit").write(directory, step=1)
    front = yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert "base_model" not in front  # a local directory is no hub id


def test_front_matter_that_cannot_be_read_is_kept_as_text(saved):
    text = card_text("---\nx: [\n---\nhello\n", load_record(saved))
    assert "x: [" in text and "hello" in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["distillation"]


def test_a_later_edit_of_the_card_is_no_tampering(saved):
    (saved / "README.md").write_text("the trainer writes its own card again")
    assert verify(saved).exit_code == 0


def test_the_graph_is_one_well_formed_svg_without_script(saved, capsys):
    assert main(["graph", str(saved)]) == 0
    drawn = capsys.readouterr().out
    root = ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg")
    assert "script" not in {element.tag.rsplit("}")[-1] for element in root.iter()}
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    boxes = [e for e in root.iter() if e.tag.endswith("rect") and float(e.get("width")) > 200 and e.get("x")]
    assert len(boxes) == len(load_record(saved)["nodes"]) + 1


def test_markdown_export_is_the_cards_section(saved, capsys):
    assert main(["export", str(saved), "--format", "markdown"]) == 0
    assert capsys.readouterr().out.strip() in (saved / "README.md").read_text()


def test_diff_lists_what_changed_and_is_silent_otherwise(tmp_path, capsys):
    first, second, third = (checkpoint(tmp_path / "out", f"checkpoint-{i}") for i in (1, 2, 3))
    run_of(tmp_path, "mit").write(first, step=1)
    run_of(tmp_path, "mit").write(second, step=2)
    run_of(tmp_path, "mit", "gemma").write(third, step=3)
    assert main(["diff", str(first), str(second)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["diff", str(second), str(third)]) == 1
    changed = capsys.readouterr().out
    assert "+ source: distilled logits teacher-1-gemma [gemma]" in changed
    assert "- licence: Apache-2.0\n+ licence: Apache-2.0 AND LicenseRef-gemma" in changed
    (third / "lineage.json").unlink()
    assert main(["diff", str(second), str(third)]) == 3


CHECKS = [
    ("student: {repo: a/b, license: mit}\nteachers: {r1: {repo: deepseek-ai/DeepSeek-R1, license: mit}}\n", 0),
    ("student: {repo: a/b, license: mit}\nteachers: {gpt: {endpoint: https://api.openai.com/v1, model: gpt-4o}}\n", 1),
    ("student: {repo: a/b, license: mit}\nteachers: {x: {repo: c/d}}\n", 1),
    (
        "student: {repo: a/b, license: mit, name: acme}\nteachers: {l: {repo: c/d, license: llama3.1}}\n"
        "use: {distribute: true, mau_over_700m_at_release: false}\n",
        1,
    ),
    ("student: {repo: a/b, license: mit}\nteachers: {l: {repo: c/d, license: llama3.1}}\n", 3),
    ("student: {repo: a/b, licens: mit}\n", 2),
    ("student: [\n", 2),
]


@pytest.mark.parametrize(("text", "code"), CHECKS)
def test_check_has_an_exit_code_for_every_outcome(tmp_path, capsys, text, code):
    path = tmp_path / "lineage.yaml"
    path.write_text(text)
    assert main(["check", str(path)]) == code
    shown = capsys.readouterr()
    assert ("not legal advice" in shown.out) == (code != 2)
    assert main(["check", str(path), "--json"]) == code


def test_an_adapter_is_called_an_adapter(tmp_path):
    directory = checkpoint(tmp_path / "out")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    student = Source("student", ref="org/base", license="mit")
    RunLineage(method="sft", student=student, config={"run": RUN}).write(directory, step=1)
    front = yaml.safe_load((directory / "README.md").read_text().split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("org/base", "adapter")


def test_the_card_tells_who_taught_it_from_who_taught_its_teacher(tmp_path):
    middle = checkpoint(tmp_path / "out", "middle")
    run_of(tmp_path, "gemma").write(middle, step=1)
    student = Source("student", ref=model_dir(tmp_path, "small", "mit"))
    cache = Source("c", "teacher_outputs", record=outputs_record(Source("expert", ref=str(middle))))
    run = RunLineage(method="offline_kd", student=student, outputs=[cache], config={"run": RUN})
    first, last = checkpoint(tmp_path / "run", "checkpoint-1"), checkpoint(tmp_path / "run", "checkpoint-2")
    run.write(first, step=1)
    run.resume(first)
    run.write(last, step=2)
    front = yaml.safe_load((last / "README.md").read_text().split("---")[1])
    assert front["distillation"]["teachers"] == [
        {"name": "expert", "model": "middle", "signal": "distributions", "license": []},
        {"name": "t0", "model": "teacher-0-gemma", "signal": "distributions", "license": ["gemma"], "taught": "middle"},
    ]
    assert "Decision: **allow with duties**." in (last / "README.md").read_text()


def test_a_card_that_names_another_licence_is_a_violation(saved):
    card = saved / "README.md"
    card.write_text(card.read_text().replace("license: other", "license: mit"))
    report = verify(saved)
    assert report.exit_code == 1 and "front matter says {'license': 'mit'" in report.problems[0].message


def test_a_licence_text_that_someone_added_is_noted(saved):
    (saved / "LICENSES" / "free.txt").write_text("Do as you please.")
    report = verify(saved)
    assert report.exit_code == 0 and report.notes == ("LICENSES/free.txt is not of this record",)


def test_an_output_that_is_no_file_is_written_to_and_not_replaced(saved, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    read: list[str] = []
    reader.start()
    assert main(["export", str(saved), "--format", "markdown", "--output", str(pipe)]) == 0
    reader.join(10)
    assert pipe.is_fifo() and read[0].startswith("## License lineage")
    with pytest.raises(ConfigError, match=r"--output '.*' cannot be written: No such file"):
        main(["export", str(saved), "--format", "markdown", "--output", str(tmp_path / "no" / "x")])
