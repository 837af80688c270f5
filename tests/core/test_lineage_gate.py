import pytest

from kd_plugin.errors import ConfigError, LicenseRefusedError
from kd_plugin.lineage import RunLineage, Source, outputs_record
from tests.core.lineage_help import model_dir, run_of


def refusal(run):
    with pytest.raises(LicenseRefusedError) as caught:
        run.require_trainable()
    return str(caught.value)


def test_permissive_licences_may_teach_and_leave_duties(tmp_path):
    run = run_of(tmp_path, "mit", "bsd-3-clause")
    run.require_trainable()
    assert run.verdict.decision == "allow_with_duties"
    assert {d.terms for d in run.verdict.obligations} == {"apache-2.0", "mit", "bsd-3-clause"}
    assert run.verdict.license_expression == "Apache-2.0"


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"endpoint": "https://api.openai.com/v1", "model": "gpt-4o"}, "compete with OpenAI"),
        ({"endpoint": "https://me.openai.azure.com/"}, "compete with OpenAI"),
        ({"endpoint": "http://gateway.local:4000", "model": "openai/gpt-4o-2024-08-06"}, "compete with OpenAI"),
        ({"model": "claude-opus-4-1"}, "without prior authorisation"),
        ({"endpoint": "api.anthropic.com"}, "without prior authorisation"),
        ({"repo": "anthropic/claude-3-opus"}, "without prior authorisation"),
        ({"endpoint": "https://generativelanguage.googleapis.com/v1beta/openai/"}, "replicate"),
        ({"model": "grok-4"}, "distillation"),
    ],
)
def test_closed_apis_are_refused_although_a_local_path_with_a_free_licence_would_be_loaded(tmp_path, declared, says):
    message = refusal(run_of(tmp_path, "mit", config={"teachers": {"t0": declared}}))
    assert says in message
    assert "written permission" in message
    assert "not legal advice" in message


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-xl", "openai/gpt-oss-20b", "EleutherAI/gpt-neo-1.3B"])
def test_open_weights_with_similar_names_are_judged_by_their_licence(tmp_path, name):
    run = run_of(tmp_path, "mit", config={"teachers": {"t0": {"model": name, "endpoint": "http://127.0.0.1:8000"}}})
    run.require_trainable()


def test_a_dataset_that_a_closed_model_wrote_is_refused(tmp_path):
    datasets = [{"repo": "someone/instructions", "license": "mit", "generated_by": ["gpt-4"]}]
    message = refusal(run_of(tmp_path, config={"datasets": datasets}))
    assert "gpt-4: OpenAI" in message


def test_a_dataset_that_an_unknown_model_wrote_is_refused_and_its_cure_cures(tmp_path):
    def run(writer):
        datasets = [{"repo": "someone/texts", "license": "mit", "generated_by": [writer]}]
        return run_of(tmp_path, config={"datasets": datasets})

    cure = "datasets: [{repo: someone/texts, generated_by: [{model: org/writer, license: apache-2.0}]}]"
    assert cure in refusal(run("org/writer"))
    run({"model": "org/writer", "license": "apache-2.0"}).require_trainable()
    assert "OpenAI" in refusal(run({"model": "gpt-4o", "license": "mit"}))


def test_a_cache_cannot_be_captured_from_a_closed_model(tmp_path):
    with pytest.raises(LicenseRefusedError, match="Anthropic"):
        outputs_record(Source("t", endpoint="https://api.anthropic.com", model="claude-sonnet-4"))


def test_no_licence_at_all_is_refused_and_one_line_of_config_cures_it(tmp_path):
    bare = model_dir(tmp_path, "bare")

    def run(config=None):
        student = Source("student", ref=model_dir(tmp_path, f"s{len(list(tmp_path.iterdir()))}", "mit"))
        return RunLineage(method="sft", student=student, teachers=[Source("math", ref=bare)], config=config)

    message = refusal(run())
    assert "bare: Unknown licence" in message
    assert "`lineage: {teachers: {math: {license: apache-2.0}}}`" in message
    run({"teachers": {"math": {"license": "apache-2.0"}}}).require_trainable()
    run({"teachers": {"math": {"license": "own"}}}).require_trainable()


def test_an_unknown_student_is_refused_and_names_its_cure(tmp_path):
    run = RunLineage(method="sft", student=Source("student", ref=model_dir(tmp_path, "bare")))
    assert "`lineage: {student: {license: apache-2.0}}`" in refusal(run)


def test_a_misspelt_licence_is_unknown_and_suggests_the_known_one(tmp_path):
    message = refusal(run_of(tmp_path, "mit", config={"student": {"license": "apache2.0"}}))
    assert "declared: apache2.0 (Did you mean 'apache-2.0'?)" in message


def test_data_in_memory_is_noted_and_not_refused(tmp_path):
    run = RunLineage(
        method="sft",
        student=Source("student", ref=model_dir(tmp_path, "s", "mit")),
        datasets=[Source("train", "dataset", signal="text")],
    )
    run.require_trainable()
    assert [f.code for f in run.verdict.findings] == ["undeclared_dataset"]


def test_a_dataset_with_a_name_and_no_terms_is_refused(tmp_path):
    run = run_of(tmp_path, config={"datasets": [{"repo": "someone/instructions"}]})
    assert "`lineage: {datasets: [{repo: someone/instructions, license: cc-by-4.0}]}`" in refusal(run)


def test_llama_asks_for_the_facts_it_turns_on_and_the_answers_decide(tmp_path):
    run = run_of(tmp_path, "llama3.1")
    run.require_trainable()
    assert run.verdict.decision == "conditional"
    asked = {f.remedy.split("{use: {")[1].split(":")[0] for f in run.verdict.findings}
    assert asked == {"distribute", "mau_over_700m_at_release"}

    small = {"distribute": True, "mau_over_700m_at_release": False}
    named = run_of(tmp_path, "llama3.1", config={"use": small, "student": {"name": "Llama-acme"}})
    assert named.verdict.decision == "allow_with_duties"
    assert named.verdict.publication_stops == ()

    misnamed = run_of(tmp_path, "llama3.1", config={"use": small, "student": {"name": "acme"}})
    misnamed.require_trainable()
    with pytest.raises(LicenseRefusedError, match="the declared name is 'acme'"):
        misnamed.require_publishable()

    large = run_of(tmp_path, "llama3.1", config={"use": {**small, "mau_over_700m_at_release": True}})
    assert "700 million" in refusal(large)


def test_publishing_is_distribution_even_where_the_user_said_otherwise(tmp_path):
    facts = {"distribute": False, "mau_over_700m_at_release": False}
    run = run_of(tmp_path, "llama3.3", config={"use": facts})
    run.require_trainable()
    with pytest.raises(LicenseRefusedError, match="no name is declared"):
        run.require_publishable()


def test_gemma_makes_the_student_its_derivative_through_a_cache_and_a_checkpoint(tmp_path):
    record = outputs_record(Source("g", ref=model_dir(tmp_path, "g", "gemma")))
    cache = Source("cache", "teacher_outputs", record=record)
    run = RunLineage(method="offline_kd", student=Source("s", ref=model_dir(tmp_path, "s", "mit")), outputs=[cache])
    assert run.verdict.license_expression == "LicenseRef-gemma AND MIT"
    kinds = {(d.kind, d.basis) for d in run.verdict.obligations if d.terms == "gemma"}
    assert kinds == {("use_restrictions", "explicit"), ("license_text", "explicit"), ("notice", "explicit")}


def test_a_cache_without_lineage_is_refused(tmp_path):
    student = Source("s", ref=model_dir(tmp_path, "s", "mit"))
    run = RunLineage(method="offline_kd", student=student, outputs=[Source("old", "teacher_outputs")])
    message = refusal(run)
    assert "old: Unknown licence" in message and "capture these outputs again" in message


def test_a_declaration_for_a_teacher_that_is_not_there_names_the_teachers(tmp_path):
    with pytest.raises(ConfigError, match=r"'t9', which is no teacher of this run; its teachers are 't0'"):
        run_of(tmp_path, "mit", config={"teachers": {"t9": {"license": "mit"}}})


def test_the_gate_needs_no_network_and_loads_no_model(tmp_path, monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("the gate went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    student = Source("student", ref="nobody/knows-this")
    assert "Unknown licence" in refusal(RunLineage(method="sft", student=student))


def test_what_does_not_stop_training_is_logged_once(tmp_path, caplog):
    run = run_of(tmp_path, "llama3.1")
    run.require_trainable()
    run.require_trainable()
    shown = [r.getMessage() for r in caplog.records]
    assert len(shown) == 2 and all("conditional" in m and "say it once in the config" in m for m in shown)


def test_a_caches_facts_that_canonical_json_cannot_hold_become_text(tmp_path):
    record = outputs_record(Source("g", ref=model_dir(tmp_path, "g", "mit")))
    facts = {"digest": "d", "rows": 3, "sampling": {"seed": 2**60, "temperature": 1.0}}
    cache = Source("cache", "teacher_outputs", record={**record, "outputs": facts})
    run = RunLineage(method="offline_kd", student=Source("s", ref=model_dir(tmp_path, "s", "mit")), outputs=[cache])
    (node,) = [n for n in run.graph.nodes.values() if n.kind == "teacher_outputs"]
    assert node.details == {"rows": 3, "sampling": {"seed": str(2**60), "temperature": 1.0}}
    assert node.digest == "d"
