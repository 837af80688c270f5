"""A cache that holds every token of a small vocabulary is the live teacher.

Tolerance 1e-4 relative in float32, of losses and of the gradient's norm: stored log-probabilities are float16, whose
rounding (2^-11 of a value of up to 20 nats, weighted by its probability) stays below it.
"""

import pytest
import torch
from datasets import Dataset

from kd_plugin.cache import TopK, TeacherCache, capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import TOPICS, Trace, assert_same, losses, settings
from tests.tiny import byte_tokenizer

ROWS = [
    {"prompt": f"{TOPICS[i % len(TOPICS)]}?", "completion": f" answer {i} {'y' * (i % 7)}", "domain": "a"}
    for i in range(16)
]


@pytest.fixture(scope="module")
def dataset():
    return Dataset.from_list(ROWS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir, dataset):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return capture(dataset, teacher, tmp_path_factory.mktemp("cache") / "all", targets=TopK(259), progress=False)


def train(directory, cache, student, dataset=None, divergence="forward_kl", trainer_class=OfflineKDTrainer, **kwargs):
    trace = Trace()
    trainer = trainer_class(
        model=student,
        args=OfflineKDConfig(**settings(directory, divergence=divergence, shuffle_dataset=False, **kwargs)),
        train_dataset=dataset,
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        callbacks=[trace],
    )
    trainer.train()
    return trainer, trace


class LiveTrainer(OfflineKDTrainer):
    """Plain PyTorch in the place of the cached loss: the teacher's and the student's full logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        with torch.no_grad():
            expected = self.live_teacher.model(ids, attention_mask=mask).logits[:, :-1].float()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        scored = labels[:, 1:] != -100
        values = divergence_from_logits(logits[scored], expected[scored], self.args.resolved_divergence())
        return values.sum() / num_items_in_batch


def live(teacher_dir):
    return type("Live", (LiveTrainer,), {"live_teacher": LocalTeacher(teacher_dir, dtype="float32")})


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_equals_the_live_teacher(divergence, cache, tmp_path, student_dir, teacher_dir):
    cached, cached_trace = train(tmp_path / "a", cache, student_dir, divergence=divergence)
    reference, reference_trace = train(
        tmp_path / "b", cache, student_dir, divergence=divergence, trainer_class=live(teacher_dir)
    )
    assert losses(cached) == pytest.approx(losses(reference), rel=1e-4)
    for gradients, expected in zip(cached_trace.gradients, reference_trace.gradients, strict=True):
        assert_same(gradients, expected, 2e-4)


@pytest.mark.parametrize(
    "change",
    [{"shuffle_dataset": True}, {"max_length": 17}, {"max_length": 17, "truncation_mode": "keep_end"},
     {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}],
    ids=["shuffled", "truncated", "truncated at the start", "other micro-batches"],
)  # fmt: skip
def test_still_equals_it(change, cache, tmp_path, student_dir, teacher_dir, dataset):
    cached, _ = train(tmp_path / "a", cache, student_dir, dataset=dataset.shuffle(seed=3), **change)
    reference, _ = train(
        tmp_path / "b", cache, student_dir, dataset=dataset.shuffle(seed=3), trainer_class=live(teacher_dir), **change
    )
    assert losses(cached) == pytest.approx(losses(reference), rel=1e-4)


def test_micro_batches_give_one_gradient(cache, tmp_path, student_dir):
    shapes = [(1, 8), (2, 4), (8, 1)]
    gradients = [
        train(
            tmp_path / f"{rows}x{steps}", cache, student_dir,
            per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=1, learning_rate=0.0,
        )[1].gradients[0]
        for rows, steps in shapes
    ]  # fmt: skip
    assert_same(gradients[0], gradients[2], 1e-5)
    assert_same(gradients[1], gradients[2], 1e-5)


def test_the_rows_of_the_cache_are_the_rows_of_the_dataset(cache, tmp_path, student_dir, dataset):
    from_cache, _ = train(tmp_path / "a", cache, student_dir)
    from_dataset, _ = train(tmp_path / "b", cache, student_dir, dataset=dataset)
    assert losses(from_cache) == pytest.approx(losses(from_dataset), rel=1e-6)


class ShiftedCache(TeacherCache):
    """A cache whose targets belong to the token before."""

    def signal(self, teacher_index):
        return super().signal((teacher_index - 1).clamp(min=0))


def test_a_shift_by_one_token_is_far_outside_the_tolerance(cache, tmp_path, student_dir, teacher_dir):
    shifted, _ = train(tmp_path / "a", ShiftedCache(cache.path), student_dir)
    reference, _ = train(tmp_path / "b", cache, student_dir, trainer_class=live(teacher_dir))
    with pytest.raises(AssertionError):
        assert losses(shifted) == pytest.approx(losses(reference), rel=1e-2)


def test_divergence_reaches_the_trainer(cache, tmp_path, student_dir):
    trainer, _ = train(tmp_path, cache, student_dir, divergence="skew_kl", skew_alpha=0.3, max_steps=1)
    assert trainer.args.resolved_divergence() == Divergence("skew_kl", alpha=0.3)
