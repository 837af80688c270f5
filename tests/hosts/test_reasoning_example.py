"""The experiment of examples/reasoning: its problems, and all of it with models that learn for two updates."""

import json
import random
from concurrent.futures import Executor, Future
from functools import partial

import pytest
import torch

from examples.reasoning.methods import METHODS, Training, tasks_of
from examples.reasoning.models import make_starts, make_teacher
from examples.reasoning.problems import (
    END,
    GIVEN,
    LENGTHS,
    LETTERS,
    LONG,
    held_out,
    held_out_prompts,
    problems,
    settled,
    solved,
    table,
    tokenizer,
    with_slips,
)
from examples.reasoning.run import Options, main
from examples.side_by_side import Results


def test_who_has_lost_the_way_does_not_come_back():
    pairs = {pair: pair[1] + letter for pair, letter in table().items()}
    assert len(pairs) == len(LETTERS) ** 2 == len(set(pairs.values()))


def test_a_long_solution_has_a_hundred_tokens_of_steps():
    for problem in held_out(5)[LONG]:
        assert len(tokenizer()(problem.solution)["input_ids"]) == len(problem.solution) == 3 * LONG + 1


def test_a_solution_is_right_and_one_with_a_wrong_step_is_not():
    for problem in problems(50, LENGTHS, 0):
        row, steps = problem.row, problem.sequence
        assert solved(problem.solution, row) and solved(f"{problem.solution} ", row)
        assert not solved(problem.solution[:-1], row)
        for wrong in range(GIVEN, len(steps)):
            letters = [step[1] for step in steps[:wrong]]
            letters.append(LETTERS[(LETTERS.index(steps[wrong][1]) + 1) % len(LETTERS)])
            while len(letters) < len(steps):
                letters.append(table()[letters[-2] + letters[-1]])
            written = "".join(f"{step[0]}{letter}," for step, letter in zip(steps, letters, strict=True))
            assert not solved(written + END, row)


def test_slips_are_taken_back_and_not_learned():
    draw = random.Random(0)
    for problem in problems(50, LENGTHS, 1):
        text, learned = with_slips(draw, problem.solution, 0.3)
        assert settled(text) == problem.solution and solved(text, problem.row)
        assert len(learned) == len(text)
        assert [i for i, one in enumerate(learned) if not one] == [i - 1 for i, one in enumerate(text) if one == "#"]


def test_held_out_problems_are_not_trained_on():
    out = held_out_prompts(30)
    assert len(out) == 90
    assert not out & {problem.prompt for problem in problems(3000, LENGTHS, 0, out)}


def test_it_runs_from_models_to_report_and_goes_on_where_it_was(tmp_path, capsys):
    chosen = ("offline KD, top-k", "on-policy, reverse KL", "warm-up, then reverse KL", "GRPO, verifier alone")
    options = Options(
        output_dir=tmp_path, methods=chosen, teacher_updates=1, starts=(1, 2, 3), updates=4, rows=64, evaluate_every=2,
        learning_rates=(1e-3,), questions=2, seeds=1, map_seeds=1,
    )  # fmt: skip
    main(options)
    found = json.loads((tmp_path / "results.json").read_text())["found"]
    assert {name.split(" / ")[0] for name in found} == set(chosen)
    offline, panel = (
        found[f"{name} / start 2 / rate 0.001 / seed 0"] for name in ("offline KD, top-k", "on-policy, reverse KL")
    )
    assert [point["updates"] for point in offline["points"]] == [2, 4, 6, 8]
    assert [point["updates"] for point in panel["points"]] == [2, 4]
    text = (tmp_path / "results.md").read_text()
    assert "| warm-up, then reverse KL | 0.001 |" in text and "| 3 | on-policy, reverse KL |" in text
    for name in ("curves", "lengths", "map"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    main(options)
    assert not capsys.readouterr().out  # nothing was done again
    with pytest.raises(SystemExit, match="other sizes"):
        main(Options(output_dir=tmp_path, methods=chosen))


def test_results_are_on_disk_after_each_job_and_none_is_done_twice(tmp_path, capsys):
    class Alone(Executor):
        def submit(self, job):
            future = Future()
            future.set_result(job())
            return future

    done, seen = [], []
    jobs = {name: partial(lambda name: done.append(name) or {"value": len(done)}, name) for name in ("a", "b")}
    Results(tmp_path / "results.json", {"size": 1}).fill(Alone(), {"a": jobs["a"]})
    Results(tmp_path / "results.json", {"size": 1}).fill(Alone(), jobs, after=lambda found: seen.append(dict(found)))
    assert done == ["a", "b"] and seen == [{"a": {"value": 1}, "b": {"value": 2}}]
    assert Results(tmp_path / "results.json", {"size": 1}).found == seen[-1]
    with pytest.raises(SystemExit, match="other sizes"):
        Results(tmp_path / "results.json", {"size": 2})


@pytest.mark.parametrize("text", ['{"base": {"a": 0.5}}', '{"sizes": {"size"', "[]", ""])
def test_results_of_an_earlier_form_or_a_cut_file_are_refused_and_left_alone(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"results\.json is no file of results.*Choose another --output_dir"):
        Results(path, {"size": 1})
    assert path.read_text() == text


def test_responses_that_say_nothing_are_not_right():
    row = problems(1, LENGTHS, 0)[0].row
    for response in ("", "#", "###", END, "#" * 500 + END):
        assert not solved(response, row)


def test_stale_rollouts_are_those_of_the_weights_one_update_before(tmp_path):
    """With a learning rate of 0 they are the fresh ones. The first update of a warm-up has that in any case."""
    prompts = held_out_prompts(2)
    make_teacher(tmp_path / "teacher", 1, prompts)
    make_starts({1: tmp_path / "start"}, prompts)
    for steps, group in held_out(2).items():
        (tmp_path / f"steps-{steps}.jsonl").write_text("".join(json.dumps(one.row) + "\n" for one in group))
    written = {}
    for rate in (0.0, 0.1):
        training = Training(
            METHODS["on-policy, reverse KL, one step stale"], tmp_path / "start", tmp_path / "teacher", {},
            problems(128, LENGTHS, 0), tasks_of(tmp_path), 4, 4, rate, 0,
        )  # fmt: skip
        trainer = training.trainer(tmp_path / f"out-{rate}")
        kept = []
        engine = trainer._next_engine

        def noted(engine=engine, kept=kept, trainer=trainer):
            found = engine()
            kept.append((_sum(found.model), _sum(trainer.accelerator.unwrap_model(trainer.model))))
            return found

        trainer._next_engine = noted
        trainer.train()
        written[rate] = kept[:4]
    assert all(used == now for used, now in written[0.0])
    first, second, third, fourth = written[0.1]
    assert first[0] == first[1] == second[0] == second[1] == third[0] != third[1]
    assert fourth[0] == third[1] != fourth[1]


def _sum(model):
    return float(torch.cat([p.detach().double().flatten() for p in model.parameters()]).abs().sum())
