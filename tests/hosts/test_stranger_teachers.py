"""A teacher that somebody else wrote against the protocol alone works wherever the package's own do."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kd_plugin import LocalTeacher, TeacherPanel, capture
from kd_plugin.cache import Sampled, TopK
from kd_plugin.errors import ConfigError
from kd_plugin.lightning import TeacherPanelCorrection
from kd_plugin.lineage import load_record
from kd_plugin.panel.estimators import Estimator
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.core.cache_help import prompt_rows
from tests.hosts.runs import assert_same, losses, prompts, settings, weights
from tests.lightning.help import Losses, Plain
from tests.lightning.help import trainer as lightning_trainer
from tests.strangers import InProcessStranger, RemoteStranger
from tests.tiny import byte_tokenizer

KINDS = {"in process": InProcessStranger, "remote": RemoteStranger}


def panel(teacher, kind):
    """One stranger, or the package's own teacher in its place, compared in the same way."""
    estimator = Estimator("topk_tail", top_k=32, student_top_k=0) if kind == "remote" else Estimator()
    return TeacherPanel({"t": teacher}, estimator=estimator)


def trl(directory, student, teacher, kind, **options):
    return TeacherPanelTrainer(
        model=student,
        teacher_models=panel(teacher, kind),
        args=TeacherPanelConfig(**settings(directory, max_steps=3, max_completion_length=6, **options)),
        train_dataset=prompts(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_packages_own_in_trl_and_is_in_the_lineage(kind, tmp_path, student_dir, teacher_dir):
    saving = {"save_strategy": "steps", "save_steps": 2}
    mine = trl(tmp_path / "mine", student_dir, KINDS[kind](teacher_dir), kind, **saving)
    mine.train()
    theirs = trl(tmp_path / "theirs", student_dir, LocalTeacher(teacher_dir, dtype="float32"), kind)
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-5)
    assert_same(weights(mine), weights(theirs))
    record = load_record(tmp_path / "mine" / "checkpoint-2")
    (taught,) = [edge["to"] for edge in record["edges"] if edge["kind"] == "distilled_logits"]
    (teacher,) = [node for node in record["nodes"] if node["id"] == taught]
    assert teacher["expression"] == "Apache-2.0"

    again = trl(tmp_path / "mine", student_dir, KINDS[kind](teacher_dir), kind, **saving)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again), weights(mine), relative=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_another_one_does_not_go_on_with_its_run(kind, tmp_path, student_dir, teacher_dir, other_teacher_dir):
    trl(tmp_path, student_dir, KINDS[kind](teacher_dir), kind, save_strategy="steps", save_steps=2).train()
    other = trl(tmp_path, student_dir, KINDS[kind](other_teacher_dir), kind)
    with pytest.raises(ConfigError, match="trained under another panel: teacher 't': repo was"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_packages_own_in_lightning(kind, tmp_path, student_dir, teacher_dir):
    def run(teacher):
        rows = DataLoader([{"prompt": row["prompt"]} for row in prompts(count=8)], batch_size=4)
        seen, module = Losses(), Plain(student_dir)
        correction = TeacherPanelCorrection(
            panel(teacher, kind), max_completion_length=6, generation_kwargs={"do_sample": False}
        )
        lightning_trainer(tmp_path, [correction, seen], max_steps=2).fit(module, rows)
        return seen.losses, dict(module.named_parameters())

    mine, theirs = run(KINDS[kind](teacher_dir)), run(LocalTeacher(teacher_dir, dtype="float32"))
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert_same(mine[1], theirs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_of_it_stores_what_a_capture_of_the_packages_own_does(kind, tmp_path, teacher_dir):
    def stored(teacher, name, **options):
        return capture(prompt_rows(6), teacher, tmp_path / name, targets=TopK(8), progress=False, **options)

    mine = stored(KINDS[kind](teacher_dir), "mine", tokenizer=byte_tokenizer())
    theirs = stored(LocalTeacher(teacher_dir, dtype="float32"), "theirs")
    everything = torch.arange(theirs.tokens)
    one, other = mine.signal(everything), theirs.signal(everything)
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(
        one.logprobs, other.logprobs, atol=4e-3, rtol=0
    )  # float16 of equal numbers, or a step off
    torch.testing.assert_close(one.tail_logmass, other.tail_logmass, atol=1e-4, rtol=1e-4)
    assert np.array_equal(mine.dataset()["input_ids"][0], theirs.dataset()["input_ids"][0])
    # The same call again finds it finished; another teacher's weights are another capture
    stored(KINDS[kind](teacher_dir), "mine", tokenizer=byte_tokenizer())


def test_one_teacher_serves_two_trainers_in_one_process(tmp_path, student_dir, teacher_dir):
    """The second run finds nothing of the first one in it: same seeds, same losses."""
    teacher = InProcessStranger(teacher_dir)
    first = trl(tmp_path / "first", student_dir, teacher, "in process", num_train_epochs=2)
    first.train()
    second = trl(tmp_path / "second", student_dir, teacher, "in process", num_train_epochs=2)
    second.train()
    assert losses(second) == pytest.approx(losses(first), rel=1e-6)


class TestRefusals:
    def test_what_lacks_a_member_is_named(self, teacher_dir):
        class Older:
            source = vocabulary = None

            def score(self, input_ids, attention_mask, positions): ...

        with pytest.raises(ConfigError, match="'t' is a Older, which lacks 'capabilities'"):
            TeacherPanel({"t": Older()})
        with pytest.raises(ConfigError, match="got Older, which lacks 'capabilities'"):
            capture(prompt_rows(2), Older(), "nowhere", progress=False)

    def test_what_it_does_not_give(self, tmp_path, teacher_dir, student_dir):
        remote = RemoteStranger(teacher_dir)
        with pytest.raises(
            ConfigError, match=r"a remote stranger, which gives some.*'exact' needs all.*'topk_tail' or"
        ):
            trl(tmp_path, student_dir, remote, "in process")
        with pytest.raises(ConfigError, match="a remote stranger that lists some tokens"):
            capture(prompt_rows(2), remote, tmp_path / "c", targets=Sampled(5), progress=False)
        with pytest.raises(ConfigError, match="has no tokenizer to read the rows with"):
            capture(prompt_rows(2), remote, tmp_path / "c", progress=False)

    def test_it_cannot_write(self, tmp_path, teacher_dir):
        from kd_plugin.cache import Generation

        rows = [{"prompt": "one"}]
        with pytest.raises(ConfigError, match="a stranger that generates nothing"):
            capture(rows, InProcessStranger(teacher_dir), tmp_path / "c", generate=Generation(), progress=False)
