"""The student as its own teacher: which weights teach, in every host and across checkpoints, and what it holds."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from kd_plugin import SelfTeacher, TeacherPanel
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.lightning import TeacherPanelModule
from kd_plugin.lineage import verify
from kd_plugin.panel.checks import require_one_vocabulary
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.teachers.in_process import Placement
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.views.view import View
from kd_plugin.vocab import Vocabulary
from tests.hosts.runs import LORA, launched, losses, prompts, settings, weights
from tests.lightning.help import trainer
from tests.tiny import byte_tokenizer, save_tiny

HINT = View(context="Hint: {{ hint }}")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("self") / "student", seed=3)


def rows(count=24):
    return prompts(count=count, hint=[f"say {'abc'[i % 3]}" for i in range(count)])


def panel_of(teacher, view=HINT):
    return TeacherPanel({"me": teacher}, own={"me": OwnTerms(view=view)})


def panel_trainer(directory, student, teacher, view=HINT, callbacks=None, peft_config=None, **options):
    chosen = {"max_steps": 4, "max_completion_length": 6, "learning_rate": 1e-2, **options}
    return TeacherPanelTrainer(
        model=student,
        teacher_models=panel_of(teacher, view),
        args=TeacherPanelConfig(**settings(directory, **chosen)),
        train_dataset=rows(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


class Recorded(TrainerCallback):
    """Keeps the trained parameters after each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


def of_teacher(teacher):
    return {name: one.own.detach() for name, one in teacher._followed.items()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_start_stays_and_an_average_follows(lora, student, tmp_path):
    peft_config = LORA if lora else None
    for kind in ("start", "ema"):
        teacher, recorded = SelfTeacher(kind, decay=0.75), Recorded()
        made = panel_trainer(tmp_path / kind, student, teacher, callbacks=[recorded], peft_config=peft_config)
        begun = weights(made)
        made.train()
        expected = begun
        if kind == "ema":
            for seen in recorded.seen:
                expected = {name: 0.75 * expected[name] + 0.25 * seen[name] for name in expected}
        found = of_teacher(teacher)
        assert found.keys() == begun.keys() and len(recorded.seen) == 4
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(tensor, begun[name]) for name, tensor in weights(made).items())
        assert all(loss > 0.0 for loss in losses(made))
        # What it computes is what a copy with these weights computes
        ids = torch.tensor([[5, 9, 60, 70]])
        plain = made.accelerator.unwrap_model(made.model)
        with torch.no_grad():
            for parameter in (p for p in plain.parameters() if p.requires_grad):
                name = next(n for n, p in plain.named_parameters() if p is parameter)
                parameter.copy_(found[name])
            logits = plain.eval()(ids).logits
            own = teacher.score(ids, torch.ones_like(ids), torch.arange(4))
        torch.testing.assert_close(
            own.head.logits(own.hidden), logits[0, :, : own.head.vocab_size], rtol=1e-4, atol=1e-4
        )


def test_with_an_adapter_there_is_no_second_copy(student, tmp_path):
    for kind, copies in (("start", 1), ("ema", 1), ("current", 0)):
        teacher = SelfTeacher(kind)
        made = panel_trainer(tmp_path / kind, student, teacher, peft_config=LORA)
        adapter = sum(p.numel() * p.element_size() for p in made.model.parameters() if p.requires_grad)
        assert teacher.own_bytes == copies * adapter
        mine = {p.data_ptr() for p in made.model.parameters()}
        beside = [p for p in teacher.model.parameters() if p.data_ptr() not in mine]
        assert sum(p.numel() * p.element_size() for p in beside) == copies * adapter
        made.train()
    full = SelfTeacher("ema")
    made = panel_trainer(tmp_path / "full", student, full)
    assert full.own_bytes == sum(p.numel() * p.element_size() for p in made.model.parameters())


def test_the_present_weights_are_the_student_and_differ_by_the_context_alone(student, tmp_path):
    blind = panel_trainer(tmp_path / "blind", student, SelfTeacher("current"), view=None, divergence="forward_kl")
    blind.train()
    assert all(abs(loss) < 1e-6 for loss in losses(blind))
    shown = panel_trainer(tmp_path / "shown", student, SelfTeacher("current"), divergence="forward_kl")
    shown.train()
    assert all(loss > 1e-3 for loss in losses(shown))
    assert shown.panel.teachers["me"].own_bytes == 0


def test_a_resumed_run_goes_on_with_the_average(student, tmp_path):
    straight = panel_trainer(
        tmp_path / "straight", student, SelfTeacher("ema", decay=0.5), save_steps=2, save_strategy="steps"
    )
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    teacher = SelfTeacher("ema", decay=0.5)
    resumed = panel_trainer(tmp_path / "resumed", student, teacher)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for mine, theirs in (
        (weights(resumed), weights(straight)),
        (of_teacher(teacher), of_teacher(straight.panel.teachers["me"])),
    ):
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-8)
    (checkpoint / "teachers.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no state of teacher 'me', which follows the student"):
        panel_trainer(tmp_path / "gone", student, SelfTeacher("ema", decay=0.5)).train(str(checkpoint))
    with pytest.raises(ConfigError, match=r"decay"):
        panel_trainer(tmp_path / "other", student, SelfTeacher("ema", decay=0.9)).train(
            str(tmp_path / "straight" / "checkpoint-4")
        )


def test_the_lineage_says_whose_weights_teach(student, tmp_path):
    made = panel_trainer(
        tmp_path, student, SelfTeacher("ema", name="me"), max_steps=1, save_steps=1, save_strategy="steps"
    )
    made.train()
    record = json.loads((tmp_path / "checkpoint-1" / "lineage.json").read_text())
    text = json.dumps(record)
    edges = {edge["role"]: edge for edge in record["edges"]}
    assert edges["me"]["kind"] == "distilled_logits" and edges["me"]["to"] == edges["student"]["to"]
    assert "apache-2.0" in text


def module_of(student, kind):
    view = {"context": HINT.context}
    panel = {"teachers": {"me": {"kind": "self", "weights": kind, "decay": 0.5, "view": view}}}
    return TeacherPanelModule(student, panel=panel, max_completion_length=6, learning_rate=1e-2)


def loader():
    data = [
        {"prompt": row["prompt"], "hint": row["hint"]} for row in rows(2)
    ]  # one batch an epoch, so that a resumed run sees the same
    return DataLoader(data, batch_size=2, collate_fn=lambda batch: {k: [one[k] for one in batch] for k in batch[0]})


@pytest.mark.parametrize("kind", ["start", "ema", "current"])
def test_lightning_goes_on_from_a_checkpoint(kind, student, tmp_path):
    begun = AutoModelForCausalLM.from_pretrained(student)
    straight = module_of(student, kind)
    saving = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    host = trainer(tmp_path / "straight", max_steps=4, callbacks=[saving], enable_checkpointing=True)
    host.fit(straight, loader())
    resumed = module_of(student, kind)
    trainer(tmp_path / "resumed", max_steps=4).fit(resumed, loader(), ckpt_path=tmp_path / "c" / "step=2.ckpt")
    one, other = (of_teacher(module._correction.panel.teachers["me"]) for module in (straight, resumed))
    assert bool(one) == (kind != "current")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-8)
        if kind == "start":
            assert torch.equal(other[name].cpu(), dict(begun.named_parameters())[name])
    mine, theirs = dict(resumed.named_parameters()), dict(straight.named_parameters())
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7)


def test_a_student_in_another_precision_than_its_start(student):
    """A trainer may cast and move the student after the teacher was placed, as DeepSpeed does under bf16."""
    model = AutoModelForCausalLM.from_pretrained(student)
    vocabulary = Vocabulary.from_tokenizer(byte_tokenizer())
    teacher = SelfTeacher("ema", decay=0.5)
    teacher.place(Placement(model, vocabulary, torch.device("cpu"), lambda m: m))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = (parameter + 0.01).to(torch.bfloat16)
    teacher.follow()
    ids = torch.tensor([[5, 9, 60]])
    assert teacher.score(ids, torch.ones_like(ids), torch.arange(3)).hidden.dtype == torch.bfloat16
    for name, tensor in teacher.state_dict().items():
        assert tensor.dtype == torch.float32  # the average itself is not rounded
        now = dict(model.named_parameters())[name].float()
        torch.testing.assert_close(tensor, 0.5 * before[name] + 0.5 * now, rtol=1e-6, atol=1e-7)


def test_what_it_refuses(student, tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown weights 'strat'.*Did you mean 'start'"):
        SelfTeacher("strat")
    with pytest.raises(ConfigError, match=r"decay is 1.0 of teacher 'teacher'"):
        SelfTeacher("ema", decay=1.0)
    model = AutoModelForCausalLM.from_pretrained(student)
    vocabulary = Vocabulary.from_tokenizer(AutoTokenizer.from_pretrained(student))
    for kind, instead in (("start", "kind: local"), ("ema", "ZeRO-1 or 2")):
        placement = Placement(model, vocabulary, torch.device("cpu"), lambda m: m, student_is_sharded_later=True)
        with pytest.raises(ConfigError, match=rf"keeps whole tensors.*sharded over ranks\. .*{instead}"):
            SelfTeacher(kind).place(placement)
    with pytest.raises(ConfigError, match="no student is there yet"):
        _ = SelfTeacher().model
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    teacher = SelfTeacher("ema")
    teacher.load_state_dict({"x": torch.zeros(1)})
    with pytest.raises(ConfigError, match="holds 1 tensors, and the student trains 4"):
        teacher.place(Placement(tuned, vocabulary, torch.device("cpu"), lambda m: m))


def test_in_yaml(tmp_path):
    from kd_plugin.panel.block import panel_from_block

    view = {"context": "Solution: {{ hint }}"}
    panel = panel_from_block({"teachers": {"me": {"kind": "self", "weights": "ema", "decay": 0.9, "view": view}}})
    assert panel.teachers["me"].identity == {"kind": "self", "weights": "ema", "decay": 0.9}
    assert "hint" in panel.columns


def test_the_example_in_yaml_trains(student, tmp_path):
    """integrations/trl/self.yaml, by the command."""
    content = yaml.safe_load((Path(__file__).parents[2] / "integrations" / "trl" / "self.yaml").read_text())
    data = [{"prompt": [{"role": "user", "content": row["prompt"]}], "solution": row["hint"]} for row in rows(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "self.yaml").write_text(yaml.safe_dump(content | {"output_dir": str(tmp_path / "out")}))
    small = "--max_steps 2 --bf16 false --use_cpu true --save_strategy no --report_to none --max_completion_length 4"
    small += f" --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --dataset_name {tmp_path / 'p.jsonl'}"
    assert (
        main(["panel", "--config", str(tmp_path / "self.yaml"), "--model_name_or_path", student, *small.split()]) == 0
    )
    assert verify(tmp_path / "out").exit_code == 0
    (saved, *_) = sorted((tmp_path / "out" / "rollouts").glob("*.jsonl"))
    assert "Reference solution" in saved.read_text()


def test_a_teacher_with_another_template_is_said_and_the_way_out(student, tmp_path, caplog):
    other = save_tiny(tmp_path / "other", seed=5)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(other)
    vocabulary = Vocabulary.from_tokenizer(byte_tokenizer())
    for view, said in ((None, True), (View(chat_template="own"), False)):
        caplog.clear()
        panel = TeacherPanel({"t": other}, own={"t": OwnTerms(view=view)})
        require_one_vocabulary(panel, vocabulary)
        assert ("set `view: {chat_template: own}` for 't'" in caplog.text) == said


def test_two_ranks_have_the_average_of_one(student, tmp_path):
    found = {}
    for ranks, count in ((1, 8), (2, 4)):
        out = tmp_path / str(ranks)
        out.mkdir()
        launched("tests.hosts.self_worker", ranks, (out, student, count))
        found[ranks] = [torch.load(out / f"{rank}.pt") for rank in range(ranks)]
    (one,), two = found[1], found[2]
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(one["losses"]) == 3
    for name, tensor in one["average"].items():
        assert torch.equal(two[0]["average"][name], two[1]["average"][name])  # each rank follows for itself
        torch.testing.assert_close(two[0]["average"][name], tensor, rtol=1e-3, atol=1e-5)
        assert not torch.equal(tensor, one["weights"][name])
