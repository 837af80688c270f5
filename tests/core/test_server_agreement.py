"""A server that does not answer as one model, before sampling settings, is found out, and nothing wrong is stored."""

import random

import numpy as np
import pytest
import torch

from kd_plugin import ServerTeacher
from kd_plugin.cache import Generation, TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import ConfigError, KDError, ServerError
from kd_plugin.teachers.agreement import Repeats
from tests.core.cache_help import live_logprobs, prompt_rows
from tests.fake_vllm import fake_vllm
from tests.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("short_pauses")

DISAGREES = "answers one question in two ways"
GENERATION = Generation(n=2, max_new_tokens=8, temperature=0.6, top_p=0.9, keep_unfinished=True)


@pytest.fixture(scope="module")
def other():
    return tiny_llama(seed=9)


def of(served, teacher_dir, **options):
    return ServerTeacher(served[0], "tiny", repo=teacher_dir, **options)


def require_right(directory, local):
    """Whatever a capture stored, finished or not, is what the teacher says."""
    if not list(directory.glob("units/*.json")):
        return 0
    cache = TeacherCache(directory, allow_partial=True)
    for row in cache.dataset():
        index = torch.tensor(row["teacher_index"])
        signal = cache.signal(index[index >= 0])
        live = live_logprobs(local, row["input_ids"])[: len(index)][index >= 0].float()
        torch.testing.assert_close(signal.logprobs, live.gather(1, signal.ids), atol=2e-2, rtol=0)
    return len(cache)


def captured(served, teacher_dir, out, generation=None, rows=12, **options):
    given = prompt_rows(rows)
    if generation is not None:
        given = [{"prompt": row["prompt"]} for row in given]
    teacher = of(served, teacher_dir, max_concurrency=1, **options)
    return capture(given, teacher, out, targets=TopK(8), generate=generation, shard_rows=4, progress=False)


# What the log-probabilities are taken of


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_completions_with_other_than_raw_log_probabilities_are_refused_before_a_directory_is_made(
    served, teacher_dir, tmp_path, mode
):
    served[1].logprobs_mode = mode
    with pytest.raises(KDError, match="default --logprobs-mode raw_logprobs"):
        captured(served, teacher_dir, tmp_path / "c", GENERATION)
    assert not (tmp_path / "c").exists()


def test_scoring_does_not_need_what_is_raw_in_writing(served, local, teacher_dir, tmp_path):
    served[1].logprobs_mode = "processed_logprobs"
    captured(served, teacher_dir, tmp_path / "c")
    assert require_right(tmp_path / "c", local) == 12


def test_logits_below_zero_are_told_from_log_probabilities(served, teacher_dir):
    """As of models whose logits are all negative, so that no sum of probabilities exceeds one."""

    def lowered(answer):
        for choice in answer["choices"]:
            for entry in choice.get("prompt_logprobs", [None])[1:]:
                for item in entry.values():
                    item["logprob"] -= 30.0

    served[1].logprobs_mode, served[1].change = "raw_logits", lowered
    with pytest.raises(ServerError, match="less than any distribution gives them"):
        of(served, teacher_dir, top_k=8).check()


@pytest.mark.parametrize("top_k", [1, 8, "all"])
def test_log_probabilities_of_prompts_at_another_temperature_are_refused(served, teacher_dir, top_k):
    def scaled(answer):
        for choice in answer["choices"]:
            for entry in choice.get("prompt_logprobs", [None])[1:]:
                values = torch.tensor([item["logprob"] for item in entry.values()]) / 2
                values = values.log_softmax(-1) if top_k == "all" else values - 1.0
                for item, value in zip(entry.values(), values.tolist(), strict=True):
                    item["logprob"] = value

    served[1].change = scaled
    with pytest.raises(ServerError, match="another log-probability than one that it generates in the same place"):
        of(served, teacher_dir, top_k=top_k).check()


def test_settings_of_the_checkpoint_change_nothing(served, teacher_dir, tmp_path):
    plain = captured(served, teacher_dir, tmp_path / "a", GENERATION).dataset()
    served[1].defaults = {
        "temperature": 0.2,
        "top_k": 2,
        "top_p": 0.5,
        "repetition_penalty": 3.0,
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
    }
    assert captured(served, teacher_dir, tmp_path / "b", GENERATION).dataset()["input_ids"] == plain["input_ids"]


# Several servers behind one address


@pytest.mark.parametrize("share", [0.5, 0.125])
@pytest.mark.parametrize("generation", [None, GENERATION])
def test_replicas_with_other_weights_never_get_a_wrong_row_stored(
    local, other, tokenizer, teacher_dir, tmp_path, share, generation
):
    stopped = 0
    for seed in range(4):
        draws, asked = random.Random(seed), []

        def replica(number, draws=draws, asked=asked):
            asked.append(draws.random() < share)
            return other if asked[-1] else local.model

        with fake_vllm(local.model, tokenizer) as served:
            served[1].replica = replica
            try:
                captured(served, teacher_dir, tmp_path / f"{seed}", generation)
                assert not any(asked) or all(asked)
            except (ServerError, ConfigError):
                stopped += 1
                assert any(asked)
        if (tmp_path / f"{seed}" / "manifest.json").exists():
            require_right(tmp_path / f"{seed}", other if asked[0] else local)
    assert stopped >= 3


def test_one_wrong_answer_of_many_stops_scoring(served, other, local, teacher_dir):
    """Whichever request it is that another model answers: the probe goes with it."""
    rows = [list(range(3, 15 + i)) for i in range(6)]
    positions = [[len(row) - 2] for row in rows]
    teacher = of(served, teacher_dir, top_k=8, max_concurrency=1)
    teacher.check()
    for wrong in range(6):
        first = served[1].completions
        served[1].replica = lambda n, at=first + 1 + wrong: other if n == at else local.model
        with pytest.raises(ServerError, match=f"{DISAGREES}: a probe that goes with every request"):
            teacher.score_tokens(rows, positions)
    served[1].replica = None
    teacher.score_tokens(rows, positions)


def test_a_server_restarted_with_other_weights_stops_the_same_run(served, other, teacher_dir):
    teacher = of(served, teacher_dir, top_k=8)
    teacher.score_tokens([[5, 6, 7, 8]], [[0, 1]])
    served[1].replica = lambda number: other
    with pytest.raises(ServerError, match=DISAGREES):
        teacher.score_tokens([[5, 6, 7, 8]], [[0, 1]])


# Something that keeps answers


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("generation", [None, GENERATION])
def test_a_prefix_cache_that_repeats_another_position_is_found_out(
    served, local, teacher_dir, tmp_path, block, generation
):
    served[1].stale_block = block
    with pytest.raises(ServerError, match=f"{DISAGREES}|another log-probability"):
        captured(served, teacher_dir, tmp_path / "c", generation)
    if (tmp_path / "c").exists():
        assert not list((tmp_path / "c" / "units").glob("*.json"))


@pytest.mark.parametrize("block", [4, 16])
def test_it_is_found_out_while_training(served, teacher_dir, tokenizer, block):
    served[1].stale_block = block
    teacher = of(served, teacher_dir, top_k=8, max_concurrency=1)
    rows = [f"a common system prompt. a common answer {i}" for i in range(6)]
    ids = torch.tensor(tokenizer(rows)["input_ids"])
    positions = (torch.arange(6)[:, None] * ids.shape[1] + torch.arange(23, ids.shape[1] - 1)).flatten()
    with pytest.raises(ServerError, match=f"{DISAGREES}|another log-probability"):
        teacher.score(ids, torch.ones_like(ids), positions)


def test_rows_that_begin_alike_must_agree_there(served, teacher_dir, tokenizer):
    """Of a proxy that knows probes and repetitions, and gives later rows the values of the first one's end."""
    teacher, first = of(served, teacher_dir, top_k=8, max_concurrency=1), {}
    rows = tokenizer([f"a question, and answer {i}" for i in range(3)])["input_ids"]
    teacher.score_tokens([rows[0]], [[5]])

    def moved(answer):
        entries = answer["choices"][0]["prompt_logprobs"]
        kept = first.setdefault("entries", [dict(e) if e else e for e in entries])
        if kept is not entries and len(first) > 1:
            for i in range(1, 12):
                token = next(iter(entries[i]))
                entries[i] = {token: {"logprob": -3.0}, **kept[-1]}
        first["later"] = True

    served[1].change = moved
    with pytest.raises(ServerError, match=f"{DISAGREES}: a position in two rows that begin alike"):
        teacher.score_tokens(rows, [[4, 10, 9], [9, 4, 10], [10, 4, 9]])


def test_an_answer_for_other_tokens_is_refused(served, teacher_dir):
    teacher = of(served, teacher_dir, top_k=8)
    teacher.check()

    def another(answer):
        answer["choices"][0]["prompt_token_ids"][1] += 1

    served[1].change = another
    with pytest.raises(ServerError, match=r"answered for other tokens than were sent"):
        teacher.score_tokens([[5, 6, 7]], [[0]])


# A server that is well


@pytest.mark.parametrize("generation", [None, GENERATION])
def test_rounding_of_half_precision_raises_no_alarm(served, teacher_dir, tmp_path, generation):
    """Gaussian noise of 0.1 nats: more than SmolLM2 in bfloat16 is from itself in float32, 0.06 on average."""
    noise = np.random.default_rng(0)

    def rounded(answer):
        for choice in answer["choices"]:
            for entry in (choice.get("prompt_logprobs") or [None])[1:]:
                top = max(item["logprob"] for item in entry.values())
                for item in entry.values():
                    item["logprob"] += min(noise.normal(0, 0.1), 0.0 if item["logprob"] == top else 1.0)
            for entry in (choice.get("logprobs") or {"top_logprobs": []})["top_logprobs"]:
                for key in entry:
                    entry[key] += min(noise.normal(0, 0.1), 0.0)

    served[1].change = rounded
    assert len(captured(served, teacher_dir, tmp_path / "c", generation, rows=40)) == 40 * (
        1 if generation is None else 2
    )


def test_one_row_of_every_few_is_asked_for_twice():
    repeats = Repeats()
    asked = [repeats.next(1) for _ in range(33)]
    assert [i for i, row in enumerate(asked) if row is not None] == [0, 8, 16, 24, 32]
    many = [repeats.next(128) for _ in range(128)]
    assert len(set(many)) > 100 and all(0 <= row < 128 for row in many if row is not None)
