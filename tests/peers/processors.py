"""Stand-ins for processors of models that see images: PIL's image processors, and our tokenizers.

Families whose processor needs torchvision (Qwen-VL, Gemma 4, InternVL) have none: the project does not install it.
"""

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)

# What the hub's configurations say and the scripts do not change
SAID = {
    "gemma3": {"vision_config": {"patch_size": 14}},
    "llava_next": {
        "image_token_index": 32000,
        "vision_config": {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 336},
        "text_config": {"model_type": "mistral", "vocab_size": 32064, "intermediate_size": 32},
    },
}
TYPES = {"google/gemma-3-4b-it": "gemma3", "llava-hf/llava-v1.6-mistral-7b-hf": "llava_next"}


def processor(name: str, tokenizer: Any) -> ProcessorMixin:
    """Build the stand-in for a processor of :data:`TYPES`."""
    template = tokenizer.chat_template
    if TYPES[name] == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessorPil(), tokenizer, chat_template=template)
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def configuration(name: str, **parts: Any) -> PreTrainedConfig:
    """Build a configuration of ``name``'s kind with these parts changed."""
    said = SAID[TYPES[name]]
    merged = {key: {**said.get(key, {}), **part} for key, part in parts.items()}
    return CONFIG_MAPPING[TYPES[name]](**{**said, **merged})
