"""The experiment of examples/merge_experts, with a tiny model and two updates each."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.merge_experts.report import recovered
from examples.merge_experts.run import Options, main
from examples.merge_experts.tasks import DOMAINS, held_out, training
from kd_plugin.lineage import load_record

ROOT = Path(__file__).parents[2]


def test_it_runs_from_experts_to_report_and_goes_on_where_it_was(tmp_path, teacher_dir, capsys):
    options = Options(
        output_dir=tmp_path / "out", expert_steps=2, expert_rows=2, expert_problems=8, student_steps=2,
        student_rows=3, items=2, seeds=1, workers=2, base=teacher_dir,
    )  # fmt: skip
    main(options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["found"]
    assert {"base", "averaged adapters", "panel / seed 0", "warm-up, then panel / seed 0", "offline KD / seed 0"} < set(
        results
    )
    assert all(set(found) == set(DOMAINS) for found in results.values())
    assert "| offline KD |" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "students" / "panel-0" / "lineage.json").exists()

    record = load_record(tmp_path / "out" / "students" / "average, then panel-0")
    merged = {edge["to"] for edge in record["edges"] if edge["kind"] == "merged_from"}
    assert merged == {edge["to"] for edge in record["edges"] if edge["kind"] == "distilled_logits"}
    experts = {load_record(tmp_path / "out" / "experts" / domain)["digest"] for domain in DOMAINS}
    assert {node["digest"] for node in record["nodes"] if node["id"] in merged} == experts

    written = (tmp_path / "out" / "students" / "panel-0" / "lineage.json").stat().st_mtime_ns
    main(options)
    assert (tmp_path / "out" / "students" / "panel-0" / "lineage.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("domain", DOMAINS)
def test_answers_are_recognised_and_no_held_out_problem_is_trained_on(domain):
    examined = held_out(domain, 20)
    assert all(problem.is_solved_by(f" {problem.answer}\nand more") for problem in examined)
    assert not any(problem.is_solved_by("nonsense") for problem in examined)
    assert not {p.prompt for p in examined} & {p.prompt for p in training(domain, 200, 0, examined)}


def test_a_worker_ends_with_the_run_that_started_it(tmp_path, teacher_dir):
    command = [sys.executable, "-m", "examples.merge_experts.run", "--output_dir", str(tmp_path / "out")]
    command += ["--base", str(teacher_dir), "--workers", "1", "--items", "2", "--expert_steps", "100000"]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    try:
        _wait_for(lambda: (tmp_path / "out" / "results.json").exists(), "the base is examined")
        workers = _children(run.pid)
        assert workers
        run.kill()
        run.wait()
        _wait_for(lambda: not any(Path("/proc", str(pid)).exists() for pid in workers), "the workers are gone")
    finally:
        run.kill()


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def test_the_recovered_gain_is_that_of_the_experts_own_domain():
    results = {"base": dict.fromkeys(DOMAINS, 0.2)}
    results |= {f"expert: {domain}": {**dict.fromkeys(DOMAINS, 0.0), domain: 0.8} for domain in DOMAINS}
    assert recovered(results, dict.fromkeys(DOMAINS, 0.5)) == pytest.approx(dict.fromkeys(DOMAINS, 0.5))
