"""One block of YAML describes a panel; every wrong key names the near one."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.panel.block import panel_from_block
from kd_plugin.panel.checks import require_defined_panel
from kd_plugin.panel.estimators import EstimatorName
from kd_plugin.teachers import AdapterTeacher, CachedTeacher, LocalTeacher, ServerTeacher

BLOCK = """
combine: weighted_kl
divergence: {name: jsd, beta: 0.3}
estimator: topk_tail
top_k: 16
domain_weights:
  law: {big: 1.0}
teachers:
  math:
    model: MODEL
    weight: {start: 0.0, end: 1.0, steps: 100, shape: cosine}
    temperature: 0.7
    estimator: exact
    placement: offload
  code: {kind: adapter, adapter: ADAPTER, base: math, estimator: exact}
  other: {kind: adapter, adapter: ADAPTER, base: {model: MODEL, dtype: float32}, estimator: exact}
  again: {kind: adapter, adapter: ADAPTER, base: {model: MODEL, dtype: float32}, estimator: exact}
  mine: {kind: adapter, adapter: ADAPTER}
  big: {kind: server, url: "http://127.0.0.1:9", model: big, tokenizer: MODEL, repo: x/big, divergence: reverse_kl}
  kept: {kind: cached, cache: CACHE, tokenizer: MODEL}
"""


@pytest.fixture(scope="module")
def block(tmp_path_factory, teacher_dir):
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("block")
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    rows = Dataset.from_list([{"prompt": "a?", "completion": f" b{i}"} for i in range(4)])
    capture(rows, teacher, root / "cache", targets=TopK(8), progress=False)
    get_peft_model(teacher.model, LoraConfig(target_modules=["q_proj"])).save_pretrained(root / "adapter")
    text = BLOCK.replace("MODEL", teacher_dir).replace("ADAPTER", str(root / "adapter"))
    return yaml.safe_load(text.replace("CACHE", str(root / "cache")))


def test_all_four_kinds(block):
    panel = panel_from_block(block)
    kinds = [LocalTeacher, AdapterTeacher, AdapterTeacher, AdapterTeacher, AdapterTeacher, ServerTeacher, CachedTeacher]
    assert [type(teacher) for teacher in panel.teachers.values()] == kinds
    math, code, other, again, mine, *_ = panel.teachers.values()
    assert (
        math.placement == "offload"
        and code.base is math
        and other.base is again.base
        and mine.capabilities.shares == "student"
    )
    assert panel.divergence.name == "jsd" and panel.divergence.beta == 0.3
    assert panel.own["math"].temperature == 0.7 and panel.own["math"].estimator.name == "exact"
    assert panel.own["big"].divergence.name == "reverse_kl" and panel.estimator.top_k == 16
    assert panel.weights.teachers["math"].at(50) == pytest.approx(0.5)
    assert panel.weights.teachers["code"].at(50) == 1.0
    assert panel.weights_of(panel.assign({"domain": "law"})) == (0, 0, 0, 0, 0, 1.0, 0)


def block_of(page, block, teacher_dir):
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    text = text.replace("MODEL", teacher_dir).replace("EXPERT", block["teachers"]["mine"]["adapter"])
    return panel_from_block(yaml.safe_load(text)["panel"])


def test_the_block_of_the_docs(block, teacher_dir):
    panel = block_of("panel.md", block, teacher_dir)
    require_defined_panel(panel, panel.divergence, 1.0)
    assert panel.weights_of(panel.assign({"domain": "poetry"})) == (0.75, 0.25)


@pytest.mark.parametrize("name", get_args(EstimatorName))
def test_the_page_of_each_estimator_shows_a_panel_that_is_defined(name, block, teacher_dir):
    panel = block_of(f"estimators/{name}.md", block, teacher_dir)
    require_defined_panel(panel, panel.divergence, 1.0)
    own = [terms.estimator.name for terms in panel.own.values() if terms.estimator]
    assert name in (own or [panel.estimator.name])


def test_from_a_file(block, tmp_path):
    for content in (block, {"panel": block}):
        (tmp_path / "panel.yaml").write_text(yaml.safe_dump(content))
        assert panel_from_block(tmp_path / "panel.yaml").combine == "weighted_kl"
    with pytest.raises(ConfigError, match="there is no such file"):
        panel_from_block(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("{a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        panel_from_block(tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"combin": "route"}, "panel: unknown key 'combin'. Did you mean 'combine'"),
        (
            {"teachers": {"t": {"model": "x", "placment": "offload"}}},
            "teacher 't': unknown key 'placment'.*'placement'",
        ),
        ({"teachers": {"t": {"kind": "servers"}}}, "kind 'servers'.*Did you mean 'server'"),
        ({"teachers": {"t": {"kind": "server"}}}, "teacher 't': the key 'url' is missing"),
        ({"teachers": {"t": {"model": "x", "divergence": "jds"}}}, "Did you mean 'jsd'"),
        ({"teachers": {"t": {"model": "x", "divergence": {"nam": "jsd"}}}}, "Did you mean 'name'"),
        ({"teachers": {"t": {"model": "x", "weight": {"start": 1, "end": 0, "step": 3}}}}, "Did you mean 'steps'"),
        ({"teachers": {"t": {"model": "x", "estimator": "sample"}}}, "Did you mean 'sampled'"),
        (
            {"teachers": {"t": {"kind": "server", "url": "http://h:1", "temperature": 0.0}}},
            "'t': temperature is 0.0; it",
        ),
        ({"teachers": {"t": {"model": "x", "temperature": 0}}}, "'t': temperature is 0; it divides"),
        ({"teachers": {"t": {"model": "x", "temperature": -1.0}}}, "'t': temperature is -1.0; it divides"),
        ({"teachers": {"t": {"model": "x", "temperature": float("nan")}}}, "'t': temperature is nan; it divides"),
        ({"teachers": {"t": {"model": "x", "temperature": "0.5"}}}, "'t': temperature is '0.5'; it divides"),
        ({"teachers": {"t": {"model": "x", "temperature": False}}}, "'t': temperature is False; it divides"),
        ({"teachers": {"t": 3}}, "expected a path, a hub id or a mapping"),
        ({"teachers": {}}, "expected a mapping 'teachers'"),
        ({"teachers": {"t": {"kind": "adapter", "adapter": "x", "base": 3}}}, "its base is 3; expected 'student'"),
    ],
)
def test_wrong_keys_and_values(change, message):
    with pytest.raises(ConfigError, match=message):
        panel_from_block({"teachers": {"t": "x"}, "combine": "weighted_kl", **change})


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_of_the_run_that_divides_nothing_is_refused(temperature):
    panel = panel_from_block({"teachers": {"t": {"model": "x", "temperature": 1.5}}})
    with pytest.raises(ConfigError, match="it divides logits and must be a positive number"):
        require_defined_panel(panel, Divergence("forward_kl"), temperature)


def test_the_blocks_of_the_page_on_text_are_panels(teacher_dir):
    """Of docs/panel-text.md: teachers by text beside one by distribution, and a verifier as a member."""
    page = (Path(__file__).parents[2] / "docs" / "panel-text.md").read_text(encoding="utf-8")
    text, reward = (
        panel_from_block(yaml.safe_load(block.replace("MODEL", teacher_dir))["panel"])
        for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    )
    assert list(text.text_teachers) == ["r1", "qwen", "phi"] and list(text.teachers) == ["base"]
    assert text.prices["r1"].written == 2.19 and text.text.min_teachers == 2
    assert reward.reward.factor(0.0) == 0.5 and reward.reward.factor(1.0) == 1.0


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"teachers": {"t": {"model": "m"}}, "text": {}}, "no text teacher"),
        ({"teachers": {"t": {"kind": "server", "signal": "text", "url": "http://a"}}}, "majority of the other text"),
        ({"teachers": {"t": {"kind": "server", "signal": "txt", "url": "http://a"}}}, "Unknown signal 'txt'"),
        ({"teachers": {"t": {"kind": "cached", "signal": "text"}}}, "kind 'cached' and signal 'text'"),
        (
            {
                "teachers": {"t": {"kind": "server", "signal": "text", "url": "http://a"}, "d": {"model": "m"}},
                "combine": "mixture",
                "text": {"accept": "teacher"},
            },
            "combine='mixture' needs",
        ),
        (
            {"teachers": {"t": {"kind": "server", "signal": "text", "url": "http://a"}}, "text": {"acept": "teacher"}},
            "Did you mean 'accept'",
        ),
        (
            {
                "teachers": {"t": {"kind": "server", "signal": "text", "url": "http://a"}},
                "text": {"accept": "verifier"},
            },
            "no verifier is named",
        ),
        ({"teachers": {"t": {"model": "m"}}, "reward": {"weight": 1}}, "names no verifier"),
        ({"teachers": {"t": {"model": "m"}}, "reward": {"verifier": "exact", "weight": 2}}, "weight is 2"),
    ],
)
def test_text_that_cannot_be_meant_is_refused(block, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        panel_from_block(block)
