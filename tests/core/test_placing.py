"""Teachers are placed by one function, whichever the host."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kd_plugin.panel import TeacherPanel
from kd_plugin.sharding import move
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from kd_plugin.teachers.in_process import Placement, place, tree_over_same_tensors
from kd_plugin.vocab import Vocabulary
from tests.core.test_adapter_teacher import save_adapter
from tests.tiny import byte_tokenizer, tiny_llama

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


class Wrapper(nn.Module):
    """What a host puts around a model; counts its passes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, *args):
        self.passes += 1
        return self.model(*args)


def test_each_model_is_wrapped_once_and_runs_in_its_wrapper(tmp_path, student_dir, teacher_dir):
    base = LocalTeacher(teacher_dir, dtype="float32")
    adapter = save_adapter(teacher_dir, tmp_path / "adapter", LORA)
    offloaded = LocalTeacher(teacher_dir, dtype="float32", placement="offload")
    on_student = AdapterTeacher(save_adapter(student_dir, tmp_path / "own", LORA))
    panel = TeacherPanel(
        {
            "base": base,
            "one": AdapterTeacher(adapter, base=base),
            "two": AdapterTeacher(adapter, base=base),
            "own": on_student,
            "away": offloaded,
        },
        combine="mixture",
    )
    student = get_peft_model(LocalTeacher(student_dir, dtype="float32").model, LORA)
    wrapped = []

    def wrap(model):
        wrapped.append(Wrapper(model))
        return wrapped[-1]

    vocabulary = Vocabulary.from_tokenizer(byte_tokenizer())
    place(panel.teachers.values(), Placement(student, vocabulary, torch.device("cpu"), wrap))
    assert [one.model for one in wrapped] == [base.model]
    ids = torch.tensor([[1, 2, 3]])
    hidden = [teacher.hidden_states(ids, torch.ones_like(ids)) for teacher in panel.teachers.values()]
    assert wrapped[0].passes == 1 and len(hidden) == 5
    assert any(p is q for p in on_student.model.parameters() for q in student.parameters())
    place(panel.teachers.values(), Placement(student, vocabulary, torch.device("cpu"), wrap, shards_move=True))
    assert [one.model for one in wrapped[2:]] == [offloaded.model]


def test_a_copied_tree_leaves_what_wrappers_hooked_behind():
    model, seen = tiny_llama(), []
    model.model.norm.register_forward_hook(lambda *_: seen.append("hook"))
    copied = tree_over_same_tensors(model)
    copied(input_ids=torch.tensor([[1, 2]]))
    assert not seen
    model(input_ids=torch.tensor([[1, 2]]))
    assert seen and all(p is q for p, q in zip(model.parameters(), copied.parameters(), strict=True))


def test_parts_of_what_is_cut_stay_unless_they_are_asked_to_move():
    model = nn.Linear(4, 4)
    model.register_buffer("table", torch.zeros(3))
    model.weight.ds_status, model.weight.ds_tensor = "cut", torch.zeros(8)
    there = torch.float64  # stands for a device: `to` takes either, and this machine has one device
    move(model, there, parts=False)
    assert model.weight.ds_tensor.dtype == model.weight.dtype == torch.float32
    assert model.bias.dtype == model.table.dtype == there
    move(model, there)
    assert model.weight.ds_tensor.dtype == there
