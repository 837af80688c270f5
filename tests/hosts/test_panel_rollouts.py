"""Whose text the panel corrects: the dataset's, the student's with the panel at its elbow, and a cache's at first."""

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from trl import DistillationConfig, DistillationTrainer

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.rollouts import decoding as generation
from kd_plugin.rollouts.rows import cut_loops
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import LORA, TOPICS, assert_same, losses, prompts, settings, weights

COMPLETIONS = [f" answer {i}{'y' * (i % 4)}" for i in range(24)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    rows = [{"prompt": f"{TOPICS[i % 8]}?", "completion": f" reply {i} {'z' * (i % 7)}"} for i in range(16)]
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return capture(
        Dataset.from_list(rows), teacher, tmp_path_factory.mktemp("c") / "all", targets=TopK(259), progress=False
    )


def build(directory, student, teacher, dataset=None, **kwargs):
    return TeacherPanelTrainer(
        model=student,
        teacher_model=teacher,
        args=TeacherPanelConfig(**settings(directory, **{"max_completion_length": 12, **kwargs})),
        train_dataset=prompts(completion=COMPLETIONS) if dataset is None else dataset,
    )


def written(trainer, rows=8):
    """Return the completions of one generation batch, as token ids."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(row) for row in trainer.train_dataset.select(range(rows))])
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]


@pytest.mark.parametrize("kind", ["plain", "conversational"])
def test_a_fraction_of_zero_corrects_the_datasets_text(kind, tmp_path, student_dir, teacher_dir, tokenizer):
    texts = COMPLETIONS if kind == "plain" else [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    trainer = build(
        tmp_path, student_dir, teacher_dir, prompts(kind, completion=texts), on_policy_fraction=0,
        max_completion_length=20,
    )  # fmt: skip
    expected = [tokenizer(text + "<|im_end|>")["input_ids"] for text in COMPLETIONS[:8]]
    assert written(trainer) == expected
    trainer.train()
    assert len(losses(trainer)) == 5


def test_half_of_the_rows_are_the_students(tmp_path, student_dir, teacher_dir, tokenizer):
    trainer = build(tmp_path, student_dir, teacher_dir, on_policy_fraction=0.5)
    given = [tokenizer(text + "<|im_end|>")["input_ids"][:12] for text in COMPLETIONS[:8]]
    kept = [mine == theirs for mine, theirs in zip(written(trainer), given, strict=True)]
    assert sum(kept) == 4
    trainer.model.eval()
    assert trainer.panel_step.assign([{}] * 4, 4).given == (None,) * 4


def test_a_schedule_moves_from_the_dataset_to_the_student(tmp_path, student_dir, teacher_dir):
    trainer = build(tmp_path, student_dir, teacher_dir, on_policy_fraction={"start": 0, "end": 1, "steps": 4})
    shares = []
    assign = trainer.panel_step.assign

    def spy(rows, rows_at_once):
        assigned = assign(rows, rows_at_once)
        shares.append(sum(given is None for given in assigned.given) / len(rows))
        return assigned

    trainer.panel_step.assign = spy
    trainer.train()
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_interleaved_with_top_1_writes_the_teachers_greedy_text(tmp_path, student_dir, teacher_dir):
    trainer = build(
        tmp_path, student_dir, teacher_dir, rollouts="interleaved", interleaved_top_k=1, interleaved_block=3
    )
    teacher = trainer.panel.teachers["teacher"].model
    texts = written(trainer)
    for text, row in zip(texts, trainer.train_dataset, strict=False):
        ids = torch.tensor([trainer.processing_class(row["prompt"])["input_ids"]])
        greedy = teacher.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        greedy = greedy[0, ids.shape[1] :].tolist()
        assert text == (greedy[: greedy.index(2) + 1] if 2 in greedy else greedy)
    trainer.train()
    shares = [entry["rollouts/replaced"] for entry in trainer.state.log_history if "rollouts/replaced" in entry]
    assert len(shares) == 5 and all(0 < share <= 1 for share in shares)


def test_interleaved_rollouts_are_cut_where_they_repeat_themselves(tmp_path, student_dir, teacher_dir):
    options = {"rollouts": "interleaved", "interleaved_top_k": 1, "max_completion_length": 60}
    whole = written(build(tmp_path / "whole", student_dir, teacher_dir, **options))
    trainer = build(tmp_path / "cut", student_dir, teacher_dir, repetition_stop=3, **options)
    found, looping = cut_loops(whole, 3)
    assert looping > 0  # a greedy random model soon repeats itself
    assert written(trainer) == found
    assert trainer._metrics["train"]["rollouts/looping"] == [looping]


def test_the_warm_up_fits_the_cache_and_then_the_student_writes(tmp_path, cache, student_dir, teacher_dir):
    trainer = build(tmp_path, student_dir, teacher_dir, warmup_cache=str(cache.path), warmup_cache_steps=2)
    batch = trainer.panel_step.warmup.batch(0, 0, 4, micro_steps=1, rank=0, ranks=1)
    teacher = LocalTeacher(teacher_dir, dtype="float32").model
    with torch.no_grad():
        mine, theirs = (
            m(batch.input_ids, attention_mask=batch.attention_mask).logits for m in (trainer.model, teacher)
        )
        at = batch.targets[0]["positions"]
        expected = divergence_from_logits(
            mine.flatten(0, 1)[at], theirs.flatten(0, 1)[at], Divergence("forward_kl")
        ).mean()
    rollouts = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: rollouts.append(trainer.state.global_step) or generate(rows)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(float(expected), rel=1e-4)
    assert rollouts == [2, 3, 4]
    trainer.save_model(str(tmp_path / "saved"))
    assert "teacher_outputs" in (tmp_path / "saved" / "lineage.json").read_text()


def test_micro_batches_of_the_warm_up_give_one_step(tmp_path, cache, student_dir, teacher_dir):
    found = []
    for size in (4, 2, 1):
        trainer = build(
            tmp_path / str(size), student_dir, teacher_dir, warmup_cache=str(cache.path), warmup_cache_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=3,
        )  # fmt: skip
        trainer.train()
        found.append((losses(trainer), weights(trainer)))
    for values, moved in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-4)
        assert_same(moved, found[0][1])


def test_a_resumed_warm_up_goes_on_where_it_was(tmp_path, cache, student_dir, teacher_dir):
    options = {"warmup_cache": str(cache.path), "warmup_cache_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path / "whole", student_dir, teacher_dir, **options)
    whole.train()
    again = build(tmp_path / "whole", student_dir, teacher_dir, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"rollouts": "interleave"}, "interleaved"),
        ({"interleaved_top_k": 0}, "at least 1"),
        ({"on_policy_fraction": 1.5}, "between 0 and 1"),
        ({"on_policy_fraction": "fast"}, "expected a number"),
        ({"warmup_cache_steps": 3}, "no warmup_cache"),
        ({"warmup_cache": "somewhere"}, "warmup_cache_steps is 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(kwargs, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        TeacherPanelConfig(**settings(tmp_path, **kwargs))


def test_a_row_without_a_completion_cannot_be_mixed_in(tmp_path, student_dir, teacher_dir):
    trainer = build(tmp_path, student_dir, teacher_dir, prompts(), on_policy_fraction="0.0")
    with pytest.raises(DataError, match="no `completion`"):
        trainer.train()


@pytest.mark.parametrize("lora", [False, True])
def test_the_student_writes_what_it_writes_in_trl(lora, tmp_path, student_dir, teacher_dir, monkeypatch):
    used = []
    monkeypatch.setattr(generation, "_choose", lambda *a, choose=generation._choose: used.append(a) or choose(*a))
    peft = {"peft_config": LORA} if lora else {}
    found = []
    for cls, config in ((TeacherPanelTrainer, TeacherPanelConfig), (DistillationTrainer, DistillationConfig)):
        trainer = cls(
            model=student_dir,
            teacher_model=teacher_dir,
            args=config(**settings(tmp_path, max_completion_length=12)),
            train_dataset=prompts(),
            **peft,
        )
        torch.manual_seed(5)
        found.append(written(trainer))
        assert bool(used) == (cls is TeacherPanelTrainer)
        used.clear()
    assert found[0] == found[1]


def test_uniform_draws_reach_the_loop_and_other_names_are_refused(tmp_path, student_dir, teacher_dir, monkeypatch):
    used = []
    monkeypatch.setattr(generation, "draw_uniform", lambda *a, d=generation.draw_uniform: used.append(a) or d(*a))
    written(build(tmp_path, student_dir, teacher_dir, rollout_draws="uniform"))
    assert used
    with pytest.raises(ConfigError, match=r"Unknown rollout_draws 'unform'.*uniform"):
        TeacherPanelConfig(**settings(tmp_path, rollout_draws="unform"))


def test_beams_and_repetition_penalties_are_still_trls(tmp_path, student_dir, teacher_dir, monkeypatch):
    monkeypatch.setattr(generation, "_choose", None)
    for options in ({"generation_kwargs": {"num_beams": 2}}, {"repetition_penalty": 1.3}):
        assert len(written(build(tmp_path, student_dir, teacher_dir, **options))) == 8


def test_autocast_casts_weights_once_for_all_tokens(tmp_path, student_dir, teacher_dir):
    trainer = build(tmp_path, student_dir, teacher_dir, bf16=True)
    trainer.model.train()
    ids = [[5, 6, 7], [8, 9]]
    trainer._assigned = trainer.panel_step.assign([{}, {}], 2)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        texts = trainer._generate_single_turn(ids, None, {})
    head = list(trainer.model.lm_head.weight.shape)
    casts = [e.count for e in seen.key_averages(group_by_input_shape=True)
             if e.key == "aten::_to_copy" and e.input_shapes[0] == head]  # fmt: skip
    assert max(map(len, texts)) > 3 and casts == [1]
