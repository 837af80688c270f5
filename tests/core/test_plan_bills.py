"""The bill follows from the step time beside it."""

import json

import pytest

from kd_plugin.cli.main import main
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.cost import bills, options, recommended
from kd_plugin.planner.run import Cluster, PlannedRun, parse_teacher

GRID = [
    (student, teachers, nodes, combine, lora)
    for student in ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-32B")
    for teachers in (
        ("Qwen/Qwen2.5-72B:sharded",),
        ("Qwen/Qwen2.5-7B:resident", "Qwen/Qwen2.5-14B:offload"),
        ("math:server", "code:cached"),
    )
    for nodes in (1, 2, 8)
    for combine in ("route", "weighted_kl")
    for lora in (0, 16)
]


@pytest.mark.parametrize(("student", "teachers", "nodes", "combine", "lora"), GRID)
def test_a_bill_is_its_steps_times_their_time_times_the_gpus(student, teachers, nodes, combine, lora):
    run = PlannedRun(
        architecture(student, lora_rank=lora),
        teachers=tuple(parse_teacher(teacher) for teacher in teachers),
        combine=combine,
        micro_batch=2,
        accumulation=4,
    )
    cluster, rows, epochs = Cluster(nodes=nodes), 50_000, 1.5
    found = {bill.method: bill for bill in bills(run, cluster, rows, epochs)}
    best = recommended(options(run, cluster))
    assert ("panel" in found) == (best is not None)
    for bill in found.values():
        steps = rows * epochs / (2 * 4 * 8 * nodes)
        training = steps * bill.step_seconds * 8 * nodes / 3600
        assert bill.price == pytest.approx(bill.hours * cluster.price)
        assert bill.steps == pytest.approx(steps) and bill.gpus == 8 * nodes
        assert bill.tokens == rows * epochs * (run.prompt_length + run.completion_length)
        assert bill.tokens_per_second == pytest.approx(bill.tokens / (steps * bill.step_seconds))
        assert bill.teacher_hours >= 0 and bill.student_hours > 0
        if bill.method == "panel":
            assert (bill.step_seconds, bill.layout) == (best.seconds.total, best.layout.name)
            assert bill.hours == pytest.approx(training)
        else:
            assert bill.student_hours == pytest.approx(training)


def test_the_bill_of_a_panel_whose_weights_are_gathered_for_every_token(capsys):
    """Weights that do not fit whole make a step 42 times as long; the bill must say so."""
    argv = ["--student", "Qwen/Qwen2.5-32B", "--teachers", "[Qwen/Qwen2.5-72B:sharded]", "--nodes", "2"]
    assert main(["plan", "--json", *argv]) == 0
    plan = json.loads(capsys.readouterr().out)
    (best,) = [option for option in plan["options"] if option["name"] == plan["recommended"]]
    bill = {bill["method"]: bill for bill in plan["bills"]}
    hours = 100_000 / (8 * plan["ranks"]) * best["seconds"]["total"] * plan["ranks"] / 3600
    assert bill["panel"]["hours"] == pytest.approx(hours) and hours > 10_000
    assert bill["panel"]["hours"] > bill["offline"]["hours"]


def test_what_does_not_fit_has_no_bill(capsys):
    argv = ["--student", "meta-llama/Llama-3.1-70B", "--method", "offline", "--host_memory", "100"]
    assert main(["plan", "--json", *argv]) == 3
    assert json.loads(capsys.readouterr().out)["bills"] == []
    assert main(["plan", *argv]) == 3
    assert "GPU hours" not in capsys.readouterr().out


def test_more_epochs_cost_as_many_times_more():
    run = PlannedRun(architecture("qwen2.5-1.5b"), teachers=(parse_teacher("qwen2.5-7b:sharded"),))
    once, thrice = (bills(run, Cluster(), 1000, epochs) for epochs in (1, 3))
    assert thrice[1].hours == pytest.approx(3 * once[1].hours)
    assert thrice[0].student_hours == pytest.approx(3 * once[0].student_hours)
    assert thrice[0].teacher_hours == pytest.approx(once[0].teacher_hours)


def test_text_teachers_are_billed_by_what_they_read_and_write(capsys):
    command = ["plan", "--student", "Qwen/Qwen2.5-0.5B", "--prompt_length", "100", "--completion_length", "200"]
    command += ["--rows", "1000", "--corrected", "0.25", "--text_teachers"]
    teachers = {"a": {"read": 1.0, "written": 4.0}, "b": {"read": 2.0}}
    assert main([*command, json.dumps(teachers), "--json"]) == 0
    one, other = json.loads(capsys.readouterr().out)["text_bills"]
    # 1,000 evaluations, 250 corrections, and 250 votes on those of the other
    evaluating = one["written"] - 250 * (200 + 30)
    assert evaluating == 1250 * 30 and 1500 * 300 < one["read"] < 1500 * 800
    assert one["price"] == pytest.approx((one["read"] + 4 * one["written"]) / 1e6, rel=1e-4)
    assert other["price"] == pytest.approx(2 * other["read"] / 1e6, rel=1e-4)
    assert main([*command, json.dumps(teachers), "--voted", "false", "--json"]) == 0
    unvoted, _ = json.loads(capsys.readouterr().out)["text_bills"]
    assert one["written"] - unvoted["written"] == 250 * 30
    assert main([*command, json.dumps(teachers)]) == 0
    assert "text teacher a: reads" in capsys.readouterr().out
