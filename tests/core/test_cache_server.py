"""A capture through a server stores what a capture in process stores, and loses nothing when the server goes away."""

import json
import threading
import time

import pytest
import torch
import yaml

from kd_plugin import ServerTeacher
from kd_plugin.cache import Generation, Sampled, TeacherCache, TopK, TopP
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.teachers import client
from tests.core.cache_help import live_logprobs, prompt_rows, shards_of
from tests.fake_vllm import fake_vllm
from tests.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("short_pauses")


def of(url, teacher_dir, **options):
    return ServerTeacher(url, "tiny", repo=teacher_dir, **options)


def assert_same(mine, theirs, tolerance=1e-3):
    """The same examples and tokens, and log-probabilities within ``tolerance`` nats and their float16 storage."""
    assert mine.dataset()["example_id"] == theirs.dataset()["example_id"]
    a, b = mine.signal(torch.arange(mine.tokens)), theirs.signal(torch.arange(theirs.tokens))
    assert len(a) == len(b) > 0
    # By token, since the stored order follows rounded values; and by rank, for rows that differ in a token at the edge
    by_token = [(s.ids.sort(1).values, s.logprobs.gather(1, s.ids.sort(1).indices)) for s in (a, b)]
    same = (by_token[0][0] == by_token[1][0]).all(1)
    assert same.float().mean() > 0.98
    ranked = [s.logprobs.sort(1, descending=True).values for s in (a, b)]
    for mine_at, theirs_at in ((by_token[0][1][same], by_token[1][1][same]), ranked):
        near = theirs_at.abs() * 2**-10 + tolerance  # both were rounded to float16
        either = torch.isfinite(mine_at) | torch.isfinite(theirs_at)
        assert bool(((mine_at - theirs_at).abs() <= near)[either].all())
    torch.testing.assert_close(a.tail_logmass.exp(), b.tail_logmass.exp(), atol=tolerance, rtol=0)
    return a, b


@pytest.mark.parametrize(
    ("targets", "top_k", "temperature"),
    [
        (TopK(8), 64, 1.0),
        (TopP(0.7, 30), 64, 1.0),
        (TopK(300), 64, 1.0),  # more than there are
        (Sampled(30), "all", 1.0),
        (Sampled(30, logprobs="each"), "all", 1.0),
        (TopK(8), "all", 1.7),
    ],
)
def test_a_server_fills_the_cache_that_a_local_teacher_fills(
    served, local, teacher_dir, tmp_path, targets, top_k, temperature
):
    options = {"targets": targets, "temperature": temperature, "shard_rows": 4, "progress": False}
    mine = capture(prompt_rows(10), of(served[0], teacher_dir, top_k=top_k), tmp_path / "s", **options)
    theirs = capture(prompt_rows(10), local, tmp_path / "l", **options)
    a, b = assert_same(mine, theirs)
    assert (a.ids == b.ids).float().mean() > 0.98
    if isinstance(targets, Sampled):
        assert torch.equal(a.draws, b.draws)
    assert mine.manifest.engine["name"] == "vllm" and mine.manifest.engine["vllm"] == "0.0-fake"
    nodes = mine.manifest.lineage["nodes"]
    assert any(node.get("endpoint") == "127.0.0.1" and node.get("model") == "tiny" for node in nodes)
    assert served[0] not in (tmp_path / "s" / "manifest.json").read_text()
    asked = [b["prompt_logprobs"] for p, _, b in served[1].requests if "prompt_logprobs" in b]
    whole = top_k == "all" or targets == TopK(300)
    # 0 for the rows that are asked for twice
    assert set(asked) == {-1 if whole else getattr(targets, "cap", getattr(targets, "k", None)), 0}


def test_what_a_server_cannot_give_is_refused_before_it_is_asked(served, teacher_dir, tmp_path):
    teacher = of(served[0], teacher_dir)
    with pytest.raises(ConfigError, match=r"Sampled targets.*lists 64 tokens.*top_k='all'"):
        capture(prompt_rows(3), teacher, tmp_path / "c", targets=Sampled(5), progress=False)
    with pytest.raises(ConfigError, match=r"temperature=2.0: a server gives log-probabilities at temperature 1"):
        capture(prompt_rows(3), teacher, tmp_path / "c", targets=TopK(5), temperature=2.0, progress=False)
    assert not served[1].requests
    served[1].max_logprobs = 20
    with pytest.raises(ConfigError, match="Use top_k=20 or fewer"):
        capture(prompt_rows(3), teacher, tmp_path / "c", targets=TopK(21), progress=False)
    assert not (tmp_path / "c").exists()
    capture(prompt_rows(3), teacher, tmp_path / "c", targets=TopK(20), progress=False)


def test_a_server_that_dies_in_mid_capture_and_comes_back_costs_no_row(local, tokenizer, teacher_dir, tmp_path):
    options = {"targets": TopK(8), "shard_rows": 3, "progress": False}
    expected = capture(prompt_rows(24), local, tmp_path / "l", **options)
    out = tmp_path / "s"
    with fake_vllm(local.model, tokenizer) as (url, first):
        port = int(url.rsplit(":", 1)[1])
        teacher = of(url, teacher_dir, max_concurrency=2, max_retries=200)
        worker = threading.Thread(target=capture, args=(prompt_rows(24), teacher, out), kwargs=options)
        worker.start()
        while len(list(out.glob("units/*.json"))) < 3:
            time.sleep(0.005)
        assert worker.is_alive() and first.requests
    time.sleep(0.1)
    assert worker.is_alive()
    with fake_vllm(local.model, tokenizer, port=port):
        worker.join(60)
    cache = TeacherCache(out)
    assert_same(cache, expected)
    assert len(set(cache.dataset()["example_id"])) == 24 == len(cache)


def test_a_server_away_for_good_stops_the_capture_and_a_second_run_goes_on(served, local, teacher_dir, tmp_path):
    url, behaviour = served
    options = {"targets": TopK(8), "shard_rows": 3, "progress": False}
    teacher = of(url, teacher_dir, max_retries=1, max_concurrency=1)
    teacher.check()
    at = len(behaviour.requests) + 10  # the capture's own questions, and then the second unit

    def fail(answer):
        if len(behaviour.requests) > at:
            behaviour.failures = [503] * 1000

    behaviour.change = fail
    with pytest.raises(ServerError, match=r"gave no answer in 2 attempts; the last error: status 503.*What was done"):
        capture(prompt_rows(12), teacher, tmp_path / "s", **options)
    kept = shards_of(tmp_path / "s")
    assert 0 < len(kept) < 4
    behaviour.change, behaviour.failures = None, []
    cache = capture(prompt_rows(12), teacher, tmp_path / "s", **options)
    assert {name: data for name, data in shards_of(tmp_path / "s").items() if name in kept} == kept
    assert_same(cache, capture(prompt_rows(12), local, tmp_path / "l", **options))


def test_a_server_that_came_back_with_other_weights_is_refused(served, tokenizer, teacher_dir, tmp_path):
    options = {"targets": TopK(8), "shard_rows": 3, "progress": False}
    with fake_vllm(tiny_llama(seed=9), tokenizer) as (other, _):
        capture(prompt_rows(6), of(other, teacher_dir), tmp_path / "c", **options)
    (tmp_path / "c" / "units" / "00001.json").unlink()
    (tmp_path / "c" / "data" / "00001.parquet").unlink()
    before = shards_of(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"other log-probabilities than the one that began.*nats apart"):
        capture(prompt_rows(6), of(served[0], teacher_dir), tmp_path / "c", **options)
    assert shards_of(tmp_path / "c") == before
    with fake_vllm(tiny_llama(seed=9), tokenizer) as (other, _):
        assert len(capture(prompt_rows(6), of(other, teacher_dir), tmp_path / "c", **options)) == 6


def test_a_server_writes_completions_with_their_targets_from_the_same_pass(served, local, teacher_dir, tmp_path):
    url, behaviour = served
    rows = [{"prompt": row["prompt"]} for row in prompt_rows(4)]
    written = Generation(n=2, max_new_tokens=6, temperature=0.8, keep_unfinished=True)
    options = {"targets": TopK(5), "generate": written, "shard_rows": 2, "progress": False}
    cache = capture(rows, of(url, teacher_dir), tmp_path / "s", **options)
    asked = [body for path, _, body in behaviour.requests if path == "/v1/completions"]
    writing = [body for body in asked if "seed" in body]
    assert len(writing) == 8 == len({body["seed"] for body in writing})
    # Targets come from the pass that writes; what was written is compared by its own tokens alone
    assert [body["prompt_logprobs"] for body in asked if "prompt_logprobs" in body] == [5] + [0] * 9
    for row in cache.dataset():
        index = torch.tensor(row["teacher_index"])
        signal = cache.signal(index[index >= 0])
        live = live_logprobs(local, row["input_ids"])[: len(index)][index >= 0].float()
        torch.testing.assert_close(signal.logprobs, live.gather(1, signal.ids), atol=2e-2, rtol=0)
        torch.testing.assert_close(live.topk(5).values, live.gather(1, signal.ids))
        assert sum(row["completion_mask"]) == len(signal) <= 6
    again = capture(rows, of(url, teacher_dir), tmp_path / "t", **options)
    assert again.dataset()["input_ids"] == cache.dataset()["input_ids"]


def test_capture_from_a_server_by_yaml(served, teacher_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in prompt_rows(5)))
    settings = {
        "dataset": str(tmp_path / "rows.jsonl"),
        "teacher": {"url": served[0], "model": "tiny", "repo": teacher_dir, "max_concurrency": 3},
        "output_dir": str(tmp_path / "c"),
        "k": 7,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["capture", "--config", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    assert "5 examples (0 rows dropped)" in capsys.readouterr().out and not (tmp_path / "c").exists()
    assert main(["capture", "--config", str(tmp_path / "c.yaml")]) == 0
    assert main(["cache", "info", str(tmp_path / "c")]) == 0
    assert "on a server, temperature 1.0" in capsys.readouterr().out
    for teacher, message in (
        ({"url": served[0], "modell": "x"}, "Did you mean 'model'?"),
        ({"model": "x"}, "needs its url"),
        ({"url": "http://a:b@host"}, "credentials"),
    ):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**settings, "teacher": teacher}))
        assert main(["capture", "--config", str(tmp_path / "c.yaml")]) != 0
        assert message in capsys.readouterr().err


def test_threads_ask_in_bounded_number(served, local, teacher_dir, tmp_path):
    inside, most, lock = 0, 0, threading.Lock()
    once = client.Client._once

    def counted(self, *args):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            return once(self, *args)
        finally:
            with lock:
                inside -= 1

    client.Client._once, original = counted, once
    try:
        capture(prompt_rows(20), of(served[0], teacher_dir, max_concurrency=3), tmp_path / "c", progress=False)
    finally:
        client.Client._once = original
    assert most == 3
