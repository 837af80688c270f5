"""Both methods on several real ranks: every ZeRO stage gives one training, and no rank waits for ever."""

import pytest

from tests.zero.ranks import ended, environment, is_running, run_all

STAGES = (0, 1, 2, 3)


def job(student_dir, tmp_path, **more):
    return {"student": student_dir, "output_dir": str(tmp_path / "out"), **more}


@pytest.fixture(scope="session")
def students(student_dir, untied_student_dir):
    return {"tied": student_dir, "untied": untied_student_dir}


def test_ranks_that_do_not_end_are_ended_with_their_launcher_and_say_where_they_were():
    launcher = ["sh", "-c", "sh -c 'echo rank $$; exec sleep 600' & wait"]  # a shell has started within 5 s on any load
    with pytest.raises(AssertionError, match=r"Not done after 5 s.*rank \d+") as raised:
        ended(launcher, environment(), timeout=5)
    assert not is_running(int(str(raised.value).split("rank ")[1].split()[0]))


def test_a_routed_panel_trains_under_zero_3(students, teacher_dir, other_teacher_dir, tmp_path):
    """One row a rank, so that in each step a rank has nothing for one of the two teachers."""
    panel = {"method": "panel", "stage": 3, "routing": 5, "rows": 1, "steps": 4, "completion": 4}
    panel["teachers"] = {"a": teacher_dir, "b": other_teacher_dir}
    jobs = {name: job(student, tmp_path / name, **panel) for name, student in students.items()}
    for name, ranks in run_all(jobs, tmp_path / "job").items():
        assert [rank["steps"] for rank in ranks] == [4, 4], name
        assert ranks[0]["losses"] == ranks[1]["losses"], name


@pytest.mark.zero
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_routing_never_hangs(ranks, students, teacher_dir, other_teacher_dir, tmp_path):
    panel = {"method": "panel", "stage": 3, "routing": 7, "rows": 1, "steps": 50, "prompts": 60 * ranks}
    panel["teachers"] = {"a": teacher_dir, "b": other_teacher_dir}
    jobs = {name: job(student, tmp_path / name, **panel) for name, student in students.items()}
    for name, done in run_all(jobs, tmp_path / "job", ranks, timeout=1200).items():
        assert [rank["steps"] for rank in done] == [50] * ranks, name


@pytest.mark.zero
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_open_heads_alike_whatever_their_rows_ask(
    ranks, untied_student_dir, teacher_dir, other_teacher_dir, cache, tmp_path
):
    """Rows that ask teachers of several estimators, of two caches, or of no teacher at all, a row on each rank.

    An untied head, no parameter kept whole, rows saved, two micro-batches a step: the losses are those of one process.
    """
    routed = {"method": "panel", "routing": 5, "given": True, "steps": 3, "accumulate": 2, "prompts": 24 * ranks}
    routed["teachers"] = {"a": teacher_dir, "b": other_teacher_dir}
    saving = {"save_rollouts": 2}
    kinds = {
        "routed": {"arguments": saving},
        "mixed estimators": {"estimators": {"a": "exact", "b": "topk_tail"}, "arguments": saving},
        "ranks without rows": {"arguments": {**saving, "mask_truncated_completions": True}},
        "warm-up": {"arguments": {**saving, "warmup_cache": f"{cache},{cache}", "warmup_cache_steps": 2}},
    }

    def jobs(name, **how):
        return {
            kind: job(untied_student_dir, tmp_path / name / kind, **routed, **how, **more)
            for kind, more in kinds.items()
        }

    found = run_all(jobs("sharded", stage=3, rows=1), tmp_path / "sharded job", ranks, timeout=900)
    whole = run_all(jobs("alone", stage=None, rows=ranks), tmp_path / "job alone", 1, timeout=900)
    for kind in kinds:
        first, *others = found[kind]
        assert len(first["losses"]) == 3
        assert first["losses"] == pytest.approx(whole[kind][0]["losses"], rel=1e-3), kind
        assert all(rank["gatherings"] == first["gatherings"] for rank in others), kind
        assert any(first["gatherings"]), kind


@pytest.mark.zero
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["panel", "offline", "offline, ce"])
def test_every_stage_gives_the_same_losses(method, lora, students, teacher_dir, other_teacher_dir, cache, tmp_path):
    method, _, ce = method.partition(", ")
    more = {"lora": lora, "teachers": {"a": teacher_dir, "b": other_teacher_dir}, "cache": cache}
    more |= {"method": method, "arguments": {"ce_weight": 0.3} if ce else {}}
    jobs = {
        f"{name}{stage}": job(student, tmp_path / f"{name}{stage}", stage=stage, **more)
        for name, student in students.items()
        for stage in STAGES
    }
    found = run_all(jobs, tmp_path / "job", timeout=900)
    for name in students:
        first = found[f"{name}0"][0]
        assert len(first["losses"]) == 5
        for stage in STAGES[1:]:
            other = found[f"{name}{stage}"][0]
            assert other["losses"] == pytest.approx(first["losses"], rel=1e-3), (name, stage)
            assert other["norm"] == pytest.approx(first["norm"], rel=1e-3), (name, stage)


@pytest.mark.zero
@pytest.mark.parametrize("method", ["panel", "offline"])
def test_other_kinds_of_student_and_teacher_train_alike_under_zero_3(method, variant_dir, cache, tmp_path):
    """A padded, soft-capped, scaled, biased and MoE student, the panel's teacher of its kind: nothing is kept whole."""
    kinds = ("padded", "softcapped", "scaled", "biased", "moe")
    jobs = {}
    for kind in kinds:
        teachers = {"a": variant_dir(kind, seed=2, hidden=48)}
        more = {"method": method, "teachers": teachers, "cache": cache, "steps": 2}
        jobs |= {
            f"{kind}{stage}": job(variant_dir(kind), tmp_path / f"{kind}{stage}", stage=stage, **more)
            for stage in (0, 3)
        }
    found = run_all(jobs, tmp_path / "job", timeout=900)
    for kind in kinds:
        whole, cut = found[f"{kind}0"][0], found[f"{kind}3"][0]
        assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-3), kind
        assert cut["norm"] == pytest.approx(whole["norm"], rel=1e-3), kind


@pytest.mark.zero
@pytest.mark.parametrize("stage", [1, 2])
def test_teachers_are_sharded_beside_a_student_that_is_not(stage, students, teacher_dir, other_teacher_dir, tmp_path):
    panel = {"method": "panel", "stage": stage, "teachers": {"a": teacher_dir, "b": other_teacher_dir}}
    jobs = {}
    for name, student in students.items():
        jobs[f"{name} whole"] = job(student, tmp_path / name / "whole", **panel)
        jobs[f"{name} cut"] = job(student, tmp_path / name / "cut", **panel, arguments={"shard_teachers": True})
    found = run_all(jobs, tmp_path / "job", timeout=600)
    for name in students:
        whole, cut = found[f"{name} whole"][0], found[f"{name} cut"][0]
        assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-4)
        assert cut["sharded"] == ["a", "b"]
        assert whole["sharded"] == []


@pytest.mark.zero
def test_a_rank_whose_rows_call_fewer_tools_does_not_leave_the_others_waiting(student_dir, teacher_dir, tmp_path):
    panel = {"method": "panel", "stage": 3, "steps": 2, "completion": 4, "teachers": {"a": teacher_dir}}
    panel["tool_rounds"] = [[2, 1, 1], []]
    jobs = {
        str(gather): job(student_dir, tmp_path, **panel, arguments={"ds3_gather_for_generation": gather})
        for gather in (True, False)
    }
    for name, ranks in run_all(jobs, tmp_path / "job").items():
        assert [rank["steps"] for rank in ranks] == [2, 2], name


@pytest.mark.zero
def test_a_student_that_teaches_itself(untied_student_dir, teacher_dir, tmp_path):
    """Its average under ZeRO-2, where each rank has all of it; its present weights under ZeRO-3."""
    panel = {"method": "panel", "rows": 2, "steps": 3, "completion": 4, "combine": "weighted_kl"}
    jobs = {
        f"{kind}{stage}": job(
            untied_student_dir, tmp_path / f"{kind}{stage}", stage=stage,
            teachers={"me": {"self": kind}, "other": teacher_dir}, **panel,
        )
        for kind, stages in (("ema", (0, 2)), ("current", (0, 3)))
        for stage in stages
    }  # fmt: skip
    found = run_all(jobs, tmp_path / "job", timeout=600)
    for one, other in (("ema0", "ema2"), ("current0", "current3")):
        assert found[other][0]["losses"] == pytest.approx(found[one][0]["losses"], rel=1e-3), other
        assert found[other][0]["norm"] == pytest.approx(found[one][0]["norm"], rel=1e-3), other
