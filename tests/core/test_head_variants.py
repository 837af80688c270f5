"""A head read from any model gives the model's own logits; the tiny variants are what their names say."""

import pytest
import torch

from kd_plugin.signals import OutputHead
from tests.tiny import VARIANTS, byte_tokenizer, save_tiny, tiny_model

TOKENS = len(byte_tokenizer())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_head_gives_the_models_own_logits(variant):
    model = tiny_model(variant, seed=1)
    ids = torch.randint(3, 258, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        own = model(input_ids=ids).logits
        read = OutputHead.from_model(model).logits(hidden)
    torch.testing.assert_close(read, own, rtol=1e-5, atol=1e-5)
    assert own.std() > 0.1, "flat logits hide mistakes"


def test_each_variant_is_what_its_name_says():
    made = {name: tiny_model(name) for name in VARIANTS}
    heads = {name: model.get_output_embeddings() for name, model in made.items()}
    tied = {n for n, m in made.items() if heads[n].weight is m.get_input_embeddings().weight}
    assert tied == {"tied"}
    assert {n for n, h in heads.items() if h.bias is not None} == {"biased"}
    assert heads["padded"].weight.shape[0] > TOKENS > heads["wide_tokenizer"].weight.shape[0]
    assert {n for n, m in made.items() if OutputHead.from_model(m).softcap} == {"softcapped"}
    assert {n for n, m in made.items() if OutputHead.from_model(m).logit_scale != 1.0} == {"scaled"}
    assert made["moe"].config.num_experts == 4


@pytest.mark.parametrize("variant", ["softcapped", "biased", "moe"])
def test_a_saved_variant_comes_back(variant, tmp_path):
    from transformers import AutoModelForCausalLM

    path = save_tiny(tmp_path, variant=variant, seed=5)
    back = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=ids).logits, tiny_model(variant, seed=5)(input_ids=ids).logits)
