import re
from pathlib import Path

import pytest
import yaml

from kd_plugin.lineage.config import load_config
from kd_plugin.lineage.registry import default_registry, parse_registry
from kd_plugin.lineage.verdict import NO_ADVICE, Override

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_declarations_and_the_registry_of_the_page_are_read():
    declarations, merged, exception = blocks("lineage.md", "yaml")
    config = load_config(yaml.safe_load(declarations.replace("<sha>", "abc")))
    assert config.teachers["r1"].signal == "text"
    assert len(load_config(yaml.safe_load(merged)).student.merged_from) == 3
    (one,) = yaml.safe_load(exception)["overrides"]
    cites = {(i, c.cite) for i, entry in default_registry().terms.items() for c in entry.clauses}
    found = Override.from_mapping(one, "overrides")
    assert (found.terms, found.cite) in cites
    (registry,) = blocks("lineage.md", "toml")
    assert parse_registry(registry.encode(), "docs", lambda name: b"text").terms["acme-model-license"].clauses


@pytest.mark.parametrize("page", ["lineage.md", "lineage-for-lawyers.md"])
def test_each_page_says_that_this_is_no_advice(page):
    assert NO_ADVICE.rstrip(".") in (DOCS / page).read_text().replace("\n", " ")


def test_the_lawyers_page_names_what_was_only_quoted():
    page = (DOCS / "lineage-for-lawyers.md").read_text()
    quoted = {i for i, entry in default_registry().terms.items() if "quoted" in entry.read}
    assert quoted == {
        "openai-terms", "anthropic-terms", "xai-terms", "qwen-research", "grok2-community", "mistral-modified-mit",
        "deepseek-platform-terms", "zai-terms", "moonshot-terms", "alibaba-model-studio-terms",
    }  # fmt: skip
    for words in (
        "OpenAI",
        "Anthropic",
        "xAI",
        "Qwen research licence",
        "Grok 2",
        "Devstral 2",
        "DeepSeek",
        "Z.ai",
        "Moonshot",
        "Alibaba",
    ):
        assert words in page
