"""A cache that holds every token of a small vocabulary is the live teacher.

Tolerance of losses 1e-4 relative in float32: stored log-probabilities are float16, whose rounding (up to 2^-11 of each
value, independent from token to token) averages out below it; what a position's values have in common is taken back on
reading. A gradient does not average over the vocabulary, so it differs by about that rounding, up to
4e-3 nats where a log-probability is about -8: 3e-3. With the rounding
taken away (`exact`) gradients and weights agree to 1e-4 too, which shows that nothing else differs.
"""

from functools import cached_property

import pytest
import torch
from datasets import Dataset

from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.signals import SparseSignal
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import TOPICS, Trace, assert_same, losses, settings, weights
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


def build(directory, cache, student, dataset=None, trainer_class=OfflineKDTrainer, callbacks=None, **kwargs):
    return trainer_class(
        model=student,
        args=OfflineKDConfig(**settings(directory, **{"shuffle_dataset": False, **kwargs})),
        train_dataset=dataset,
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
    )


def train(directory, cache, student, **kwargs):
    trace = Trace()
    trainer = build(directory, cache, student, callbacks=[trace], **kwargs)
    trainer.train()
    return trainer, trace


class LiveTrainer(OfflineKDTrainer):
    """Plain PyTorch in the place of the cached loss: the teacher's and the student's full logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        with torch.no_grad():
            expected = self.live_teacher.model(ids, attention_mask=mask).logits[:, :-1, :259].float()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1, :259]
        scored = labels[:, 1:] != -100
        values = divergence_from_logits(logits[scored], expected[scored], self.args.resolved_divergence())
        return values.sum() / num_items_in_batch


class ExactCache(TeacherCache):
    """The same targets before they were rounded to float16."""

    @cached_property
    def exact(self):
        teacher = LocalTeacher(self.teacher_dir, dtype="float32").model
        stored = {}
        for row in self.dataset():
            logprobs = teacher(torch.tensor([row["input_ids"]])).logits[0, :, :259].detach().log_softmax(-1)
            stored |= {i: logprobs[t] for t, i in enumerate(row["teacher_index"]) if i >= 0}
        return torch.stack([stored[i] for i in range(len(stored))])

    def signal(self, teacher_index):
        logprobs = self.exact[teacher_index]
        ids = torch.arange(logprobs.shape[1]).expand_as(logprobs)
        return SparseSignal(ids, logprobs, torch.full((len(logprobs),), -torch.inf))


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
        assert_same(gradients, expected, 3e-3)
    require_exact(tmp_path / "c", cache, student_dir, teacher_dir, reference, reference_trace, divergence=divergence)


def require_exact(directory, cache, student, teacher, reference, reference_trace, **kwargs):
    """Train on the targets before they were rounded: losses, gradients and weights are the live teacher's."""
    unrounded = ExactCache(cache.path)
    unrounded.teacher_dir = teacher
    exact, exact_trace = train(directory, unrounded, student, **kwargs)
    assert losses(exact) == pytest.approx(losses(reference), rel=1e-5)
    for gradients, expected in zip(exact_trace.gradients, reference_trace.gradients, strict=True):
        assert_same(gradients, expected, 1e-4)
    assert_same(weights(exact), weights(reference), 1e-4)


# `wide_tokenizer` has no loss: its vocabulary has a token that its head has not
@pytest.mark.parametrize("variant", ["untied", "padded", "softcapped", "scaled", "biased", "moe"])
def test_other_kinds_of_student_and_teacher_equal_the_live_teacher(variant, tmp_path, variant_dir, dataset):
    student, teacher = variant_dir(variant), variant_dir(variant, seed=2, hidden=48)
    own = LocalTeacher(teacher, dtype="float32")
    cache = capture(dataset, own, tmp_path / "cache", targets=TopK(259), progress=False)
    # TRL adds a mixture-of-experts student's router loss, which is not the teacher's
    options = {"divergence": "jsd", "max_steps": 2, "router_aux_loss_coef": 0.0}
    reference, trace = train(tmp_path / "a", cache, student, trainer_class=live(teacher), **options)
    require_exact(tmp_path / "b", cache, student, teacher, reference, trace, **options)


@pytest.mark.parametrize(
    "change",
    [{"shuffle_dataset": True}, {"max_length": 17},
     {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}],
    ids=["shuffled", "truncated", "other micro-batches"],
)  # fmt: skip
def test_still_equals_it(change, cache, tmp_path, student_dir, teacher_dir, dataset):
    cached, _ = train(tmp_path / "a", cache, student_dir, dataset=dataset.shuffle(seed=3), **change)
    reference, _ = train(
        tmp_path / "b", cache, student_dir, dataset=dataset.shuffle(seed=3), trainer_class=live(teacher_dir), **change
    )
    assert losses(cached) == pytest.approx(losses(reference), rel=1e-4)


def test_truncation_at_the_start_keeps_each_target_with_its_token(cache, tmp_path, student_dir):
    def targets_by_token(trainer):
        rows = [(row["input_ids"], row["teacher_index"]) for row in trainer.train_dataset]
        return [list(zip(ids, index, strict=True)) for ids, index in rows]

    whole = build(tmp_path / "a", cache, student_dir)
    cut = build(tmp_path / "b", cache, student_dir, max_length=17, truncation_mode="keep_end")
    pairs = targets_by_token(whole)
    assert targets_by_token(cut) == [row[-17:] for row in pairs] and any(len(row) > 17 for row in pairs)


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
