"""Servers generate ahead while the trainer trains: how stale tokens may be, what that gains, and what it costs."""

import functools
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from kd_plugin.errors import ConfigError
from kd_plugin.rollouts.vllm.ahead import Lookahead
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.teachers import LocalTeacher, client
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import ages_of_tokens, assert_same, losses, prompts, weights
from tests.hosts.test_rollout_engine import block, plain, trl


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture
def served(untied_student_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
    with fake_vllm(model, tokenizer, Behaviour()) as (url, behaviour):
        yield url, behaviour


def test_windows_are_fetched_ahead_and_none_is_lost():
    for count in (1, 3, 7):
        windows = iter([[i] for i in range(count)])
        ahead, seen, begun = Lookahead(2), [], {}
        iterator = object()
        for step in range(count):
            window, fetched = ahead.next(iterator, functools.partial(next, windows, []))
            begun |= {tuple(rows): step + more for more, rows in fetched}
            seen.append(window[0])
        assert seen == list(range(count)) and begun == {(i,): i for i in range(count)}
        assert ahead.next(iterator, lambda: []) == ([], [])
    ahead.next("a", lambda: [1])
    assert ahead.next("b", lambda: [2])[0] == [2], "another epoch: what waited is dropped"


@pytest.mark.parametrize("host", [trl, plain])
@pytest.mark.parametrize("staleness", [1, 3])
def test_no_token_is_older_than_allowed_and_each_says_how_old(
    host, staleness, served, teacher, untied_student_dir, tmp_path, monkeypatch
):
    seen = ages_of_tokens(monkeypatch)
    chosen = block(served[0], sync="reload", max_staleness=staleness, chunk=4)
    run = host(tmp_path, untied_student_dir, teacher, chosen, max_steps=6)
    run.train()
    assert len(seen) == 6 and set(seen[0]) == {0}
    assert all(0 <= age <= staleness for ages in seen for age in ages)
    assert max(age for ages in seen for age in ages) == staleness
    logged = [entry for entry in run.state.log_history if "rollouts/staleness" in entry]
    assert len(logged) == 6 and 0 < logged[-1]["rollouts/staleness"] <= staleness
    for name in ("rollouts/trainer_waits", "rollouts/engines_wait"):
        assert all(0 <= entry[name] <= 1 for entry in logged)
    assert all(entry["rollouts/trained_per_second"] > 0 for entry in logged)
    assert not run.server_engine._begun, "nothing was generated for steps that do not come"


@pytest.mark.parametrize("host", [trl, plain])
def test_without_staleness_it_is_the_synchronous_run(host, served, teacher, untied_student_dir, tmp_path):
    mine = host(tmp_path / "a", untied_student_dir, teacher, block(served[0], sync="reload", max_staleness=0))
    mine.train()
    theirs = host(tmp_path / "b", untied_student_dir, teacher, None)
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-4, abs=1e-4)
    assert_same(weights(mine), weights(theirs), 1e-4)


def test_responses_go_on_with_newer_weights_and_are_not_begun_anew(
    served, teacher, untied_student_dir, tmp_path, monkeypatch
):
    """A response that is under way at a sync has tokens of both versions, and each token is drawn once."""
    url, behaviour = served
    behaviour.per_token = 0.02
    mixed, generate = [], ServerEngine.generate

    def noted(self, prompts):
        found = generate(self, prompts)
        mixed.extend(one.versions for one in found if len(set(one.versions)) > 1)
        return found

    monkeypatch.setattr(ServerEngine, "generate", noted)
    chosen = block(url, sync="reload", max_staleness=4, chunk=2, max_concurrency=2)
    plain(tmp_path, untied_student_dir, teacher, chosen, max_steps=6).train()
    assert mixed and all(versions == sorted(versions) for versions in mixed)
    sent = [body for path, _, body in behaviour.requests if path == "/v1/completions" and "seed" in body]
    firsts = [body for body in sent if len(body["prompt"][0]) < 20]
    assert len({(body["seed"], len(body["prompt"][0])) for body in sent}) == len(sent) and firsts


def test_a_resumed_run_generates_anew_what_was_waiting(served, teacher, untied_student_dir, tmp_path):
    chosen = block(served[0], sync="reload", max_staleness=2)
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    plain(tmp_path, untied_student_dir, teacher, chosen, **common).train()
    again = plain(tmp_path, untied_student_dir, teacher, chosen, **common)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [entry for entry in again.state.log_history if "rollouts/staleness" in entry]
    assert again.state.global_step == 5 and logged[-3]["rollouts/staleness"] == 0


class Slow(TrainerCallback):
    """Trains as long as a large student would."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_pre_optimizer_step(self, *args, **kwargs):
        time.sleep(self.seconds)


@pytest.mark.slow
def test_where_both_sides_take_equally_long_it_is_faster(served, teacher, untied_student_dir, tmp_path):
    """Both sides wait, as real ones would on nodes of their own; here they share two cores."""
    url, behaviour = served
    behaviour.script = lambda prompt, count: [20 + len(prompt) % 50] * count
    tokens, seconds, steps = 10, 4.0, 12  # an epoch
    behaviour.per_token = seconds / tokens
    took = {}
    for staleness in (0, 1):
        chosen = block(url, sync="reload", max_staleness=staleness, chunk=5)
        options = {"max_steps": steps, "per_device_train_batch_size": 2}
        run = plain(tmp_path / str(staleness), untied_student_dir, teacher, chosen, **options)
        run.add_callback(Slow(seconds))
        began = time.monotonic()
        run.train()
        took[staleness] = time.monotonic() - began
    # The first batch has nothing to overlap with
    gain = took[0] / took[1]
    print(f"{steps} steps: {took[0]:.1f} s synchronous, {took[1]:.1f} s with max_staleness=1: {gain:.2f} times as fast")
    assert took[0] > 2 * seconds * steps and gain >= 1.6


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 4])
def test_held_out_divergence_is_that_of_a_synchronous_run(staleness, teacher, untied_student_dir, tokenizer, tmp_path):
    """After equal updates, mean of three seeds: within 2%."""
    found = {0: [], staleness: []}
    for seed in (1, 2, 3):
        for stale in found:
            model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
            with fake_vllm(model, tokenizer, Behaviour()) as (url, _):
                chosen = block(url, sync="reload", max_staleness=stale)
                options = {"max_steps": 40, "learning_rate": 1e-3, "seed": seed, "logging_steps": 40}
                run = plain(tmp_path / f"{seed}-{stale}", untied_student_dir, teacher, chosen, **options)
                run.train()
                held = [{"prompt": row["prompt"] + " and then"} for row in prompts(count=24)]
                found[stale].append(run.evaluate(type(prompts()).from_list(held))["eval_loss"])
    means = {stale: sum(values) / 3 for stale, values in found.items()}
    start = plain(tmp_path / "start", untied_student_dir, teacher, None)
    print(
        f"max_staleness={staleness}: {means[staleness]:.4f} nats, synchronous {means[0]:.4f}: "
        f"{means[staleness] / means[0] - 1:+.2%}; {found}"
    )
    assert abs(means[staleness] / means[0] - 1) < 0.02 and start is not None


def test_what_does_not_go_with_staleness_is_refused(teacher, untied_student_dir, tmp_path):
    chosen = block("http://127.0.0.1:1", sync="reload", max_staleness=1)
    with pytest.raises(ConfigError, match="on_policy_fraction below 1"):
        trl(tmp_path, untied_student_dir, teacher, chosen, on_policy_fraction=0.5)
