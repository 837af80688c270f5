"""Asking a server for text: what is read of its answers, and every way in which servers fail."""

import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from kd_plugin.cache.targets import Generation
from kd_plugin.errors import ConfigError, LicenseRefusedError, ServerError
from kd_plugin.teachers import client
from kd_plugin.text import Answer, Ask, Budget, Prices, ServerWriter, Usage, Writer, in_order
from kd_plugin.text.writers import split_reasoning
from tests.scripted_writer import Script, scripted_writer

HOW = Generation(max_new_tokens=16, temperature=0.7, top_p=0.9)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def served():
    with scripted_writer(Script(write=lambda body: f"<think>hm</think>\n{body['messages'][-1]['content']}!")) as found:
        yield found


def asks(count, how=HOW):
    return [Ask(f"question {i}", how, seed=i) for i in range(count)]


def test_a_request_says_what_was_asked_and_the_answer_is_read(served, monkeypatch):
    url, script = served
    monkeypatch.setenv("MY_KEY", "k-123")
    writer = ServerWriter(url + "/v1/", request={"top_k": 5, "seed": None}, api_key_env="MY_KEY")
    assert isinstance(writer, Writer)
    asked = Ask([{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}], HOW, seed=3)
    assert in_order(writer, [asked]) == [Answer("1+1!", "hm", "stop", Usage(2, 2), "scripted")]
    ((_, body),) = script.log
    assert body == {
        "model": "scripted",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}],
        "max_tokens": 16,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
    }
    assert script.headers[0]["Authorization"] == "Bearer k-123" and "k-123" not in repr(vars(writer))


def test_completions_take_texts_and_no_conversations(served):
    url, script = served
    script.write = lambda body: body["prompt"] + " done"
    writer = ServerWriter(url, api="completions")
    assert in_order(writer, [Ask("go", HOW)])[0].text == "go done"
    with pytest.raises(ConfigError, match="Use api: chat"):
        in_order(writer, [Ask([{"role": "user", "content": "x"}], HOW)])
    with pytest.raises(ConfigError, match=r"Unknown api 'chats'.*Did you mean 'chat'"):
        ServerWriter(url, api="chats")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("made", "text", "reasoning"),
    [
        ("plain", "plain", None),
        ("<think>\nwhy\n</think>\n\nso", "so", "why"),
        ("why</think>so", "so", "why"),
        ("\n<think>never ends", "", "never ends"),
        ("the tag <think> is written </think> so", "the tag <think> is written </think> so", None),
        ({"content": "so", "reasoning_content": "why"}, "so", "why"),
        ({"content": "so", "reasoning": "why"}, "so", "why"),
        ({"content": "so</think>", "reasoning_content": "why"}, "so</think>", "why"),
        ({"content": None, "reasoning_content": "cut off", "finish_reason": "length"}, "", "cut off"),
    ],
)
def test_reasoning_is_kept_apart(served, made, text, reasoning, stream):
    url, script = served
    script.write = lambda body: made
    (answer,) = in_order(ServerWriter(url, stream=stream), asks(1))
    assert (answer.text, answer.reasoning) == (text, reasoning)
    assert answer.usage is not None and answer.finished == (not isinstance(made, dict) or "finish_reason" not in made)


def test_content_in_parts_is_joined(served):
    url, script = served
    script.counts_usage = False
    script.write = lambda body: {"content": "x", "model": "scripted"}
    writer = ServerWriter(url)
    part = {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}, "finish_reason": "x"}]}
    assert writer._read(part) == Answer("ab", None, "x")
    assert split_reasoning("a</think>b</think>c") == ("b</think>c", "a")


@pytest.mark.parametrize(
    ("fault", "stream"),
    [
        (500, False), (503, True), (429, False), ((429, {"Retry-After": "0.1"}), True), ("drop", False), ("drop", True),
        ("half", False), ("cut json", False), ("cut stream", True), ("error event", True), ("empty", False),
        ("no end", False), ("hang", False),
    ],
)  # fmt: skip
def test_a_fault_is_asked_again_and_nothing_half_is_kept(served, fault, stream, caplog):
    url, script = served
    script.hang, script.faults = 1.0, [fault] * 2
    writer = ServerWriter(url, stream=stream, max_retries=2, timeout=0.5 if fault == "hang" else 20)
    with caplog.at_level(logging.WARNING):
        answers = in_order(writer, asks(8))
    assert [a.text for a in answers] == [f"question {i}!" for i in range(8)]
    assert [a.reasoning for a in answers] == ["hm"] * 8
    assert len(script.log) == 10 and max(script.answered.values()) == 1 and "attempt 1 of 3 failed" in caplog.text


def test_a_proxy_of_the_environment_is_used(served, monkeypatch):
    url, script = served
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (answer,) = in_order(ServerWriter("http://far.invalid", "scripted", max_retries=0), [Ask("Hello", HOW)])
    assert answer.text == "Hello!" and script.headers[-1]["Host"] == "far.invalid"
    monkeypatch.setenv("no_proxy", "far.invalid")
    with pytest.raises(ServerError, match="gave no answer"):
        in_order(ServerWriter("http://far.invalid", "scripted", max_retries=0), [Ask("Hello", HOW)])


def test_a_page_of_a_proxy_is_one_clear_error(served):
    url, script = served
    script.faults = ["html"]
    with pytest.raises(ServerError, match=r"answered HTML: '<!DOCTYPE html>.*OpenAI-compatible server\?"):
        in_order(ServerWriter(url), asks(1))


def test_no_request_is_sent_before_the_time_that_the_server_asked_for(served):
    url, script = served
    in_order(ServerWriter(url), asks(1))
    for header in (lambda: "1", lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=2))):
        script.log.clear()
        script.faults = [(429, {"Retry-After": header()})]
        answers = in_order(ServerWriter(url, max_concurrency=2, max_retries=0), asks(6))
        assert len(answers) == 6
        times = [at for at, _ in script.log]
        assert times[-1] - times[0] >= 0.9 and len(times) == 7
        # One other request may have been on its way; none was sent in the time after
        assert sum(at - times[0] > 0.3 for at in times) == sum(at - times[0] > 0.9 for at in times)


def test_a_wait_of_hours_is_an_error_and_obeying_does_not_use_up_attempts(served):
    url, script = served
    script.faults = [(429, {"Retry-After": "7200"})]
    with pytest.raises(ServerError, match=r"asks to wait 2.0 hours"):
        in_order(ServerWriter(url), asks(1))
    script.faults = [(429, {"Retry-After": "0.02"})] * 12
    assert in_order(ServerWriter(url, max_retries=1), asks(1))[0].text == "question 0!"


def test_a_dead_server_ends_in_one_error_after_what_is_under_way(served):
    url, script = served
    script.latency = 0.05
    answered = []

    def late(body):
        while len(script.log) < 3:  # all three are under way, however busy the machine is
            time.sleep(0.01)
        time.sleep(0.3)
        return "late"

    script.write = late
    script.faults = [None, None, 503]
    with pytest.raises(ServerError, match="gave no answer in 1 attempt"):
        answered.extend(k for k, _ in ServerWriter(url, max_concurrency=3, max_retries=0).answers(enumerate(asks(50))))
    assert len(set(answered)) == len(answered) == 2 and set(answered) < {0, 1, 2}  # requests come in any order
    assert len(script.log) == 3


def test_a_prompt_that_is_refused_is_an_answer_and_all_of_them_are_an_error(served):
    url, script = served
    script.faults = [400, 413]
    found = in_order(ServerWriter(url, max_concurrency=1), asks(4))
    assert [a.ended for a in found] == ["refused", "refused", "stop", "stop"] and found[0].says == "made to fail"
    script.faults = [400] * 100
    with pytest.raises(ServerError, match=r"each of the first \d+ prompts\. Change what every request says"):
        in_order(ServerWriter(url), asks(100))
    assert len(script.log) < 4 + 16 + 33
    for status, match in ((401, "status 401"), (404, "status 404"), (307, "status 307")):
        script.faults = [status]
        with pytest.raises(ServerError, match=match):
            in_order(ServerWriter(url), asks(1))


def test_names_are_judged_before_the_first_prompt_and_before_an_answer_is_used(served):
    url, script = served

    def admit(names):
        if any("gpt" in name for name in names):
            raise LicenseRefusedError(f"refused: {names}")

    script.models = [{"id": "scripted", "root": "openai/gpt-4o"}]
    writer = ServerWriter(url)
    writer.gate(admit)
    with pytest.raises(LicenseRefusedError):
        in_order(writer, asks(1))
    assert not script.log
    script.models = [{"id": "scripted"}, {"id": "other"}]
    with pytest.raises(ServerError, match="serves 'scripted', 'other'; no model is named"):
        in_order(ServerWriter(url), asks(1))
    script.write = lambda body: {"content": "x", "model": "gpt-4o-2024" if "3" in str(body["messages"]) else "scripted"}
    writer = ServerWriter(url, "scripted", max_concurrency=1)
    writer.gate(admit)
    found = []
    with pytest.raises(LicenseRefusedError, match="gpt-4o-2024"):
        found.extend(writer.answers(enumerate(asks(6))))
    assert [key for key, _ in found] == [0, 1, 2]


def test_an_address_with_a_version_of_its_own_is_left_as_it_is(served, caplog):
    url, _ = served
    writer = ServerWriter(url + "/api/paas/v4", "glm")
    assert in_order(writer, asks(1))[0].text == "question 0!"
    assert writer.client.root.endswith("/v4") and "does not list 'glm'" in caplog.text


def test_requests_are_sent_no_further_than_there_is_room(served):
    url, script = served
    script.latency = 0.05
    read = []

    def endless():
        for i in range(10**9):
            read.append(i)
            yield i, Ask(str(i), HOW)

    found = ServerWriter(url, max_concurrency=4).answers(endless())
    for _ in range(10):
        next(found)
    found.close()
    assert len(read) <= 10 + 4 + 4 and script.most_at_once <= 4


PRICES = Prices(read=1.0, written=10.0, cached=0.1)


def test_costs_are_by_price_and_a_ceiling_is_never_passed():
    assert PRICES.cost(Usage(1_000_000, 100_000, 500_000)) == pytest.approx(0.5 + 0.05 + 1.0)
    budget, ask = Budget(0.001), Ask("x" * 36, HOW)
    most = PRICES.most(ask)
    assert most == pytest.approx((36 + 64 + 16 * 10) / 1e6)
    taken = 0
    while budget.reserve(PRICES, ask):
        taken += 1
    assert taken == 3  # 3 * 0.00026
    for _ in range(taken):
        budget.settle("t", PRICES, ask, Answer("x", usage=Usage(10, 16)))
    assert budget.spent == pytest.approx(3 * 170e-6) and budget.usage["t"] == Usage(30, 48)
    assert budget.reserve(PRICES, ask) and not budget.reserve(PRICES, ask)


def test_a_ceiling_needs_a_server_that_counts_and_prices_are_checked():
    with pytest.raises(ServerError, match="the ceiling of 1 cannot be held"):
        Budget(1.0).count("t", PRICES, None)
    free = Budget()
    free.count("t", PRICES, None)
    assert free.uncounted == {"t": 1} and free.spent == 0
    with pytest.raises(ConfigError, match=r"prices: unknown key 'writen'. Did you mean 'written'"):
        Prices.of({"writen": 3})
    with pytest.raises(ConfigError, match="read=-1"):
        Prices.of({"read": -1})
    with pytest.raises(ConfigError, match="ceiling=-1"):
        Budget(-1.0)


def test_no_more_are_asked_than_at_a_time_until_answers_are_taken():
    """A kill may cost what is under way, and nothing that came: a thread waits until its answer was written down."""
    with scripted_writer(Script()) as (url, script):
        answers = ServerWriter(url, "scripted", max_concurrency=3).answers(enumerate(asks(9)))
        for taken in range(9):
            next(answers)
            time.sleep(0.05)
            assert len(script.log) <= taken + 3
        assert next(answers, None) is None and len(script.log) == 9
