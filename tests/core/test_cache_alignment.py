"""A cache whose targets belong to the neighbouring token is noticed from its data alone."""

import itertools
import random
import re

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

from kd_plugin.cache import Sampled, TeacherCache, TopK, alignment
from kd_plugin.cache.alignment import measure_alignment, require_aligned
from kd_plugin.capturing import capture
from kd_plugin.errors import CacheError
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import WORDS
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    """A capture of what the teacher itself wrote, as distillation uses it."""
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    torch.manual_seed(0)
    start = torch.randint(3, 259, (8, 4))
    written = teacher.model.generate(start, max_new_tokens=24, do_sample=True, eos_token_id=None)
    rows = [{"input_ids": ids, "completion_mask": [0] * 4 + [1] * 24} for ids in written.tolist()]
    directory = tmp_path_factory.mktemp("cache") / "own"
    return capture(Dataset.from_list(rows), teacher, directory, targets=TopK(64), progress=False)


class Shifted(TeacherCache):
    by = 1

    def signal(self, teacher_index):
        return super().signal((teacher_index + self.by).clamp(0, self.tokens - 1))


def test_an_aligned_cache_passes(cache):
    found = require_aligned(cache)
    assert found.shift == 0
    assert found.positions > 100
    assert found.logprob[0] > max(found.logprob[-1], found.logprob[1]) + 0.5


@pytest.mark.parametrize("by", [-1, 1])
def test_a_shifted_cache_is_refused(cache, by):
    shifted = type("Shifted", (Shifted,), {"by": by})(cache.path)
    assert measure_alignment(shifted).shift == by
    with pytest.raises(CacheError, match=re.escape(f"shifted by {by:+d} token")):
        require_aligned(shifted)


ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 8}),
    "lfm2": (
        "Lfm2Config",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}),
}


def untrained(name, seed, scale):
    """A teacher that nobody trained, of one of the ARCHITECTURES."""
    kind, changes = ARCHITECTURES[name]
    config = getattr(transformers, kind)(
        **{
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.02 * scale,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def written_by(model, rows=24, tokens=24, temperature=1.0):
    """Let a model go on from random tokens, and return the rows."""
    start = torch.randint(3, 259, (rows, 4))
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [{"input_ids": row, "completion_mask": [0] * 4 + [1] * tokens} for row in ids.tolist()]


def words(seed, rows=24):
    dice = random.Random(seed)
    return [
        {"prompt": " ".join(dice.choices(WORDS, k=3)) + " ", "completion": " ".join(dice.choices(WORDS, k=8))}
        for _ in range(rows)
    ]


def runs(seed, rows=24):
    """Text in which each token stands three times, which a teacher that repeats what it reads seems to know."""
    dice = random.Random(seed)
    found = [[token for token in dice.choices(range(3, 259), k=12) for _ in range(3)] for _ in range(rows)]
    return [{"input_ids": ids, "completion_mask": [0] * 4 + [1] * (len(ids) - 4)} for ids in found]


def captured(model, rows, directory, targets):
    teacher = LocalTeacher(model, tokenizer=byte_tokenizer(), license="mit")
    return capture(Dataset.from_list(rows), teacher, directory, targets=targets, progress=False)


def shifted_by(cache, by):
    return type("Shifted", (Shifted,), {"by": by})(cache.path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_an_untrained_teacher_says_of_any_text_is_no_shift(name, tmp_path):
    """12 caches an architecture, 72 in all."""
    alarms, number = [], 0
    for seed, scale in itertools.product((0,), (1.0, 8.0)):
        model = untrained(name, seed, scale)
        texts = {"own": written_by(model), "foreign": words(seed), "runs": runs(seed)}
        for text, rows in texts.items():
            for targets in (TopK(8), Sampled(50)):
                number += 1
                cache = captured(model, rows, tmp_path / str(number), targets)
                alarms += [(seed, scale, text, targets)] if measure_alignment(cache).shift else []
    assert not alarms


@pytest.fixture(scope="module")
def trained():
    """A small Llama that was taught a language of fixed pairs of words, in two seconds."""
    model = untrained("llama", 0, 1.0).train()
    tokenizer, dice = byte_tokenizer(), random.Random(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        text = [" ".join(dice.choices(WORDS, k=10))[:48] for _ in range(16)]
        ids = torch.tensor([tokenizer(line)["input_ids"] for line in text if len(line) == 48])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("targets", [TopK(8), Sampled(50)], ids=str)
@pytest.mark.parametrize("temperature", [None, 1.0, 0.7, 0.0])
def test_a_shift_of_a_trained_teachers_targets_is_caught(trained, temperature, targets, tmp_path):
    """Over text that it was taught, and text that it wrote itself, drawn, drawn sharply and greedily: 16 of 16."""
    torch.manual_seed(1)
    rows = words(7, rows=48) if temperature is None else written_by(trained, rows=48, temperature=temperature)
    cache = captured(trained, rows, tmp_path / "c", targets)
    assert require_aligned(cache).shift == 0
    for by in (-1, 1):
        assert measure_alignment(shifted_by(cache, by)).shift == by, by


def test_a_refusal_can_be_overridden(cache, caplog):
    with pytest.raises(CacheError, match="allow_misaligned=True"):
        require_aligned(shifted_by(cache, 1))
    found = require_aligned(shifted_by(cache, 1), allow_misaligned=True)
    assert found.shift == 1 and str(found).startswith("shifted by +1 token")
    assert "trained on all the same, since allow_misaligned is set" in caplog.text


def test_few_rows_decide_nothing():
    assert not alignment._mean([torch.ones(50)] * 3).beyond(4)
    assert alignment._mean([torch.ones(50) + 0.1 * torch.randn(50) for _ in range(4)]).beyond(4)
    alike = [torch.full((500,), value) for value in (1.0, -1.0, 2.0, 0.5)]  # rows differ, their positions do not
    assert not alignment._mean(alike).beyond(4)


def test_rows_of_a_few_tokens_are_no_evidence_and_no_error(tmp_path, teacher_dir):
    rows = [{"input_ids": ids, "labels": ids} for ids in ([10, 20], [30, 40, 50], [60, 70, 80, 90])]
    require_aligned(capture(rows, LocalTeacher(teacher_dir), tmp_path / "c", progress=False))
