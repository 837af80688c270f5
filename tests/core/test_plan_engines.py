"""A plan with engines and servers beside the trainers: who takes how long, and how GPUs are best shared."""

import json
from dataclasses import replace

import pytest

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.cost import options, recommended
from kd_plugin.planner.run import Cluster, PlannedRun, parse_teacher
from kd_plugin.planner.time import Engines, best_split, engine_step

CLUSTER = Cluster(nodes=1)
BESIDE = Engines(8, 16, active=37e9, width=7168)
COMMAND = ["plan", "--student", "Qwen/Qwen2.5-7B", "--teachers", "[big:server]", "--engine_gpus", "8"]


@pytest.fixture(scope="module")
def best():
    run = PlannedRun(
        architecture("Qwen/Qwen2.5-7B"),
        teachers=(parse_teacher("big:server"),),
        completion_length=4096,
        generates=False,
    )
    return recommended(options(run, CLUSTER))


def test_trainers_have_no_generation_in_memory_traffic_or_time(best):
    assert best.memory.kv_cache == best.memory.generation == 0 and best.seconds.generate == 0.0
    own = options(replace(best.run, generates=True), CLUSTER)
    assert all(option.seconds.generate > 0 and option.memory.kv_cache > 0 for option in own)


def test_sides_follow_one_another_or_overlap(best):
    behind = engine_step(best.run, best.seconds, CLUSTER, BESIDE)
    at_once = engine_step(best.run, best.seconds, CLUSTER, replace(BESIDE, staleness=0))
    assert at_once.total == pytest.approx(at_once.sync + at_once.generate + at_once.learning)
    assert behind.total == pytest.approx(behind.sync + max(behind.generate, behind.learning))
    assert behind.total < at_once.total
    tokens = 8 * 8 * (512 + 4096)
    assert behind.transfer == pytest.approx(tokens * 7168 * 2 / 3e9)
    assert behind.score == pytest.approx(2 * 37e9 * tokens / (16 * 989e12 * 0.4))


def test_twice_the_engines_take_less_and_twice_the_servers_half(best):
    one = engine_step(best.run, best.seconds, CLUSTER, BESIDE)
    more = engine_step(best.run, best.seconds, CLUSTER, replace(BESIDE, student_gpus=16, server_gpus=32))
    assert 0.5 * one.generate < more.generate < one.generate and more.score == pytest.approx(one.score / 2)
    assert more.sync == one.sync


def test_an_adapter_goes_to_the_engines_alone():
    """All else is read there once, at the start."""
    seconds = {}
    for rank in (0, 16):
        student = architecture("Qwen/Qwen2.5-7B", lora_rank=rank)
        run = PlannedRun(student, teachers=(parse_teacher("big:server"),), completion_length=4096, generates=False)
        best = recommended(options(run, CLUSTER))
        seconds[rank] = engine_step(best.run, best.seconds, CLUSTER, BESIDE)
        assert seconds[rank].sync == pytest.approx(2 * student.trainable * 2 / 2e9)
    assert seconds[16].sync < 0.02 * seconds[0].sync
    assert seconds[16].generate > 0.99 * seconds[0].generate, "its base is read for every token all the same"


def test_the_best_split_is_the_shortest_of_all(best):
    wide = replace(BESIDE, student_gpus=40, server_gpus=8, active=700e9)
    split = best_split(best.run, best.seconds, CLUSTER, wide)
    assert split.student_gpus + split.server_gpus == 48 and split.server_gpus > 8
    total = engine_step(best.run, best.seconds, CLUSTER, split).total
    for some in range(8, 48, 8):
        other = replace(wide, student_gpus=some, server_gpus=48 - some)
        assert total <= engine_step(best.run, best.seconds, CLUSTER, other).total
    alone = Engines(16)
    assert best_split(best.run, best.seconds, CLUSTER, alone) == alone


@pytest.mark.parametrize(
    ("given", "message"), [((12,), "an engine has 8"), ((8, 8), "server_active .* and server_width")]
)
def test_gpus_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Engines(*given)


def test_the_command_says_it(capsys):
    assert main([*COMMAND, "--server_gpus", "16", "--server_active", "37", "--server_width", "7168"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "With 8 GPUs of engines and 16 of servers beside 8 that train: generate" in text
    assert "--output DIR also writes a Slurm script and a Kubernetes manifest" in text
    assert main([*COMMAND, "--max_staleness", "0", "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["engines"]["seconds"]
    assert seconds["score"] == 0 and seconds["total"] == pytest.approx(
        seconds["sync"] + seconds["generate"] + seconds["train"]
    )
