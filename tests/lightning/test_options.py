"""The TRL configurations' options are Lightning's under the same names, but for those that make no sense there."""

import dataclasses

import pytest
from transformers import TrainingArguments

from kd_plugin.lightning import KDDataModule, OfflineKDModule, TeacherPanelModule
from kd_plugin.lightning.__main__ import _fields
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.trl import OfflineKDConfig, TeacherPanelConfig

# Everything of TrainingArguments is Lightning's Trainer's, or StudentModule's: learning rate, precision, saving ...
OF_THE_TRAINER = {field.name for field in dataclasses.fields(TrainingArguments)}
SHARED = {
    "shuffle_dataset": "data.shuffle",
    "pad_to_multiple_of": "batches are as wide as their longest row; a user's collator may pad further",
}
NOT_OF_A_PANEL = {
    "disable_dropout": "a setting of the student: model_init_kwargs, such as attention_dropout",
    "ds3_gather_for_generation": "layers are gathered one by one, whatever the size of the student",
    "log_completions": "samples_shown and save_rollouts",
    "num_completions_to_print": "samples_shown",
    "log_unique_prompts": "samples_shown",
    "max_tool_calling_iterations": "tools are TRL's",
    **dict.fromkeys(
        (f.name for f in dataclasses.fields(TeacherPanelConfig) if f.name == "use_vllm" or f.name.startswith("vllm_")),
        "the student writes by transformers; sending its weights to vLLM is TRL's",
    ),
}
TOKENS = "the cache holds rows that are tokenized already"
NOT_OF_OFFLINE_KD = {
    "teacher_cache": "cache",
    "teacher_text": "data.text",
    "max_length": "data.max_length",
    "truncation_mode": "a cached row keeps its start",
    "trust_remote_code": "model_init_kwargs",
    **dict.fromkeys(["chat_template_path", "dataset_text_field", "dataset_kwargs", "dataset_num_proc"], TOKENS),
    **dict.fromkeys(["eos_token", "pad_token", "completion_only_loss", "assistant_only_loss"], TOKENS),
    **dict.fromkeys(["packing", "packing_strategy", "padding_free", "eval_packing"], "rows are padded, not packed"),
    "loss_type": "offline KD replaces the loss; OfflineKDConfig refuses other values",
    "router_aux_loss_coef": "the module's own loss has it: model_init_kwargs",
    "activation_offloading": "gradient_checkpointing, or the strategy's offloading",
}


def of_trl(config):
    return {field.name for field in dataclasses.fields(config)} - OF_THE_TRAINER


@pytest.mark.parametrize(
    ("config", "module", "without"),
    [(TeacherPanelConfig, TeacherPanelModule, NOT_OF_A_PANEL), (OfflineKDConfig, OfflineKDModule, NOT_OF_OFFLINE_KD)],
)
def test_every_option_that_makes_sense_has_the_same_name(config, module, without):
    ours, theirs = {*_fields(module)}, of_trl(config)
    without = without | SHARED
    assert theirs - ours - without.keys() == set(), "add them to the module, or say here why they make no sense"
    assert without.keys() <= theirs - ours, "these are no options of TRL's, or they are Lightning's too"
    assert {"shuffle", "max_length"} <= {*_fields(KDDataModule)}


def test_the_module_has_the_callbacks_settings_and_their_defaults():
    import inspect

    parameters = inspect.signature(TeacherPanelModule).parameters
    for field in dataclasses.fields(PanelSettings):
        assert parameters[field.name].default == getattr(PanelSettings(), field.name), field.name


def test_defaults_are_those_of_trl(tmp_path):
    theirs, ours = TeacherPanelConfig(str(tmp_path), use_cpu=True), PanelSettings()
    for name in {field.name for field in dataclasses.fields(PanelSettings)}:
        assert getattr(ours, name) == getattr(theirs, name), name
