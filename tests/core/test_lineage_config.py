import pytest

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.config import load_config
from kd_plugin.lineage.registry import default_registry, parse_registry


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"teacher": {}}, "lineage: unknown key 'teacher'.*Did you mean 'teachers'"),
        ({"teachers": {"t": {"licence": "mit"}}}, "lineage.teachers.t: unknown key 'licence'.*'license'"),
        ({"use": {"comercial": True}}, "unknown key 'comercial'.*'commercial'"),
        ({"use": {"commercial": "yes"}}, "must be true or false, got 'yes'"),
        ({"teachers": ["mit"]}, "lineage.teachers must be a mapping, got list"),
        ({"datasets": {"repo": "x"}}, "lineage.datasets must be a list"),
        ({"teachers": {"t": {"signal": "hidden"}}}, "'text' or 'logits', got 'hidden'"),
        ({"student": {"name": 3}}, "lineage.student.name must be a string, got 3"),
        ({"datasets": [{"generated_by": [1]}]}, "must be a list of model names"),
        ({"datasets": [{"generated_by": [{"license": "mit"}]}]}, r"generated_by\[0\] must say which model"),
        ({"datasets": [{"generated_by": [{"modle": "x"}]}]}, "unknown key 'modle'.*'model'"),
        ({"student": {"merged_from": "a/b"}}, r"student\.merged_from must be a list of paths or hub ids, got 'a/b'"),
        ({"student": {"merged_from": [{"license": "mit"}]}}, r"merged_from\[0\] must be a path, a hub id"),
        ({"student": {"merged_from": [{"ref": "x"}]}}, r"merged_from\[0\]: unknown key 'ref'.*Known: repo"),
        ({"teachers": {"t": {"merged_from": ["x"]}}}, "teachers.t: unknown key 'merged_from'"),
        ({"run": {"ID": "x"}}, "unknown key 'ID'"),
        (["x"], "must be a mapping, got list"),
    ],
)
def test_a_wrong_declaration_names_its_place_and_the_way_out(config, says):
    with pytest.raises(ConfigError, match=says):
        load_config(config)


def test_yaml_errors_name_line_and_column(tmp_path):
    path = tmp_path / "lineage.yaml"
    path.write_text("student:\n  license: [mit\nuse: {}\n")
    with pytest.raises(ConfigError, match=r"lineage.yaml is not valid YAML at line 3, column"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [1]\nb: *a\n", "YAML aliases"),
        ("x: " + "y" * (1 << 20), "larger than"),
        ("student: !!python/object/apply:os.system [id]", "not valid YAML at line 1"),
        ("[" * 5000, "nested deeper than 64"),
        ("\x00", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_one_clear_error(tmp_path, text, says):
    path = tmp_path / "lineage.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_whole_declaration_is_read(tmp_path):
    path = tmp_path / "lineage.yaml"
    path.write_text(
        "student: {repo: Qwen/Qwen2.5-7B, license: apache-2.0, name: acme-small, declared_license: apache-2.0}\n"
        "teachers:\n"
        "  r1: {repo: deepseek-ai/DeepSeek-R1, license: mit, signal: text}\n"
        "datasets:\n"
        "  - {repo: someone/instructions, license: cc-by-4.0, generated_by: []}\n"
        "use: {commercial: true, distribute: true, eu_domiciled: false, mau_over_700m_at_release: false}\n"
        "run: {id: r, date: 2026-11-24}\n"
    )
    config = load_config(str(path))
    assert config.teachers["r1"].signal == "text"
    assert config.run == {"id": "r", "date": "2026-11-24"}
    assert config.use["distribute"] is True


def no_texts(name):
    raise FileNotFoundError(name)


def test_a_malformed_registry_names_line_and_entry():
    with pytest.raises(ConfigError, match=r"my.toml is not valid TOML: .*line 2"):
        parse_registry(b'version = "1"\n[[license\n', "my.toml", no_texts)
    with pytest.raises(ConfigError, match=r"license 'x': unknown key 'spxd'.*Did you mean 'spdx'"):
        parse_registry(b'[[license]]\nid = "x"\nname = "X"\nspxd = "X"\nno_text = true\n', "my.toml", no_texts)
    with pytest.raises(ConfigError, match=r"my.toml is not valid TOML: maximum recursion"):
        parse_registry(b"a = " + b"[" * 5000, "my.toml", no_texts)
    with pytest.raises(ConfigError, match="unknown reach 'weight'"):
        parse_registry(
            b'[[license]]\nid = "x"\nname = "X"\nno_text = true\n[[license.clauses]]\ncite = "1"\neffect = "duty"\n'
            b'kind = "notice"\nsays = "s"\nreach = ["weight"]\n',
            "my.toml",
            no_texts,
        )


@pytest.mark.parametrize(
    ("written", "ids", "expression"),
    [
        ("MIT", ("mit",), "MIT"),
        ("Apache-2.0", ("apache-2.0",), "Apache-2.0"),
        ("MIT OR Apache-2.0", ("mit",), "MIT OR Apache-2.0"),
        ("mit AND LicenseRef-gemma", ("mit", "gemma"), "MIT AND LicenseRef-gemma"),
        ("llama3.1", ("llama3.1",), "LicenseRef-llama3.1"),
        ("other", ("unknown",), None),
        ("(", ("unknown",), None),
    ],
)
def test_licence_names_and_expressions_resolve(written, ids, expression):
    found = default_registry().resolve(written)
    assert found.ids == ids
    assert expression is None or found.expression == expression


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("use: {}\nteachers:\n  t:\n    licence: mit\n", r"teachers.t \(line 4\): unknown key 'licence'.*'license'"),
        ("student:\n  name: a\n  license: 3\n", r"student.license \(line 3\) must be a string, got 3"),
        ("datasets:\n- {repo: a}\n- {repo: b, rows: 3}\n", r"datasets\[1\] \(line 3\): unknown key 'rows'"),
        ("use:\n  commercial: perhaps\n", r"use.commercial \(line 2\) must be true or false"),
        ("\n\nteacher: {}\n", r"lineage.yaml \(line 3\): unknown key 'teacher'"),
        ("[]\n", r"lineage.yaml \(line 1\) must be a mapping"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(tmp_path, text, says):
    path = tmp_path / "lineage.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path)
