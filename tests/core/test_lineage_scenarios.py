# ruff: noqa: E501 - a row is read as one line
"""A table of student, teachers, data and use, with what the clauses lead to; each row says why.

Shorthand. A teacher is a licence with ``:text`` where only text is used, else distributions are. Duties name a
licence and a reach: ``w`` weights, ``l`` distributions, ``o`` text, ``d`` data; the sets are spelled out below from
the clauses. Uses: ``com``, ``dist``, ``eu``, ``huge`` (700M users at release), ``100m``, and short names of single
licences' questions; ``!`` is "no".
"""

from dataclasses import dataclass

import pytest

from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.lineage.registry import default_registry

FACTS = {
    "com": "commercial", "dist": "distribute", "eu": "eu_domiciled", "huge": "mau_over_700m_at_release",
    "100m": "mau_over_100m", "kimi": "over_100m_mau_or_20m_usd_a_month", "k3": "model_service_and_over_20m_usd_a_year",
    "m2": "over_100m_mau_or_30m_usd_a_year", "cosmos": "nvidia_cosmos", "lfm": "commercial_and_over_10m_usd_a_year",
    "mistral": "over_20m_usd_a_month", "territory": "in_eu_uk_or_south_korea", "100m-then": "mau_over_100m_at_release",
    "10m-then": "mau_over_10m_at_release", "naver": "competes_with_naver", "rich": "over_1m_usd_a_year",
    "sold": "distributed_commercially",
}  # fmt: skip
# "?" marks what is kept as a precaution
NOTICE = {"w": "notice license_text", "l": "notice? license_text?", "o": "notice? license_text?"}
LLAMA = {
    "w": "license_text display name_prefix notice acceptable_use monthly_active_users",
    "l": "license_text? display? name_prefix notice? acceptable_use monthly_active_users",
    "o": "display? name_prefix acceptable_use? monthly_active_users",
}
LLAMA_EU = {reach: f"{kinds} eu_multimodal" for reach, kinds in LLAMA.items()}
RAIL = dict.fromkeys("wlo", "use_restrictions license_text notice")
NC_BY = {"w": "attribution non_commercial", "l": "attribution? non_commercial", "o": "attribution? non_commercial",
         "d": "attribution non_commercial"}  # fmt: skip
BY_SA = {"w": "attribution share_alike", "l": "attribution? share_alike?", "o": "attribution? share_alike?",
         "d": "attribution share_alike"}  # fmt: skip
GPL = {"w": "share_alike notice license_text", "l": "share_alike? notice? license_text?", "d": "share_alike"}
DUTIES = {
    "mit": NOTICE, "bsd-3-clause": NOTICE, "isc": NOTICE, "zlib": NOTICE,
    "apache-2.0": {"w": "license_text state_changes notice patent_grant", "l": "license_text? notice?", "o": "license_text? notice?"},
    "cc-by-4.0": {"w": "attribution", "l": "attribution?", "o": "attribution?", "d": "attribution"},
    "odc-by": {"d": "attribution"},
    "llama3.1": LLAMA, "llama3.3": LLAMA, "llama3.2": LLAMA_EU, "llama4": LLAMA_EU,
    "llama2": {"w": "license_text notice acceptable_use monthly_active_users",
               "l": "license_text? notice? acceptable_use monthly_active_users",
               "o": "license_text? notice? acceptable_use monthly_active_users"},
    "llama3": {"w": "license_text display name_prefix notice acceptable_use monthly_active_users",
               "l": "license_text? display? name_prefix? notice? acceptable_use monthly_active_users"},
    "gemma": {"w": "use_restrictions license_text state_changes notice", "l": "use_restrictions license_text notice",
              "o": "use_restrictions license_text notice"},
    "deepseek": RAIL, "bigscience-openrail-m": RAIL, "openrail": RAIL, "creativeml-openrail-m": RAIL,
    "qwen": {"w": "license_text notice display monthly_active_users",
             "l": "license_text? notice? display monthly_active_users",
             "o": "license_text? notice? display monthly_active_users"},
    "qwen-research": {"w": "non_commercial notice license_text display state_changes",
                      "l": "non_commercial notice? license_text? display",
                      "o": "non_commercial notice? license_text? display"},
    "tongyi-qianwen": {"w": "license_text notice monthly_active_users",
                       "l": "license_text? notice? monthly_active_users"},
    "mistral-research": {"w": "non_commercial notice license_text state_changes", "l": "non_commercial notice? license_text?",
                         "o": "non_commercial notice? license_text?"},
    "exaone": {"l": "non_commercial notice? license_text?", "o": "non_commercial notice? license_text?"},
    "nvidia-open-model-license": {"w": "license_text notice guardrails display", "l": "display", "o": "display"},
    "nvidia-nemotron-open-model-license": {"l": "", "o": ""},
    "tencent-hunyuan-community": {
        "w": "use_restrictions license_text notice state_changes territory monthly_active_users",
        "l": "use_restrictions license_text notice territory monthly_active_users",
        "o": "use_restrictions license_text notice territory monthly_active_users"},
    "lfm1.0": {"w": "license_text notice state_changes commercial_threshold",
               "o": "license_text? notice? commercial_threshold"},
    "exaone-1.2": {"o": "non_commercial notice? license_text? attribution?"},
    "k-exaone": {"w": "license_text name_prefix commercial_distribution acceptable_use",
                 "o": "license_text? acceptable_use?"},
    "minimax-m2": {"l": "display? notice? license_text?"}, "minimax-m2.1": {"o": "display? notice? license_text?"},
    "minimax-model-license": {"o": "license_text? notice? acceptable_use?"},
    "minimax-m2.7": {"o": "non_commercial display? notice? license_text? acceptable_use?"},
    "kimi-k2.5": {"l": "display? notice? license_text?"},
    "kimi-k3": {"l": "model_service display? notice? license_text?"},
    "openmdw-1.1": {"w": "license_text notice", "l": "", "o": ""},
    "databricks-open-model-license": {
        "w": "license_text notice state_changes acceptable_use monthly_active_users",
        "l": "license_text? notice? acceptable_use monthly_active_users"},
    "hyperclova-x-seed": dict.fromkeys("lo", "name_prefix display use_restrictions license_text notice "
                                       "monthly_active_users competing_product"),
    "falcon-llm-license": {"o": "use_restrictions? license_text? notice? acceptable_use display?"},
    "stabilityai-ai-community": {"o": "revenue_limit registration license_text notice display acceptable_use"},
    "mistral-modified-mit": {"l": "revenue_limit notice? license_text?"},
    "kimi-k2": {"w": "display notice license_text", "l": "display? notice? license_text?",
                "o": "display? notice? license_text?"},
    "openmdw-1.0": {"w": "license_text notice", "l": "", "o": ""},
    "cc-by-nc-4.0": NC_BY,
    "cc-by-sa-4.0": BY_SA, "cc-by-sa-3.0": BY_SA, "gpl-3.0": GPL, "gpl-2.0": GPL, "agpl-3.0": GPL,
    "cc-by-nd-4.0": {"w": "attribution no_derivatives", "d": "attribution no_derivatives"},
    "cc-by-nc-sa-4.0": {"d": "attribution non_commercial share_alike"},
    "grok2-community": {"o": "non_commercial notice? license_text? display? acceptable_use?"},
    "apple-ascl": {"w": "license_text no_endorsement", "l": "license_text?"},
    "apple-amlr": {"l": "non_commercial notice? license_text?"},
    "deepfloyd-if-license": {"o": "non_commercial use_restrictions notice? license_text?"},
    "fair-noncommercial-research-license": {
        "o": "non_commercial share_alike? license_text? attribution acceptable_use?"},
    "h-research": {"w": "non_commercial notice license_text", "l": "non_commercial notice? license_text?"},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    why: str
    student: str
    teachers: str
    data: str
    use: str
    decision: str
    duties: str
    expression: str
    codes: str = ""
    name: str | None = None
    declared: str | None = None
    without: str = ""  # kinds of a triggered ban, which stands as a finding and not as a duty


A, D, C, U, B = "allow", "allow_with_duties", "conditional", "unknown", "block"
AP = "Apache-2.0"
ROWS = [
    Row("Apache asks its notices of a derivative, and nothing else joins", "apache-2.0", "", "", "", D, "apache-2.0.w", AP),
    Row("one's own model with one's own teacher owes nothing", "own", "own", "", "", A, "", "LicenseRef-own"),
    Row("MIT binds copies; outputs only as a precaution", "apache-2.0", "mit:text", "", "", D, "apache-2.0.w mit.o", AP),
    Row("the same for distributions", "apache-2.0", "mit", "", "", D, "apache-2.0.w mit.l", AP),
    Row("an MIT base binds by its words", "mit", "", "", "com dist", D, "mit.w", "MIT"),
    Row("BSD as MIT", "mit", "bsd-3-clause", "", "", D, "mit.w bsd-3-clause.l", "MIT"),
    Row("ISC as MIT", "mit", "isc", "", "", D, "mit.w isc.l", "MIT"),
    Row("zlib as MIT", "mit", "zlib:text", "", "", D, "mit.w zlib.o", "MIT"),
    Row("CC0 waives everything", "mit", "cc0-1.0", "", "", D, "mit.w", "MIT"),
    Row("CC-BY asks attribution of what is adapted, of outputs as a precaution", "mit", "cc-by-4.0", "", "", D,
        "mit.w cc-by-4.0.l", "MIT"),
    Row("a CC-BY dataset is credited", "mit", "", "cc-by-4.0", "", D, "mit.w cc-by-4.0.d", "MIT"),
    Row("MIT and Apache texts bind copies of the data, not what is trained on it", "mit", "", "apache-2.0", "", D,
        "mit.w", "MIT"),
    Row("ODC-By asks attribution of the data", "mit", "", "odc-by", "com dist", D, "mit.w odc-by.d", "MIT"),
    # Llama 3.1 and later
    Row("§1.b.i names and §2 users are facts that only the user knows", "apache-2.0", "llama3.1", "", "", C,
        "apache-2.0.w llama3.1.l", AP, "fact_missing"),
    Row("answers settle it, and a name that begins with Llama meets §1.b.i", "apache-2.0", "llama3.1:text", "",
        "dist !huge", D, "apache-2.0.w llama3.1.o", AP, name="Llama-acme"),
    Row("§1.b.i: outputs alone bring the name", "apache-2.0", "llama3.3:text", "", "dist !huge", D,
        "apache-2.0.w llama3.3.o", AP, "name_prefix", name="acme"),
    Row("no name declared is no name that begins with Llama", "apache-2.0", "llama3.3", "", "dist !huge", D,
        "apache-2.0.w llama3.3.l", AP, "name_prefix"),
    Row("§1.b.i speaks of models that are distributed", "apache-2.0", "llama3.3", "", "!dist !huge", D,
        "apache-2.0.w llama3.3.l", AP, name="acme"),
    Row("§2: over 700M users at release there is no grant", "apache-2.0", "llama3.1", "", "dist huge", B,
        "apache-2.0.w llama3.1.l", AP, "forbidden", name="Llama-x", without="monthly_active_users"),
    Row("§2 binds a base as well", "llama3.1", "", "", "dist huge", B, "llama3.1.w", "LicenseRef-llama3.1", "forbidden",
        name="Llama-x", without="monthly_active_users"),
    Row("worked case: a Llama-3.1 base taught by R1", "llama3.1", "mit:text", "", "com dist !huge", D,
        "llama3.1.w mit.o", "LicenseRef-llama3.1", name="Llama-r1"),
    Row("worked case: Qwen2.5-7B taught by Llama-3.3", "apache-2.0", "llama3.3:text", "", "com dist !huge", D,
        "apache-2.0.w llama3.3.o", AP, name="Llama-qwen"),
    Row("3.2's policy: EU domicile has no rights in multimodal models", "apache-2.0", "llama3.2", "", "dist !huge eu", B,
        "apache-2.0.w llama3.2.l", AP, "forbidden", name="Llama-x", without="eu_multimodal"),
    Row("outside the EU 3.2 is as 3.1", "apache-2.0", "llama3.2", "", "dist !huge !eu", D, "apache-2.0.w llama3.2.l", AP,
        name="Llama-x"),
    Row("Llama 4 asks all three facts", "llama4", "", "", "", C, "llama4.w", "LicenseRef-llama4", "fact_missing"),
    Row("Llama 4 in the EU", "llama4", "", "", "dist !huge eu", B, "llama4.w", "LicenseRef-llama4", "forbidden",
        name="Llama-x", without="eu_multimodal"),
    # Llama 2 and 3
    Row("Llama 2 §1.b.v: outputs may not improve another model", "apache-2.0", "llama2", "", "!huge", B,
        "apache-2.0.w llama2.l", AP, "forbidden"),
    Row("the same for text alone", "apache-2.0", "llama2:text", "", "!huge", B, "apache-2.0.w llama2.o", AP, "forbidden"),
    Row("§1.b.v excepts Llama 2 and its derivatives", "llama2", "llama2", "", "!huge", D, "llama2.w llama2.l",
        "LicenseRef-llama2"),
    Row("Llama 3 §1.b.v", "apache-2.0", "llama3", "", "!huge !dist", B, "apache-2.0.w llama3.l", AP, "forbidden"),
    Row("a Llama 3 derivative may learn from Llama 3, and is named Llama 3", "llama3", "llama3", "", "dist !huge", D,
        "llama3.w llama3.l", "LicenseRef-llama3", name="Llama 3 acme"),
    Row("a Llama 2 student is no Llama 3 derivative", "llama2", "llama3", "", "!huge !dist", B, "llama2.w llama3.l",
        "LicenseRef-llama2", "forbidden"),
    Row("Llama 3 asks 'Llama 3', Llama 3.1 'Llama': one name can meet both", "llama3", "llama3.1:text", "", "dist !huge", D,
        "llama3.w llama3.1.o", "LicenseRef-llama3", name="Llama 3 acme"),
    Row("and a name that meets one of the two is a violation", "llama3", "llama3.1:text", "", "dist !huge", D,
        "llama3.w llama3.1.o", "LicenseRef-llama3", "name_prefix", name="Llama-acme"),
    # terms that a student inherits
    Row("Gemma §1.1(e): distillation makes a Model Derivative", "apache-2.0", "gemma", "", "", D, "apache-2.0.w gemma.l",
        "Apache-2.0 AND LicenseRef-gemma"),
    Row("so does synthetic data", "mit", "gemma:text", "", "com dist", D, "mit.w gemma.o", "LicenseRef-gemma AND MIT"),
    Row("a Gemma base", "gemma", "", "", "", D, "gemma.w", "LicenseRef-gemma"),
    Row("a declared licence that leaves Gemma out is weaker than the union", "mit", "gemma", "", "", D, "mit.w gemma.l",
        "LicenseRef-gemma AND MIT", "declared_license_weaker", declared="mit"),
    Row("one that names both is not", "mit", "gemma", "", "", D, "mit.w gemma.l", "LicenseRef-gemma AND MIT",
        declared="mit AND gemma"),
    Row("DeepSeek's licence: derivatives of output", "apache-2.0", "deepseek:text", "", "", D, "apache-2.0.w deepseek.o",
        "Apache-2.0 AND LicenseRef-deepseek-license"),
    Row("OpenRAIL-M the same", "mit", "bigscience-openrail-m", "", "", D, "mit.w bigscience-openrail-m.l",
        "LicenseRef-bigscience-openrail-m AND MIT"),
    Row("the family is judged as OpenRAIL-M, and its text is to be supplied", "mit", "openrail", "", "", D,
        "mit.w openrail.l", "LicenseRef-openrail AND MIT", "text_missing"),
    Row("CreativeML as OpenRAIL-M", "mit", "creativeml-openrail-m:text", "", "", D, "mit.w creativeml-openrail-m.o",
        "LicenseRef-creativeml-openrail-m AND MIT"),
    # display and scale
    Row("Qwen §4.b: built with Qwen, also for outputs", "mit", "qwen:text", "", "!100m", D, "mit.w qwen.o", "MIT"),
    Row("Qwen §4 asks for the number of users", "mit", "qwen", "", "", C, "mit.w qwen.l", "MIT", "fact_missing"),
    Row("over 100M there is no grant", "qwen", "", "", "100m", B, "qwen.w", "LicenseRef-qwen", "forbidden",
        without="monthly_active_users"),
    Row("Kimi's notice above a scale: the duty stands, and the fact is asked", "mit", "kimi-k2", "", "", C,
        "mit.w kimi-k2.l", "MIT", "fact_missing"),
    Row("below it nothing more is asked", "mit", "kimi-k2", "", "!kimi", D, "mit.w kimi-k2.l", "MIT"),
    # other models
    Row("Tongyi Qianwen §4.b", "mit", "tongyi-qianwen", "", "!100m", B, "mit.w tongyi-qianwen.l", "MIT", "forbidden"),
    Row("except for derivatives of itself", "tongyi-qianwen", "tongyi-qianwen", "", "!100m", D,
        "tongyi-qianwen.w tongyi-qianwen.l", "LicenseRef-tongyi-qianwen"),
    Row("EXAONE §3.1", "mit", "exaone", "", "!com", B, "mit.w exaone.l", "MIT", "forbidden"),
    Row("NVIDIA §1.1: outputs are no derivatives", "mit", "nvidia-open-model-license", "", "!cosmos", D,
        "mit.w nvidia-open-model-license.l", "MIT"),
    Row("NVIDIA §3.2: outputs of a Cosmos model are said", "mit", "nvidia-open-model-license:text", "", "", C,
        "mit.w nvidia-open-model-license.o", "MIT", "fact_missing"),
    Row("a NVIDIA base brings text, notice and guardrails", "nvidia-open-model-license", "", "", "!cosmos", D,
        "nvidia-open-model-license.w", "LicenseRef-nvidia-open-model"),
    Row("Nemotron's licence asks nothing of outputs", "mit", "nvidia-nemotron-open-model-license", "", "", D,
        "mit.w nvidia-nemotron-open-model-license.l", "MIT"),
    Row("OpenMDW asks nothing of outputs", "mit", "openmdw-1.0", "", "", D, "mit.w openmdw-1.0.l", "MIT"),
    Row("nor does its 1.1", "mit", "openmdw-1.1:text", "", "", D, "mit.w openmdw-1.1.o", "MIT"),
    Row("Hunyuan §5.b", "mit", "tencent-hunyuan-community:text", "", "!territory !100m-then", B,
        "mit.w tencent-hunyuan-community.o", "LicenseRef-tencent-hunyuan-community AND MIT", "forbidden"),
    Row("Hunyuan §5.c: nor in the EU, the UK and South Korea", "tencent-hunyuan-community",
        "tencent-hunyuan-community", "", "territory !100m-then", B, "tencent-hunyuan-community.w tencent-hunyuan-community.l",
        "LicenseRef-tencent-hunyuan-community", "forbidden", without="territory"),
    Row("DBRX §2.3", "mit", "databricks-open-model-license", "", "!huge", B,
        "mit.w databricks-open-model-license.l", "MIT", "forbidden"),
    Row("except for derivatives of itself: DBRX", "databricks-open-model-license", "databricks-open-model-license", "",
        "!huge", D, "databricks-open-model-license.w databricks-open-model-license.l", "LicenseRef-databricks-open-model"),
    Row("EXAONE 1.2 §3.1: models that compete", "mit", "exaone-1.2:text", "", "!com", B, "mit.w exaone-1.2.o", "MIT",
        "forbidden"),
    Row("Stability §IV.b", "mit", "stabilityai-ai-community:text", "", "!com !rich", B,
        "mit.w stabilityai-ai-community.o", "LicenseRef-stabilityai-community AND MIT", "forbidden"),
    Row("K-EXAONE §2.2: who sells it is asked", "k-exaone", "k-exaone:text", "", "!dist", C, "k-exaone.w k-exaone.o",
        "LicenseRef-k-exaone", "fact_missing", name="K-EXAONE-x"),
    # scale, and who sells
    Row("LFM §5: commercial above a revenue", "apache-2.0", "lfm1.0:text", "", "", C, "apache-2.0.w lfm1.0.o",
        "Apache-2.0", "fact_missing"),
    Row("LFM below it: as Apache", "lfm1.0", "", "", "!lfm", D, "lfm1.0.w", "LicenseRef-lfm1.0"),
    Row("MiniMax M2 is shown above a scale", "mit", "minimax-m2", "", "!m2", D, "mit.w minimax-m2.l", "MIT"),
    Row("M2.1 in every commercial product", "mit", "minimax-m2.1:text", "", "", C, "mit.w minimax-m2.1.o", "MIT",
        "fact_missing"),
    Row("M2.5 has a policy", "mit", "minimax-model-license:text", "", "", D, "mit.w minimax-model-license.o", "MIT"),
    Row("M2.7 is not for commerce", "mit", "minimax-m2.7:text", "", "com", B, "mit.w minimax-m2.7.o", "MIT", "forbidden",
        without="non_commercial"),
    Row("Kimi K2.5 is shown by its own name", "mit", "kimi-k2.5", "", "!kimi", D, "mit.w kimi-k2.5.l", "MIT"),
    Row("Kimi K3 §2: who runs a model service is asked", "mit", "kimi-k3", "", "!kimi", C, "mit.w kimi-k3.l", "MIT",
        "fact_missing"),
    Row("HyperCLOVA X §3.1: the name, also for outputs", "mit", "hyperclova-x-seed:text", "",
        "dist !10m-then !naver", D, "mit.w hyperclova-x-seed.o", "LicenseRef-hyperclova-x-seed AND MIT",
        name="HyperCLOVA X Mini"),
    Row("without it there is a violation", "mit", "hyperclova-x-seed", "", "dist !10m-then !naver", D,
        "mit.w hyperclova-x-seed.l", "LicenseRef-hyperclova-x-seed AND MIT", "name_prefix", name="mini"),
    Row("Falcon §5: outputs under its policy", "apache-2.0", "falcon-llm-license:text", "", "", D,
        "apache-2.0.w falcon-llm-license.o", "Apache-2.0", "text_missing"),
    Row("Mistral's modified MIT above a revenue, as quoted", "mit", "mistral-modified-mit", "", "mistral", B,
        "mit.w mistral-modified-mit.l", "MIT", "forbidden text_missing", without="revenue_limit"),
    # non-commercial
    Row("research only, and whether this is commercial is not said", "mit", "qwen-research", "", "", C,
        "mit.w qwen-research.l", "MIT", "fact_missing text_missing"),
    Row("commercial use of a research teacher", "mit", "qwen-research:text", "", "com", B, "mit.w qwen-research.o", "MIT",
        "forbidden text_missing", without="non_commercial"),
    Row("MRL: outputs included", "mit", "mistral-research:text", "", "com", B, "mit.w mistral-research.o", "MIT",
        "forbidden text_missing", without="non_commercial"),
    Row("research use of it", "mit", "mistral-research", "", "!com", D, "mit.w mistral-research.l", "MIT", "text_missing"),
    Row("CC-BY-NC data makes the student non-commercial", "mit", "", "cc-by-nc-4.0", "com", B, "mit.w cc-by-nc-4.0.d",
        "MIT", "forbidden", without="non_commercial"),
    Row("and may be used otherwise", "mit", "", "cc-by-nc-4.0", "!com", D, "mit.w cc-by-nc-4.0.d", "MIT"),
    Row("a declared licence without the condition is weaker", "mit", "", "cc-by-nc-4.0", "!com", D, "mit.w cc-by-nc-4.0.d",
        "MIT", "declared_license_weaker", declared="mit"),
    Row("an unread research licence is non-commercial by the family rule", "mit", "h-research", "", "com", B,
        "mit.w h-research.l", "MIT", "forbidden text_missing", without="non_commercial"),
    # share-alike
    Row("GPL weights: share-alike turns on distribution", "gpl-3.0", "", "", "", C, "gpl-3.0.w", "GPL-3.0-only",
        "fact_missing"),
    Row("distributed, it is a duty", "gpl-3.0", "", "", "dist", D, "gpl-3.0.w", "GPL-3.0-only"),
    Row("GPL outputs are no copies: a precaution", "mit", "gpl-3.0", "", "dist", D, "mit.w gpl-3.0.l", "MIT"),
    Row("GPL-2.0-only and GPL-3.0 cannot both be the licence", "gpl-2.0", "", "gpl-3.0", "dist", D, "gpl-2.0.w gpl-3.0.d",
        "GPL-2.0-only", "share_alike_conflict"),
    Row("AGPL-3.0 and GPL-3.0 can (§13)", "agpl-3.0", "", "gpl-3.0", "dist", D, "agpl-3.0.w gpl-3.0.d", "AGPL-3.0-only"),
    Row("CC-BY-SA 3.0 allows a later version", "mit", "", "cc-by-sa-3.0 cc-by-sa-4.0", "dist", D,
        "mit.w cc-by-sa-3.0.d cc-by-sa-4.0.d", "MIT"),
    Row("CC-BY-SA and CC-BY-NC-SA cannot both be the licence", "mit", "", "cc-by-sa-4.0 cc-by-nc-sa-4.0", "dist !com", D,
        "mit.w cc-by-sa-4.0.d cc-by-nc-sa-4.0.d", "MIT", "share_alike_conflict"),
    Row("no-derivatives data may not leave adapted", "mit", "", "cc-by-nd-4.0", "dist", B, "mit.w cc-by-nd-4.0.d", "MIT",
        "forbidden", without="no_derivatives"),
    Row("kept at home it may be used", "mit", "", "cc-by-nd-4.0", "!dist", D, "mit.w cc-by-nd-4.0.d", "MIT"),
    # expressions and the unknown
    Row("in a choice the milder is chosen", "MIT OR GPL-3.0", "", "", "", D, "mit.w", "MIT"),
    Row("in a conjunction both bind", "mit AND gemma", "", "", "", D, "mit.w gemma.w", "LicenseRef-gemma AND MIT"),
    Row("what is not known blocks", "mit", "grok9-community", "", "", U, "mit.w", "MIT", "unknown_license"),
    Row("Grok 2, as quoted: outputs may not train other models", "mit", "grok2-community:text", "", "!com", B,
        "mit.w grok2-community.o", "MIT", "forbidden text_missing"),
    Row("Apple's sample code licence permits, and gives no patents", "apple-ascl", "apple-ascl", "", "", D,
        "apple-ascl.w apple-ascl.l", "LicenseRef-apple-ascl"),
    Row("Apple's research licence is for research", "mit", "apple-amlr", "", "com", B, "mit.w apple-amlr.l", "MIT",
        "forbidden", without="non_commercial"),
    Row("DeepFloyd: nor may data that it produced", "mit", "deepfloyd-if-license:text", "", "com", B,
        "mit.w deepfloyd-if-license.o", "MIT", "forbidden", without="non_commercial"),
    Row("FAIR: nor outputs or results", "mit", "fair-noncommercial-research-license:text", "", "com !dist", B,
        "mit.w fair-noncommercial-research-license.o", "MIT", "forbidden", without="non_commercial"),
    Row("'other' says nothing", "mit", "other", "", "", U, "mit.w", "MIT", "unknown_license"),
    Row("an unknown part of a conjunction blocks", "mit AND Made-Up-1.0", "", "", "", U, "mit.w", "MIT", "unknown_license"),
    Row("the worst decides, whatever else is there", "apache-2.0", "mit gemma llama2 llama3.1", "cc-by-4.0", "dist !huge", B,
        "apache-2.0.w mit.l gemma.l llama2.l llama3.1.l cc-by-4.0.d", "Apache-2.0 AND LicenseRef-gemma", "forbidden",
        name="Llama-x"),
]  # fmt: skip


def run_of(row: Row) -> RunLineage:
    answers = {FACTS[word.lstrip("!")]: not word.startswith("!") for word in row.use.split()}
    teachers = []
    for i, written in enumerate(row.teachers.split()):
        licence, _, signal = written.partition(":")
        teachers.append(Source(f"t{i}", ref=f"org/t{i}", license=licence, signal=signal or "logits"))
    datasets = [Source(f"d{i}", "dataset", f"org/d{i}", license=d) for i, d in enumerate(row.data.split())]
    student = {k: v for k, v in (("name", row.name), ("declared_license", row.declared)) if v}
    return RunLineage(
        method="offline_kd",
        student=Source("student", ref="org/student", license=row.student),
        teachers=teachers,
        datasets=datasets,
        config={"use": answers, "student": student},
    )


def expected_duties(row: Row) -> set[tuple[str, str, str]]:
    found = set()
    for item in row.duties.split():
        terms, reach = item.rsplit(".", 1)
        for kind in DUTIES[terms][reach].split():
            bare = kind.rstrip("?")
            if bare not in row.without.split():
                found.add((terms, bare, "precautionary" if kind.endswith("?") else "explicit"))
    return found


def test_the_table_is_long_enough():
    assert len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.why[:60])
def test_scenario(row):
    run = run_of(row)
    verdict = run.verdict
    assert verdict.decision == row.decision, [str(f) for f in verdict.findings]
    assert {(d.terms, d.kind, d.basis) for d in verdict.obligations} == expected_duties(row)
    assert verdict.license_expression == row.expression
    # None of these repositories is there, so all that supports a licence is its declaration, which is noted
    understood = [n for n in run.graph.nodes.values() if not {"own", "unknown"} & set(n.licenses)]
    alone = {"declaration_alone"} if understood else set()
    assert {f.code for f in verdict.findings} == set(row.codes.split()) | alone
    for duty in verdict.obligations:  # every duty says by which path it came, and the path ends at its source
        assert duty.path[0] == "self" and duty.path[-1] == duty.node
        assert duty.terms in run.graph.nodes[duty.node].licenses
    if row.decision in (B, U) and any(f.trigger == "training" for f in verdict.findings if f.severity in (B, U)):
        with pytest.raises(LicenseRefusedError):
            run.require_trainable()
    else:
        run.require_trainable()


HUB_IDS = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 "
    "lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl "
    "openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other"
)


def test_every_hub_licence_id_that_we_know_of_resolves():
    registry = default_registry()
    unknown = {hub_id for hub_id in HUB_IDS.split() if registry.resolve(hub_id).ids == ("unknown",)}
    assert unknown == {"unknown", "other"}


def test_every_entry_says_where_it_comes_from():
    for entry in default_registry().terms.values():
        assert entry.name and entry.read and entry.source
        assert entry.text is None or entry.text_sha256
        for clause in entry.clauses:
            assert clause.cite and clause.says and (clause.reach or clause.precaution)


def test_the_distilled_llama_carries_llama_terms_beside_its_mit_badge():
    source = Source("r1", ref="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", license="mit")
    run = RunLineage(method="sft", student=Source("s", ref="org/s", license="apache-2.0"), teachers=[source])
    assert {d.terms for d in run.verdict.obligations} == {"apache-2.0", "mit", "llama3.1"}
    assert run.verdict.decision == "conditional"
    assert all("qwen" not in d.terms for d in run.verdict.obligations)
    qwen = Source("r1", ref="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", license="mit")
    run = RunLineage(method="sft", student=Source("s", ref="org/s", license="apache-2.0"), teachers=[qwen])
    assert run.verdict.decision == "allow_with_duties"
