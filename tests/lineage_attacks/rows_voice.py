"""A: whose word is it? A stranger's file never counts as the user's own declaration."""

import json
from dataclasses import replace
from pathlib import Path

from kd_plugin.lineage import RunLineage, Source, outputs_record
from kd_plugin.lineage.graph import Evidence, Graph
from kd_plugin.lineage.registry import default_registry
from tests.core.lineage_help import checkpoint, model_dir
from tests.lineage_attacks.attack import attack, gate, verdict

TEXTS = default_registry()


def carded(place: Path, front: str, *, text: str | None = None, **files: str) -> Source:
    directory = model_dir(place, "t", front or None, text)
    for name, content in files.items():
        (Path(directory) / name.replace("__", ".")).write_text(content)
    return Source("t", ref=directory)


OWN = "A own"
for front in (
    "license: own",
    "license: OWN",
    "license: ' own '",
    "license: LicenseRef-own",
    "license: licenseref-OWN",
    "license: [own]",
    "license: other\nlicense_name: own\nlicense_link: LICENSE",
    "license: own AND mit",
):
    attack(OWN, f"a teacher's card: {front!r}", "unknown", lambda d, f=front: gate(d, teacher=carded(d, f)))
attack(OWN, "a card: 'license: own OR mit'", "allow", lambda d: gate(d, teacher=carded(d, "license: own OR mit")))
attack(OWN, "a card: [own, mit]", "unknown", lambda d: gate(d, teacher=carded(d, "license: [own, mit]")))
attack(OWN, "a card: 'own OR llama2'", "unknown", lambda d: gate(d, teacher=carded(d, "license: own OR llama2")))
attack(
    OWN, "config.json: own", "unknown",
    lambda d: gate(d, teacher=carded(d, "", config__json='{"license": "own"}')),
)  # fmt: skip
attack(OWN, "a student's card: own", "unknown", lambda d: gate(d, student=carded(d, "license: own")))
attack(
    OWN, "a dataset's card: own", "unknown",
    lambda d: gate(d, data=Source("d", "dataset", model_dir(d, "d", "license: own"))),
)  # fmt: skip
attack(
    OWN, "dataset_info.json: own", "unknown",
    lambda d: gate(d, data=Source("d", "dataset", carded(d, "", dataset_info__json='{"license": "own"}').ref)),
)  # fmt: skip
attack(OWN, "a LICENSE file with the one word own", "unknown", lambda d: gate(d, teacher=carded(d, "", text="own")))
attack(
    OWN, "an adapter's base whose card says own", "unknown",
    lambda d: gate(d, teacher=carded(d, "license: mit", adapter_config__json=json.dumps(
        {"base_model_name_or_path": model_dir(d, "base", "license: own")}))),
)  # fmt: skip
attack(OWN, "the user's config: own", "allow", lambda d: gate(
    d, teacher=carded(d, ""), config={"teachers": {"t": {"license": "own"}}}))  # fmt: skip
attack(OWN, "the user's own against a stranger's text", "block", lambda d: gate(
    d, teacher=carded(d, "", text=TEXTS.text("llama2")), config={"teachers": {"t": {"license": "own"}}}))  # fmt: skip


def cache_of(place: Path) -> Source:
    teacher = Source("expert", ref=model_dir(place, "expert"), license="own")
    rows = Source("rows", "dataset", license="own", signal="text")
    return Source("cache", "teacher_outputs", record=outputs_record(teacher, [rows]))


def on_cache(place: Path, config=None) -> str:
    student = Source("student", ref=model_dir(place, "s", "mit"))
    return verdict(lambda: RunLineage(method="x", student=student, outputs=[cache_of(place)], config=config))


attack(OWN, "a cache's record calls its teacher own", "unknown", on_cache)
attack(OWN, "and the user says that it is theirs", "allow", lambda d: on_cache(
    d, {"teachers": {"expert": {"license": "own"}}, "datasets": [{"name": "rows", "license": "own"}]}))  # fmt: skip


def vouching_for_itself(place: Path) -> str:
    """Put the user's word into the record of a cache that somebody else made."""
    graph = Graph.from_json(cache_of(place).record)
    root = graph.root("teacher_outputs")
    forged = replace(root, evidence=(Evidence("declared", "own", ("own",)),))
    edges = [replace(e, source=forged.id) if e.source == root.id else e for e in graph.edges]
    nodes = [forged if node is root else node for node in graph.nodes.values()]
    cache = Source("cache", "teacher_outputs", record=Graph.of(nodes, edges).to_json())
    student = Source("student", ref=model_dir(place, "s", "mit"))
    return verdict(lambda: RunLineage(method="x", student=student, outputs=[cache]))


attack(OWN, "a cache's record says that it is the user's own", "unknown", vouching_for_itself)
attack(OWN, "and the user names another teacher", "unknown", lambda d: on_cache(
    d, {"teachers": {"other": {"license": "own"}}}))  # fmt: skip


def after_own(place: Path, licence: str | None) -> str:
    saved = checkpoint(place)
    first = Source("student", ref=model_dir(place, "base"), license="own")
    RunLineage(method="x", student=first).write(saved, step=1)
    return gate(place, student=Source("student", ref=str(saved), license=licence))


attack(OWN, "a checkpoint's record calls its base own", "unknown", lambda d: after_own(d, None))
attack(OWN, "and the user declares the checkpoint own", "allow", lambda d: after_own(d, "own"))
attack(OWN, "and the user declares it mit", "unknown", lambda d: after_own(d, "mit"))

# A user's registry adds, and takes nothing away
ADD = "A registry"


def registry(place: Path, body: str) -> dict[str, str]:
    (place / "mine.toml").write_text(f'version = "mine"\n{body}')
    return {"registry": str(place / "mine.toml")}


def served(url: str, model: str = "dep", **more: str) -> Source:
    return Source("t", endpoint=url, model=model, license="mit", **more)


for name, body in (
    ('hosts = ["*"]', '[[service]]\nid = "mine"\nname = "x"\nhosts = ["*"]\n'),
    ('hosts = ["*.com"]', '[[service]]\nid = "mine"\nname = "x"\nhosts = ["*.com"]\n'),
    ('hosts = ["api.openai.com"]', '[[service]]\nid = "mine"\nname = "x"\nhosts = ["api.openai.com"]\n'),
    ('hosts = ["openai.com"]', '[[service]]\nid = "mine"\nname = "x"\nhosts = ["openai.com"]\n'),
    ('hosts = ["*.openai.com"]', '[[service]]\nid = "mine"\nname = "x"\nhosts = ["*.openai.com"]\n'),
):
    attack(ADD, f"api.openai.com under {name}", "block", lambda d, b=body: gate(
        d, teacher=served("https://api.openai.com/v1"), config=registry(d, b)))  # fmt: skip
for pattern in ("gpt-4o", ".*", "gpt-.*"):
    attack(ADD, f"gpt-4o under models = [{pattern!r}]", "block", lambda d, p=pattern: gate(
        d, teacher=served("http://localhost", "gpt-4o"),
        config=registry(d, f"[[service]]\nid = 'mine'\nname = 'x'\nmodels = ['{p}']\n")))  # fmt: skip
attack(ADD, "a known Llama repository as mit", "conditional", lambda d: gate(
    d, teacher=Source("t", ref="meta-llama/Llama-3.1-8B", license="mit"),
    config=registry(d, '[[known]]\nrepo = "meta-llama/Llama-3.1-8B"\nlicense = "mit"\n')))  # fmt: skip
attack(ADD, "openai-terms without clauses", "error", lambda d: gate(
    d, config=registry(d, '[[service]]\nid = "openai-terms"\nname = "x"\n')))  # fmt: skip
attack(ADD, "api.z.ai under hosts = ['api.z.ai']", "block", lambda d: gate(
    d, teacher=served("https://api.z.ai"),
    config=registry(d, '[[service]]\nid = "mine"\nname = "x"\nhosts = ["api.z.ai"]\n')))  # fmt: skip
attack(ADD, "deepseek-platform-terms without clauses", "error", lambda d: gate(
    d, config=registry(d, '[[service]]\nid = "deepseek-platform-terms"\nname = "x"\n')))  # fmt: skip
attack(ADD, "a closed model at DeepSeek's own address", "block", lambda d: gate(
    d, teacher=served("https://api.deepseek.com", "openai/gpt-4o")))  # fmt: skip
attack(ADD, "unread API under hosts = ['*']", "unknown", lambda d: gate(
    d, teacher=served("https://api.mistral.ai"),
    config=registry(d, '[[service]]\nid = "mine"\nname = "x"\nhosts = ["*"]\n')))  # fmt: skip
attack(ADD, "unread API whose terms the user describes", "allow", lambda d: gate(
    d, teacher=served("https://api.mistral.ai"),
    config=registry(d, '[[service]]\nid = "mine"\nname = "x"\nhosts = ["api.mistral.ai"]\n')))  # fmt: skip

# Providers by registrable domain, addresses read strictly
HOST = "A host"
for url, right in {
    "https://eu.api.openai.com/v1": "block",
    "https://us.api.openai.com": "block",
    "https://chatgpt.com/backend-api": "block",
    "https://us-east-1.api.x.ai": "block",
    "https://acme.cognitiveservices.azure.com/openai": "block",
    "https://acme.openai.azure.us": "block",
    "https://aiplatform.eu.rep.googleapis.com": "block",
    "https://eu.api.anthropic.com": "block",
    "http:api.openai.com": "block",
    "https:/api.openai.com": "block",
    "https:///api.openai.com": "block",
    "https://api.openai.com\\@127.0.0.1": "block",
    "https://127.0.0.1\\@api.openai.com": "block",
    "https://api.openai.com%2f.local": "block",
    "https://api.openai.com\n.local": "block",
    "https://api\u3002openai\u3002com": "block",
    "https://\uff41\uff50\uff49.openai.com": "block",
    "https://API.OPENAI.COM.:443/v1": "block",
    "api.openai.com/v1": "block",
    "//api.openai.com": "block",
    "https://127.0.0.1#@api.openai.com": "allow",
    "unix:///tmp/socket": "unknown",
    "http://[::ffff:8.8.8.8": "unknown",
    "http:llm.acme.com": "unknown",
    "https://api.together.xyz": "unknown",
    "https://eu.openrouter.ai": "unknown",
    "https://bedrock-runtime.us-east-1.amazonaws.com": "unknown",
    "https://llm.acme.com": "allow",
    "https://ec2-3-4-5-6.us-west-2.compute.amazonaws.com": "allow",
    "https://vm.westeurope.cloudapp.azure.com": "allow",
    "https://notopenai.com": "allow",
    "https://api.deepseek.com/v1": "allow",
    "https://deepseek.com.acme.com": "allow",
    "https://api.z.ai/api/paas/v4": "block",
    "https://api.moonshot.cn/v1": "block",
    "https://dashscope-intl.aliyuncs.com/compatible-mode/v1": "block",
    "https://x.ai.acme.com": "allow",
}.items():
    attack(HOST, f"declared as the user's own: {url!a}", right, lambda d, u=url: gate(
        d, teacher=served(u, endpoint_terms="own")))  # fmt: skip

# A server's own word
SERVER = "A server"
for names, right in {
    ("gpt-4o",): "block",
    ("openai/gpt-4o",): "block",
    ("alias", "claude-3-5-sonnet-20241022"): "block",
    ("meta-llama/Llama-3.1-8B-Instruct",): "conditional",
    ("acme/Llama-3.1-8B-quantised",): "unknown",
    ("own",): "note declaration_alone",
    ("alias",): "note declaration_alone",
}.items():
    server = Source("t", endpoint="http://localhost:8000", license="mit", served=names)
    attack(SERVER, f"it says that it serves {', '.join(names)}", right, lambda d, s=server: gate(
        d, "declaration_alone", teacher=s))  # fmt: skip

# A declaration that nothing supports, or that a name contradicts
NAME = "A name"
for ref, licence, right in (
    ("acme/model", "mit", "note declaration_alone"),
    ("unsloth/Llama-3.1-8B", "mit", "unknown"),
    ("NousResearch/Meta-Llama-3.1-8B", "apache-2.0", "unknown"),
    ("acme/Llama-3_1-Nemotron-51B", "mit", "unknown"),
    ("acme/Llama_4_Scout", "mit", "unknown"),
    ("acme/LLAMA-2-7b", "mit", "unknown"),
    ("acme/CodeLlama-7b-hf", "mit", "unknown"),
    ("unsloth/gemma-3-4b-it", "apache-2.0", "unknown"),
    ("acme/codegemma-7b", "own", "unknown"),
    ("acme/\uff27emma-2-9b", "mit", "unknown"),
    ("unsloth/Llama-3.1-8B", "llama3.1", "conditional"),
    ("unsloth/gemma-3-4b-it", "gemma", "note declaration_alone"),
    ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "apache-2.0", "note declaration_alone"),
    ("openlm-research/open_llama_3b", "apache-2.0", "note declaration_alone"),
):
    attack(NAME, f"{ref!a} declared {licence}", right, lambda d, r=ref, w=licence: gate(
        d, "declaration_alone", teacher=Source("t", ref=r, license=w)))  # fmt: skip
attack(NAME, "unsloth/Llama-3.1-8B declared mit, explained", "note name_explained", lambda d: gate(
    d, "name_explained", teacher=Source("t", ref="unsloth/Llama-3.1-8B"),
    config={"teachers": {"t": {"license": "mit", "reason": "random weights for tests"}}}))  # fmt: skip
attack(NAME, "an MIT card on a base called org/Llama-3.1-70B, declared mit", "unknown", lambda d: gate(
    d, teacher=carded(d, "license: mit\nbase_model: org/Llama-3.1-70B"),
    config={"teachers": {"t": {"license": "mit"}}}))  # fmt: skip
