"""A capture of text that is interrupted loses nothing and asks nothing twice, within a ceiling and bounded memory."""

import json
import multiprocessing
import random
import time
from collections import Counter

import datasets
import pytest

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.text import capture_text, load_text
from tests.core.text_help import number_of, right, writer
from tests.core.text_worker import measure, questions, work
from tests.scripted_writer import Script, scripted_writer

pytestmark = pytest.mark.usefixtures("short_pauses")


PRICED = {"prices": {"read": 1000.0, "written": 1000.0}}  # tokens here are words: 3 read, 2 or 3 written


def test_a_ceiling_stops_the_run_cleanly_and_a_higher_one_goes_on(writing, tmp_path):
    url, script = writing
    how = {"max_new_tokens": 50, "progress": False}
    whole = capture_text(questions(40), writer(url, **PRICED), tmp_path / "w", **how)
    script.log.clear()
    ceiling = whole.spent * 0.8
    first = capture_text(questions(40), writer(url, **PRICED), tmp_path / "a", ceiling=ceiling, **how)
    assert not first.complete and 0 < first.rows < 40 and first.spent <= ceiling
    assert json.loads((tmp_path / "a/teacher_text.json").read_text())["complete"] is False
    asked = len(script.log)
    assert asked == first.rows
    again = capture_text(questions(40), writer(url, **PRICED), tmp_path / "a", ceiling=ceiling, **how)
    assert len(script.log) == asked and again.spent == pytest.approx(first.spent)
    second = capture_text(questions(40), writer(url, **PRICED), tmp_path / "a", **how)
    assert second.complete and second.rows == 40 and len(script.log) == 40
    assert second.spent == pytest.approx(whole.spent)
    with pytest.raises(ConfigError, match="below what the first text may cost"):
        capture_text(questions(40), writer(url, **PRICED), tmp_path / "b", ceiling=1e-6, **how)
    script.counts_usage = False
    with pytest.raises(ServerError, match="cannot be held"):
        capture_text(questions(40), writer(url, **PRICED), tmp_path / "c", ceiling=1.0, **how)


def test_a_server_that_dies_costs_nothing_that_came(writing, tmp_path):
    url, script = writing
    script.faults = [None] * 20 + [503] * 10_000
    with pytest.raises(ServerError, match="gave no answer"):
        capture_text(questions(60), writer(url, max_retries=0), tmp_path / "a", shard_rows=8, progress=False)
    script.faults = []
    found = capture_text(questions(60), writer(url), tmp_path / "a", shard_rows=8, progress=False)
    assert found.rows == 60 and max(script.answered.values()) == 1


@pytest.mark.parametrize("answered", [0, 25])
def test_a_dead_teacher_of_three_is_left_out_where_that_is_allowed(answered, tmp_path, caplog):
    """The capture goes on with two and says so; when it is there again, it is asked what it owes and nothing else."""
    dying = Script(write=right, faults=[None] * answered + [503] * 10_000)
    with (
        scripted_writer(Script(write=right)) as (one, first),
        scripted_writer(Script(write=right)) as (two, second),
        scripted_writer(dying) as (three, third),
    ):
        urls = {"a": one, "b": two, "gone": three}
        panel = [writer(url, name=name, max_retries=0, max_concurrency=4, **PRICED) for name, url in urls.items()]
        how = {"shard_rows": 2, "deduplicate": False, "vote": {"by": r"is (\d+)"}, "progress": False}
        with pytest.raises(ServerError, match="gave no answer"):
            capture_text(questions(60), panel, tmp_path / "strict", **how)
        third.faults = [None] * answered + [503] * 10_000
        for script in (first, second, third):
            script.answered.clear()
        found = capture_text(questions(60), panel, tmp_path / "v", min_teachers=2, ceiling=1e3, **how)
        assert "Teacher 'gone' cannot be reached" in caplog.text and "goes on with 'a', 'b'" in caplog.text
        assert found.missing == ("gone",) and not found.complete
        came = sum(third.answered.values())
        assert found.rows == 120 + came and (came > 0) == (answered > 0)
        assert Counter(row["teacher_name"] for row in load_text(tmp_path / "v"))["a"] == 60
        third.faults = []
        again = capture_text(questions(60), panel, tmp_path / "v", min_teachers=2, **how)
        assert again.complete and not again.missing and again.rows == 180
        for script in (first, second, third):
            assert len(script.answered) == 60 and max(script.answered.values()) == 1
        names = sorted(path.name for path in (tmp_path / "v" / "answers").iterdir())
        assert names == [f"unit-{n:06d}.parquet" for n in range(30)]
        with pytest.raises(ConfigError, match="min_teachers is 4, and there are 3 teachers"):
            capture_text(questions(60), panel, tmp_path / "w", min_teachers=4, **how)


def test_a_ceiling_with_a_dead_teacher_still_holds(tmp_path):
    dying = Script(write=right, faults=[503] * 10_000)
    with scripted_writer(Script(write=right)) as (one, first), scripted_writer(dying) as (two, _):
        few = {"max_retries": 0, "max_concurrency": 1, **PRICED}
        panel = [writer(url, name=name, **few) for name, url in (("a", one), ("gone", two))]
        how = {"max_new_tokens": 50, "min_teachers": 1, "progress": False}
        found = capture_text(questions(40), panel, tmp_path / "a", ceiling=1.0, **how)
    # What was set aside for the dead one, up to 0.65 of the ceiling, is given back
    assert found.missing == ("gone",) and found.rows == len(first.log) == 40
    assert found.spent == pytest.approx(0.32)


def test_every_fault_in_one_run_loses_and_repeats_nothing(writing, tmp_path):
    url, script = writing
    dice = random.Random(0)
    kinds = [500, 503, (429, {"Retry-After": "0.05"}), "drop", "half", "cut json", "cut stream", "no end", "empty"]
    script.faults = [dice.choice([None, *kinds]) for _ in range(120)]
    found = capture_text(
        questions(80), writer(url, stream=True, max_retries=50), tmp_path / "a", shard_rows=8, progress=False
    )
    assert found.rows == 80 and max(script.answered.values()) == 1


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.core.text_worker"])
    return context


def journaled(out):
    """Slots whose answers are on the disk; a file that a kill cut short still has its temporary name, and is none."""
    found, folder = set(), out / "answers"
    for path in folder.glob("unit-*.jsonl"):
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
        found |= {tuple(json.loads(line)["slot"].values()) for line in lines}
    for path in folder.glob("unit-*.parquet"):
        columns = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
        found |= {(r["row"], r["teacher_name"], r["sample"]) for r in columns}
    return found


def test_25_kills_lose_nothing_and_nothing_that_came_is_asked_twice(writing, processes, tmp_path):
    url, script = writing
    script.latency = 0.02
    dice, out, kept = random.Random(1), tmp_path / "killed", []
    count, samples = 400, 2
    for _ in range(25):
        worker = processes.Process(target=work, args=(url, str(out), count, samples))
        worker.start()
        before, deadline = len(script.log), time.monotonic() + 60
        while len(script.log) == before and worker.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.15))
        worker.kill()
        worker.join()
        time.sleep(0.05)  # what the server was still answering
        kept.append((len(script.log), journaled(out)))
    assert len(kept[-1][1]) < count * samples, "the captures were whole before the last kill; make them longer"
    found = capture_text(
        questions(count), writer(url, max_concurrency=8), out, completions=samples, verify="contains", shard_rows=16,
        deduplicate=False, progress=False,
    )  # fmt: skip
    assert found.rows == count * samples
    asked = [(number_of(body), body["seed"]) for _, body in script.log]
    seeds = {}
    for row, seed in asked:
        seeds.setdefault(row, set()).add(seed)
    assert all(len(seeds[row]) == samples for row in range(count))
    earlier = set()
    for logged, slots in kept:
        assert earlier <= slots  # nothing that was there is lost
        earlier = slots
        whole_rows = {row for row in range(count) if all((row, "teacher", s) in slots for s in range(samples))}
        assert not [row for row, _ in asked[logged:] if row in whole_rows]  # nor asked again
    assert len(asked) <= count * samples + 25 * 8
    undisturbed = capture_text(
        questions(count), writer(url, max_concurrency=32), tmp_path / "u", completions=samples, verify="contains",
        shard_rows=16, deduplicate=False, progress=False,
    )  # fmt: skip
    assert undisturbed.rows == found.rows
    names = ["prompt", "completion", "row", "sample"]
    assert load_text(out).select_columns(names).to_list() == load_text(tmp_path / "u").select_columns(names).to_list()


def test_two_processes_do_not_share_a_directory(writing, processes, tmp_path):
    url, script = writing
    script.latency = 0.05
    worker = processes.Process(target=work, args=(url, str(tmp_path / "a"), 200, 1))
    worker.start()
    while not script.log:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="Another process captures"):
        capture_text(
            questions(200),
            writer(url, max_concurrency=8),
            tmp_path / "a",
            verify="contains",
            shard_rows=16,
            progress=False,
        )
    worker.kill()
    worker.join()


def measured(processes, url, out, count):
    report = processes.Queue()
    worker = processes.Process(target=measure, args=(url, str(out), count, report))
    worker.start()
    found = report.get(timeout=300)
    worker.join()
    return found


@pytest.mark.slow
def test_32_requests_at_a_time_keep_a_server_busy(processes, tmp_path):
    """A share of the ideal, with the server and the capture on the same two cores."""
    with scripted_writer(Script(write=right, latency=0.2)) as (url, script):
        count = 3200
        seconds, _ = measured(processes, url, tmp_path / "a", count)
    busy = count * 0.2 / 32 / seconds
    print(f"{busy:.3f} of the ideal throughput")
    assert script.most_at_once == 32 and busy >= 0.9


def test_memory_does_not_grow_with_the_prompts(writing, processes, tmp_path):
    _, few = measured(processes, writing[0], tmp_path / "b", 500)
    _, many = measured(processes, writing[0], tmp_path / "c", 4000)  # 8 MB more of prompts, and of answers
    print(f"{few:.0f} MB for 500 prompts, {many:.0f} MB for 4000")
    assert many - few < 25
