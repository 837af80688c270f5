"""Tiny models that see images, used on text alone: a vision tower, and the text model in a nested configuration."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from tests.tiny import byte_tokenizer

_TEXT = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
FAMILIES = {
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", "head_dim": 16, **_VISION},
        "image_token_index": 258,
    },
    "gemma3": {
        "text_config": {"query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": False},
        "tie_word_embeddings": False,
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 258,
        "boi_token_index": 256,
        "eoi_token_index": 257,
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _ROPE},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
        },
        "image_token_id": 258,
        "video_token_id": 257,
        "vision_start_token_id": 255,
        "vision_end_token_id": 256,
    },
}


def tiny_multimodal(family: str, seed: int = 0, **text) -> PreTrainedModel:
    """Build a random model of one of :data:`FAMILIES`; ``text`` are fields of its text configuration."""
    torch.manual_seed(seed)
    settings = dict(FAMILIES[family])
    settings["text_config"] = {**_TEXT, **settings["text_config"], **text}
    config = CONFIG_MAPPING[family](**settings)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def save_multimodal(directory: Path, family: str, **kwargs) -> str:
    """Save such a model with its tokenizer and a model card."""
    tiny_multimodal(family, **kwargs).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (Path(directory) / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return str(directory)
