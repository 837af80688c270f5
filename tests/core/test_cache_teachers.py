"""Which teachers a capture takes, and what it says of the others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kd_plugin import AdapterTeacher, LocalTeacher
from kd_plugin.cache import Generation, TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import ConfigError
from tests.core.cache_help import prompt_rows
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(directory of a base, directory of an adapter on it, the merged model)."""
    path = tmp_path_factory.mktemp("adapter")
    base = save_tiny(path / "base", seed=2)
    model = tiny_llama(seed=2)
    model.config._name_or_path = base
    torch.manual_seed(5)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(path / "adapter")
    (path / "adapter" / "README.md").write_text(f"---\nlicense: mit\nbase_model: {base}\n---\n")
    return base, str(path / "adapter"), tuned.merge_and_unload()


@pytest.mark.parametrize("generate", [None, Generation(max_new_tokens=6, temperature=0, keep_unfinished=True)])
def test_an_adapter_says_what_the_merged_model_says(adapter, tmp_path, generate):
    base, path, merged = adapter
    options = {"targets": TopK(8), "generate": generate, "shard_rows": 4, "progress": False}
    mine = capture(prompt_rows(6), AdapterTeacher(path, base=base), tmp_path / "a", **options)
    whole = LocalTeacher(merged, tokenizer=byte_tokenizer(), license="mit")
    theirs = capture(prompt_rows(6), whole, tmp_path / "m", **options)
    assert mine.dataset()["input_ids"] == theirs.dataset()["input_ids"]
    a, b = mine.signal(torch.arange(mine.tokens)), theirs.signal(torch.arange(theirs.tokens))
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=5e-3, rtol=1e-3)


def test_what_is_no_teacher_is_refused(adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"got str.*LocalTeacher\(\.\.\.\)"):
        capture(prompt_rows(2), adapter[0], tmp_path / "c")
    with pytest.raises(ConfigError, match=r"a capture has no student\. Name its base"):
        capture(prompt_rows(2), AdapterTeacher(adapter[1]), tmp_path / "c")
    assert not (tmp_path / "c").exists()
