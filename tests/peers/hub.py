"""Make the models and datasets that TRL's tests read from the hub, in a local hub cache.

TRL's repository has the scripts that built and pushed them. They are run here from the checkout that the user named,
with three changes: tokenizers come from :mod:`tests.peers.tokenizers`, pushing writes into the local cache, and the
check of the transformers version, which only guards what is pushed, is left out. Nothing of them is kept here.

python -m tests.peers.hub CHECKOUT CACHE
"""

import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

from tests.peers.processors import TYPES, configuration, processor
from tests.peers.tokenizers import FAMILIES, build, learn_merges

DATASETS = ("zen", "harmony", "toolcall", "zen_image", "zen_multi_image")
WORDS = re.compile(r"[\w' .,?!*-]+")
# Repositories from which a test takes the tokenizer alone
TOKENIZERS = ("Qwen/Qwen3-4B",)
# What the families' own cards say; the others say apache-2.0, MIT or the like
LICENSES = {"Gemma": "gemma", "Lfm2": "lfm1.0", "Llama": "llama3.2"}


def main(checkout: Path, cache: Path) -> None:
    sys.path.insert(0, str(checkout))

    def push_data(self: DatasetDict, repo: str, config_name: str) -> None:
        _as_text(self).save_to_disk(cache / "data" / repo / config_name)

    DatasetDict.push_to_hub = push_data
    for name in DATASETS:
        script = importlib.import_module(f"scripts.generate_{name}_dataset")
        script.main(0.1, True, f"trl-internal-testing/{name.replace('_', '-')}")
    templates = " ".join(family.chat_template() or "" for family in FAMILIES.values())
    merges = learn_merges([*_texts(cache / "data"), *WORDS.findall(templates)])
    built: dict[str, Any] = {}

    def tokenizer(name: str, **options: Any) -> Any:
        if name not in built:
            built[name] = build(FAMILIES[name], merges)
        return built[name]

    AutoTokenizer.from_pretrained = tokenizer
    AutoProcessor.from_pretrained = lambda name: processor(name, tokenizer(name))
    AutoConfig.from_pretrained = configuration
    GenerationConfig.from_pretrained = lambda name, **options: GenerationConfig(**FAMILIES[name].generation)
    common = importlib.import_module("scripts.generate_tiny_models._common")
    common.check_transformers_version = common.check_dtype_pattern = common.print_config_diff = lambda *args: None

    def push(model: Any, tokenizer: Any, generation: Any, prefix: str, suffix: str | None = None) -> None:
        name = "-".join(part for part in (prefix, type(model).__name__, suffix) if part)
        _store(cache / "hub", f"trl-internal-testing/{name}", model, tokenizer, generation)

    common.push_to_hub = push
    ends = FAMILIES["openai/gpt-oss-20b"].generation
    # Its configuration has the ids of the whole vocabulary as defaults
    transformers.GptOssConfig = partial(
        transformers.GptOssConfig, pad_token_id=ends["pad_token_id"], eos_token_id=ends["eos_token_id"][0]
    )
    for name in TOKENIZERS:
        _store(cache / "hub", name, None, tokenizer(name), None)
    for folder, names in (("for_causal_lm", FAMILIES), ("for_conditional_generation", TYPES)):
        for script in sorted((checkout / "scripts" / "generate_tiny_models" / folder).glob("*.py")):
            named = re.search(r'^MODEL_ID = "(.+)"', script.read_text(), re.MULTILINE)
            if named and named[1] in names:
                torch.manual_seed(0)
                importlib.import_module(f"scripts.generate_tiny_models.{folder}.{script.stem}")


def _as_text(datasets: DatasetDict) -> DatasetDict:
    """Return the datasets with their tools as JSON text, as the hub has them; newer releases of datasets parse it."""
    if "tools" not in next(iter(datasets.values())).column_names:
        return datasets

    def rows(dataset: Dataset) -> list[dict[str, Any]]:
        return [
            {**row, "tools": tools if isinstance(tools := row["tools"], str) else json.dumps(tools)} for row in dataset
        ]

    return DatasetDict({name: Dataset.from_list(rows(dataset)) for name, dataset in datasets.items()})


def _texts(data: Path) -> Iterator[str]:
    """Return the text of all datasets."""
    for state in sorted(data.rglob("dataset_dict.json")):
        for dataset in DatasetDict.load_from_disk(str(state.parent)).values():
            columns = [name for name, feature in dataset.features.items() if "Image" not in str(feature)]
            for row in dataset.select_columns(columns):
                yield from WORDS.findall(str(row))


def _store(hub: Path, repo: str, model: Any, tokenizer: Any, generation: Any) -> None:
    """Write a repository into a hub cache, as a download would."""
    revision = hashlib.sha1(repo.encode()).hexdigest()
    directory = hub / f"models--{repo.replace('/', '--')}"
    snapshot = directory / "snapshots" / revision
    snapshot.mkdir(parents=True)
    if model is not None:
        model.generation_config = generation
        model.save_pretrained(snapshot)
    else:
        (snapshot / "config.json").write_text('{"model_type": "qwen3"}')
    tokenizer.save_pretrained(snapshot)
    license = next((own for family, own in LICENSES.items() if family in repo), "apache-2.0")
    card = f"---\nlicense: {license}\n---\n\nA random model that stands in for one of the hub's.\n"
    (snapshot / "README.md").write_text(card)
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text(revision)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
