"""What upstream.py files rely on in other libraries: a test of the behaviour for each name.

``test_private_names.py`` asks for them.
"""

import argparse
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from trl import SFTConfig, SFTTrainer

from kd_plugin import trl as ours
from kd_plugin import upstream as core
from kd_plugin.errors import ConfigError
from kd_plugin.lightning import upstream as lightning_host
from kd_plugin.trainers import upstream as trainers_room
from kd_plugin.trl import upstream as trl_host
from tests.hosts.runs import settings
from tests.tiny import VARIANTS, byte_tokenizer, save_tiny, tiny_llama, tiny_model

# The core


def test_reference_of(student_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(student_dir)
    assert core.reference_of(model) == core.reference_of(model.config) == core.reference_of(student_dir) == student_dir
    assert core.reference_of(tiny_llama()) == "" and core.reference_of(nn.Linear(1, 1)) == ""


def test_tied_names():
    tied = tiny_llama(tied=True)
    state = tied.state_dict()
    for name in core.tied_names(tied):
        del state[name]
    other = tiny_llama(tied=True, seed=4)
    missing = other.load_state_dict(state, strict=False).missing_keys
    assert set(missing) == core.tied_names(tied) == {"lm_head.weight"}
    assert torch.equal(other.lm_head.weight, tied.lm_head.weight)


@pytest.mark.parametrize("cls", [transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM])
def test_built(cls):
    model = core.built(cls, tiny_llama().config, dtype=torch.bfloat16)
    assert type(model) is transformers.LlamaForCausalLM and model.dtype is torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_stored(variant, tmp_path):
    """The names, shapes and values of a saved checkpoint, layer by layer as an engine is sent them."""
    model = tiny_model(variant)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    groups = {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", name)
        groups.setdefault(layer and layer[1], {})[name] = parameter.detach()
    found = {name: one for group in groups.values() for name, one in core.as_stored(model, group).items()}
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_is_compiled():
    plain, compiled = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled.compile(backend="eager")
    wrapped = torch.compile(nn.Linear(2, 2), backend="eager")
    assert [core.is_compiled(one) for one in (plain, compiled, wrapped)] == [False, True, True]


def test_forget_adapters(tmp_path):
    model = tiny_llama()
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:  # transformers 5.24 asks for a PEFT that was not published yet when it came out
        pytest.skip(str(error))
    model.save_pretrained(tmp_path / "before")
    assert (tmp_path / "before" / "adapter_config.json").is_file()
    core.forget_adapters(model)
    model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after" / "adapter_config.json").exists()
    assert (tmp_path / "after" / "model.safetensors").is_file()


def test_is_dropout():
    assert all(core.is_dropout(kind(0.1)) for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout))
    assert not core.is_dropout(nn.Linear(1, 1))


def test_own_parameters():
    layer = nn.Sequential(nn.Linear(2, 1, bias=False))
    (place, name, weight), *others = core.own_parameters(layer.modules())
    assert not others and weight is layer[0].weight
    place[name] = torch.ones(1, 2)
    assert layer(torch.ones(1, 2)).item() == 2.0
    place[name] = weight
    assert list(layer.parameters()) == [weight]


def test_swap_deepspeed_config():
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    before = core.swap_deepspeed_config(None)
    handle = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        found = core.swap_deepspeed_config(None)
        assert not is_deepspeed_zero3_enabled() and found() is handle
        core.swap_deepspeed_config(found)
        assert is_deepspeed_zero3_enabled()
    finally:
        core.swap_deepspeed_config(before)


def test_default_generation_parameters():
    defaults, unset = core.default_generation_parameters(), transformers.GenerationConfig()
    assert defaults["temperature"] == 1.0 and defaults["do_sample"] is False
    assert all(getattr(unset, name) is None for name in ("temperature", "top_k", "top_p"))


def generated(loop, **kwargs):
    """Generate with a loop of the test's own, and return what the model's own loop gives too."""
    model = tiny_llama(seed=3)
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 4, "do_sample": True, "pad_token_id": 0, **kwargs}
    found = []
    for custom in (None, loop):
        torch.manual_seed(1)
        found.append(model.generate(ids, **options, custom_generate=custom))
    return found


def test_sampling_loop():
    ours, theirs = generated(lambda model, ids, **kwargs: core.sampling_loop(model, ids, **without_streamer(kwargs)))
    assert torch.equal(ours, theirs)


def without_streamer(kwargs):
    return {name: value for name, value in kwargs.items() if name != "streamer"}


def test_pad_token():
    seen = []

    def loop(model, ids, *, generation_config, **kwargs):
        seen.append(core.pad_token(generation_config))
        return ids

    generated(loop)
    assert isinstance(seen[0], torch.Tensor) and int(seen[0]) == 0


def test_next_inputs():
    seen = []

    def loop(model, ids, *, generation_config, logits_processor, stopping_criteria, synced_gpus=False, **kwargs):
        kwargs = without_streamer(kwargs)
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        after = core.next_inputs(model, model(**inputs, return_dict=True), kwargs)
        seen.append((after["attention_mask"].shape, after[core.CACHE].get_seq_length()))
        return ids

    generated(loop)
    assert seen == [((2, 4), 3)]


def test_decoding():
    for variant in ("untied", "moe"):
        model, ids = tiny_model(variant, seed=3), torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            before = model(ids).logits
            with core.decoding(model):
                torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(ids).logits, before)


def test_source_of_stream():
    rows = Dataset.from_dict({"a": [1, 2]})
    assert core.source_of_stream(rows) is None
    (shard,) = core.source_of_stream(rows.to_iterable_dataset()).kwargs["shards"]
    assert shard["a"] == rows["a"]
    mapped = core.source_of_stream(rows.to_iterable_dataset().map(lambda row: row))
    while not getattr(mapped, "kwargs", None):
        mapped = mapped.ex_iterable
    assert mapped.kwargs["shards"][0]["a"] == rows["a"]


@pytest.fixture
def parser():
    made = argparse.ArgumentParser("x")
    made.add_argument("place")
    made.add_argument_group("a title").add_argument("--own")
    made.add_subparsers().add_parser("below").add_argument("--deep")
    return made


def test_option_groups(parser):
    groups = dict(core.option_groups(parser))
    assert [one.dest for one in groups["a title"]] == ["own"]
    assert "place" in {one.dest for one in groups["positional arguments"]}


def test_subcommands(parser):
    assert list(core.subcommands(parser)) == ["below"]


def test_option_names(parser):
    assert {"--own", "--deep", "--help"} <= set(core.option_names(parser))


# transformers


class Columns(trainers_room.KeptColumnsMixin, transformers.Trainer):
    kept_columns = ("input_ids", "wanted")


def tiny_trainer(directory, **kwargs):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6], "wanted": [1, 2], "other": 3}] * 4)
    return Columns(
        model=tiny_llama(), args=transformers.TrainingArguments(**settings(directory, **kwargs)), train_dataset=rows,
        data_collator=lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0] if k != "wanted"},
    )  # fmt: skip


def test_KeptColumnsMixin(tmp_path):
    trainer = tiny_trainer(tmp_path)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(sorted(rows[0])) or collate(rows)
    next(iter(trainer.get_train_dataloader()))
    assert seen == [["input_ids", "labels", "wanted"]]


def test_save_checkpoint_now(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    saved = []

    class Told(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    trainer.add_callback(Told())
    trainer.train()
    trainers_room.save_checkpoint_now(trainer)
    assert saved == [1]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {
        p.name for p in (tmp_path / "checkpoint-1").iterdir()
    }


# Lightning


class Told(pl.Callback):
    def __init__(self):
        self.found = []

    def setup(self, trainer, module, stage):
        self.found.append(lightning_host.resumed_from(trainer))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(directory, steps, callbacks=(), ckpt_path=None, **kwargs):
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=directory, callbacks=list(callbacks), **{"enable_checkpointing": False, **kwargs},
    )  # fmt: skip
    trainer.fit(Module(), torch.ones(8, 1, 1), ckpt_path=ckpt_path)
    return trainer


def test_resumed_from(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    told = Told()
    fit(tmp_path, 1, [told, saving], enable_checkpointing=True)
    last = tmp_path / "last.ckpt"
    fit(tmp_path, 2, [told], ckpt_path=last)
    again = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(tmp_path, 2, [told, again], ckpt_path="last", enable_checkpointing=True)
    assert told.found[0] is None and [Path(found) for found in told.found[1:]] == [last, last]
    assert lightning_host.resumed_from(pl.Trainer(accelerator="cpu", logger=False)) is None


def test_after_the_save(tmp_path):
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    there = []
    for plugin in (TorchCheckpointIO(), AsyncCheckpointIO()):
        trainer = fit(tmp_path, 1, plugins=[plugin])
        path = tmp_path / type(plugin).__name__
        trainer.save_checkpoint(path)
        lightning_host.after_the_save(plugin, lambda path=path: there.append(path.stat().st_size > 0))
        trainer.strategy.teardown()
    assert there == [True, True]


# TRL


def test_card_and_fields(tmp_path):
    """``_name`` and ``_tag_names`` reach the card; a field in ``_VALID_DICT_FIELDS`` may be JSON."""

    class Named(SFTTrainer):
        _name, _tag_names = "A name", ["trl", "a-tag"]

    class Config(SFTConfig):
        _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "hub_model_id"]  # noqa: RUF012

    model = save_tiny(tmp_path / "model")
    rows = Dataset.from_list([{"text": "a"}])
    args = SFTConfig(**settings(tmp_path / "out"))
    trainer = Named(model, args, train_dataset=rows, processing_class=byte_tokenizer())
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a-tag" in card and "A name" in card
    assert Config(**settings(tmp_path), hub_model_id='{"a": 1}').hub_model_id == {"a": 1}


def test_refuse_panel():
    with pytest.raises(ConfigError, match=r"TeacherPanelTrainer needs TRL 1\.15 or newer.*TeacherPanelMixin"):
        trl_host.refuse_panel("TeacherPanelTrainer")
    if trl_host.HAS_PANEL:
        assert ours.TeacherPanelTrainer.__mro__
    else:
        with pytest.raises(ConfigError, match="TeacherPanelConfig needs TRL"):
            ours.TeacherPanelConfig  # noqa: B018


def test_any_rows():
    def graphs_of(prepare) -> int:
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        doubled = torch.compile(lambda x: x * 2, backend=backend)
        for rows in (3, 4, 9):
            tensor = torch.ones(rows, 5)
            if rows == 3:
                prepare(tensor)
            assert torch.equal(doubled(tensor), tensor * 2)
        return len(graphs)

    assert graphs_of(core.any_rows) == 1
    assert graphs_of(lambda tensor: None) == 2  # what any_rows is for
