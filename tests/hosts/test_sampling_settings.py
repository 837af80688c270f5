"""Settings under which tokens are not drawn from the student's whole distribution, in both hosts."""

import json
import shutil

import pytest
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from kd_plugin.errors import ConfigError
from kd_plugin.lightning import TeacherPanelCorrection
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import losses, prompts, settings
from tests.lightning.help import Plain, trainer

SAMPLED = {"estimator": "sampled", "divergence": "reverse_kl", "max_completion_length": 6}

# What a user may set, and what the message must name
CHANGED = [
    {"temperature": 2.0},
    {"do_sample": False},
    {"top_k": 5},
    {"top_p": 0.5},
    {"min_p": 0.1},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.01},
    {"top_h": 0.3},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [3, 4]},
    {"min_new_tokens": 6},
    {"bad_words_ids": [[7]]},
    {"num_beams": 2},
    {"sequence_bias": [[[7], 100.0]]},
    {"encoder_repetition_penalty": 2.0},
    {"forced_eos_token_id": 2},
    {"exponential_decay_length_penalty": [1, 2.0]},
    {"cache_implementation": "quantized"},
    {"logits_processor": []},
    {"prefix_allowed_tokens_fn": print},
]


@pytest.fixture
def unloaded(monkeypatch):
    """Fails when a student is loaded: all of these are known before."""

    def refused(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", refused)


def panel_trainer(directory, student, teacher, **options):
    peft_config = options.pop("peft_config", None)
    return TeacherPanelTrainer(
        model=student,
        teacher_models=None if teacher is None else {"t": teacher},
        args=TeacherPanelConfig(**settings(directory, **{**SAMPLED, "max_steps": 1, **options})),
        train_dataset=prompts(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("changed", CHANGED, ids=lambda changed: next(iter(changed)))
def test_generation_kwargs(changed, tmp_path, student_dir, teacher_dir, unloaded):
    message = rf"{next(iter(changed))}=.* with estimator='sampled' \(teacher 't(eacher)?'\)"
    with pytest.raises(ConfigError, match=message):
        panel_trainer(tmp_path, student_dir, teacher_dir, generation_kwargs=changed)
    with pytest.raises(ConfigError, match=message):
        TeacherPanelCorrection(teacher_dir, generation_kwargs=changed, **SAMPLED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.9}, r"top_p=0\.9 with"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty=1\.1 with"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions with.*depend on the tokens after it"),
        ({"rollouts": "interleaved"}, "rollouts='interleaved' with"),
        ({"on_policy_fraction": 0.5}, "on_policy_fraction below 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields(fields, message, tmp_path, student_dir, teacher_dir, unloaded):
    with pytest.raises(ConfigError, match=message):
        panel_trainer(tmp_path, student_dir, teacher_dir, **fields)
    with pytest.raises(ConfigError, match=message):
        TeacherPanelCorrection(teacher_dir, **SAMPLED, **fields)


def test_a_teachers_own_temperature(tmp_path, student_dir, teacher_dir, unloaded):
    own = {"t": {"model": teacher_dir, "estimator": "sampled", "temperature": 2.0}}
    block = {"divergence": "reverse_kl", "teachers": own}
    with pytest.raises(ConfigError, match=r"Teacher 't' has temperature=2\.0.*samples at temperature=1\.0"):
        panel_trainer(tmp_path, student_dir, None, panel=block, estimator="exact", divergence=None)
    with pytest.raises(ConfigError, match=r"Teacher 't' has temperature=2\.0.*samples at temperature=1\.0"):
        TeacherPanelCorrection(panel=block)
    TeacherPanelCorrection(panel=block, temperature=2.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"generation_kwargs": {"presence_penalty": 0.5}},
        {"generation_kwargs": {"min_tokens": 3}},
        {"generation_kwargs": {"logit_bias": {3: 1.0}}},
        {"generation_kwargs": {"truncate_prompt_tokens": 4}},
        {"generation_kwargs": {"temperature": 0.7}},
        {"generation_kwargs": {"seed": 1}},
        {"vllm_structured_outputs_regex": "[ab]+"},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_with_vllm(fields, tmp_path, student_dir, teacher_dir, unloaded):
    with pytest.raises(ConfigError, match="with estimator='sampled'"):
        panel_trainer(tmp_path, student_dir, teacher_dir, use_vllm=True, **fields)


@pytest.fixture
def opinionated(tmp_path, student_dir):
    """A student whose checkpoint brings its own way of generating, as most instruction-tuned ones do."""

    def make(**own):
        directory = shutil.copytree(student_dir, tmp_path / "student")
        path = directory / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
        return str(directory)

    return make


@pytest.mark.parametrize("own", [{"no_repeat_ngram_size": 2}, {"suppress_tokens": [5]}, {"typical_p": 0.8}], ids=str)
def test_what_the_students_checkpoint_sets_counts_in_trl(own, tmp_path, opinionated, teacher_dir, unloaded):
    with pytest.raises(ConfigError, match=rf"{next(iter(own))}=.*stands in the student's own generation configuration"):
        panel_trainer(tmp_path, opinionated(do_sample=True, **own), teacher_dir)


@pytest.mark.parametrize("own", [{"no_repeat_ngram_size": 2}, {"suppress_tokens": [5]}, {"typical_p": 0.8}], ids=str)
def test_what_the_students_checkpoint_sets_counts_in_lightning(own, tmp_path, opinionated, teacher_dir):
    kd = TeacherPanelCorrection(teacher_dir, **SAMPLED)
    module = Plain(opinionated(do_sample=True, **own))
    with pytest.raises(ConfigError, match=rf"{next(iter(own))}=.*stands in the student's own generation configuration"):
        trainer(tmp_path, [kd]).fit(module, DataLoader([{"prompt": "a"}], collate_fn=lambda rows: {"prompt": ["a"]}))


def test_the_usual_settings_of_a_checkpoint_are_overruled_by_the_trainers(tmp_path, opinionated, teacher_dir):
    """temperature, top_k, top_p and repetition_penalty are always given to `generate`; others mean nothing."""
    usual = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "chat_format": "x"}
    student = opinionated(do_sample=True, **usual)
    made = panel_trainer(tmp_path, student, teacher_dir)
    made.train()
    assert len(losses(made)) == 1


def test_a_checkpoint_that_sets_min_p_is_told_to_set_none(tmp_path, opinionated, teacher_dir):
    """TRL's min_p=None leaves the checkpoint's in place; the message's way out is taken."""
    student = opinionated(do_sample=True, min_p=0.05)
    with pytest.raises(ConfigError, match=r"min_p=0\.05.*Set min_p=0\.0"):
        panel_trainer(tmp_path, student, teacher_dir)
    panel_trainer(tmp_path, student, teacher_dir, min_p=0.0)


def test_an_adapters_dropout(tmp_path, student_dir, teacher_dir):
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"lora_dropout.* has dropout=0\.1, with estimator='sampled'"):
        panel_trainer(tmp_path, student_dir, teacher_dir, peft_config=lora)
    panel_trainer(tmp_path, student_dir, teacher_dir, peft_config=lora, disable_dropout=True)


def test_other_estimators_are_free_to_draw_otherwise(tmp_path, student_dir, teacher_dir):
    made = panel_trainer(
        tmp_path, student_dir, teacher_dir, estimator="exact", generation_kwargs={"top_p": 0.5, "temperature": 0.7}
    )
    made.train()
    assert len(losses(made)) == 1
