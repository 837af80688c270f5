"""A teacher that is an adapter on a shared base is the adapter merged into a whole model."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from kd_plugin.errors import ConfigError
from kd_plugin.panel import TeacherPanel
from kd_plugin.teachers import AdapterTeacher, LocalTeacher, Teacher
from kd_plugin.vocab import Vocabulary
from tests.core.panel_help import assert_same_gradients, corrected, rows
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "other lora": LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "whole head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}


def save_adapter(base_dir, directory, config, seed=0):
    base = LocalTeacher(base_dir, dtype="float32").model
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("adapters") / "base", seed=2, tied=False)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base_dir):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(base_dir, root / name.replace(" ", "-"), config, seed)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }


def merged(base_dir, adapter):
    base = LocalTeacher(base_dir, dtype="float32").model
    return LocalTeacher(PeftModel.from_pretrained(base, adapter).merge_and_unload(), tokenizer=byte_tokenizer())


def logits(teacher, batch):
    ids, mask, _ = batch
    positions = mask.reshape(-1).nonzero().squeeze(-1)
    signal = teacher.score(ids, mask, positions)
    return signal.head.logits(signal.hidden)


@pytest.mark.parametrize("name", ADAPTERS)
def test_equals_the_merged_model(name, base_dir, adapters):
    teacher = AdapterTeacher(adapters[name], base=LocalTeacher(base_dir, dtype="float32"))
    assert isinstance(teacher, Teacher)
    expected = logits(merged(base_dir, adapters[name]), rows())
    torch.testing.assert_close(logits(teacher, rows()), expected, rtol=1e-4, atol=1e-4)
    plain = logits(LocalTeacher(base_dir, dtype="float32"), rows())
    assert (plain - expected).abs().max() > 0.1  # the adapter says something


def test_one_base_is_shared_and_left_alone(base_dir, adapters):
    base = LocalTeacher(base_dir, dtype="float32")
    before = logits(base, rows())
    teachers = [AdapterTeacher(adapters[name], base=base) for name in ("lora", "other lora", "ia3")]
    for teacher in teachers:
        logits(teacher, rows())
        assert teacher.head is base.head
    torch.testing.assert_close(logits(base, rows()), before, rtol=0, atol=0)
    own = {id(p) for p in base.model.parameters()}
    for teacher in teachers:
        added = sum(p.numel() for p in teacher.model.parameters() if id(p) not in own)
        assert 0 < added < 0.1 * sum(p.numel() for p in base.model.parameters())
        assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_panel_unites_bases_of_the_same_path(base_dir, adapters):
    panel = TeacherPanel(
        {name: AdapterTeacher(adapters[name], base=base_dir, name=name) for name in ("lora", "ia3")}, combine="mixture"
    )
    first, second = panel.teachers.values()
    assert first.base is second.base
    assert first.head.weight is second.head.weight


def test_layers_of_its_own_over_what_fsdp2_cut_are_refused(base_dir, adapters):
    base = LocalTeacher(base_dir, dtype="float32")
    weight = base.model.model.layers[0].self_attn.q_proj.weight
    weight.full_tensor = None  # what tells a DTensor
    with pytest.raises(ConfigError, match=r"'expert' .*modules_to_save: lm_head.*FSDP2 sharded.*placement='offload'"):
        logits(AdapterTeacher(adapters["whole head"], base=base, name="expert"), rows())
    made = AdapterTeacher(adapters["dora"], base=base).model
    assert any(parameter is weight for parameter in made.parameters())


class TestOnTheStudentsBase:
    @pytest.fixture
    def student(self, base_dir):
        base = LocalTeacher(base_dir, dtype="float32").model
        return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))

    def teacher(self, adapter, student, base_dir, **options):
        teacher = AdapterTeacher(adapter, **options)
        teacher.use_student(student, base_dir, Vocabulary.from_tokenizer(byte_tokenizer()))
        return teacher

    def test_equals_the_merged_model_while_the_student_trains(self, student, base_dir, adapters):
        teacher = self.teacher(adapters["lora"], student, base_dir)
        expected = logits(merged(base_dir, adapters["lora"]), rows())
        torch.testing.assert_close(logits(teacher, rows()), expected, rtol=1e-4, atol=1e-4)
        trained = [p for p in student.parameters() if p.requires_grad]
        assert trained
        optimizer = torch.optim.SGD(trained, lr=1.0)
        student(input_ids=rows()[0], labels=rows()[0]).loss.backward()
        optimizer.step()
        torch.testing.assert_close(logits(teacher, rows()), expected, rtol=1e-4, atol=1e-4)
        own = {id(p) for p in student.parameters()}
        shared = [p for p in teacher.model.parameters() if id(p) in own]
        assert sum(p.numel() for p in shared) == sum(p.numel() for p in tiny_llama(tied=False).parameters())
        assert teacher.head.weight is student.get_output_embeddings().weight

    def test_the_student_is_saved_as_if_there_were_no_teacher(self, student, base_dir, adapters, tmp_path):
        logits(self.teacher(adapters["lora"], student, base_dir), rows())
        student.save_pretrained(tmp_path)
        assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == set()
        assert list(student.peft_config) == ["default"]

    def test_a_student_without_an_adapter(self, base_dir, adapters):
        with pytest.raises(ConfigError, match=r"no PEFT model.*peft_config"):
            self.teacher(adapters["lora"], LocalTeacher(base_dir).model, base_dir)

    def test_a_student_that_trains_its_base(self, student, base_dir, adapters):
        student.get_base_model().model.norm.weight.requires_grad_(True)
        with pytest.raises(ConfigError, match=r"trains a part of it \(model.norm.weight\)"):
            self.teacher(adapters["lora"], student, base_dir)

    def test_an_adapter_for_another_base(self, student, adapters, tmp_path):
        with pytest.raises(ConfigError, match=r"was trained on .*base.*accept_base=True"):
            self.teacher(adapters["lora"], student, "HuggingFaceTB/SmolLM2-135M")
        self.teacher(adapters["lora"], student, "HuggingFaceTB/SmolLM2-135M", accept_base=True)


def test_a_base_of_other_shapes_is_refused_before_it_is_loaded(adapters, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    wider = save_tiny(tmp_path / "wider", seed=1, hidden=48)
    shorter = save_tiny(tmp_path / "shorter", seed=1, layers=1)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"in_features in the base .*wider.* are 96.*another base"):
        AdapterTeacher(adapters["lora"], base=wider)
    with pytest.raises(ConfigError, match=r"changes 'model.layers.1.*which the base .*shorter.* does not have"):
        AdapterTeacher(adapters["lora"], base=shorter)


def test_a_base_of_the_same_shape_and_another_name_is_refused(adapters, tmp_path):
    other = save_tiny(tmp_path / "other", seed=7, tied=False)
    with pytest.raises(ConfigError, match=r"was trained on '.*base', and the base is '.*other'"):
        AdapterTeacher(adapters["lora"], base=other)


def test_what_is_no_adapter_that_changes_layers(base_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"no PEFT adapter is at.*a whole model is a LocalTeacher"):
        AdapterTeacher(base_dir, base=base_dir)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(LocalTeacher(base_dir).model, prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ConfigError, match="PROMPT_TUNING, which adds tokens before the prompt"):
        AdapterTeacher(tmp_path / "prompts", base=base_dir)


@pytest.mark.parametrize("combine", ["weighted_kl", "mixture", "confidence"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_a_panel_of_adapters_trains_as_one_of_merged_models(combine, divergence, base_dir, adapters):
    names = ["lora", "other lora", "ia3"]
    base = LocalTeacher(base_dir, dtype="float32")
    small = TeacherPanel({n: AdapterTeacher(adapters[n], base=base) for n in names}, combine=combine)
    whole = TeacherPanel({n: merged(base_dir, adapters[n]) for n in names}, combine=combine)
    student = tiny_llama(seed=1).train()
    mine, gradient = corrected(small, student, [{}] * 4, rows(), divergence=divergence)
    theirs, expected = corrected(whole, student, [{}] * 4, rows(), divergence=divergence)
    torch.testing.assert_close(mine.loss_sum, theirs.loss_sum, rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradient, expected, 1e-4)
