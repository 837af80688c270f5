"""Stand-ins for the tokenizers that TRL's tiny models use: the same ids, special tokens, sizes and chat templates.

A stand-in is a byte-level BPE. Its merges are learnt from the tests' own datasets, so that words are tokens and rows
are as long as with the real one. Tokens that a test writes as a number have that number; what is left of the vocabulary
is filled up, so that its size is the real one. Those of Qwen2.5, of the dense Qwen3 and of gpt-oss, on which most and
the longest tests run, are cut to 8,192 tokens, or the tests would take hours. Chat templates are those that the
installed TRL has for the family.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = re.compile(r"<\|[^|<>{}'\"]+\|>|</?[a-z_]+>")


@dataclass(frozen=True)
class Family:
    """A tokenizer of the hub.

    Attributes:
        size: number of tokens.
        template: name of a chat template in TRL, or the template itself; None has none.
        specials: id to special token.
        words: id to a plain token that a test names by its id.
        eos, pad, bos: those special tokens.
        adds_bos: whether a text begins with ``bos``.
        generation: fields of the model's generation configuration.
        named: special tokens that a processor asks for by a name.
    """

    size: int
    template: str | None
    specials: dict[int, str]
    eos: str
    pad: str | None = None
    bos: str | None = None
    adds_bos: bool = False
    words: dict[int, str] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)

    def chat_template(self) -> str | None:
        """Return the template's text."""
        if self.template is None or "{" in self.template:
            return self.template
        return (files("trl") / "chat_templates" / f"{self.template}.jinja").read_text()


QWEN = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151657: "<tool_call>"}
QWEN |= {151652: "<|vision_start|>", 151653: "<|vision_end|>", 151655: "<|image_pad|>", 151656: "<|video_pad|>"}
QWEN |= {151658: "</tool_call>"}
QWEN3 = {**QWEN, 151665: "<tool_response>", 151666: "</tool_response>", 151667: "<think>", 151668: "</think>"}
QWEN_WORDS = {4913: '{"', 606: "name", 788: '":', 330: ' "', 64648: "multiply", 22785: "_tool", 497: '",'}
QWEN_WORDS |= {16370: "arguments", 5212: ' {"', 11248: "}}\n", 1513: " don", 944: "'t", 1414: " know"}
QWEN_WORDS |= {894: " any", 5392: " tool", 17453: "Done"}
QWEN_ENDS = {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": True, "top_p": 0.95, "top_k": 20}
QWEN_PARTS = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
CUT = 8192 - 151669  # what is added to an id
LLAMA = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128004: "<|finetune_right_pad_id|>"}
LLAMA |= {128006: "<|start_header_id|>", 128007: "<|end_header_id|>", 128008: "<|eom_id|>", 128009: "<|eot_id|>"}


def cut_qwen(template: str, specials: dict[int, str]) -> Family:
    """Return a Qwen tokenizer of fewer tokens, whose special ones are still the last."""
    ends = {"eos_token_id": [151645 + CUT, 151643 + CUT], "pad_token_id": 151643 + CUT}
    moved = {i + CUT: token for i, token in specials.items()}
    return Family(max(moved) + 1, template, moved, generation={**QWEN_ENDS, **ends}, **QWEN_PARTS)


def cut_gpt_oss() -> Family:
    """Return gpt-oss's tokenizer with fewer tokens, whose special ones are still the last."""
    down = 8192 - 200019
    special = {199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>", 200003: "<|constrain|>"}
    special |= {200005: "<|channel|>", 200006: "<|start|>", 200007: "<|end|>", 200008: "<|message|>"}
    special |= {200012: "<|call|>"}
    moved = {i + down: token for i, token in special.items()}
    ends = {"eos_token_id": [200002 + down, 199999 + down, 200012 + down]}
    ends |= {"pad_token_id": 199999 + down, "bos_token_id": 199998 + down}
    return Family(8192, "gptoss", moved, "<|return|>", "<|endoftext|>", "<|startoftext|>", generation=ends)


FAMILIES = {
    "Qwen/Qwen2.5-32B-Instruct": cut_qwen("qwen2_5", QWEN),
    "Qwen/Qwen3-8B": cut_qwen("qwen3", QWEN3),
    "Qwen/Qwen3-4B": cut_qwen("qwen3", QWEN3),
    "Qwen/Qwen3-30B-A3B": Family(151669, "qwen3", QWEN3, words=QWEN_WORDS, generation=QWEN_ENDS, **QWEN_PARTS),
    "CohereLabs/tiny-aya-earth": Family(
        261018,
        "cohere2",
        {0: "<PAD>", 1: "<UNK>", 2: "<BOS_TOKEN>", 3: "<|END_OF_TURN_TOKEN|>"},
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        bos="<BOS_TOKEN>",
        adds_bos=True,
        generation={"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2},
    ),
    "zai-org/GLM-4.5": Family(
        151365,
        "glm4moe",
        {151329: "<|endoftext|>", 151331: "[gMASK]", 151333: "<sop>", 151335: "<|system|>"}
        | {151336: "<|user|>", 151337: "<|assistant|>", 151338: "<|observation|>"},
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        generation={"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329},
    ),
    "openai/gpt-oss-20b": cut_gpt_oss(),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Family(
        131072,
        "nemotron_3_nano",
        {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"},
        eos="<|im_end|>",
        pad="<unk>",
        bos="<s>",
        generation={"eos_token_id": [2, 11], "pad_token_id": 0, "bos_token_id": 1},
    ),
    "allenai/Olmo-3-7B-Think": Family(
        100278,
        CHATML,
        {100257: "<|endoftext|>", 100264: "<|im_start|>", 100265: "<|im_end|>", 100277: "<|pad|>"},
        eos="<|endoftext|>",
        pad="<|pad|>",
        generation={"eos_token_id": [100265, 100257], "pad_token_id": 100277},
    ),
    "LiquidAI/LFM2-1.2B": Family(
        64400,
        "lfm2",
        {0: "<|pad|>", 1: "<|startoftext|>", 2: "<|endoftext|>", 6: "<|im_start|>", 7: "<|im_end|>"},
        eos="<|im_end|>",
        pad="<|pad|>",
        bos="<|startoftext|>",
        adds_bos=True,
        generation={"eos_token_id": 7, "pad_token_id": 0, "bos_token_id": 1},
    ),
    "LiquidAI/LFM2.5-230M": Family(
        64400,
        "lfm2_2_5",
        {0: "<|pad|>", 1: "<|startoftext|>", 2: "<|endoftext|>", 6: "<|im_start|>", 7: "<|im_end|>"},
        eos="<|im_end|>",
        pad="<|pad|>",
        bos="<|startoftext|>",
        adds_bos=True,
        generation={"eos_token_id": 7, "pad_token_id": 0, "bos_token_id": 1},
    ),
    "EleutherAI/pythia-14m": Family(
        50277,
        None,
        {0: "<|endoftext|>", 1: "<|padding|>"},
        eos="<|endoftext|>",
        bos="<|endoftext|>",
        generation={"eos_token_id": 0, "bos_token_id": 0},
    ),
    "meta-llama/Llama-3.2-1B-Instruct": Family(
        128256,
        "llama3_2",
        LLAMA,
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        adds_bos=True,
        generation={"eos_token_id": [128001, 128008, 128009], "bos_token_id": 128000, "do_sample": True},
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": Family(
        32000,
        INST,
        {0: "<unk>", 1: "<s>", 2: "</s>"},
        eos="</s>",
        bos="<s>",
        adds_bos=True,
        generation={"eos_token_id": 2, "bos_token_id": 1},
    ),
    "google/gemma-3-4b-it": Family(
        262145,
        "gemma3",
        {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 105: "<start_of_turn>", 106: "<end_of_turn>"}
        | {255999: "<start_of_image>", 256000: "<end_of_image>", 262144: "<image_soft_token>"},
        eos="<eos>",
        pad="<pad>",
        bos="<bos>",
        adds_bos=True,
        generation={"eos_token_id": [1, 106], "pad_token_id": 0, "bos_token_id": 2, "do_sample": True},
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": Family(
        32002,
        "llava_next",
        {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"},
        eos="</s>",
        pad="<pad>",
        bos="<s>",
        adds_bos=True,
        generation={"eos_token_id": 2, "pad_token_id": 32001, "bos_token_id": 1},
    ),
    "microsoft/Phi-3.5-mini-instruct": Family(
        32011,
        "phi3_5",
        {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<|endoftext|>", 32001: "<|assistant|>"}
        | {32006: "<|system|>", 32007: "<|end|>", 32010: "<|user|>"},
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        bos="<s>",
        words={10924: "Blue", 322: " and", 7933: " green"},
        generation={"eos_token_id": [32007, 32001, 32000], "pad_token_id": 32000, "bos_token_id": 1},
    ),
}


def byte_symbols() -> dict[int, str]:
    """Return the symbol of each byte, in the order of GPT-2's and its successors' first 256 ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Learn which pairs of symbols make words of ``texts``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]


def build(family: Family, merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Build the stand-in for ``family``."""
    symbols = byte_symbols()
    template = family.chat_template()
    specials = dict(family.specials)
    unplaced = dict.fromkeys(SPECIAL.findall(template or ""))
    free_from_top = (i for i in range(family.size - 1, 0, -1) if i not in specials and i not in family.words)
    for token in unplaced:
        if token not in specials.values():
            specials[next(free_from_top)] = token
    words = {i: "".join(symbols[byte] for byte in word.encode()) for i, word in family.words.items()}
    placed = {**specials, **words}
    learnt = [*symbols.values(), *(a + b for a, b in merges)]
    others = iter([token for token in dict.fromkeys(learnt) if token not in set(placed.values())])
    vocab = {}
    for i in range(family.size):
        vocab[placed.get(i) or next(others, f"[unused {i}]")] = i
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for a, b in merges if a + b in vocab]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([specials[i] for i in sorted(specials)])
    if family.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, vocab[family.bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.eos,
        pad_token=family.pad,
        bos_token=family.bos,
        **({"extra_special_tokens": family.named} if family.named else {}),
    )
    tokenizer.chat_template = template
    return tokenizer
