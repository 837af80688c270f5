"""A teacher behind a server: its signal is the local teacher's, and whatever is wrong with the server is said."""

import copy
import dataclasses
import inspect
import logging
from functools import partial

import pytest
import torch

from kd_plugin import LocalTeacher, ServerTeacher
from kd_plugin.capturing import capture
from kd_plugin.errors import (
    ConfigError,
    DataError,
    LicenseRefusedError,
    NonFiniteError,
    ServerError,
    VocabularyError,
)
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.teachers import Teacher, client
from kd_plugin.teachers.served import Connection
from kd_plugin.text import ServerWriter, TextServerTeacher
from tests.fake_vllm import fake_vllm
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def batch():
    """Rows with padding on either side, and positions in no order."""
    ids = torch.randint(3, 259, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 7:] = 0, 0
    return ids, mask, torch.tensor([24 + 3, 2, 12 + 4, 10, 12 + 10, 24 + 5, 0])


def of(url, tokenizer, **options):
    return ServerTeacher(url, "tiny", tokenizer=tokenizer, license="apache-2.0", **options)


@pytest.mark.parametrize("top_k", [5, "all"])
def test_the_signal_is_that_of_the_local_teacher(served, local, tokenizer, batch, top_k):
    ids, mask, positions = batch
    teacher = of(served[0] + "/v1/", tokenizer, top_k=top_k, max_concurrency=2)
    assert isinstance(teacher, Teacher)
    signal = teacher.score(ids, mask, positions)
    hidden = local.score(ids, mask, positions)
    full = hidden.head.logits(hidden.hidden).log_softmax(-1)
    k = 259 if top_k == "all" else top_k
    assert signal.ids.shape == (7, k) and signal.draws is None
    torch.testing.assert_close(signal.logprobs, full.topk(k).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(signal.logprobs, full.gather(1, signal.ids), atol=1e-5, rtol=0)
    mass = signal.logprobs.double().exp().sum(1) + signal.tail_logmass.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)
    assert bool(torch.isinf(signal.tail_logmass).all()) == (top_k == "all")
    written = ids.flatten()[positions + 1]
    torch.testing.assert_close(signal.sampled_token_logprobs, full.gather(1, written[:, None])[:, 0], atol=1e-5, rtol=0)
    moved = signal.to("cpu")
    assert torch.equal(moved.sampled_token_logprobs, signal.sampled_token_logprobs)


def test_padded_rows_of_the_head_are_cut_as_in_process(tokenizer, batch):
    model = tiny_llama(seed=4, vocab_size=300)
    local = LocalTeacher(model, tokenizer=tokenizer)
    ids, mask, positions = batch
    hidden = local.score(ids, mask, positions)
    full = hidden.head.logits(hidden.hidden).log_softmax(-1)
    with fake_vllm(model, tokenizer) as (url, _):
        signal = of(url, tokenizer, top_k="all").score(ids, mask, positions)
        few = of(url, tokenizer, top_k=20).score(ids, mask, positions)
    assert int(signal.ids.max()) == 258
    torch.testing.assert_close(signal.logprobs, full.gather(1, signal.ids), atol=1e-5, rtol=0)
    assert int(few.ids.max()) < 259
    assert bool((few.logprobs[:, 0] > -torch.inf).all())


def test_no_position_asks_for_nothing(served, tokenizer, batch):
    ids, mask, _ = batch
    signal = of(served[0], tokenizer, top_k=5).score(ids, mask, torch.zeros(0, dtype=torch.int64))
    assert signal.ids.shape == (0, 5) and signal.sampled_token_logprobs.shape == (0,) and not served[1].requests


@pytest.mark.parametrize("position", [11, 12 + 2, 24 + 6])
def test_a_position_without_a_next_token_is_refused(served, tokenizer, batch, position):
    ids, mask, _ = batch
    with pytest.raises(DataError, match="must have a next token"):
        of(served[0], tokenizer).score(ids, mask, torch.tensor([position]))


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_a_server_that_is_away_for_a_while_is_asked_again(served, tokenizer, batch, status, caplog):
    url, behaviour = served
    expected = of(url, tokenizer, top_k=4).score(*batch)
    behaviour.failures = [status] * 3
    with caplog.at_level(logging.WARNING):
        signal = of(url, tokenizer, top_k=4, max_retries=3).score(*batch)
    assert torch.equal(signal.ids, expected.ids) and torch.equal(signal.logprobs, expected.logprobs)
    assert "attempt 1 of 4 failed" in caplog.text and not behaviour.failures


def test_a_server_that_stays_away_ends_in_one_error(tokenizer, batch):
    with fake_vllm(None, tokenizer) as (url, _):
        pass
    with pytest.raises(ServerError, match=rf"{url}/v1/models gave no answer in 3 attempts; .*ConnectionError") as error:
        of(url, tokenizer, max_retries=2).score(*batch)
    assert isinstance(error.value, ConnectionError)


def test_a_failure_among_many_requests_ends_the_others(served, tokenizer, monkeypatch):
    url, behaviour = served
    teacher = of(url, tokenizer, top_k=4, max_retries=50, max_concurrency=4)
    teacher.check()
    before = len(behaviour.requests)
    monkeypatch.setattr(client, "_FIRST_PAUSE", 60.0)  # one that slept through it would hold the test up
    behaviour.failures = [503, 503, 400]
    with pytest.raises(ServerError, match="refused a request with status 400: made to fail"):
        teacher.score_tokens([[1, 2, 3]] * 40, [[0]] * 40)
    assert len(behaviour.requests) - before < 40


def test_a_redirect_is_not_followed(served, tokenizer):
    served[1].failures = [307]
    with pytest.raises(ServerError, match="status 307"):
        of(served[0], tokenizer).check()


def test_more_tokens_than_the_server_lists_are_refused_early(served, tokenizer, batch):
    url, behaviour = served
    behaviour.max_logprobs = 20
    with pytest.raises(ConfigError, match=r"64 tokens a position.*Use top_k=20 or fewer, or .* --max-logprobs 64"):
        of(url, tokenizer, top_k=64).score(*batch)
    with pytest.raises(ConfigError, match=r"--max-logprobs -1"):
        of(url, tokenizer, top_k="all").score(*batch)
    assert len([body for path, _, body in behaviour.requests if path == "/v1/completions"]) == 2  # the probes


def test_a_server_of_another_model_is_refused(served, tokenizer, batch):
    url, behaviour = served
    with pytest.raises(ServerError, match=r"serves 'tiny'; 'big' is asked for.*--served-model-name"):
        ServerTeacher(url, "big", tokenizer=tokenizer).score(*batch)
    teacher = of(url, tokenizer)
    assert teacher.check()["id"] == "tiny"
    behaviour.answer_as = "other"  # restarted with something else
    with pytest.raises(ServerError, match="answered with model 'other' where 'tiny' was asked"):
        teacher.score(*batch)


def test_another_tokenizer_is_refused(served, tokenizer, batch, caplog):
    url, behaviour = served
    with pytest.raises(VocabularyError, match="first difference is at token"):
        of(url, byte_tokenizer(("a", "b"))).score(*batch)
    behaviour.has_tokenize = False
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<extra>"])
    with pytest.raises(VocabularyError, match="does not know token 259"):
        of(url, larger).score(*batch)
    with caplog.at_level(logging.WARNING):
        of(url, tokenizer).score(*batch)
    assert "cannot be compared" in caplog.text


def _short(answer):
    answer["choices"][0]["prompt_logprobs"].pop()


def _fewer(answer):
    entry = answer["choices"][0]["prompt_logprobs"][1]
    entry.pop(next(reversed(entry)))
    entry.pop(next(reversed(entry)))


def _nan(answer):
    for item in answer["choices"][0]["prompt_logprobs"][1].values():
        item["logprob"] = float("nan")


def _logits(answer):
    for item in answer["choices"][0]["prompt_logprobs"][1].values():
        item["logprob"] += 9.0


def _nothing(answer):
    answer["choices"][0]["prompt_logprobs"] = None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_short, ServerError, "for 1 tokens where 2 were sent"),
        (_fewer, ServerError, "where 8 tokens and the next one"),
        (_nan, NonFiniteError, "NaN"),
        (_logits, ServerError, "sum to a probability of.*raw_logprobs"),
        (_nothing, ServerError, "for 0 tokens where 2 were sent"),
    ],
)
def test_an_answer_that_lacks_something_is_never_used(served, tokenizer, batch, change, error, match):
    served[1].change = change
    with pytest.raises(error, match=match):
        of(served[0], tokenizer, top_k=8).score(*batch)


def test_a_minus_infinity_that_json_cannot_hold_comes_back(served, tokenizer, batch):
    def clamp(answer):
        for entry in answer["choices"][0].get("prompt_logprobs", [None])[1:]:
            if len(entry) > 1:  # not where own tokens alone are asked for
                entry[list(entry)[-1]]["logprob"] = -9999.0

    served[1].change = clamp
    signal = of(served[0], tokenizer, top_k="all").score(*batch)
    assert bool(torch.isinf(signal.logprobs[:, -1]).all())


def test_a_row_longer_than_the_server_takes_is_refused(served, tokenizer):
    served[1].max_model_len = 10
    ids = torch.full((1, 12), 7)
    teacher = of(served[0], tokenizer)
    assert teacher.max_length == 9
    with pytest.raises(DataError, match=r"12 tokens.*takes 9\. Set max_length=9, or .*--max-model-len 13"):
        teacher.score(ids, torch.ones_like(ids), torch.tensor([10]))


def test_the_key_reaches_the_server_and_nothing_else(served, tokenizer, batch, monkeypatch, caplog):
    url, behaviour = served
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-42")
    teacher = of(url, tokenizer, api_key_env="TEACHER_KEY", max_retries=0)
    with caplog.at_level(logging.DEBUG):
        teacher.score(*batch)
        behaviour.failures = [503]
        with pytest.raises(ServerError) as error:
            teacher.score(*batch)
    assert behaviour.requests[0][1]["Authorization"] == "Bearer sk-secret-42"
    for shown in (repr(teacher), repr(teacher.client), repr(teacher.source), str(error.value), caplog.text):
        assert "secret" not in shown
    assert "secret" not in str(teacher.__getstate__())
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="TEACHER_KEY, named by api_key_env, is not set"):
        of(url, tokenizer, api_key_env="TEACHER_KEY").check()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"url": "http://user:pass@host:1"}, "credentials"),
        ({"url": "http://host:1?key=sk"}, "credentials"),
        ({"url": "host:8000"}, "address of a server"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": "most"}, "top_k='most'"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"max_retries": -1}, "max_retries=-1"),
    ],
)
def test_bad_settings_are_refused_at_once(options, match):
    with pytest.raises(ConfigError, match=match) as error:
        ServerTeacher(**{"url": "http://host:1", "model": "tiny", **options})
    assert "pass" not in str(error.value).replace("Pass", "") and "sk" not in str(error.value)


@pytest.mark.parametrize(
    "make", [ServerTeacher, partial(ServerTeacher, signal="hidden"), ServerWriter, TextServerTeacher]
)
def test_every_teacher_behind_a_server_takes_and_shows_the_same_connection(make):
    given = {
        "url": "http://host:1/v1", "model": "tiny", "name": "math", "timeout": 1.5, "max_concurrency": 3,
        "max_retries": 0, "api_key_env": "MY_KEY", "repo": "org/tiny", "revision": "v1", "license": "mit",
    }  # fmt: skip
    assert set(given) == {field.name for field in dataclasses.fields(Connection)}
    teacher = make(**given)
    held = getattr(teacher, "writer", teacher)  # a teacher that is asked in words holds who answers
    assert {name: getattr(held.connection, name) for name in given} == given
    assert held.client.root == "http://host:1" and held.client.max_concurrency == 3 and teacher.name == "math"
    shown = set(inspect.signature(make).parameters)
    assert set(given) <= shown and not {"connection", "args", "options"} & shown
    documented = inspect.getdoc(getattr(make, "func", make))
    assert all(f"    {field.name}: " in documented for field in dataclasses.fields(Connection))
    with pytest.raises(ConfigError, match=r"Unknown setting 'max_retry'\. Did you mean 'max_retries'"):
        make("http://host:1", "tiny", max_retry=1)


@pytest.mark.parametrize(
    ("url", "model"),
    [("https://api.openai.com/v1", "gpt-4o"), ("https://api.anthropic.com", "x"), ("http://127.0.0.1:9", "gpt-4o")],
)
def test_closed_apis_are_refused_before_the_first_request(url, model, tokenizer, tmp_path, monkeypatch, student_dir):
    def never(*args, **kwargs):
        raise AssertionError("a request was sent")

    monkeypatch.setattr(client.Client, "_once", never)
    teacher = ServerTeacher(url, model, tokenizer=tokenizer, license="apache-2.0")
    with pytest.raises(LicenseRefusedError):
        capture([{"text": "x"}], teacher, tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()
    run = RunLineage(method="teacher_panel", student=Source("student", ref=student_dir), teachers=[teacher.source])
    with pytest.raises(LicenseRefusedError):
        run.require_trainable()


def test_lineage_names_host_and_model_and_reads_the_terms_of_the_weights(tmp_path, tokenizer):
    path = save_tiny(tmp_path / "weights", license="mit")
    teacher = ServerTeacher("http://10.0.0.1:8000", "served", tokenizer=tokenizer, repo=path)
    run = RunLineage(method="x", student=Source("s", license="apache-2.0"), teachers=[teacher.source])
    node = next(n for n in run.graph.nodes.values() if n.endpoint)
    assert (node.endpoint, node.model, node.licenses) == ("10.0.0.1", "served", ("mit",))


def test_the_tokenizer_comes_from_the_weights_or_is_asked_for(teacher_dir, tokenizer):
    assert ServerTeacher("http://h:1", teacher_dir).vocabulary.size == 259
    assert ServerTeacher("http://h:1", "alias", tokenizer=teacher_dir).vocabulary.size == 259
    with pytest.raises(ConfigError, match=r"ServerTeacher\(\.\.\., tokenizer="):
        ServerTeacher("http://h:1").vocabulary  # noqa: B018
    with pytest.raises(ConfigError, match="directory or hub id"):
        ServerTeacher("http://h:1", "no-such-model").vocabulary  # noqa: B018


def test_a_copy_asks_again(served, tokenizer, batch):
    teacher = of(served[0], tokenizer, top_k=4)
    expected = teacher.score(*batch)
    assert torch.equal(copy.deepcopy(teacher).score(*batch).ids, expected.ids)


def test_threads_ask_the_server_what_it_is_once(served, tokenizer):
    import threading

    teacher = of(served[0], tokenizer)
    threads = [threading.Thread(target=teacher.check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path for path, _, _ in served[1].requests].count("/v1/models") == 1
