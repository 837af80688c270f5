"""Offline KD on a plain ``transformers.Trainer``: what plain PyTorch computes, and what TRL's host computes.

Tolerances are those of tests/equivalence for TRL: 1e-4 relative, 3e-3 for gradients from targets that were rounded.
"""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from kd_plugin.cache import Sampled, TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import LORA, assert_same, launched, losses, settings
from tests.tiny import byte_tokenizer
from tests.transformers.help import TEXTS, OfflineTrainer, step, tokenized, train

KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_kl"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher_dir):
    directory, teacher = tmp_path_factory.mktemp("caches"), LocalTeacher(teacher_dir, dtype="float32")
    plan = {
        "all": (TEXTS, TopK(259), {}),
        "texts": (TEXTS, TopK(16), {"completion_only": False}),
        "sampled": (TEXTS, Sampled(30), {}),
        "half": (TEXTS[::2], TopK(259), {}),
    }
    return {
        name: capture(rows, teacher, directory / name, targets=targets, progress=False, **options)
        for name, (rows, targets, options) in plan.items()
    }


class LiveTrainer(OfflineTrainer):
    """Plain PyTorch in the place of the cached loss: the teacher's and the student's full logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        with torch.no_grad():
            expected = self.live_teacher.model(ids, attention_mask=mask).logits[:, :-1, :259].float()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1, :259]
        scored = labels[:, 1:] != -100
        values = divergence_from_logits(logits[scored], expected[scored], self.objective.divergence)
        return values.sum() / num_items_in_batch


@pytest.fixture(scope="module")
def live(teacher_dir):
    return type("Live", (LiveTrainer,), {"live_teacher": LocalTeacher(teacher_dir, dtype="float32")})


@pytest.mark.parametrize("divergence", KINDS)
def test_equals_the_live_teacher(divergence, caches, live, tmp_path, student_dir):
    cached = train(tmp_path / "a", caches["all"], student_dir, divergence=divergence)
    reference = train(tmp_path / "b", caches["all"], student_dir, divergence=divergence, cls=live)
    assert cached[0] == pytest.approx(reference[0], rel=1e-4)
    for mine, theirs in zip(cached[1], reference[1], strict=True):
        assert_same(mine, theirs, 3e-3)
    assert cached[2].batches == 5  # the project's own trainer took part


# What differs around the head; see tests/tiny.py
@pytest.mark.parametrize("variant", ["untied", "padded", "softcapped", "scaled", "biased"])
def test_other_kinds_of_student_equal_the_live_teacher(variant, caches, live, tmp_path, variant_dir):
    student = variant_dir(variant)
    cached = train(tmp_path / "a", caches["all"], student, max_steps=2)
    reference = train(tmp_path / "b", caches["all"], student, max_steps=2, cls=live)
    assert cached[0] == pytest.approx(reference[0], rel=1e-4)


def test_a_lora_student_equals_the_live_teacher(caches, live, tmp_path, student_dir):
    def adapted():
        torch.manual_seed(5)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(student_dir), LORA)

    cached = train(tmp_path / "a", caches["all"], adapted(), max_steps=3)
    reference = train(tmp_path / "b", caches["all"], adapted(), max_steps=3, cls=live)
    assert cached[0] == pytest.approx(reference[0], rel=1e-4)
    for mine, theirs in zip(cached[1], reference[1], strict=True):
        assert_same(mine, theirs, 3e-3)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("name", ["texts", "sampled"])
def test_equals_trls_host(name, ce_weight, caches, tmp_path, student_dir):
    trainer = OfflineKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student_dir),
        args=OfflineKDConfig(**settings(tmp_path / "trl", ce_weight=ce_weight, gradient_checkpointing=False)),
        teacher_cache=caches[name],
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    plain, *_ = train(tmp_path / "plain", caches[name], student_dir, ce_weight=ce_weight)
    assert plain == pytest.approx(losses(trainer), rel=1e-5)


def test_rows_of_the_users_own_are_those_of_the_cache(caches, tmp_path, student_dir):
    own, *_ = train(tmp_path / "a", caches["all"], student_dir, tokenized())
    theirs, *_ = train(tmp_path / "b", caches["all"], student_dir)
    streamed, *_ = train(tmp_path / "c", caches["all"], student_dir, tokenized().to_iterable_dataset(), max_steps=2)
    assert own == pytest.approx(theirs, rel=1e-6) and len(streamed) == 2


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_micro_batches_give_one_gradient(ce_weight, caches, tmp_path, student_dir):
    shapes = [(1, 16), (4, 4), (16, 1)]
    found = [
        step(tmp_path / f"{rows}", caches["all"], student_dir, tokenized(), ce_weight=ce_weight,
             per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
        for rows, steps in shapes
    ]  # fmt: skip
    for loss, gradients, _ in found[:2]:
        assert loss == pytest.approx(found[2][0], rel=1e-5)
        assert_same(gradients, found[2][1], 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_in_one_equal_padded(attention, caches, tmp_path, student_dir):
    def model():
        return AutoModelForCausalLM.from_pretrained(student_dir, attn_implementation=attention)

    padded = step(tmp_path / "a", caches["texts"], model(), tokenized(completion_only=False), ce_weight=0.5)
    flat = step(tmp_path / "b", caches["texts"], model(), tokenized(completion_only=False), ce_weight=0.5,
                data_collator=DataCollatorWithFlattening())  # fmt: skip
    assert flat[0] == pytest.approx(padded[0], rel=1e-4)
    assert_same(flat[1], padded[1], 1e-4)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("rows", [16, 2], ids=["whole", "accumulated"])
def test_rows_that_the_cache_does_not_hold(ce_weight, rows, caches, tmp_path, student_dir, teacher_dir):
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (student_dir, teacher_dir)]
    divergences, entropies = [], []
    for number, row in enumerate(tokenized()):
        ids, scored = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
        with torch.no_grad():
            q, p = (model(ids).logits[0, :-1][scored] for model in models)
        if number % 2 == 0:
            divergences.append(divergence_from_logits(q, p, Divergence("forward_kl")))
        entropies.append(torch.nn.functional.cross_entropy(q, ids[0, 1:][scored], reduction="none"))
    expected = float(torch.cat(divergences).mean()) + ce_weight * float(torch.cat(entropies).mean())
    loss, _, trainer = step(
        tmp_path, caches["half"], student_dir, tokenized(), ce_weight=ce_weight, allow_partial=True,
        eval_dataset=tokenized(), per_device_train_batch_size=rows, gradient_accumulation_steps=16 // rows,
    )  # fmt: skip
    if ce_weight or rows == 16:  # without cross-entropy eight rows are left, and an epoch ends in mid-step
        assert loss == pytest.approx(expected, rel=1e-4)
    assert len(trainer.train_dataset) == (16 if ce_weight else 8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_several_caches_teach_together(caches, live, tmp_path, student_dir, other_teacher_dir):
    other = capture(
        TEXTS, LocalTeacher(other_teacher_dir, dtype="float32"), tmp_path / "c", targets=TopK(259), progress=False
    )
    first, second = (step(tmp_path / name, cache, student_dir) for name, cache in (("a", caches["all"]), ("b", other)))
    both = step(tmp_path / "d", {str(caches["all"].path): 3.0, str(other.path): 1.0}, student_dir)
    assert both[0] == pytest.approx(0.75 * first[0] + 0.25 * second[0], rel=1e-5)
    assert_same(both[1], {n: 0.75 * g + 0.25 * second[1][n] for n, g in first[1].items()}, 1e-5)


def test_a_shift_by_one_token_is_far_outside_the_tolerance(caches, live, tmp_path, student_dir):
    class Shifted(TeacherCache):
        def signal(self, teacher_index):
            return super().signal((teacher_index - 1).clamp(min=0))

    shifted, *_ = train(tmp_path / "a", Shifted(caches["all"].path), student_dir)
    reference, *_ = train(tmp_path / "b", caches["all"], student_dir, cls=live)
    with pytest.raises(AssertionError):
        assert shifted == pytest.approx(reference, rel=2e-3)


OPTIONS = ["plain", "partial", "streamed"]


@pytest.fixture(scope="module")
def of_ranks(caches, tmp_path_factory, student_dir):
    """What the run of each option left, by the number of ranks."""
    directory, found = tmp_path_factory.mktemp("ranks"), {}
    for ranks in (1, 2):
        jobs = []
        for option in OPTIONS:
            cache = caches["half" if option == "partial" else "all"]
            cache.dataset()  # built once, before two processes ask for it
            out = directory / f"{option} on {ranks}"
            out.mkdir()
            jobs.append((out, cache.path, student_dir, 4 // ranks, option))
        launched("tests.transformers.offline_worker", ranks, *jobs)
        found |= {(option, ranks): torch.load(directory / f"{option} on {ranks}" / "result.pt") for option in OPTIONS}
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_two_ranks_train_as_one_process(option, of_ranks):
    one, two = of_ranks[option, 1], of_ranks[option, 2]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(one["losses"]) == 4
    assert_same(two["weights"], one["weights"], 1e-4)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-4)
