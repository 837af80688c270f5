"""Tiny models and a byte tokenizer, built in memory: tests run anywhere, in seconds, without a hub."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(swap: tuple[str, str] | None = None, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a byte and three specials (259 tokens).

    Args:
        swap: two tokens that exchange their ids.
        added: further tokens, from id 259 on.
    """
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(tokens)}
    if swap:
        vocab[swap[0]], vocab[swap[1]] = vocab[swap[1]], vocab[swap[0]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(list(added))
    return tokenizer


# What differs in the world's models around the output head: each variant changes one thing, by the configuration of a
# family that has it. All but `tied` are untied, as students from 7B up are.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "untied": {"model_type": "llama"},
    "padded": {"model_type": "llama", "vocab_size": 272},  # rows beyond the tokenizer's 259, as Qwen's
    "softcapped": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "scaled": {"model_type": "granite", "logits_scaling": 0.5},
    "biased": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "wide_tokenizer": {"model_type": "llama", "vocab_size": 258},  # one row short of the tokenizer, as Gemma-3-1B's
}


def tiny_model(
    variant: str = "untied", seed: int = 0, hidden: int = 32, layers: int = 2, scale: float = 8.0, **changes: Any
) -> PreTrainedModel:
    """Build a random model of one of :data:`VARIANTS`.

    Args:
        variant: the variant's name.
        seed: of its weights.
        hidden: width H; a multiple of 4.
        layers: number of decoder layers.
        scale: multiplies the initial weights, and the biases of a biased head, so that distributions are not flat.
        **changes: fields of its configuration.
    """
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 259,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.02 * scale,
        **VARIANTS[variant],
        **changes,
    }
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias, std=0.1 * scale)
    return model.eval()


def tiny_llama(
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    vocab_size: int = 259,
    tied: bool = True,
    scale: float = 8.0,
) -> LlamaForCausalLM:
    """Build a random Llama; ``scale`` multiplies its initial weights so that distributions are not flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.02 * scale,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(
    directory: Path,
    license: str | None = "apache-2.0",
    swap=None,
    variant: str | None = None,
    added: tuple[str, ...] = (),
    **kwargs,
) -> str:
    """Save a tiny model with its tokenizer and, if given, a model card that names ``license``.

    Args:
        directory: where to.
        license: its hub id.
        swap: two tokens that exchange their ids.
        variant: of :data:`VARIANTS`, built by :func:`tiny_model`; None is :func:`tiny_llama`.
        added: further tokens of its tokenizer.
        **kwargs: of the function that builds it.
    """
    model = tiny_llama(**kwargs) if variant is None else tiny_model(variant, **kwargs)
    model.save_pretrained(directory)
    byte_tokenizer(swap, added).save_pretrained(directory)
    if license:
        (Path(directory) / "README.md").write_text(f"---\nlicense: {license}\n---\n\n# Tiny test model\n")
    return str(directory)
