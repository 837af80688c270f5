"""Responses, completions and prompts without a token: in rollouts, captures, metrics and traces."""

import json

import pytest
import torch
from datasets import Dataset

from kd_plugin import LocalTeacher, ServerTeacher, capture
from kd_plugin.cache import Generation, TopK
from kd_plugin.cli.main import main
from kd_plugin.errors import DataError
from kd_plugin.rollouts import Drawn
from kd_plugin.rollouts.rows import as_responses, completion_ids, render
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.core.cache_help import prompt_rows
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import assert_same, losses, prompts, settings, weights
from tests.tiny import byte_tokenizer

WATCHED = {"save_rollouts": 2, "anchor_weight": 0.1, "length_alarm": 3.0, "repetition_alarm": 0.9, "max_steps": 1}


@pytest.fixture(scope="module")
def local(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


def panel(out, student, teacher, dataset, empty=None, **options):
    chosen = {"divergence": "reverse_kl", "max_completion_length": 6, **WATCHED, **options}
    made = TeacherPanelTrainer(
        model=student,
        teacher_models={"t": teacher},
        args=TeacherPanelConfig(**settings(out, **chosen)),
        train_dataset=dataset,
    )
    if empty is not None:  # as an engine that leaves the end token out, or was interrupted, answers
        respond = made.panel_step.respond
        made.panel_step.respond = lambda *args: [
            Drawn([]) if empty(row) else one for row, one in enumerate(respond(*args))
        ]
    return made


@pytest.mark.parametrize("kind", ["local", "server"])
@pytest.mark.parametrize("which", ["some", "all"])
def test_rollouts_without_a_token(kind, which, local, tokenizer, student_dir, teacher_dir, tmp_path, capsys):
    with fake_vllm(local.model, tokenizer) as (url, _):
        teacher, options = local, {}
        if kind == "server":
            teacher = ServerTeacher(url, repo=teacher_dir, license="apache-2.0", top_k=16)
            options = {"estimator": "topk_tail"}
        made = panel(tmp_path, student_dir, teacher, prompts(), lambda row: which == "all" or row % 2 == 1, **options)
        made.train()
    (loss,) = losses(made)
    assert loss == 0.0 if which == "all" else loss > 0.0
    assert main(["trace", str(tmp_path), "-o", str(tmp_path / "trace.html")]) == 0


def test_a_row_without_a_token_leaves_the_others_as_they_are(local, student_dir, tmp_path):
    """The mean is over the tokens of the other rows, as if it were not there."""
    options = {"learning_rate": 0.1, "anchor_weight": 0.0, "gradient_accumulation_steps": 2, "optim": "sgd"}
    mixed = panel(tmp_path / "a", student_dir, local, prompts(), lambda row: row % 2 == 1, **options)
    masked = panel(tmp_path / "b", student_dir, local, prompts(), **options)
    score = masked.panel_step.score

    def without(assigned, rollouts, used, **options):
        used = [[0] * len(flags) if row % 2 else flags for row, flags in enumerate(used)]
        return score(assigned, rollouts, used=used, **options)

    masked.panel_step.score = without
    for made in (mixed, masked):
        torch.manual_seed(0)
        made.train()
    assert losses(mixed) == pytest.approx(losses(masked), rel=1e-5)
    assert_same(weights(mixed), weights(masked), 1e-5)


def test_completions_of_the_dataset_without_a_token(local, student_dir, tmp_path):
    rows = prompts().add_column("completion", ["" if i % 2 else " some words" for i in range(24)])
    made = panel(tmp_path, student_dir, local, rows, on_policy_fraction=0.0)
    made.train()
    assert losses(made)[0] > 0
    tokenizer = byte_tokenizer()
    assert completion_ids(tokenizer, {"prompt": "a", "completion": ""}, end_tokens=[2], max_length=4) == [2]
    with pytest.raises(DataError, match="has no `completion` to fill in"):
        completion_ids(tokenizer, {"prompt": "a", "completion": None}, end_tokens=[2], max_length=4)


def test_a_prompt_without_a_token_is_refused(local, student_dir, tmp_path):
    rows = Dataset.from_dict({"prompt": ["", "hello"] * 12})
    with pytest.raises(DataError, match=r"of 4 prompts have no token"):
        panel(tmp_path, student_dir, local, rows).train()
    with pytest.raises(DataError, match=r"1 of 2 prompts have no token"):
        render(byte_tokenizer(), ["", "hello"])


def test_a_response_without_a_token_was_not_cut():
    assert [one.truncated for one in as_responses([[], [5], [5, 2]], [2])] == [False, True, False]


def test_a_server_that_writes_nothing_for_some_prompts(local, tokenizer, teacher_dir, tmp_path):
    generation = Generation(max_new_tokens=4, keep_unfinished=True)
    options = {"targets": TopK(4), "generate": generation, "progress": False}
    with fake_vllm(local.model, tokenizer, Behaviour(writes_nothing=True)) as (url, behaviour):
        teacher = ServerTeacher(url, repo=teacher_dir, license="apache-2.0")
        assert teacher.generate_tokens([[5, 6]], [3], [1], temperature=1.0)[0].ids == []
        with pytest.raises(DataError, match="2 nothing to score"):
            capture([{"prompt": "a"}, {"prompt": "b"}], teacher, tmp_path / "none", **options)
        asked = []

        def some(answer):
            asked.append(1)
            behaviour.writes_nothing = len(asked) % 2 == 0

        behaviour.change, behaviour.writes_nothing = some, False
        cache = capture([{"prompt": p} for p in "abcdef"], teacher, tmp_path / "some", **options)
        assert 0 < len(cache) < 6 and cache.manifest.dropped == {"nothing to score": 6 - len(cache)}


def test_nothing_is_asked_of_a_server_for_nothing(local, tokenizer, teacher_dir):
    with fake_vllm(local.model, tokenizer) as (url, behaviour):
        teacher = ServerTeacher(url, repo=teacher_dir)
        assert teacher.score_tokens([], []) == [] == teacher.generate_tokens([], [], [], temperature=1.0)
        with pytest.raises(DataError, match="empty; a server goes on from one token at least"):
            teacher.generate_tokens([[]], [3], [1], temperature=1.0)
        assert not behaviour.requests


@pytest.mark.parametrize("generate", [None, Generation(max_new_tokens=4, keep_unfinished=True)])
@pytest.mark.parametrize("kind", ["local", "server"])
def test_rows_of_a_capture_without_a_token(kind, generate, local, tokenizer, teacher_dir, tmp_path):
    full = prompt_rows(1)[0]
    empty = [{"prompt": "", "completion": ""}] if generate is None else [{"prompt": ""}]
    with fake_vllm(local.model, tokenizer) as (url, _):
        teacher = local if kind == "local" else ServerTeacher(url, repo=teacher_dir, license="apache-2.0")
        options = {"targets": TopK(4), "generate": generate, "progress": False}
        rows = [*empty, full if generate is None else {"prompt": full["prompt"]}]
        cache = capture(rows, teacher, tmp_path / "c", **options)
        # An empty completion is its end token, which a prompt without a token gives no place to be scored at
        assert len(cache) == 1
        with pytest.raises(DataError, match=r"row 0: 'messages' is a conversation without a turn"):
            capture([{"messages": []}, {"messages": []}], teacher, tmp_path / "d", **options)
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())
