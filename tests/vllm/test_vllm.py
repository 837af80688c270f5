"""A real vLLM server says what the same model says in this process."""

import os
import threading
import time

import pytest
import torch

from kd_plugin import LocalTeacher, ServerTeacher
from kd_plugin.cache import Generation, Sampled, TeacherCache, TopK, TopP
from kd_plugin.capturing import capture
from kd_plugin.capturing.generating import uniforms
from kd_plugin.errors import ConfigError, DataError, VocabularyError
from tests.core.cache_help import live_logprobs, prompt_rows
from tests.core.test_cache_server import assert_same
from tests.tiny import byte_tokenizer, save_tiny
from tests.vllm.server import VllmServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("KD_VLLM_PYTHON" not in os.environ, reason="needs vLLM: make test-vllm"),
]
TOLERANCE = 1e-3  # nats
_BATCHES = 4  # times the rounding of one batch, by which that of another may be larger

PROSE = (
    "The licenses for most software are designed to take away your freedom to share and change it. By contrast, "
    "our licences are intended to guarantee it. Дорога шла вдоль реки, 12.5 км. 価格は三百円です。 "
    "def f(x): return x**2\n"
)
ROWS = [
    {"text": PROSE},
    {"messages": [{"role": "user", "content": "What is 7 * 6?"}, {"role": "assistant", "content": "It is 42."}]},
    {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Danube. " * 9}]},
    {"text": PROSE[::-1]},
]


@pytest.fixture
def teacher(url, smol):
    return ServerTeacher(url, "served", repo=smol, top_k=64)


def rounding_of(logprobs, teacher, rows):
    """Return by how much cumulative probabilities of two engines may differ: what they do on some rows, several times.

    It depends on the processor and on the batch: a draw falls where the cumulative probabilities pass its number.

    Args:
        logprobs: called with a row's tokens; (L - 1, V) of the engine under test.
        teacher: in this process.
        rows: token ids.
    """
    apart = [
        float((logprobs(ids).double().exp().cumsum(1) - live_logprobs(teacher, ids)[:-1].exp().cumsum(1)).abs().max())
        for ids in rows
    ]
    return _BATCHES * max(apart)


def assert_same_draws(mine, theirs, teacher, rounding):
    """The same random numbers drew from distributions that differ by ``rounding`` of the cumulative probabilities.

    So both hold each draw whose number is not within rounding of an edge between two tokens; which side one at an edge
    falls to depends on the processor. Where no draw of a position is at an edge, both hold the same.
    """
    settings, equal, sure, total = theirs.manifest.settings, [], 0, 0
    assert mine.dataset()["example_id"] == theirs.dataset()["example_id"]
    rows = {row["example_id"]: row for row in theirs.dataset()}
    for row in mine.dataset():
        counts, logprobs = [], []
        for cache, index in ((mine, row["teacher_index"]), (theirs, rows[row["example_id"]]["teacher_index"])):
            signal = cache.signal(torch.tensor([i for i in index if i >= 0]))
            held = torch.zeros(len(signal), settings.vocab_size, dtype=torch.int64)
            counts.append(held.scatter_add_(1, signal.ids.long(), signal.draws.long()))
            drawn = signal.logprobs.masked_fill(signal.draws == 0, -torch.inf)
            logprobs.append(torch.full(held.shape, -torch.inf).scatter_reduce_(1, signal.ids.long(), drawn, "amax"))
        live = live_logprobs(teacher, row["input_ids"])[: len(row["teacher_index"])]
        edges = live[torch.tensor(row["teacher_index"]) >= 0].exp().cumsum(1)
        numbers = torch.from_numpy(uniforms(settings.seed, row["example_id"], len(edges), settings.targets.draws))
        least, most = (torch.searchsorted(edges, numbers + apart, right=True) for apart in (-rounding, rounding))
        is_sure = least == most
        certain = torch.zeros_like(counts[0]).scatter_add_(1, least.clamp(max=edges.shape[1] - 1), is_sure.long())
        sure, total = sure + int(is_sure.sum()), total + is_sure.numel()
        for held in counts:
            assert bool((held >= certain).all()) and bool((held.sum(1) == settings.targets.draws).all())
        same = (counts[0] == counts[1]).all(1)
        near = logprobs[1].abs() * 2**-10 + TOLERANCE  # both were rounded to float16
        compared = same[:, None] & (counts[0] > 0)
        assert bool(((logprobs[0] - logprobs[1]).abs() <= near)[compared].all())
        equal += same.tolist()
    print(
        f"rounding {rounding:.1e}: {total - sure} of {total} draws are that near to an edge; {equal.count(False)} of "
        f"{len(equal)} positions have one on the other side"
    )
    assert sure / total > 0.5, "or little was compared"


def listed_logprobs(server, ids):
    """Return (L - 1, V) nats of a server that lists all tokens."""
    (listed,) = server.score_tokens([ids], [range(len(ids) - 1)])
    found = torch.full((len(ids) - 1, server.vocabulary.size), -torch.inf, dtype=torch.float64)
    return found.scatter_(1, torch.from_numpy(listed.ids), torch.from_numpy(listed.logprobs))


def by_form(form):
    return [row for row in ROWS if form in row]


def test_the_signal_equals_that_of_the_local_teacher(teacher, local):
    tokenizer = local.tokenizer
    tokenizer.padding_side = "left"
    batch = tokenizer([PROSE, PROSE[:100], PROSE[50:300]], return_tensors="pt", padding=True)
    used = batch["attention_mask"].bool()
    used[:, -1] = False  # no token stands after the last one
    positions = used.flatten().nonzero()[:, 0]
    signal = teacher.score(batch["input_ids"], batch["attention_mask"], positions)
    hidden = local.score(batch["input_ids"], batch["attention_mask"], positions)
    full = hidden.head.logits(hidden.hidden).double().log_softmax(-1)
    assert len(signal) == len(positions) > 100
    differences = {
        "listed": (signal.logprobs - full.gather(1, signal.ids)).abs().max(),
        "ranks": (signal.logprobs - full.topk(64).values).abs().max(),
        "written": (
            signal.sampled_token_logprobs - full.gather(1, batch["input_ids"].flatten()[positions + 1, None])[:, 0]
        )
        .abs()
        .max(),
        "tail": (signal.tail_logmass.exp() + full.topk(64).values.exp().sum(1) - 1).abs().max(),
    }
    print({name: float(value) for name, value in differences.items()})
    assert max(differences.values()) < TOLERANCE


@pytest.mark.parametrize("targets", [TopK(64), TopP(0.95, 100)])
@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_server_capture_equals_one_in_process(teacher, local, tmp_path, form, targets):
    options = {"targets": targets, "shard_rows": 2, "progress": False}
    mine = capture(by_form(form), teacher, tmp_path / "s", **options)
    theirs = capture(by_form(form), local, tmp_path / "l", **options)
    assert mine.manifest.engine["name"] == "vllm" and mine.manifest.engine["vllm"][0].isdigit()
    if isinstance(targets, TopK):
        assert_same(mine, theirs, TOLERANCE)
    else:  # a token at the edge of p may fall on either side
        assert mine.tokens == theirs.tokens
        a, b = (sum(unit.entries for unit in cache.manifest.units) for cache in (mine, theirs))
        assert abs(a - b) <= 0.001 * b


def test_limits_of_the_server_are_said_early(url, smol, tmp_path):
    with pytest.raises(ConfigError, match=r"Use top_k=100 or fewer, or start the server with --max-logprobs 101"):
        capture(by_form("text"), ServerTeacher(url, repo=smol), tmp_path, targets=TopK(101), progress=False)
    with pytest.raises(DataError, match=r"takes 599\. Set max_length=599, or start the server with --max-model-len"):
        capture([{"text": PROSE * 9}], ServerTeacher(url, repo=smol), tmp_path, progress=False)
    with pytest.raises(VocabularyError, match="first difference"):
        ServerTeacher(url, tokenizer=byte_tokenizer()).check()


def test_written_completions_bring_the_targets_of_their_own_tokens(teacher, local, tmp_path):
    rows = [{"prompt": row["messages"][:1]} for row in by_form("messages")]
    for generation in (
        Generation(max_new_tokens=24, temperature=0, keep_unfinished=True),
        Generation(n=2, max_new_tokens=24, temperature=0.9, top_p=0.95, keep_unfinished=True),
    ):
        options = {"targets": TopK(20), "generate": generation, "progress": False}
        cache = capture(rows, teacher, tmp_path / f"s{generation.n}", **options)
        assert len(cache) == 2 * generation.n
        for row in cache.dataset():
            index = torch.tensor(row["teacher_index"])
            signal = cache.signal(index[index >= 0])
            live = live_logprobs(local, row["input_ids"])[: len(index)][index >= 0].float()
            near = signal.logprobs.abs() * 2**-10 + TOLERANCE
            assert bool(((signal.logprobs - live.gather(1, signal.ids)).abs() <= near).all())
            written = torch.tensor(row["input_ids"])[1:][torch.tensor(row["completion_mask"])[1:] == 1]
            if generation.temperature == 0:
                assert torch.equal(live.argmax(1), written)
    greedy = capture(
        rows,
        local,
        tmp_path / "l",
        targets=TopK(20),
        generate=Generation(max_new_tokens=24, temperature=0, keep_unfinished=True),
        progress=False,
    )
    assert greedy.dataset()["input_ids"] == TeacherCache(tmp_path / "s1").dataset()["input_ids"]


def test_a_server_killed_in_mid_capture_and_restarted_costs_no_row(tmp_path):
    """SIGKILL, half a minute of nothing, and the same command goes on in the same process."""
    model = save_tiny(tmp_path / "tiny", seed=2, hidden=128, tied=False, scale=4.0)  # vLLM needs heads of 32 at least
    rows, options = prompt_rows(90), {"targets": Sampled(30), "shard_rows": 4, "progress": False}
    local = capture(rows, LocalTeacher(model, dtype="float32"), tmp_path / "l", **options)
    server = VllmServer(model, tmp_path / "server.log", "--max-model-len", "512", "--max-logprobs", "-1")
    out, failed = tmp_path / "s", []

    def work():
        teacher = ServerTeacher(server.url, repo=model, top_k="all", max_concurrency=4, max_retries=12)
        try:
            capture(rows, teacher, out, **options)
        except BaseException as error:
            failed.append(error)

    server.start()
    worker = threading.Thread(target=work)
    worker.start()
    while len(list(out.glob("units/*.json"))) < 3 and worker.is_alive():
        time.sleep(0.05)
    server.kill()
    done = len(list(out.glob("units/*.json")))
    assert worker.is_alive() and 3 <= done < 20
    with VllmServer(model, tmp_path / "again.log", "--max-model-len", "512", "--max-logprobs", "-1", port=server.port):
        worker.join(600)
        assert not worker.is_alive() and not failed, failed
        cache, here = TeacherCache(out), LocalTeacher(model, dtype="float32")
        there = ServerTeacher(server.url, repo=model, top_k="all")
        examples = cache.dataset()["input_ids"][::15]
        rounding = rounding_of(lambda ids: listed_logprobs(there, ids), here, examples)
    assert_same_draws(cache, local, here, rounding)
    assert len(cache) == len(set(cache.dataset()["example_id"])) == len(local)
    cache.verify()
