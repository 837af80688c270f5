"""Text teachers on a TRL panel: what the student is trained on, and what becomes of it."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from kd_plugin.errors import CacheError, ConfigError, DataError, ServerError
from kd_plugin.inputs import load_rows
from kd_plugin.panel import TeacherPanel
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.text.dataset import text_source
from kd_plugin.text.spending import Spent
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import assert_same, losses, prompts, settings, weights
from tests.text_teachers import ScriptedTeacher

ANSWERS = [f"answer {i % 3}" for i in range(24)]


def trainer(directory, student, teachers, text=None, rows=None, **options):
    panel = {k: options.pop(k) for k in ("combine", "prices", "reward") if k in options}
    panel = TeacherPanel(
        teachers, text=CorrectionSettings(**({"accept": "teacher"} if text is None else text)), **panel
    )
    config = TeacherPanelConfig(**settings(directory, **{"max_completion_length": 12, "max_steps": 2, **options}))
    rows = prompts(answer=ANSWERS) if rows is None else rows
    return TeacherPanelTrainer(model=student, teacher_models=panel, args=config, train_dataset=rows)


def one_batch(run, count=4):
    run.model.train()
    return run._generate_and_score_completions([dict(row) for row in run.train_dataset.select(range(count))])


def test_the_loss_is_the_cross_entropy_of_corrections_from_where_they_depart(tmp_path, student_dir, tokenizer):
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher()})
    found = one_batch(run)
    scored = found["scored"]
    (batch,) = scored.micro_batches([4])
    # The student's own rows are left out: nothing scores them
    assert len(batch.scores) == 4 and found["num_items_in_batch"] == scored.tokens == batch.tokens
    loss, _, count = run._compute_loss(run.model, {"batch": batch}, found["num_items_in_batch"])
    total, tokens = 0.0, 0
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    for row, response in enumerate(scored.rollouts.responses):
        prompt = scored.rollouts.input_ids[row, : scored.rollouts.completion_start]
        prompt = prompt[scored.rollouts.attention_mask[row, : scored.rollouts.completion_start] != 0].tolist()
        text = tokenizer.decode(response.tokens, skip_special_tokens=True)
        begin = text[: len(text) - len(text.lstrip())]
        ids = tokenizer(begin + ANSWERS[row], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        departs = next(i for i, t in enumerate(ids) if i >= len(response.tokens) or response.tokens[i] != t)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
        total, tokens = total + nll[departs:].sum(), tokens + len(ids) - departs
    assert tokens == count
    torch.testing.assert_close(loss, total / tokens, rtol=1e-5, atol=1e-5)


def test_it_trains_and_logs(tmp_path, student_dir):
    prices = {"t": {"written": 1e6}}
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher()}, max_steps=12, learning_rate=2e-2, prices=prices)
    run.train()
    log = run.state.log_history
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    first = log[0]
    assert first["text/accepted"] == 1.0 and first["text/score"] == 0.0 and first["text/unparsed"] == 0
    assert first["economics/read/t"] == 4 * 30 and first["economics/written/t"] == 4 * 7
    assert first["economics/cost"] == 28.0 and first["economics/student_generated"] > 0
    assert math.isclose(first["divergence/t"], first["loss"], rel_tol=1e-4)


def test_no_correction_still_has_a_loss(tmp_path, student_dir):
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher(score=lambda case: 1.0)})
    before = weights(run)
    run.train()
    assert losses(run) == [0.0, 0.0]
    assert all(torch.equal(before[k], v) for k, v in weights(run).items())


def test_corrections_that_are_all_too_long_are_said_once(tmp_path, student_dir, caplog):
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher()}, max_completion_length=5, max_steps=3)
    run.train()
    assert run.state.log_history[0]["text/unusable"] == 1.0
    said = [record.message for record in caplog.records if "can be trained on" in record.message]
    assert len(said) == 1 and "max_completion_length (5)" in said[0]


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.mark.parametrize(
    "text", [{}, {"earlier_weight": 0.5, "keep_weight": 0.7}, {"preference": "dpo"}], ids=["ce", "earlier", "dpo"]
)
def test_micro_batches_do_not_matter(text, tmp_path, student_dir, teacher_dir):
    """A mixed panel: a correction and a distribution in one row, and rows without a correction."""
    found = []
    for i, (rows, parts) in enumerate([(8, 1), (2, 4)]):
        rare = ScriptedTeacher(score=lambda case: float(case.row["answer"] == "answer 1"))
        run = trainer(
            tmp_path / f"{i}", student_dir, {"t": rare, "d": teacher_dir}, {"accept": "teacher", **text},
            prompts(count=8, answer=ANSWERS[:8]), combine="weighted_kl", generation_kwargs=GREEDY, max_steps=3,
            per_device_train_batch_size=rows, gradient_accumulation_steps=parts, learning_rate=1e-2,
        )  # fmt: skip
        run.train()
        found.append((losses(run), weights(run)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert_same(found[0][1], found[1][1], 1e-4)


def test_a_mixed_row_is_the_weighted_sum_of_both(tmp_path, student_dir, teacher_dir):
    def loss_of(teachers):
        run = TeacherPanelTrainer(
            model=student_dir, teacher_models=teachers, train_dataset=prompts(answer=ANSWERS),
            args=TeacherPanelConfig(**settings(tmp_path, max_completion_length=12, generation_kwargs=GREEDY)),
        )  # fmt: skip
        (batch,) = one_batch(run)["scored"].micro_batches([4])
        return float(run.panel_loss(run.model, batch)[0]), batch

    taken = CorrectionSettings(accept="teacher")
    text, corrected = loss_of(TeacherPanel({"t": ScriptedTeacher()}, text=taken))
    plain, scored = loss_of({"d": teacher_dir})
    both = {"t": ScriptedTeacher(), "d": teacher_dir}
    loss, batch = loss_of(TeacherPanel(both, combine="weighted_kl", weights={"t": 0.3, "d": 0.7}, text=taken))
    assert batch.tokens == corrected.tokens + scored.tokens and len(batch.scores) == 8
    assert loss == pytest.approx(0.3 * text + 0.7 * plain, rel=1e-5)


def test_dpo_is_the_formula_of_its_paper(tmp_path, student_dir):
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher()}, {"accept": "teacher", "preference": "dpo"})
    with torch.no_grad():  # away from the start, where every margin is 0
        for parameter in run.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    scored = one_batch(run)["scored"]
    (batch,) = scored.micro_batches([4])
    start = AutoModelForCausalLM.from_pretrained(student_dir)
    run.model.eval()

    def logprob(model, row):
        ids, begin = batch.input_ids[row], batch.starts[row]
        length = int(batch.attention_mask[row].sum())
        logprobs = model(ids[None, :length]).logits[0, begin - 1 : -1].log_softmax(-1)
        return logprobs.gather(1, ids[begin:length, None]).sum()  # the whole response: what is common cancels

    total = 0.0
    for chosen, rejected in batch.pairs:
        margin = logprob(run.model, chosen) - logprob(start, chosen)
        margin = margin - (logprob(run.model, rejected) - logprob(start, rejected))
        tokens = sum(len(batch.scores[row].positions) for row in (chosen, rejected))
        total = total - torch.nn.functional.logsigmoid(0.1 * margin) * tokens
    total = total / batch.tokens
    parameters = list(run.model.parameters())
    expected = torch.autograd.grad(total, parameters)
    loss, _, _ = run.panel_loss(run.model, batch)
    found = torch.autograd.grad(loss / batch.tokens, parameters)
    assert len(batch.pairs) == 4
    torch.testing.assert_close(loss / batch.tokens, total, rtol=1e-4, atol=1e-5)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 1e-3)


def test_dpo_prefers_the_correction(tmp_path, student_dir):
    text = {"accept": "teacher", "preference": "dpo"}
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher()}, text, max_steps=10, learning_rate=1e-2)
    run.train()
    margins = [log["text/margin"] for log in run.state.log_history if "text/margin" in log]
    assert abs(margins[0]) < 1e-3 and sum(margins[-3:]) > 1.0


def test_good_responses_are_kept_with_their_weight(tmp_path, student_dir, tokenizer):
    text = {"accept": "teacher", "keep_weight": 0.5}
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher(score=lambda case: 1.0)}, text, generation_kwargs=GREEDY)
    scored = one_batch(run)["scored"]
    ended = [one for one in scored.rollouts.responses if not one.truncated]
    (batch,) = scored.micro_batches([4])
    kept = [one for one in batch.scores if one.signals]
    assert len(kept) == len(ended) and batch.tokens == sum(len(one.tokens) for one in ended)
    assert all(one.signals["t"].weights.tolist() == [0.5] * len(one.positions) for one in kept)


# Who accepts, and what happens when teachers are away


def liar(row):
    return "a lie"


@pytest.mark.parametrize("accept", ["majority", "verifier"])
def test_a_lie_is_not_trained_on(accept, tmp_path, student_dir):
    teachers = {"liar": ScriptedTeacher(says=liar), "a": ScriptedTeacher(), "b": ScriptedTeacher()}
    text = {"accept": accept, "verifier": "contains"}
    run = trainer(tmp_path, student_dir, teachers, text, combine="weighted_kl")
    (batch,) = one_batch(run)["scored"].micro_batches([4])
    assert [next(iter(one.signals)) for one in batch.scores] == ["a"] * 4


def test_a_majority_needs_others(tmp_path, student_dir):
    with pytest.raises(ConfigError, match="majority of the other text teachers"):
        trainer(tmp_path, student_dir, {"t": ScriptedTeacher()}, {})
    with pytest.raises(DataError, match="one text teacher, 'a'"):
        trainer(
            tmp_path, student_dir, {"a": ScriptedTeacher(), "b": ScriptedTeacher()}, {}, combine="weighted_kl",
            rows=prompts(answer=ANSWERS, teacher_id=[["a"]] * 24),
        )  # fmt: skip


def test_a_dead_teacher_is_left_out_where_that_is_allowed(tmp_path, student_dir, caplog):
    teachers = {"a": ScriptedTeacher(), "b": ScriptedTeacher(), "gone": ScriptedTeacher("gone", dead=True)}
    run = trainer(tmp_path / "a", student_dir, teachers, {"min_teachers": 2}, combine="weighted_kl")
    run.train()
    assert "'gone' cannot be reached (gone is away). The run goes on with 'a', 'b'." in caplog.text
    assert [log["text/missing_teachers"] for log in run.state.log_history[:2]] == [1, 1]
    assert [log["text/accepted"] for log in run.state.log_history[:2]] == [1.0, 1.0]
    strict = trainer(tmp_path / "b", student_dir, teachers, {}, combine="weighted_kl")
    with pytest.raises(ServerError, match="2 of 3 are left where 3 must be"):
        strict.train()


def test_a_ceiling_stops_the_run_with_what_was_learned(tmp_path, student_dir):
    run = trainer(
        tmp_path, student_dir, {"t": ScriptedTeacher()}, {"accept": "teacher", "ceiling": 50.0}, max_steps=9,
        prices={"t": {"written": 1e6}},
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 2  # 28 a step
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_a_ceiling_counts_what_was_spent_before_the_run_was_resumed(tmp_path, student_dir):
    """28 a step. The process that resumes begins with what the ones before it have spent, at any number of ranks."""

    def attempt(ceiling, resume):
        teacher = ScriptedTeacher()
        text = {"accept": "teacher", "ceiling": ceiling}
        prices = {"t": {"written": 1e6}}
        saved = {"save_strategy": "steps", "save_steps": 1}
        run = trainer(tmp_path, student_dir, {"t": teacher}, text, max_steps=9, prices=prices, **saved)
        run.train(resume_from_checkpoint=resume)
        return run.state.global_step, len(teacher.seen) // 2, run.state.log_history[-2]["economics/cost"]

    assert attempt(50.0, None) == (2, 2, 56.0)
    assert attempt(100.0, True) == (4, 2, 112.0)  # and not four more
    _, asked, cost = attempt(100.0, True)
    assert (asked, cost) == (0, 112.0)
    kept = tmp_path / "rounds" / "round-0000"
    assert len(load_rows(str(kept))) == 16 and not (tmp_path / "rounds" / "round-0001").exists()
    assert json.loads((kept / "teacher_text.json").read_text())["spent"] == 112.0
    assert Spent.read(kept.with_suffix(".spent.json")).spent == 112.0
    # A run of its own begins from 0, and its dataset has its own directory
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert attempt(50.0, None) == (2, 2, 56.0)
    assert len(load_rows(str(tmp_path / "rounds" / "round-0001"))) == 8
    assert Spent.read(kept.with_suffix(".spent.json")).generated > 0
    kept.with_name("round-0001.spent.json").write_text("{")
    with pytest.raises(ConfigError, match="what the run has spent is not known"):
        attempt(100.0, True)


def test_replies_that_say_nothing_count_as_none(tmp_path, student_dir, teacher_dir, caplog):
    """A random model in this process keeps to no form; nothing is trained on, and the log says why."""
    block = {"teachers": {"t": {"kind": "local", "signal": "text", "model": teacher_dir, "max_tokens": 8}}}
    block["text"] = {"accept": "teacher"}
    config = TeacherPanelConfig(**settings(tmp_path, max_completion_length=6, max_steps=1, panel=block))
    run = TeacherPanelTrainer(model=student_dir, args=config, train_dataset=prompts(answer=ANSWERS))
    run.train()
    log = run.state.log_history[0]
    assert losses(run) == [0.0] and log["text/unparsed"] == 4 and log["text/corrected"] == 0
    assert "4 of 4 replies of text teacher 't' count as none (asked for: evaluation)" in caplog.text
    assert log["economics/read/t"] > 400 and log["economics/written/t"] > 0


# Rewards


@pytest.mark.parametrize("weight", [1, 0.25, {"right": 2.0, "wrong": 0.5}])
def test_a_reward_weighs_or_masks_rows(weight, tmp_path, student_dir, teacher_dir):
    reward = {"verifier": "tests.hosts.test_panel_text:is_first", "weight": weight}
    config = settings(tmp_path, max_completion_length=12, generation_kwargs=GREEDY, reward=reward)
    rows = prompts(answer=ANSWERS)
    run = TeacherPanelTrainer(
        model=student_dir, teacher_models={"d": teacher_dir}, train_dataset=rows, args=TeacherPanelConfig(**config)
    )
    scored = one_batch(run)["scored"]
    right, wrong = {1: (1, 0), 0.25: (1, 0.75)}.get(weight, (2.0, 0.5)) if not isinstance(weight, dict) else (2.0, 0.5)
    assert [bool(one.positions) for one in scored.scores] == [True] + [wrong > 0] * 3
    plain = TeacherPanelTrainer(
        model=student_dir, teacher_models={"d": teacher_dir}, train_dataset=rows,
        args=TeacherPanelConfig(**config | {"reward": None}),
    )  # fmt: skip
    unweighed = one_batch(plain)["scored"].micro_batches([1, 1, 1, 1])
    own = [float(plain.panel_loss(plain.model, batch)[0]) for batch in unweighed]
    (batch,) = scored.micro_batches([4])
    expected = right * own[0] + wrong * sum(own[1:])
    assert float(run.panel_loss(run.model, batch)[0]) == pytest.approx(expected, rel=1e-5)
    assert run._metrics["train"]["reward"] == [0.25]


def is_first(response, row):
    return row["prompt"].startswith("one plus two")


def test_a_verifier_without_its_column_is_refused_early(tmp_path, student_dir, teacher_dir):
    with pytest.raises(DataError, match="reads the column 'answer', and train_dataset has none"):
        TeacherPanelTrainer(
            model=student_dir, teacher_models={"d": teacher_dir}, train_dataset=prompts(),
            args=TeacherPanelConfig(**settings(tmp_path, reward={"verifier": "contains"})),
        )  # fmt: skip


def test_a_run_goes_on_in_a_later_epoch(tmp_path, student_dir):
    """Two epochs of two steps; one run is ended after the third. All trainers of this process share the panel."""
    rare = ScriptedTeacher(score=lambda case: float(case.row["answer"] == "answer 1"))
    panel = TeacherPanel({"t": rare}, text=CorrectionSettings(accept="teacher", keep_weight=0.5))
    rows = prompts(count=8, answer=ANSWERS[:8])

    def run(directory, resume=None, **options):
        common = {"max_steps": 6, "max_completion_length": 12, "generation_kwargs": GREEDY, "learning_rate": 1e-2}
        config = TeacherPanelConfig(**settings(tmp_path / directory, **common, **options))
        made = TeacherPanelTrainer(model=student_dir, teacher_models=panel, args=config, train_dataset=rows)
        if options and resume is None:
            made.add_callback(StopAt(3))
        made.train(resume_from_checkpoint=resume)
        return losses(made), weights(made)

    whole, expected = run("whole")
    asked = len(rare.seen)
    saved = {"save_strategy": "steps", "save_steps": 3}
    begun, _ = run("parts", **saved)
    ended, found = run("parts", resume=True, **saved)
    assert len(begun) == 3 and ended[:3] == begun and ended == pytest.approx(whole, rel=1e-4)
    assert_same(found, expected, 1e-4)
    assert len(rare.seen) == 2 * asked  # no step was asked about again
    again, _ = run("again")
    assert again == pytest.approx(whole, rel=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# Rounds


def test_a_round_is_a_dataset_that_trains_again_without_a_teacher(tmp_path, student_dir):
    """The kept rows give the losses and the weights of the run that they were kept in."""
    rare = ScriptedTeacher(score=lambda case: float(case.row["answer"] == "answer 1"))
    first = trainer(tmp_path / "a", student_dir, {"t": rare}, max_steps=2)
    first.train()
    directory = tmp_path / "a" / "rounds" / "round-0000"
    rows = load_rows(str(directory))
    assert len(rows) == 8 and rows.column_names[:2] == ["prompt", "completion"]
    corrected = [row for row in rows if row["completion"] is not None]
    assert 0 < len(corrected) < 8
    assert all(row["completion"].strip() == row["answer"] and row["corrected_by"] == "t" for row in corrected)
    assert all(row["evaluations"][0]["teacher"] == "t" for row in rows)
    assert text_source(directory).signal == "text"  # its record is about these files
    dead = ScriptedTeacher(dead=True)
    again = trainer(
        tmp_path / "b", student_dir, {"t": dead}, {"accept": "teacher", "recorded": True}, rows=rows, max_steps=2
    )
    again._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    again.train()
    assert losses(again) == pytest.approx(losses(first), rel=1e-5)
    assert_same(weights(again), weights(first), 1e-5)
    assert not dead.seen and not (tmp_path / "b" / "rounds").exists()


def test_a_changed_round_is_no_record_of_its_teachers(tmp_path, student_dir):
    run = trainer(tmp_path, student_dir, {"t": ScriptedTeacher()})
    run.train()
    directory = tmp_path / "rounds" / "round-0000"
    file = sorted(directory.glob("*.parquet"))[0]
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(CacheError, match="is not the file that"):
        text_source(directory)
