"""Tokens that are trained on and have no target: refused, or left out of what divides the divergence."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from kd_plugin.cache import Sampled, TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.errors import DataError
from kd_plugin.teachers import LocalTeacher
from tests.equivalence.test_offline_packing import require_same, step

ROWS = Dataset.from_list([{"prompt": f"say {i}:", "completion": f" answer {'y' * (5 * i % 9)}"} for i in range(8)])
PROMPT = len("say 0:")
HALF = ROWS.select(range(0, 8, 2))
SHAPES = [
    {},
    {"padding_free": True},
    {"packing": True, "max_length": 64},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
]
BOTH = {"completion_only_loss": False, "allow_partial": True}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher_dir):
    """`all` has a target for every token, `completions` what capture takes by default, `half` every other row."""
    directory = tmp_path_factory.mktemp("caches")
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    plan = {
        "all": (ROWS, TopK(259), {"completion_only": False}),
        "completions": (ROWS, TopK(259), {}),
        "sampled": (ROWS, Sampled(20), {}),
        "half": (HALF, TopK(259), {}),
        "cut": (ROWS, TopK(259), {"max_length": 12}),
    }
    return {
        name: capture(rows, teacher, directory / name, targets=kept, progress=False, **options)
        for name, (rows, kept, options) in plan.items()
    }


@pytest.fixture(scope="module")
def oracle(student_dir, teacher_dir, caches):
    """Each row's divergence and cross-entropy at its tokens, from the models' logits: (L-1,) two a row."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (teacher_dir, student_dir)
    )
    found = []
    for row in caches["all"].dataset():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q, p = (model(ids).logits[0, :-1] for model in (student, teacher))
        divergence = divergence_from_logits(q, p, Divergence("forward_kl"))
        found.append((divergence, torch.nn.functional.cross_entropy(q, ids[0, 1:], reduction="none")))
    return found


def mean(oracle, which, rows=range(8), first=PROMPT, last=None):
    """Mean over the tokens from number ``first`` on of some rows."""
    return float(torch.cat([oracle[i][which][first - 1 : last] for i in rows]).mean())


def tells(found, *parts):
    message = str(found.value)
    assert all(part in message for part in parts), message


def test_targets_at_completions_do_not_do_for_whole_texts(caches, tmp_path, student_dir):
    with pytest.raises(DataError) as found:
        step(tmp_path, caches["completions"], student_dir, ROWS, completion_only_loss=False)
    tells(found, "40 of ", "trained tokens of the train dataset have no target", "token 1 of row 0",
          "scored completions", "completion_only_loss", "allow_partial=True")  # fmt: skip
    with pytest.raises(DataError, match="have no target"):
        step(tmp_path, caches["completions"], student_dir, None, completion_only_loss=False)
    with pytest.raises(DataError, match="8 of 8 rows of the eval dataset are not in"):
        step(tmp_path, caches["all"], student_dir, ROWS, eval_dataset=ROWS.map(lambda row: {"prompt": "x"}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_the_divergence_is_a_mean_over_the_tokens_with_a_target(
    ce_weight, shape, caches, oracle, tmp_path, student_dir
):
    loss, *_ = step(tmp_path, caches["completions"], student_dir, ROWS, ce_weight=ce_weight, **BOTH, **shape)
    assert loss == pytest.approx(mean(oracle, 0) + ce_weight * mean(oracle, 1, first=1), rel=1e-4)


@pytest.mark.parametrize("name", ["completions", "sampled"])
def test_what_has_no_target_changes_no_gradient(name, caches, tmp_path, student_dir):
    partial = step(tmp_path / "a", caches[name], student_dir, ROWS, **BOTH)
    require_same(partial, step(tmp_path / "b", caches[name], student_dir, ROWS, completion_only_loss=True))


def test_the_gradient_of_both_terms_is_that_of_two_runs(caches, tmp_path, student_dir):
    both = step(tmp_path / "a", caches["completions"], student_dir, ROWS, ce_weight=0.3, **BOTH)
    teacher = step(tmp_path / "b", caches["completions"], student_dir, ROWS)
    labels = step(tmp_path / "c", caches["all"], student_dir, ROWS, kd_weight=0.0, ce_weight=0.3,
                  completion_only_loss=False)  # fmt: skip
    summed = {name: teacher[1][name] + labels[1][name] for name in teacher[1]}
    require_same(both, (teacher[0] + labels[0], summed))


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_half_the_rows(ce_weight, caches, oracle, tmp_path, student_dir):
    with pytest.raises(DataError, match=r"4 of 8 rows of the train dataset are not in the teacher cache.*row 1"):
        step(tmp_path, caches["half"], student_dir, ROWS, ce_weight=ce_weight)
    loss, _, trainer = step(
        tmp_path, caches["half"], student_dir, ROWS, ce_weight=ce_weight, allow_partial=True, eval_dataset=ROWS
    )
    expected = mean(oracle, 0, rows=range(0, 8, 2)) + ce_weight * mean(oracle, 1)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert len(trainer.train_dataset) == (8 if ce_weight else 4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_several_caches_that_together_do_not_hold_everything(caches, oracle, tmp_path, student_dir):
    panel = [caches["half"], caches["completions"]]
    loss, *_ = step(tmp_path / "a", panel, student_dir, ROWS, ce_weight=0.3, **BOTH)
    assert loss == pytest.approx(mean(oracle, 0) + 0.3 * mean(oracle, 1, first=1), rel=1e-4)
    with pytest.raises(DataError, match="have no target"):
        step(tmp_path / "b", panel, student_dir, ROWS, completion_only_loss=False)
    whole = step(tmp_path / "c", [caches["half"], caches["all"]], student_dir, ROWS, completion_only_loss=False)
    assert whole[0] == pytest.approx(mean(oracle, 0, first=1), rel=1e-4)
    weightless = {str(caches["half"].path): 1.0, str(caches["completions"].path): 0.0}
    with pytest.raises(DataError, match="4 of 8 rows"):
        step(tmp_path / "d", weightless, student_dir, ROWS)
    assert len(step(tmp_path / "e", weightless, student_dir, None)[2].train_dataset) == 4


def test_a_longer_cut_in_training_than_at_capture(caches, oracle, tmp_path, student_dir):
    for shape in ({"max_length": 14}, {"max_length": 12, "truncation_mode": "keep_end"},
                  {"max_length": 12, "packing": True, "packing_strategy": "bfd_split"}):  # fmt: skip
        with pytest.raises(DataError) as found:
            step(tmp_path, caches["cut"], student_dir, ROWS, **shape)
        tells(found, "have no target", "within the first 12 tokens of a row")
    for max_length in (12, 9):
        loss, *_ = step(tmp_path / "a", caches["cut"], student_dir, ROWS, max_length=max_length)
        assert loss == pytest.approx(mean(oracle, 0, last=max_length - 1), rel=1e-4)
    loss, *_ = step(tmp_path / "b", caches["cut"], student_dir, ROWS, max_length=None, allow_partial=True)
    assert loss == pytest.approx(mean(oracle, 0, last=11), rel=1e-4)


def test_rows_of_which_both_cuts_leave_no_completion_are_not_missed(teacher_dir, tmp_path, student_dir):
    rows = Dataset.from_list([*ROWS, {"prompt": "a prompt that is longer than that", "completion": " cut away"}])
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    cache = capture(rows, teacher, tmp_path / "cut", targets=TopK(4), max_length=20, progress=False)
    assert len(cache) == 8
    assert len(step(tmp_path / "a", cache, student_dir, rows, max_length=20)[2].train_dataset) == 8
    step(tmp_path / "b", cache, student_dir, rows, max_length=20, packing=True)
    with pytest.raises(DataError, match=r"1 of 9 rows of the train dataset are not in the teacher cache.*row 8"):
        step(tmp_path / "c", cache, student_dir, rows)
    stream = rows.to_iterable_dataset()
    step(tmp_path / "d", cache, student_dir, stream, max_length=20)
    with pytest.raises(DataError, match="Rows of a streamed dataset are not in the teacher cache"):
        step(tmp_path / "e", cache, student_dir, stream)


def test_a_stream_is_refused_at_the_first_batch(caches, tmp_path, student_dir):
    with pytest.raises(DataError, match=r"40 trained tokens of a batch have no target.*token 1 of its row 0"):
        step(tmp_path / "a", caches["completions"], student_dir, ROWS.to_iterable_dataset(), completion_only_loss=False)


def test_wrapped_packing_leaves_out_what_follows_the_end_of_another_row(caches, tmp_path, student_dir):
    shape = {"packing": True, "packing_strategy": "wrapped", "max_length": 4096, "completion_only_loss": False}
    loss, _, trainer = step(tmp_path, caches["all"], student_dir, ROWS, **shape)
    (row,) = trainer.train_dataset
    ids = torch.tensor([row["input_ids"]])
    cache = caches["all"]
    numbers = torch.tensor(row["teacher_index"])
    held = (numbers >= 0).nonzero()[:, 0]
    assert len(held) == len(ids[0]) - len(ROWS)
    with torch.no_grad():
        q = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)(ids).logits[0, held].log_softmax(-1)
    signal = cache.signal(numbers[held])
    expected = (signal.logprobs.exp() * (signal.logprobs - q.gather(1, signal.ids))).sum(-1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-3)
