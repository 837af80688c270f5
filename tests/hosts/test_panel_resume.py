"""An interrupted and resumed run is the undisturbed one, bit for bit; another panel is refused."""

import json

import pytest
import torch
from peft import get_peft_model

from kd_plugin.errors import ConfigError
from kd_plugin.lineage import load_record, verify
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import LORA, losses, prompts, settings, weights


@pytest.fixture(scope="module")
def experts(tmp_path_factory, student_dir):
    """Three LoRA experts on the student's own base."""
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(("math", "code", "law")):
        torch.manual_seed(seed)
        model = get_peft_model(LocalTeacher(student_dir, dtype="float32").model, LORA)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return root


def trainer(directory, student, experts, names=("math", "code", "law"), **options):
    rows = prompts(teacher_id=[names[i % len(names)] for i in range(24)])
    if options.get("combine", "route") != "route":
        rows = prompts()
    common = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    common |= {"max_completion_length": 6, "save_strategy": "steps", "save_steps": 1, **options}
    return TeacherPanelTrainer(
        model=student,
        teacher_models={name: AdapterTeacher(experts / name, name=name) for name in names},
        args=TeacherPanelConfig(**settings(directory, **common)),
        train_dataset=rows,
        peft_config=LORA,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, student_dir, experts):
    """A run of four steps of two micro-batches that nothing disturbed, with its checkpoints."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    done = trainer(directory, student_dir, experts)
    done.train()
    return done, directory


@pytest.mark.parametrize("stopped_at", [1, 2, 3])
def test_bit_for_bit(stopped_at, whole, tmp_path, student_dir, experts):
    """Routed LoRA teachers on the student's base, gradient accumulation 2, in float32."""
    undisturbed, _ = whole

    class Stopped(Exception):
        pass

    interrupted = trainer(tmp_path, student_dir, experts)

    def stop_in_the_middle_of_a_step(*args, **kwargs):
        if interrupted.state.global_step == stopped_at and interrupted._step % 2 == 1:
            raise Stopped
        return original(*args, **kwargs)

    original = interrupted.training_step
    interrupted.training_step = stop_in_the_middle_of_a_step
    with pytest.raises(Stopped):
        interrupted.train()
    torch.manual_seed(999)  # whatever else the process did in between
    resumed = trainer(tmp_path, student_dir, experts)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    expected = weights(undisturbed)
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, expected[name]), name
    assert losses(resumed) == losses(undisturbed)


def test_schedules_go_on_where_they_were(tmp_path, student_dir, experts):
    options = {
        "combine": "weighted_kl",
        "teacher_weights": {"math": 1.0, "code": {"start": 0.0, "end": 2.0, "steps": 4, "shape": "cosine"}},
        "names": ("math", "code"),
    }
    undisturbed = trainer(tmp_path / "a", student_dir, experts, **options)
    undisturbed.train()
    trainer(tmp_path / "b", student_dir, experts, **options).train()
    resumed = trainer(tmp_path / "b", student_dir, experts, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert all(torch.equal(w, weights(undisturbed)[name]) for name, w in weights(resumed).items())
    assert losses(resumed) == losses(undisturbed)


class TestAnotherPanel:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"names": ("math", "code")}, "teacher 'law' is gone"),
            ({"divergence": "forward_kl"}, r"teacher 'code': divergence was .*reverse_kl.* and is .*forward_kl"),
            ({"temperature": 0.7}, "temperature was 1.0 and is 0.7"),
            ({"combine": "confidence"}, "combine was 'route' and is 'confidence'"),
        ],
    )
    def test_is_refused(self, change, message, whole, tmp_path, student_dir, experts):
        other = trainer(tmp_path, student_dir, experts, **change)
        with pytest.raises(ConfigError, match=f"{message}.*allow_changed_panel=True"):
            other.train(resume_from_checkpoint=str(whole[1] / "checkpoint-2"))

    def test_other_weights_of_a_teacher_are_noticed_by_their_hash(self, whole, tmp_path, student_dir, experts):
        import shutil

        shutil.copytree(experts, tmp_path / "experts")
        shutil.copy(experts / "law" / "adapter_model.safetensors", tmp_path / "experts" / "math")
        other = trainer(tmp_path / "run", student_dir, tmp_path / "experts")
        with pytest.raises(ConfigError, match=r"teacher 'math': weights was [0-9a-f]{12}\.\.\. and is"):
            other.train(resume_from_checkpoint=str(whole[1] / "checkpoint-2"))

    def test_the_same_teachers_in_another_place_are_the_same_panel(self, whole, tmp_path, student_dir, experts):
        import shutil

        shutil.copytree(experts, tmp_path / "moved")
        moved = trainer(tmp_path / "run", student_dir, tmp_path / "moved")
        moved.train(resume_from_checkpoint=str(whole[1] / "checkpoint-3"))
        assert moved.state.global_step == 4

    def test_where_it_is_allowed_it_stands_in_the_lineage(self, whole, tmp_path, student_dir, experts):
        other = trainer(tmp_path, student_dir, experts, names=("math", "code"), allow_changed_panel=True)
        other.train(resume_from_checkpoint=str(whole[1] / "checkpoint-3"))
        record = load_record(tmp_path / "checkpoint-4")
        assert "panel after checkpoint-3: teacher 'law' is gone" in record["run"]["changes"]
        assert verify(tmp_path / "checkpoint-4").exit_code == 0
        assert "'law' is gone" in json.dumps(record["run"])
        assert "law" in {node["name"] for node in record["nodes"]}

    def test_a_checkpoint_that_does_not_say(self, whole, tmp_path, student_dir, experts, caplog):
        import shutil

        shutil.copytree(whole[1] / "checkpoint-3", tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-3" / "panel.json").write_text(json.dumps({"version": 1}))
        with pytest.raises(ConfigError, match=r"panel.json is damaged"):
            trainer(tmp_path, student_dir, experts).train(resume_from_checkpoint=True)
        (tmp_path / "checkpoint-3" / "panel.json").unlink()
        trainer(tmp_path, student_dir, experts).train(resume_from_checkpoint=True)
