"""``kd-plugin lineage registry``: every entry with its age, and one with its clauses."""

import json
from datetime import date

import pytest

from kd_plugin.cli import lineage_registry
from kd_plugin.cli.lineage import main
from kd_plugin.errors import ConfigError
from kd_plugin.lineage.registry import default_registry

MINE = """
version = "acme-1"
[[license]]
id = "acme"
name = "ACME License"
spdx = "LicenseRef-acme"
read = "in spring"
source = "a letter"
no_text = true
[[license.clauses]]
cite = "§1"
effect = "duty"
kind = "name_prefix"
says = "Its name begins with ACME."
value = "ACME"
fact = "acme_asks"
reach = ["weights"]
"""


@pytest.fixture(autouse=True)
def today(monkeypatch):
    monkeypatch.setattr(lineage_registry, "_today", lambda: date(2027, 1, 3))


def listed(capsys, *argv):
    assert main(["registry", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_names_every_entry_with_its_age(capsys):
    found = listed(capsys, "list")
    entries = {entry["id"]: entry for entry in found["entries"]}
    assert entries.keys() == default_registry().terms.keys()
    assert entries["apache-2.0"]["days"] == 40 and entries["apache-2.0"]["text"] == "apache-2.0.txt"
    assert entries["qwen-research"]["quoted"] and entries["qwen-research"]["days"] == 63  # of a month, its first day
    assert entries["unread-api-terms"]["days"] is None
    assert {entries[i]["as_a_teacher"] for i in ("llama2", "tencent-hunyuan-community", "openai-terms")} == {"block"}
    assert entries["lfm1.0"]["as_a_teacher"] == "conditional" and entries["unknown"]["as_a_teacher"] == "unknown"
    assert found["version"] == default_registry().version and "not legal advice" in found["disclaimer"]


def test_list_prints_one_line_for_each(capsys):
    assert main(["registry", "list"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "apache-2.0 allow with duties 2026-11-24 40 text shipped" in shown
    assert "qwen-research conditional 2026-11 63 quoted by others" in shown
    assert "openai-terms block 2026-11-24 40 quoted in part" in shown
    assert "unread-api-terms unknown ? ? not shipped" in shown


def test_show_prints_where_the_words_stand_and_each_clause(capsys):
    assert main(["registry", "show", "Tencent Hunyuan"]) == 0  # another spelling
    shown = capsys.readouterr().out
    entry = default_registry().terms["tencent-hunyuan-community"]
    assert "(35 days ago)" in shown and entry.source in shown and entry.text_sha256 in shown
    for clause in entry.clauses:
        assert f"{clause.cite}  {clause.effect}: {clause.kind}" in shown and clause.says in shown
    assert "where `in_eu_uk_or_south_korea` is true: is it" in shown
    assert "not for a student made from: tencent-hunyuan-community" in shown
    assert "tencent/Hunyuan-A13B-Instruct" in shown and "not legal advice" in shown


def test_show_of_a_service_names_its_hosts(capsys):
    found = listed(capsys, "show", "openai-terms")
    assert "openai.azure.com" in found["hosts"] and found["entry"]["clauses"][0]["kind"] == "competing_model"
    assert found["entry_sha256"] == default_registry().terms["openai-terms"].digest


@pytest.mark.parametrize("written", ["lfm", "mit OR apache-2.0", "jamba-open-model-license", ""])
def test_what_has_no_entry_is_an_exit_code_and_a_way_on(written, capsys):
    assert main(["registry", "show", written]) == 1
    said = capsys.readouterr()
    assert "its terms count as unknown" in said.err and "registry list" in said.err and said.out == ""


def test_a_registry_of_ones_own_lies_on_top(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(MINE)
    own = ["--registry", str(tmp_path / "mine.toml")]
    entries = {entry["id"]: entry for entry in listed(capsys, "list", *own)["entries"]}
    assert entries["acme"]["days"] is None and "mit" in entries
    assert main(["registry", "show", "acme", *own]) == 0
    shown = capsys.readouterr().out
    assert "in spring (how long ago is not known)" in shown and "`acme_asks` is true: a fact of your own" in shown
    with pytest.raises(ConfigError, match="cannot be read"):
        main(["registry", "list", "--registry", str(tmp_path / "absent.toml")])


def test_a_name_prefix_without_a_fact_is_ranked(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(MINE.replace('fact = "acme_asks"\n', ""))
    found = listed(capsys, "show", "acme", "--registry", str(tmp_path / "mine.toml"))
    assert found["as_a_teacher"] == "allow_with_duties"


@pytest.mark.parametrize("read, days", [
    ("2026-12-31", 3), ("2026-12", 33), ("2026-13-01", None), ("2026-02-30", None), ("", None), ("20261231", None),
])  # fmt: skip
def test_days_are_counted_from_real_dates(read, days):
    assert lineage_registry.days_since(read, date(2027, 1, 3)) == days


def test_every_help_page_names_its_exit_codes(capsys):
    for argv in (["registry"], ["registry", "list"], ["registry", "show"]):
        with pytest.raises(SystemExit) as stopped:
            main([*argv, "--help"])
        assert stopped.value.code == 0 and "exit codes: 0 " in capsys.readouterr().out
