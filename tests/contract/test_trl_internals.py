"""The signatures of TRL and transformers that the TRL host leans on; each failure names what moved."""

import inspect

import pytest
from transformers import GenerationMixin, PreTrainedModel, Trainer, TrainerCallback
from trl import DistillationTrainer, SFTTrainer
from trl.data_utils import pack_dataset
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import prepare_deepspeed
from trl.trainer.utils import (
    FusedCausalLMOutput,
    RepeatSampler,
    add_fused_lm_head,
    shuffle_sequence_dict,
    split_tensor_dict,
)

from kd_plugin.trl.upstream import EpochSampler

EXPECTED = {
    DistillationTrainer._compute_loss: ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
    DistillationTrainer._generate_and_score_completions: ["self", "inputs"],
    DistillationTrainer.compute_loss: ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    DistillationTrainer.log: ["self", "logs", "start_time"],
    SFTTrainer._prepare_dataset: [
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ],
    SFTTrainer.compute_loss: ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    Trainer.train: ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    GenerationMixin._sample: [
        "self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
        "model_kwargs",
    ],
    GenerationMixin._update_model_kwargs_for_generation: [
        "self", "outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens",
    ],
    DistillationTrainer._generate_single_turn: [
        "self", "prompt_ids", "images", "multimodal_fields", "has_tool_images",
    ],
    VLLMGeneration.generate: ["self", "prompts", "images", "num_generations", "profiler"],
    prepare_deepspeed: ["model", "accelerator"],
    pack_dataset: ["dataset", "seq_length", "strategy", "map_kwargs"],
}  # fmt: skip


@pytest.mark.parametrize("function", EXPECTED, ids=lambda f: f.__qualname__)
def test_signature(function):
    assert list(inspect.signature(function).parameters) == EXPECTED[function]


def test_arguments_that_are_passed_by_name():
    assert {"model", "teacher_model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks"} <= set(
        inspect.signature(DistillationTrainer.__init__).parameters
    )
    assert {"model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks"} <= set(
        inspect.signature(SFTTrainer.__init__).parameters
    )
    assert "logits_to_keep" in inspect.signature(DistillationTrainer._get_last_hidden_state).parameters


def test_vllm_writes_one_completion_a_prompt_and_keeps_its_group():
    assert "num_generations=1" in inspect.getsource(DistillationTrainer._generate_single_turn)
    source = inspect.getsource(VLLMGeneration)
    for name in ("self.mode", "self.tensor_parallel_size", "self.tp_group", "self.vllm_client", "self.logprobs"):
        assert name in source


def test_fused_output_has_the_fields_that_sft_reads():
    assert {"loss", "log_probs", "entropy", "is_top1", "label_mask", "aux_loss"} <= set(
        FusedCausalLMOutput.__dataclass_fields__
    )
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "outputs = model(**inputs, fused_lm_head=True)" in source
    assert "per_token_loss = -outputs.log_probs" in source and "per_token_loss.sum()" in source
    assert "add_fused_lm_head" in inspect.getsource(SFTTrainer.__init__) and callable(add_fused_lm_head)


def test_buffered_lists_follow_their_rows():
    rows = {"ids": __import__("torch").arange(4), "scores": list("abcd")}
    shuffled = shuffle_sequence_dict(rows)
    assert [list("abcd")[i] for i in shuffled["ids"].tolist()] == shuffled["scores"]
    assert [part["scores"] for part in split_tensor_dict(rows, 2)] == [["a", "b"], ["c", "d"]]


def test_every_save_goes_through_save_pretrained():
    assert "save_pretrained(output_dir" in inspect.getsource(Trainer._save)
    assert "on_push_begin" in inspect.getsource(Trainer._push_from_checkpoint)
    for event in ("on_init_end", "on_train_begin", "on_step_end", "on_save", "on_push_begin"):
        assert hasattr(TrainerCallback, event)
    assert "save_directory" in inspect.signature(PreTrainedModel.save_pretrained).parameters


def test_rows_come_in_trls_order_from_any_epoch_on():
    def theirs():
        return RepeatSampler(range(10), mini_repeat_count=1, batch_size=4, repeat_count=2, seed=3)

    upstream = theirs()
    orders = [list(upstream) for _ in range(3)]
    assert orders[0] != orders[1] and len(orders[0]) == len(EpochSampler(theirs())) == 16
    ours = EpochSampler(theirs())
    assert [list(ours) for _ in range(3)] == orders
    resumed = EpochSampler(theirs())
    resumed.set_epoch(2)
    assert list(resumed) == orders[2]
    assert not hasattr(upstream, "set_epoch"), "TRL tells its sampler the epoch now: ours can go"
