"""Shapes are counted on the real architectures, and equal what the hub publishes."""

import tomllib
from importlib.resources import files

import pytest

from kd_plugin.errors import ConfigError
from kd_plugin.planner.architectures import architecture, known_models
from tests.hosts.runs import LORA
from tests.tiny import save_tiny, tiny_llama


@pytest.mark.parametrize(("name", "published"), known_models().items())
def test_parameter_counts_equal_the_published_ones(name, published):
    assert architecture(name).total == published


def test_every_count_names_its_source():
    table = tomllib.loads(files("kd_plugin.planner").joinpath("known_models.toml").read_text())
    for name, entry in table["models"].items():
        assert entry["source"].startswith(f"https://huggingface.co/{name}/blob/main/model.safetensors")
        assert entry.get("total_size", 2 * entry["parameters"]) == 2 * architecture(name).total
        assert entry["source"].endswith("index.json") == ("total_size" in entry)


def test_the_models_that_people_distil_are_known():
    names = known_models()
    assert sum("R1-Distill" in name for name in names) == 6
    assert {f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")} <= names.keys()
    assert architecture("qwen2.5-0.5b").total == names["Qwen/Qwen2.5-0.5B"]


def test_a_config_file_and_its_directory_are_read(tmp_path):
    save_tiny(tmp_path / "model", hidden=48, tied=False)
    real = sum(p.numel() for p in tiny_llama(hidden=48, tied=False).parameters())
    for path in (tmp_path / "model", tmp_path / "model" / "config.json"):
        found = architecture(str(path))
        assert (found.total, found.trainable, found.hidden, found.layers) == (real, real, 48, 2)


def test_lora_counts_equal_pefts(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), LORA)
    save_tiny(tmp_path / "model")
    found = architecture(str(tmp_path / "model"), lora_rank=4, lora_targets=("q_proj", "v_proj"))
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in model.parameters())


def test_unknown_names_and_layers_name_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean 'Qwen/Qwen2\.5-32B'"):
        architecture("Qwen/Qwen2.5-32")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a model's config"):
        architecture(str(tmp_path))
    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        architecture("Qwen/Qwen2.5-0.5B", lora_rank=8, lora_targets=("q_porj",))
