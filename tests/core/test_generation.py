"""Our decoding loop writes what transformers' own writes."""

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from kd_plugin.rollouts import decoding as generation
from kd_plugin.rollouts.decoding import (
    GrowingLayer,
    decode,
    decode_with,
    draw_uniform,
    few_rows,
    generates_row_by_row,
)
from kd_plugin.rollouts.rows import left_padded
from tests.tiny import tiny_llama

PROMPTS = [[5, 9, 30, 7], [8], [100, 4, 6], [77, 78, 79, 80, 81, 82], [9, 9], [60, 61], [3, 200, 4], [11]]
ENDS = list(range(2, 40))  # so many that rows end at different lengths


def written(model, custom=None, seed=0, prompts=PROMPTS, **kwargs):
    ids, mask = left_padded(prompts, 0)
    options = {
        "max_new_tokens": 24,
        "pad_token_id": 0,
        "eos_token_id": ENDS,
        "top_k": 0,
        "suppress_tokens": [0],
        **kwargs,
    }
    torch.manual_seed(seed)
    more = {} if custom is None else {"custom_generate": custom}
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=GenerationConfig(**options), **more)
    return found[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def passes(model, monkeypatch):
    """Rows of each forward pass."""
    found, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: found.append(len(k["input_ids"])) or forward(*a, **k))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.02, "no_repeat_ngram_size": 2},
        {"do_sample": True, "min_new_tokens": 9},
    ],
    ids=lambda options: "-".join(options),
)
def test_tokens_of_one_seed_are_those_of_transformers(model, options):
    ours, theirs = written(model, decode, **options), written(model, **options)
    assert ours == theirs
    assert len({[*row, 0].index(0) for row in ours}) > 2  # rows ended at different lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 1), (2, 3), (8,), (1,), (9, 1), (3, 40)])
def test_a_product_of_few_rows_is_the_same_and_layers_are_left_as_they_were(shape, dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 48), torch.nn.Linear(48, 16), torch.nn.Linear(16, 16, bias=False)]
    net = torch.nn.Sequential(*layers).to(dtype)
    inputs = torch.randn(*shape, 16, dtype=dtype)
    expected = net(inputs)
    with few_rows(net):
        found = net(inputs)
        changed = ["forward" in vars(layer) for layer in net]
    assert changed == ([True, False, True] if dtype == torch.float32 else [False] * 3)
    assert not any("forward" in vars(layer) for layer in net)
    assert found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a layer"])
def test_a_compiled_student_is_not_compiled_anew_for_each_generation(whole):
    model = tiny_llama()
    (model if whole else model.model.layers[1]).compile(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    first = written(model, decode, do_sample=False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0 and written(model, decode, do_sample=False) == first
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_rows_that_ended_are_computed_no_more(model, passes):
    lengths = [[*row, 0].index(0) for row in written(model, do_sample=True, seed=1)]
    theirs = sum(passes)
    passes.clear()
    written(model, decode, do_sample=True, seed=1)
    assert theirs == len(PROMPTS) * max(lengths)
    assert sum(passes) == sum(lengths)  # of eight rows each leaves at once


def test_uniform_draws_leave_a_row_alone_when_others_end(model, monkeypatch):
    few = written(model, decode_with("uniform"), do_sample=True)
    monkeypatch.setattr(generation, "_LEAST_SHARE", -1)  # the batch never gets smaller
    assert written(model, decode_with("uniform"), do_sample=True) == few
    assert few != written(model, decode, do_sample=True)


def test_uniform_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    found = draw_uniform(probs.expand(count, -1), torch.rand(count, generator=generator))
    seen = torch.bincount(found, minlength=6)
    assert seen[1] == seen[5] == 0
    spread = (probs * (1 - probs) / count).sqrt()
    assert ((seen / count - probs).abs() <= 4 * spread).all()


def test_uniform_draws_at_the_ends_have_a_probability():
    probs = torch.tensor([[0.0, 0.4, 0.6, 0.0]]).expand(2, -1)
    assert draw_uniform(probs, torch.tensor([0.0, 1.0 - 2**-24])).tolist() == [1, 2]


def test_the_cache_grows_past_its_first_room(model, monkeypatch):
    monkeypatch.setattr(generation, "_GROWTH", 3)
    assert written(model, decode, do_sample=False) == written(model, do_sample=False)


def test_a_growing_layer_holds_what_it_was_given():
    torch.manual_seed(0)
    layer, plain = GrowingLayer(), generation.DynamicLayer()
    for new in (5, *[1] * 140):
        keys, values = torch.randn(4, 2, new, 8), torch.randn(4, 2, new, 8)
        found, expected = layer.update(keys, values), plain.update(keys, values)
    chosen = torch.tensor([0, 3])
    layer.batch_select_indices(chosen)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(layer.keys, expected[0][chosen]) and torch.equal(layer.values, expected[1][chosen])
    assert layer.get_seq_length() == 145


def forbid(*_, **__):
    raise AssertionError("transformers' own loop was expected")


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "repetition_penalty": 1.2},  # keeps a number for each row
    ],
    ids=lambda options: "-".join(options),
)
def test_what_it_does_not_know_is_left_to_transformers(model, options, monkeypatch):
    options = {"do_sample": False, "disable_compile": True, **options}
    theirs = written(model, **options)
    monkeypatch.setattr(generation, "_choose", forbid)
    assert written(model, decode, **options) == theirs


def test_beams_are_not_row_by_row():
    assert generates_row_by_row(GenerationConfig(do_sample=True)) and generates_row_by_row(GenerationConfig())
    assert not generates_row_by_row(GenerationConfig(num_beams=2))


def test_a_sliding_window_is_left_to_transformers(monkeypatch):
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    monkeypatch.setattr(generation, "_choose", forbid)
    assert written(model, decode, do_sample=False) == written(model, do_sample=False)
