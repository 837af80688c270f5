from dataclasses import replace

import pytest

from kd_plugin.errors import ConfigError, LicenseRefusedError
from kd_plugin.lineage import RunLineage, Source, load_record, outputs_record, verify
from kd_plugin.lineage.registry import default_registry, load_registry
from tests.core.lineage_help import checkpoint

OPENAI = default_registry().terms["openai-terms"]
EXCEPTION = {
    "rule": "forbidden",
    "terms": "openai-terms",
    "cite": OPENAI.clauses[0].cite,
    "terms_sha256": OPENAI.digest,
    "subject": "gpt-4o",
    "basis": "written_authorisation",
    "approved_by": "A. Counsel",
    "approved_on": "2026-01-01",
    "expires": "2099-01-01",
    "scope": "internal classifier",
    "reason": "letter of 2025-12-20",
}


def run(exception=None, **kwargs):
    config = {"run": {"id": "r", "date": "2026-06-01"}, "overrides": [exception] if exception else []}
    student = Source("student", ref="org/s", license="mit")
    teacher = Source("gpt", endpoint="https://api.openai.com/v1", model="gpt-4o")
    return RunLineage(method="sft", student=student, teachers=[teacher], config=config, **kwargs)


def test_a_matching_exception_lets_it_stand_and_says_so():
    with pytest.raises(LicenseRefusedError, match=OPENAI.digest):  # the refusal says what an exception must name
        run().require_trainable()
    allowed = run(EXCEPTION)
    allowed.require_trainable()
    allowed.require_publishable()
    assert allowed.verdict.decision == "overridden"
    (finding,) = [f for f in allowed.verdict.findings if f.severity == "overridden"]
    assert "A. Counsel" in finding.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"rule": "unknown_license"},
        {"terms": "anthropic-terms"},
        {"cite": "restrictions"},
        {"terms_sha256": "0" * 64},
        {"subject": "gpt-4"},
        {"expires": "2026-05-31"},
        {"approved_on": "2026-06-02"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_exception_that_does_not_match_exactly_or_is_not_in_force_is_none(change):
    with pytest.raises(LicenseRefusedError):
        run({**EXCEPTION, **change}).require_trainable()


@pytest.mark.parametrize("key", sorted(EXCEPTION))
def test_an_exception_is_a_whole_record(key):
    with pytest.raises(ConfigError, match=key):
        run({k: v for k, v in EXCEPTION.items() if k != key})


def test_an_exception_has_a_known_basis_and_real_dates():
    with pytest.raises(ConfigError, match="expected one of written_authorisation"):
        run({**EXCEPTION, "basis": "because"})
    with pytest.raises(ConfigError, match="expected a date"):
        run({**EXCEPTION, "expires": "soon"})
    with pytest.raises(ConfigError, match=r"unknown key 'reasons'.*'reason'"):
        run({**EXCEPTION, "reasons": "x"})


def test_no_environment_variable_grants_one(monkeypatch):
    for name in ("KD_PLUGIN_OVERRIDE", "KD_PLUGIN_ALLOW", "LINEAGE_OVERRIDES", "KD_PLUGIN_OVERRIDES"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(LicenseRefusedError):
        run().require_trainable()


def test_a_descendant_is_overridden_too_and_never_plainly_allowed(tmp_path):
    parent = checkpoint(tmp_path / "out")
    run(EXCEPTION).write(parent, step=1)
    assert verify(parent).exit_code == 0
    child = RunLineage(method="sft", student=Source("student", ref=str(parent)), config={"run": {"date": "2026-06-02"}})
    child.require_trainable()
    assert child.verdict.decision == "overridden"
    saved = checkpoint(tmp_path / "out", "child")
    child.write(saved, step=1)
    assert load_record(saved)["overrides"] == [EXCEPTION]
    late = RunLineage(method="sft", student=Source("student", ref=str(parent)), config={"run": {"date": "2099-06-02"}})
    with pytest.raises(LicenseRefusedError):
        late.require_trainable()


def test_a_cache_carries_its_exception_to_the_student():
    config = {"run": {"date": "2026-06-01"}, "overrides": [EXCEPTION]}
    teacher = Source("gpt", endpoint="https://api.openai.com/v1", model="gpt-4o")
    record = outputs_record(teacher, config=config)
    student = RunLineage(
        method="offline_kd",
        student=Source("student", ref="org/s", license="mit"),
        outputs=[Source("cache", "teacher_outputs", record=record)],
        config={"run": {"date": "2026-06-02"}},
    )
    assert student.verdict.decision == "overridden"


def test_verify_reports_an_exception_that_expired_since(tmp_path):
    directory = checkpoint(tmp_path / "out")
    short = {**EXCEPTION, "expires": "2026-06-02"}
    run(short).write(directory, step=1)
    report = verify(directory)
    assert report.exit_code == 1
    assert "expired on 2026-06-02" in str(report.problems[0])


def test_changed_terms_void_an_exception():
    assert replace(OPENAI, name="new words").digest != OPENAI.digest


def test_a_registry_of_ones_own_adds_and_replaces_and_is_named_by_its_digest(tmp_path):
    (tmp_path / "acme.txt").write_text("The ACME licence.\n")
    path = tmp_path / "mine.toml"
    path.write_text(
        'version = "acme-1"\n'
        '[[license]]\nid = "acme"\nname = "ACME licence"\nspdx = "LicenseRef-acme"\nread = "2026-11-24"\n'
        'source = "our lawyers"\n'
        '[[license.clauses]]\ncite = "1"\neffect = "forbid"\nkind = "no_training"\nsays = "No training."\n'
        'trigger = "training"\nreach = ["logits", "outputs"]\n'
    )
    registry = load_registry(path)
    assert registry.text("acme") == "The ACME licence.\n"
    assert registry.resolve("acme").ids == ("acme",) and registry.resolve("mit").ids == ("mit",)
    assert registry.sha256 != default_registry().sha256
    refused = RunLineage(
        method="sft",
        student=Source("student", ref="org/s", license="mit"),
        teachers=[Source("t", ref="org/t", license="acme")],
        config={"registry": str(path)},
    )
    with pytest.raises(LicenseRefusedError, match="ACME licence, 1: No training"):
        refused.require_trainable()
    base = RunLineage(
        method="sft", student=Source("student", ref="org/s", license="acme"), config={"registry": str(path)}
    )
    directory = checkpoint(tmp_path / "out")
    base.write(directory, step=1)
    assert (directory / "LICENSES" / "acme.txt").read_text() == "The ACME licence.\n"
    assert load_record(directory)["policy"]["version"].endswith("+acme-1")
    report = verify(directory)
    assert report.exit_code == 0 and "not the one at hand" in report.notes[0]
    assert verify(directory, registry) == replace(report, notes=())


@pytest.mark.parametrize(
    ("date", "change"),
    [
        ("2025-06-01", {"approved_on": "2025-01-01", "expires": "2025-12-31"}),
        ("2099-06-01", {"approved_on": "2099-01-01", "expires": "2099-12-31"}),
    ],
    ids=["expired", "not yet"],
)
def test_a_run_that_gives_itself_another_date_does_not_stretch_an_exception(date, change):
    dated = run({**EXCEPTION, **change})
    dated.started = date
    with pytest.raises(LicenseRefusedError):
        dated.require_trainable()
    with pytest.raises(LicenseRefusedError):
        dated.require_publishable()


def test_the_card_says_by_whose_exception_it_stands(tmp_path):
    directory = checkpoint(tmp_path / "out")
    run(EXCEPTION).write(directory, step=1)
    card = (directory / "README.md").read_text()
    assert "Stands only by recorded exceptions:" in card and "excepted by A. Counsel on 2026-01-01" in card


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('[[license]]\nid = "unknown"\nname = "fine"\nno_text = true\n', "'unknown' cannot be replaced"),
        ('[[service]]\nid = "openai-terms"\nname = "fine"\n', "'openai-terms' cannot be replaced.*overrides"),
        (
            '[[license]]\nid = "x"\nname = "X"\nno_text = true\naliases = ["llama2"]\n',
            "'llama2' already names 'llama2'",
        ),
    ],
)
def test_a_registry_of_ones_own_is_no_way_round_an_exception(tmp_path, toml, says):
    path = tmp_path / "mine.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError, match=says):
        load_registry(path)
