"""D: names of closed models, bases that cannot be read, licences by the hub's own convention."""

import json
from pathlib import Path

from kd_plugin.lineage import Source
from kd_plugin.lineage.registry import default_registry
from tests.core.lineage_help import model_dir
from tests.lineage_attacks.attack import attack, gate

TEXTS = default_registry()


def directory(place: Path, front: str, **files: str) -> Source:
    made = Path(model_dir(place, "t", front))
    for name, content in files.items():
        (made / name.replace("__", ".")).write_text(content)
    return Source("t", ref=str(made))


MODEL = "D closed"
for name in (
    "gpt-35-turbo", "grok-4-fast-non-reasoning", "grok-code-fast-1", "gemini-2.5-flash-image", "gpt-realtime",
    "davinci-002",
    "GPT\u20114o", "OpenAI GPT-4o", "gpt-7-preview-2028", "claude-nova-9", "\uff47\uff50\uff54-4o", "g\u0440t-4o",
    "openai/gpt-5.3-codex-max", "us.anthropic.claude-opus-9-20290101-v1:0", "my-proxy/gpt-4o",
):  # fmt: skip
    attack(MODEL, f"a served model {name!r}", "block", lambda d, n=name: gate(
        d, teacher=Source("t", endpoint="http://10.0.0.7:8000", model=n, license="mit")))  # fmt: skip
    attack(MODEL, f"a dataset whose card says generated_by {name!r}", "block", lambda d, n=name: gate(
        d, data=Source("d", "dataset", model_dir(d, "d", f"license: mit\ngenerated_by: {json.dumps(n)}"))))  # fmt: skip
for name in ("gpt-oss-20b", "gpt2", "grok-1", "gemma-3-27b-it", "someone/gpt4-x-vicuna-13b-GPTQ"):
    attack(MODEL, f"open weights {name!r} on the user's own server", "allow", lambda d, n=name: gate(
        d, teacher=Source("t", endpoint="http://10.0.0.7:8000", model=n, license="mit", reason="read")))  # fmt: skip

BASE = "D bases"
for written in (
    "https://huggingface.co/nobody/closed-weights", "https://huggingface.co/nobody/closed-weights/tree/main",
    "'nobody/closed-weights '", "hf.co/nobody/closed-weights", "closed-weights", "{name: nobody/closed-weights}",
    "[{model: nobody/closed-weights}]", "/data/models/closed", "https://example.org/weights.bin", "3.1", "[[nobody/x]]",
    "nobody/closed-weights@main",
):  # fmt: skip
    attack(BASE, f"base_model: {written}", "unknown", lambda d, w=written: gate(
        d, teacher=directory(d, f"license: mit\nbase_model: {w}")))  # fmt: skip
attack(BASE, "base_model: a URL of Llama-3.1", "block", lambda d: gate(
    d, teacher=directory(d, "license: mit\nbase_model: https://huggingface.co/meta-llama/Llama-2-7b-hf")))  # fmt: skip
attack(BASE, "base_model: nothing", "allow", lambda d: gate(d, teacher=directory(d, "license: mit\nbase_model:")))
attack(BASE, "adapter_config.json names a base, the card another", "unknown", lambda d: gate(
    d, teacher=directory(d, "license: mit\nbase_model: nobody/closed-weights", adapter_config__json=json.dumps(
        {"base_model_name_or_path": model_dir(d, "base", "mit")}))))  # fmt: skip
attack(BASE, "the card repeats the path of the adapter's base, as PEFT writes it", "allow", lambda d: gate(
    d, teacher=directory(d, f"license: mit\nbase_model: {model_dir(d, 'base', 'mit')}", adapter_config__json=json.dumps(
        {"base_model_name_or_path": str(d / "base")}))))  # fmt: skip
attack(BASE, "both name the same base", "allow", lambda d: gate(
    d, teacher=directory(d, "license: mit", adapter_config__json=json.dumps(
        {"base_model_name_or_path": model_dir(d, "base", "mit")}))))  # fmt: skip
MERGE = "models:\n  - model: nobody/closed-weights\n"
attack(BASE, "a merge of an unknown model", "unknown", lambda d: gate(
    d, teacher=directory(d, "license: mit", mergekit_config__yml=MERGE)))  # fmt: skip
attack(BASE, "a merge that cannot be read", "unknown", lambda d: gate(
    d, teacher=directory(d, "license: mit", mergekit_config__yml="models: [")))  # fmt: skip
attack(BASE, "a merge of slices, one of them Llama 2", "block", lambda d: gate(
    d, teacher=directory(d, "license: mit", mergekit_config__yml=(
        "slices:\n  - sources:\n    - model: meta-llama/Llama-2-7b-hf\n      layer_range: [0, 32]\n"))))  # fmt: skip
attack(BASE, "a merge of local models under MIT", "allow", lambda d: gate(
    d, teacher=directory(d, "license: mit", mergekit_config__yml=(
        f"base_model: {model_dir(d, 'a', 'mit')}\nmodels:\n  - model: {model_dir(d, 'b', 'mit')}\n"))))  # fmt: skip

TEXT = "D texts"
attack(TEXT, "LLAMA_LICENSE.txt beside an MIT badge", "block", lambda d: gate(
    d, teacher=directory(d, "license: mit", LLAMA_LICENSE__txt=TEXTS.text("llama2"))))  # fmt: skip
attack(TEXT, "MODEL-LICENSE beside an MIT badge", "block", lambda d: gate(
    d, teacher=directory(d, "license: mit", **{"MODEL-LICENSE": TEXTS.text("llama2")})))  # fmt: skip
attack(TEXT, "UNLICENSE alone", "allow", lambda d: gate(
    d, teacher=directory(d, "library_name: x", UNLICENSE=TEXTS.text("unlicense"))))  # fmt: skip
attack(TEXT, "readme.md in lower case says llama2", "block", lambda d: gate(
    d, teacher=directory(d, "license: mit", readme__md="---\nlicense: llama2\n---\n")))  # fmt: skip
OTHER = "license: other\nlicense_name: modified-mit\nlicense_link: LICENSE"
attack(TEXT, "modified-mit without its text", "unknown", lambda d: gate(d, teacher=directory(d, OTHER)))
attack(TEXT, "modified-mit with the text of Kimi K2", "conditional", lambda d: gate(
    d, teacher=directory(d, OTHER, LICENSE=TEXTS.text("kimi-k2"))))  # fmt: skip
CHANGED = f"{TEXTS.text('mit')}\nNo commercial use without a further licence."
ELSEWHERE = OTHER.replace("LICENSE", "https://example.org/terms")
attack(TEXT, "modified-mit with another text", "unknown", lambda d: gate(
    d, teacher=directory(d, OTHER, LICENSE=CHANGED)))  # fmt: skip
attack(TEXT, "modified-mit that links elsewhere", "unknown", lambda d: gate(
    d, teacher=directory(d, ELSEWHERE, LICENSE=TEXTS.text("kimi-k2"))))  # fmt: skip

HUB = "D declared"
for given, expect in (
    ({"license": "other", "license_name": "kimi-k2", "license_link": "LICENSE"}, "conditional"),
    ({"license": "other", "license_name": "llama2", "license_link": "LICENSE"}, "block"),
    ({"license": "other", "license_name": "acme-terms", "license_link": "LICENSE"}, "unknown"),
    ({"license": "other", "license_name": "kimi-k2"}, "error"),
    ({"license": "other"}, "error"),
    ({"license": "mit", "license_name": "kimi-k2", "license_link": "LICENSE"}, "error"),
):
    attack(HUB, f"a teacher declared {given}", expect, lambda d, g=given: gate(
        d, teacher=Source("t", ref="nobody/weights"), config={"teachers": {"t": g}}))  # fmt: skip
attack(HUB, "declared_license by name and link", "allow", lambda d: gate(
    d, config={"student": {"declared_license": {
        "license": "other", "license_name": "apache-2.0", "license_link": "LICENSE"}}}))  # fmt: skip
attack(HUB, "declared_license by an unknown name", "error", lambda d: gate(
    d, config={"student": {"declared_license": {
        "license": "other", "license_name": "acme", "license_link": "LICENSE"}}}))  # fmt: skip

NEW = "D registry"
for name, expect in (
    ("tencent-hunyuan-community", "block"), ("databricks-open-model-license", "block"), ("exaone-1.2", "block"),
    ("stabilityai-ai-community", "block"), ("minimax-m2.7", "conditional"), ("lfm1.0", "conditional"),
    ("nvidia-open-model-license", "conditional"), ("kimi-k2.5", "conditional"), ("kimi-k3", "conditional"),
    ("minimax-m2", "conditional"), ("minimax-m2.1", "conditional"), ("hyperclova-x-seed", "conditional"),
    ("minimax-model-license", "allow"), ("nvidia-nemotron-open-model-license", "allow"), ("openmdw-1.1", "allow"),
    ("falcon-2-11b", "allow"), ("k-exaone", "allow"), ("gemma-2026-04-01", "allow"),
):  # fmt: skip
    attack(NEW, f"the text of {name} beside a card that names none", expect, lambda d, n=name: gate(
        d, teacher=directory(d, "library_name: x", LICENSE=TEXTS.text(n))))  # fmt: skip
for repo, expect in (
    ("tencent/Hunyuan-A13B-Instruct", "block"), ("databricks/dbrx-instruct", "block"),
    ("LGAI-EXAONE/EXAONE-4.0-32B", "block"), ("mistralai/Devstral-2-123B-Instruct-2512", "conditional"),
    ("LiquidAI/LFM2-1.2B", "conditional"), ("google/gemma-4-31B-it", "allow"), ("openai/gpt-oss-20b", "allow"),
    ("zai-org/GLM-4.5-Air", "allow"), ("ibm-granite/granite-4.0-h-small", "allow"), ("microsoft/phi-4", "allow"),
    ("01-ai/Yi-34B", "allow"), ("ai21labs/AI21-Jamba-Large-1.5", "unknown"),
    ("baichuan-inc/Baichuan2-7B-Base", "unknown"),
):  # fmt: skip
    attack(NEW, f"an MIT badge over a base {repo}", expect, lambda d, r=repo: gate(
        d, teacher=directory(d, f"license: mit\nbase_model: {r}")))  # fmt: skip
for told, (old, new) in {
    "10 million users in place of 100": ("100 million", "10 million"),
    "another name to show": ("Kimi K2.5", "Kimi K2.9"),
}.items():
    attack(NEW, f"the text of Kimi K2.5 with {told}", "unknown", lambda d, a=old, b=new: gate(
        d, teacher=directory(d, "library_name: x", LICENSE=str(TEXTS.text("kimi-k2.5")).replace(a, b))))  # fmt: skip
