"""A capture of text: what is kept and why, and that nothing is lost or asked twice whatever happens."""

import json
import multiprocessing
import random
import time
from collections import Counter

import datasets
import pytest

from kd_plugin.errors import CacheError, ConfigError, DataError, LicenseRefusedError, ServerError
from kd_plugin.inputs import load_rows
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.teachers import client
from kd_plugin.text import LocalWriter, ServerWriter, capture_text, load_text, text_source
from kd_plugin.text.voting import Vote
from tests.core.text_worker import measure, questions, work
from tests.scripted_writer import Script, scripted_writer


def number_of(body):
    return int(body["messages"][-1]["content"].split()[2].split("+")[0])


def right(body):
    return f"<think>{number_of(body)} twice</think>\n\nIt is {2 * number_of(body)}"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def served():
    with scripted_writer(Script(write=right)) as found:
        yield found


def writer(url, **options):
    return ServerWriter(url, **{"license": "mit", **options})


def test_the_dataset_is_in_trls_form_with_reasoning_apart(served, tmp_path):
    url, script = served
    script.write = lambda body: right(body) if number_of(body) % 3 else "no idea"
    out = tmp_path / "text"
    found = capture_text(questions(10), writer(url), out, verify="contains", progress=False)
    assert found.rows == 6 and found.dropped == {"wrong answer": 4} and found.complete
    rows = datasets.load_dataset(str(out))["train"]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "What is 1+1?"}],
        "completion": [{"role": "assistant", "content": "<think>\n1 twice\n</think>\n\nIt is 2"}],
        "response": "It is 2",
        "reasoning": "1 twice",
        "teacher_name": "teacher",
        "generated_by": "teacher",
        "score": 1.0,
        "row": 1,
        "sample": 0,
        "domain": "odd",
    }
    answers = datasets.load_dataset("parquet", data_files=str(out / "answers/*.parquet"))["train"]
    assert len(answers) == 10 and answers[0]["why_not"] == "wrong answer"
    asked = len(script.log)
    for reasoning, content in (("drop", "It is 2"), ("field", "It is 2")):
        capture_text(questions(10), writer(url), out, verify="contains", reasoning=reasoning, progress=False)
        (message,) = load_text(out)[0]["completion"]
        assert message["content"] == content and message.get("reasoning_content") == (
            "1 twice" if reasoning == "field" else None
        )
    assert len(script.log) == asked  # selecting again asks nobody


def test_several_texts_a_prompt_have_seeds_of_their_own_and_keep_takes_the_shortest(served, tmp_path):
    url, script = served
    script.write = lambda body: f"<think>{'h' * (body['seed'] % 50)}</think>It is {2 * number_of(body)}"
    found = capture_text(questions(5), writer(url), tmp_path / "a", completions=4, keep=1, progress=False)
    assert found.rows == 5 and sum(found.dropped.values()) == 15
    seeds = {(number_of(body), body["seed"]) for _, body in script.log}
    assert len(seeds) == 20
    kept = {row["row"]: len(row["reasoning"]) for row in load_text(tmp_path / "a")}
    assert kept == {i: min(seed % 50 for n, seed in seeds if n == i) for i in range(5)}


def test_length_limits_unfinished_refused_and_equal_answers(served, tmp_path):
    url, script = served
    script.faults = [400]
    words = {1: {"content": "cut", "finish_reason": "length"}, 2: "x" * 50, 3: "", 4: f"<think>{'y' * 50}</think>ok"}
    script.write = lambda body: words.get(number_of(body), right(body))
    rows = [*questions(6), {"prompt": " what is  5+5?", "answer": "10", "domain": "odd"}]
    limits = {"max_characters": 40, "max_reasoning_characters": 40, "progress": False}
    found = capture_text(rows, writer(url, max_concurrency=1), tmp_path / "a", **limits)
    assert found.rows == 1 and found.dropped == {
        "refused by the server": 1, "unfinished": 1, "too long": 1, "empty": 1, "reasoning too long": 1,
        "same prompt": 1,
    }  # fmt: skip
    again = capture_text(
        rows, writer(url), tmp_path / "a", keep_unfinished=True, deduplicate=False, min_characters=4, progress=False
    )
    assert again.rows == 3 and again.dropped["too short"] == 2  # "cut" and "ok"
    script.write = lambda body: "all the same"
    same = capture_text(questions(3), writer(url), tmp_path / "b", completions=3, progress=False)
    assert same.rows == 3 and same.dropped == {"same answer": 6}


def test_groups_are_balanced_by_domain_and_by_difficulty(served, tmp_path):
    url, script = served
    rows = [{**row, "domain": "rare" if i < 3 else "common"} for i, row in enumerate(questions(20))]
    found = capture_text(rows, writer(url), tmp_path / "a", balance=["domain"], progress=False)
    assert Counter(r["domain"] for r in load_text(tmp_path / "a")) == {"rare": 3, "common": 3}
    assert found.dropped == {"beyond balance": 14}
    assert capture_text(rows, writer(url), tmp_path / "a", balance=["domain"], per_group=5, progress=False).rows == 8
    first = [r["row"] for r in load_text(tmp_path / "a")]
    capture_text(rows, writer(url), tmp_path / "a", balance=["domain"], per_group=5, progress=False)
    assert [r["row"] for r in load_text(tmp_path / "a")] == first
    script.write = lambda body: right(body) if number_of(body) < 4 or body["seed"] % 4 == 0 else "no"
    hard = capture_text(
        questions(40), writer(url), tmp_path / "b", completions=4, verify="contains", deduplicate=False,
        balance=["pass_rate"], progress=False,
    )  # fmt: skip
    right_by_row = Counter(r["row"] for r in load_text(tmp_path / "b"))
    assert hard.dropped["beyond balance"] > 0 and len(right_by_row) > 1
    with pytest.raises(ConfigError, match="no column 'topic'"):
        capture_text(rows, writer(url), tmp_path / "c", balance=["topic"], progress=False)


def test_the_panel_votes_and_the_outvoted_are_dropped(tmp_path):
    pytest.importorskip("math_verify")
    with scripted_writer(Script(write=right)) as (one, _), scripted_writer(Script(write=right)) as (two, _):
        lies = Script(write=lambda body: f"It is {2 * number_of(body) + (number_of(body) % 2)}")
        with scripted_writer(lies) as (three, _):
            panel = [writer(url, name=name) for url, name in ((one, "a"), (two, "b"), (three, "liar"))]
            found = capture_text(questions(6), panel, tmp_path / "v", vote=True, progress=False)
    assert found.dropped == {"outvoted": 3, "same answer": 6} or found.dropped["outvoted"] == 3
    assert {r["teacher_name"] for r in load_text(tmp_path / "v")} >= {"a"}
    record = text_source(tmp_path / "v").record
    assert len([n for n in record["nodes"] if n["kind"] == "model"]) == 3


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ([("a", "4"), ("b", "4"), ("c", "5")], [True, True, False]),
        ([("a", "4"), ("b", "5"), ("c", "6")], [False] * 3),
        ([("a", "4"), ("b", "5")], [False] * 2),
        ([("a", "4"), ("a", "4"), ("a", "5")], [True, True, False]),
        # Each teacher has one vote, however much it writes
        ([("a", "5"), ("a", "5"), ("a", "5"), ("b", "4"), ("b", "9"), ("b", "4"), ("c", "4")], [0, 0, 0, 1, 0, 1, 1]),
        ([("a", "no answer"), ("b", "4"), ("c", "4")], [False, True, True]),
        ([("a", "no"), ("b", "no"), ("c", "4")], [False] * 3),
    ],
)
def test_a_vote_is_of_teachers_and_not_of_texts(answers, kept):
    vote = Vote.of({"by": r"(\d+)"})
    assert [reason is None for reason in vote.outcome(answers)] == [bool(k) for k in kept]


def test_a_vote_that_cannot_be_is_refused():
    for given, match in (({"by": "("}, "regular expression"), ({"by": "x"}, "no group"), ({"share": 2}, "share is 2")):
        with pytest.raises(ConfigError, match=match):
            Vote.of(given)


def test_evaluation_items_are_found_listed_and_dropped(served, tmp_path):
    url, script = served
    evaluation = [{"question": "If a farmer has 12 cows and buys 7 more cows at the market on Monday, how many?"}]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, evaluation)) + "\n")
    near = "If the farmer has 12 cows and buys 7 more cows at the market on Tuesday, how many?"
    other = "If a farmer has 31 cows and sells 4 more cows at the market on Monday, how many?"
    inside = "Say something."
    script.write = lambda b: evaluation[0]["question"] if "Say" in b["messages"][-1]["content"] else "fine"
    rows = [{"prompt": text} for text in (near, other, inside)]
    options = {"decontaminate": [str(tmp_path / "eval.jsonl")], "ngram": 5, "progress": False}
    found = capture_text(rows, writer(url), tmp_path / "a", **options)
    assert found.rows == 1 and found.dropped == {"contaminated": 2} and found.contaminated == 2
    assert [r["row"] for r in load_text(tmp_path / "a")] == [1]
    listed = [json.loads(line) for line in (tmp_path / "a/contaminated.jsonl").read_text().splitlines()]
    assert [(one["row"], one["item"], one["overlap"] == 1.0) for one in listed] == [(0, 0, False), (2, 0, True)]
    with pytest.raises(DataError, match="has no column"):
        capture_text(
            rows,
            writer(url),
            tmp_path / "b",
            decontaminate=[{"dataset": str(tmp_path / "eval.jsonl"), "columns": ["x"]}],
        )


def test_conversations_are_asked_as_they_are_up_to_the_user(served, tmp_path):
    url, script = served
    script.write = lambda body: "fine"
    user, old = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "old"}
    rows = [{"messages": [user, old, {"role": "user", "content": "more"}, old]}]
    capture_text(rows, writer(url), tmp_path / "a", system="be kind", progress=False)
    assert [m["content"] for m in script.log[0][1]["messages"]] == ["be kind", "hello", "old", "more"]
    with pytest.raises(DataError, match="row 0 has no prompt"):
        capture_text([{"text": "x"}], writer(url), tmp_path / "b", progress=False)
    with pytest.raises(DataError, match="without one of the user"):
        capture_text([{"messages": [old]}], writer(url), tmp_path / "c", progress=False)


def test_what_cannot_be_is_refused_before_the_first_request(served, tmp_path):
    url, script = served
    for options, match in (
        ({"verify": "contain"}, "Did you mean 'contains'"),
        ({"completions": 0}, "completions=0"),
        ({"reasoning": "thing"}, "Did you mean 'think'"),
        ({"overlap": 0.0}, "overlap=0"),
        ({"per_group": 3}, "balance names no columns"),
        ({"completion": 2}, "Did you mean 'completions'"),
        ({"ceiling": -1.0}, "ceiling=-1"),
        ({"vote": {"bye": "x"}}, "vote: unknown key 'bye'"),
    ):
        with pytest.raises(ConfigError, match=match):
            capture_text(questions(2), writer(url), tmp_path / "x", progress=False, **options)
    with pytest.raises(ConfigError, match="have the same name"):
        capture_text(questions(2), [writer(url), writer(url)], tmp_path / "x", progress=False)
    assert not script.log
    (tmp_path / "x").mkdir(exist_ok=True)
    (tmp_path / "x/other.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds .other\.txt. and no capture"):
        capture_text(questions(2), writer(url), tmp_path / "x", progress=False)
    capture_text(questions(2), writer(url), tmp_path / "y", progress=False)
    for rows, options, key in (
        (questions(3), {}, "count: 3 against 2"),
        (questions(2), {"sampling_temperature": 0.1}, "sampling_temperature: 0.1 against 0.6"),
        (questions(2), {"completions": 2}, "completions: 2 against 1"),
    ):
        with pytest.raises(ConfigError, match=f"asks something else: {key}"):
            capture_text(rows, writer(url), tmp_path / "y", progress=False, **options)


CLOSED = [
    {"url": "https://api.openai.com", "model": "gpt-4o"},
    {"url": "https://openrouter.ai/api/v1", "model": "anthropic/claude-sonnet-4", "license": "mit"},
    {"url": "http://localhost:4000", "model": "azure/gpt-4o-mini", "license": "own"},
    {"url": "http://127.0.0.1:8000", "model": "unknown-model"},
]


@pytest.mark.parametrize("options", CLOSED, ids=lambda o: o["model"])
def test_closed_providers_and_gateways_are_refused_before_the_first_request(options, tmp_path, monkeypatch):
    monkeypatch.setattr("requests.Session.request", lambda *a, **k: pytest.fail("a request was sent"))
    with pytest.raises(LicenseRefusedError):
        capture_text(questions(2), ServerWriter(**options), tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_a_dataset_that_a_closed_model_wrote_is_refused_before_the_first_request(served, tmp_path):
    url, script = served
    with pytest.raises(LicenseRefusedError):
        capture_text([{**row, "generator": "gpt-4"} for row in questions(2)], writer(url), tmp_path / "x")
    with pytest.raises(LicenseRefusedError):
        capture_text(
            questions(2),
            writer(url),
            tmp_path / "x",
            lineage={"datasets": [{"repo": "a/b", "generated_by": ["gpt-4"]}]},
        )
    assert not script.log
    script.models = [{"id": "scripted", "root": "claude-opus-4"}]
    with pytest.raises(LicenseRefusedError):
        capture_text(questions(2), writer(url), tmp_path / "y", progress=False)
    assert not script.log


def test_lineage_names_the_writer_wherever_the_rows_go(served, tmp_path):
    url, _ = served
    out = tmp_path / "text"
    capture_text(questions(4), writer(url, model="scripted", repo="org/scripted"), out, progress=False)
    for sources in (
        {"outputs": [text_source(out)]},
        {"datasets": dataset_sources(load_text(out))},
        {"datasets": dataset_sources(load_rows(str(out)).filter(lambda row: row["row"] > 1))},
    ):
        run = RunLineage(method="sft", student=Source("student", license="mit"), **sources)
        run.require_trainable()
        names = {node.name: node for node in run.graph.nodes.values()}
        assert names["org/scripted"].licenses == ("mit",)
        assert {e.kind for e in run.graph.edges if e.target == names["org/scripted"].id} == {"trained_on_outputs"}
    # datasets forgets where it read a directory; the rows themselves say who wrote them
    copied = datasets.load_dataset(str(out))["train"]
    run = RunLineage(method="sft", student=Source("student", license="mit"), datasets=dataset_sources(copied))
    assert "org/scripted" in {node.name for node in run.graph.nodes.values()}
    with pytest.raises(LicenseRefusedError, match="org/scripted"):
        run.require_trainable()


def test_a_record_speaks_for_its_own_bytes_alone(served, tmp_path):
    url, _ = served
    out = tmp_path / "text"
    capture_text(questions(4), writer(url), out, progress=False)
    record = (out / "teacher_text.json").read_bytes()
    rows = (out / "train-00000.parquet").read_bytes()

    def refused(match):
        with pytest.raises(CacheError, match=match):
            text_source(out)
        run = RunLineage(
            method="sft", student=Source("s", license="mit"), datasets=dataset_sources(load_rows(str(out)))
        )
        with pytest.raises(LicenseRefusedError):
            run.require_trainable()

    (out / "teacher_text.json").write_bytes(record.replace(b'"mit"', b'"own"'))
    refused("not as it was written")
    (out / "teacher_text.json").unlink()
    refused("has no teacher_text.json")
    (out / "teacher_text.json").write_bytes(record)
    (out / "train-00001.parquet").write_bytes(rows)
    refused("names other files")
    (out / "train-00001.parquet").unlink()
    capture_text(questions(3), writer(url), tmp_path / "other", progress=False)
    (out / "train-00000.parquet").write_bytes((tmp_path / "other/train-00000.parquet").read_bytes())
    refused("not the file")


def test_a_model_in_this_process_writes_as_a_server_does(teacher_dir, tmp_path):
    found = capture_text(
        questions(5), LocalWriter(teacher_dir, license="mit", batch_size=2, dtype="float32"), tmp_path / "a",
        max_new_tokens=6, completions=2, keep_unfinished=True, min_characters=0, deduplicate=False, progress=False,
    )  # fmt: skip
    assert found.usage["teacher"]["written"] <= 60 and found.usage["teacher"]["read"] > 0
    whole = load_text(tmp_path / "a").to_list()
    capture_text(
        questions(5), LocalWriter(teacher_dir, license="mit", batch_size=5, dtype="float32"), tmp_path / "b",
        max_new_tokens=6, completions=2, keep_unfinished=True, min_characters=0, deduplicate=False, progress=False,
    )  # fmt: skip
    assert [r["response"] for r in load_text(tmp_path / "b")] == [r["response"] for r in whole]


PRICED = {"prices": {"read": 1000.0, "written": 1000.0}}  # tokens here are words: 3 read, 2 or 3 written


def test_a_ceiling_stops_the_run_cleanly_and_a_higher_one_goes_on(served, tmp_path):
    url, script = served
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


def test_a_server_that_dies_costs_nothing_that_came(served, tmp_path):
    url, script = served
    script.faults = [None] * 20 + [503] * 10_000
    with pytest.raises(ServerError, match="gave no answer"):
        capture_text(questions(60), writer(url, max_retries=0), tmp_path / "a", shard_rows=8, progress=False)
    script.faults = []
    found = capture_text(questions(60), writer(url), tmp_path / "a", shard_rows=8, progress=False)
    assert found.rows == 60 and max(script.answered.values()) == 1


def test_every_fault_in_one_run_loses_and_repeats_nothing(served, tmp_path):
    url, script = served
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
    """Slots whose answers are on the disk."""
    found = set()
    for path in sorted((out / "answers").glob("unit-*")):
        if path.suffix == ".jsonl":
            lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
            found |= {tuple(json.loads(line)["slot"].values()) for line in lines}
        else:
            columns = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
            found |= {(r["row"], r["teacher_name"], r["sample"]) for r in columns}
    return found


def test_25_kills_lose_nothing_and_nothing_that_came_is_asked_twice(served, processes, tmp_path):
    url, script = served
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


def test_two_processes_do_not_share_a_directory(served, processes, tmp_path):
    url, script = served
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


def test_memory_does_not_grow_with_the_prompts(served, processes, tmp_path):
    _, few = measured(processes, served[0], tmp_path / "b", 500)
    _, many = measured(processes, served[0], tmp_path / "c", 4000)  # 8 MB more of prompts, and of answers
    print(f"{few:.0f} MB for 500 prompts, {many:.0f} MB for 4000")
    assert many - few < 25
