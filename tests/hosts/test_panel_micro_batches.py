"""A student computes a micro-batch at the width of its longest row, and micro-batches have rows of like length."""

import pytest
import torch

from kd_plugin.monitor.traces import read_rollouts
from kd_plugin.panel import RowScores
from kd_plugin.panel.batches import ScoredRollouts
from kd_plugin.panel.roster import Assignment
from kd_plugin.rollouts.rows import Response, Rollouts, Span
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import Trace, assert_same, losses, prompts, settings


def spread(count=24):
    """Prompts whose lengths differ much, with completions of other lengths."""
    texts = [f"{'word ' * (i * 5 % 13)}end?" for i in range(count)]
    answers = [f" {'ab' * (i * 7 % 11)}c" for i in range(count)]
    return prompts(count=count, completion=answers).remove_columns("prompt").add_column("prompt", texts)


def run(directory, student, teacher, rows, accumulation, **kwargs):
    trace = Trace()
    trainer = TeacherPanelTrainer(
        model=student,
        teacher_model=teacher,
        args=TeacherPanelConfig(
            **settings(
                directory, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, max_steps=2,
                max_completion_length=24, on_policy_fraction=0.0, max_grad_norm=1e9, **kwargs,
            )
        ),
        train_dataset=spread(),
        callbacks=[trace],
    )  # fmt: skip
    seen = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["attention_mask"]), with_kwargs=True
    )
    trainer.train()
    return trainer, trace, [mask for mask in seen if mask is not None]


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path, student_dir, teacher_dir):
    whole, whole_trace, whole_masks = run(tmp_path / "a", student_dir, teacher_dir, 8, 1)
    parts, part_trace, part_masks = run(tmp_path / "b", student_dir, teacher_dir, 2, 4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for mine, theirs in zip(part_trace.gradients, whole_trace.gradients, strict=True):
        assert_same(mine, theirs, 1e-5)
    for mask in whole_masks + part_masks:
        assert mask[:, 0].all(), "rows begin in the first column"
        assert mask.sum(1).max() == mask.shape[1], "as wide as its longest row"
    assert len(whole_masks) == 2 and len(part_masks) == 8
    widths = [mask.shape[1] for mask in part_masks]
    assert widths[:4] == sorted(widths[:4], reverse=True) and widths[4:] == sorted(widths[4:], reverse=True)
    assert 2 * sum(widths) < 0.8 * sum(mask.numel() for mask in whole_masks)
    assert sum(int(mask.sum()) for mask in part_masks) == sum(int(mask.sum()) for mask in whole_masks)


def test_the_rows_that_are_saved_are_not_the_longest_ones(tmp_path, student_dir, teacher_dir):
    run(tmp_path / "a", student_dir, teacher_dir, 8, 1, save_rollouts=3)
    run(tmp_path / "b", student_dir, teacher_dir, 2, 4, save_rollouts=3)
    whole, parts = ([(row["step"], row["row"], row["prompt"]) for row in read_rollouts(tmp_path / d)] for d in "ab")
    assert whole == parts
    assert [row[:2] for row in whole] == [(step, row) for step in (1, 2) for row in range(3)]


def test_rows_keep_together_what_belongs_to_them():
    torch.manual_seed(0)
    lengths = [4, 9, 4, 1, 9, 6]
    ids = torch.zeros(6, 2 + 9, dtype=torch.int64)
    ids[:, 2] = torch.arange(6)
    mask = torch.stack([(torch.arange(11) >= 2) & (torch.arange(11) < 2 + length) for length in lengths]).long()
    responses = tuple(Response((row,), False, row) for row in range(6))
    scores = tuple(RowScores((), {}, Assignment(("t",)), Span(2, 2 + length)) for length in lengths)
    batch = ScoredRollouts(Rollouts(ids, mask, 4, responses), scores)

    def split():
        return batch.micro_batches([2, 2, 2], batch.longest_first(torch.randperm(6).tolist()))

    parts = split()
    assert [[one.span.length for one in part.scores] for part in parts] == [[9, 9], [6, 4], [4, 1]]
    for part in parts:
        assert part.input_ids[:, 0].tolist() == [one.number for one in part.responses]
        assert [lengths[one.number] for one in part.responses] == [one.span.length for one in part.scores]
        assert part.starts == (2, 2) and part.attention_mask[:, 0].all()
    firsts = {tuple(one.number for one in split()[0].responses) for _ in range(20)}
    assert firsts == {(1, 4), (4, 1)}, "rows of one length are in random order"
