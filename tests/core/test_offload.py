"""An offloaded teacher is on the device while it scores: once a generation batch, and one at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kd_plugin.errors import ConfigError
from kd_plugin.panel import TeacherPanel, score_rows
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from tests.core.panel_help import START, assert_same_gradients, corrected, rows
from tests.tiny import tiny_llama


class Watched(LocalTeacher):
    """Tells where its weights are told to go."""

    moves: list = []  # noqa: RUF012 - shared on purpose: the order between teachers matters

    def _move(self, device):
        self.moves.append((self.name, str(device)))
        super()._move(device)


@pytest.fixture
def offloaded(teacher_dir, other_teacher_dir):
    Watched.moves.clear()
    return {
        name: Watched(path, name=name, dtype="float32", placement="offload")
        for name, path in (("a", teacher_dir), ("b", other_teacher_dir))
    }


def test_in_once_and_out_one_at_a_time(offloaded):
    ids, mask, positions = rows(8)
    panel = TeacherPanel(offloaded, combine="weighted_kl")
    device = torch.device("cpu", 0)
    score_rows(panel, [panel.assign({})] * 8, ids.to(device), mask.to(device), START, positions, rows_at_once=2)
    here = [(name, "in" if where != "cpu" or i % 2 == 0 else "out") for i, (name, where) in enumerate(Watched.moves)]
    assert here == [("a", "in"), ("a", "out"), ("b", "in"), ("b", "out")]


def test_a_teacher_that_nobody_asks_stays_out(offloaded):
    ids, mask, positions = rows()
    panel = TeacherPanel(offloaded)
    score_rows(panel, [panel.assign({"teacher_id": "b"})] * 4, ids, mask, START, positions, rows_at_once=2)
    assert {name for name, _ in Watched.moves} == {"b"}


def test_it_leaves_when_scoring_fails(offloaded):
    ids, mask, _ = rows()
    with pytest.raises(IndexError), offloaded["a"].resident("cpu"):
        offloaded["a"].score(ids, mask, torch.tensor([10**6]))
    assert [where for _, where in Watched.moves] == ["cpu", "cpu"]


def test_same_loss_as_resident_teachers(offloaded, teacher_dir, other_teacher_dir):
    student = tiny_llama(seed=1).train()
    resident = {n: LocalTeacher(p, dtype="float32") for n, p in (("a", teacher_dir), ("b", other_teacher_dir))}
    mine = corrected(TeacherPanel(offloaded, combine="mixture"), student, [{}] * 4, rows())
    theirs = corrected(TeacherPanel(resident, combine="mixture"), student, [{}] * 4, rows())
    assert_same_gradients(mine[1], theirs[1])


def test_adapters_over_an_offloaded_base_move_with_it(teacher_dir, tmp_path):
    model = get_peft_model(LocalTeacher(teacher_dir, dtype="float32").model, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    Watched.moves.clear()
    base = Watched(teacher_dir, name="base", dtype="float32", placement="offload")
    panel = TeacherPanel(
        {n: AdapterTeacher(tmp_path / "adapter", base=base, name=n) for n in "ab"}, combine="weighted_kl"
    )
    corrected(panel, tiny_llama(seed=1).train(), [{}] * 4, rows())
    assert len(Watched.moves) == 4


def test_an_unknown_placement():
    with pytest.raises(ConfigError, match="Did you mean 'offload'"):
        LocalTeacher("nowhere", placement="offloaded")
