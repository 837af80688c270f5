"""Both methods on several real ranks: every ZeRO stage gives one training, and no rank waits for ever."""

import pytest

from tests.zero.ranks import run

STAGES = (0, 1, 2, 3)


def job(student_dir, tmp_path, **more):
    return {"student": student_dir, "output_dir": str(tmp_path / "out"), **more}


def test_a_routed_panel_trains_under_zero_3(student_dir, teacher_dir, other_teacher_dir, tmp_path):
    """One row a rank, so that in each step a rank has nothing for one of the two teachers."""
    panel = {"method": "panel", "stage": 3, "routing": 5, "rows": 1, "steps": 4, "completion": 4}
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    ranks = run(job(student_dir, tmp_path, teachers=teachers, **panel), tmp_path / "job")
    assert [rank["steps"] for rank in ranks] == [4, 4]
    assert ranks[0]["losses"] == ranks[1]["losses"]


@pytest.mark.zero
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_routing_never_hangs(ranks, student_dir, teacher_dir, other_teacher_dir, tmp_path):
    panel = {"method": "panel", "stage": 3, "routing": 7, "rows": 1, "steps": 50, "prompts": 60 * ranks}
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    done = run(job(student_dir, tmp_path, teachers=teachers, **panel), tmp_path / "job", ranks, timeout=900)
    assert [rank["steps"] for rank in done] == [50] * ranks


@pytest.mark.zero
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["panel", "offline"])
def test_every_stage_gives_the_same_losses(method, lora, student_dir, teacher_dir, other_teacher_dir, cache, tmp_path):
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    found = {}
    for stage in STAGES:
        where = tmp_path / f"stage{stage}"
        more = {"method": method, "lora": lora, "stage": stage, "teachers": teachers, "cache": cache}
        found[stage] = run(job(student_dir, where, **more), where / "job")[0]
    for stage in STAGES[1:]:
        assert found[stage]["losses"] == pytest.approx(found[0]["losses"], rel=1e-3)
        assert found[stage]["norm"] == pytest.approx(found[0]["norm"], rel=1e-3)
    assert len(found[0]["losses"]) == 5


@pytest.mark.zero
@pytest.mark.parametrize("stage", [1, 2])
def test_teachers_are_sharded_beside_a_student_that_is_not(
    stage, student_dir, teacher_dir, other_teacher_dir, tmp_path
):
    panel = {"method": "panel", "stage": stage, "teachers": {"a": teacher_dir, "b": other_teacher_dir}}
    whole = run(job(student_dir, tmp_path / "whole", **panel), tmp_path / "whole" / "job")
    panel["arguments"] = {"shard_teachers": True}
    cut = run(job(student_dir, tmp_path / "cut", **panel), tmp_path / "cut" / "job")
    assert cut[0]["losses"] == pytest.approx(whole[0]["losses"], rel=1e-4)
    assert cut[0]["sharded"] == ["a", "b"]
    assert whole[0]["sharded"] == []
