"""A student on a server calls tools: turns go on from what a tool said, and its words are not trained on."""

from pathlib import Path

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM

from kd_plugin.errors import ConfigError
from kd_plugin.rollouts import Drawn
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.trl.generation import TRLEngine
from tests.core.test_cache_templates import tokenizer_with
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import assert_same, losses, prompts, settings, weights
from tests.hosts.test_rollout_engine import block
from tests.tiny import save_tiny

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 40}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(QWEN3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student and a teacher that read what a tool's description takes, byte by byte."""
    place, more = tmp_path_factory.mktemp("models"), {"variant": "untied", "max_position_embeddings": 2048}
    return [save_tiny(place / str(seed), seed=seed, **more) for seed in (1, 2)]


@pytest.fixture(scope="module")
def writes(tokenizer):
    """Return what a student answers to a prompt: about the sea it calls the tool, twice, and then it says something."""

    def answer(prompt: list[int], count: int = 512) -> list[int]:
        text = tokenizer.decode(prompt)
        results = text.count("<tool_response>\n42\n</tool_response>")
        said = CALL if "sea" in text and results < 2 else f"after {results} results<|im_end|>"
        return tokenizer(said, add_special_tokens=False)["input_ids"][:count]

    return answer


def trainer(directory, models, tokenizer, engine, calls, **options):
    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: the first.
            b: the second.

        Returns:
            Their sum.
        """
        calls.append((a, b))
        return a + b

    common = {"max_completion_length": 400, "divergence": "reverse_kl", "max_steps": 2, "learning_rate": 1e-3}
    common |= {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 1}
    student, teacher = models
    return TeacherPanelTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_models={"t": LocalTeacher(teacher, dtype="float32", tokenizer=tokenizer)},
        args=TeacherPanelConfig(**settings(directory, rollout_engine=engine, **{**common, **options})),
        train_dataset=prompts("conversational", count=8),
        processing_class=tokenizer,
        tools=[add],
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_turns_go_on_from_what_a_tool_said(staleness, writes, tokenizer, models, tmp_path, monkeypatch):
    """The run is that of a student that writes the same in this process."""
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32).eval()
    with fake_vllm(model, tokenizer, Behaviour(script=writes, max_model_len=2048)) as (url, behaviour):
        mine_called: list = []
        chosen = block(url, sync="reload", max_staleness=staleness)
        mine = trainer(tmp_path / "a", models, tokenizer, chosen, mine_called)
        seen = []
        score = mine.panel_step.score

        def scored(assigned, rollouts, **kwargs):
            seen.append((rollouts, kwargs["used"]))
            return score(assigned, rollouts, **kwargs)

        monkeypatch.setattr(mine.panel_step, "score", scored)
        mine.train()
    monkeypatch.setattr(TRLEngine, "generate", lambda self, rows: [Drawn(writes(list(row))) for row in rows])
    called: list = []
    theirs = trainer(tmp_path / "b", models, tokenizer, None, called)
    theirs.train()
    assert mine_called == called and set(called) == {(2, 40)} and len(called) == 2, "one row calls it twice"
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-4) and len(losses(mine)) == 2
    assert_same(weights(mine), weights(theirs), 1e-4)
    # What the student wrote is trained on, and what the tool said is not
    texts = []
    for rollouts, used in seen:
        for row, mask in zip(rollouts.input_ids[:, rollouts.completion_start :].tolist(), used, strict=True):
            texts.append(tokenizer.decode([token for token, is_used in zip(row, mask, strict=True) if is_used]))
    assert sum(text == CALL + CALL + "after 2 results<|im_end|>" for text in texts) == 1
    assert sum(text == "after 0 results<|im_end|>" for text in texts) == 7
    first = [body for path, _, body in behaviour.requests if path == "/v1/completions" and "seed" in body]
    assert len(first) == 8 + 2 and len({body["seed"] for body in first}) == len(first), "each turn draws anew"


def test_the_ratio_of_sampled_tokens_is_refused_with_tools(tokenizer, models, tmp_path):
    """A tool's words have no log-probability where they were drawn."""
    with pytest.raises(ConfigError, match=r"estimator='sampled' \(teacher 't'\).*tools"):
        chosen, own = block("http://127.0.0.1:1", sync="reload"), {"estimator": "sampled", "top_k": 0}
        trainer(tmp_path, models, tokenizer, chosen, [], **own)
