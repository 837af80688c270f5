"""A SmolLM2 student with a panel of two: a teacher of its tokenizer and one of another, here and on a real server."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd_plugin import ServerTeacher
from kd_plugin.lightning import TeacherPanelCorrection
from kd_plugin.panel import Estimator, TeacherPanel
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.views import View
from tests.core.panel_help import assert_same_gradients
from tests.core.test_views_chunks import loss_of, model_of
from tests.hosts.runs import losses, settings
from tests.lightning.help import Plain, trainer
from tests.tokenizers import byte_level
from tests.vllm.server import VllmServer
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks

ROWS = [
    {"prompt": [{"role": "user", "content": f"{text}?"}]} for text in ("one plus two", "the sea", "a red bird", "why")
]


@pytest.fixture(scope="module")
def places(smol, tmp_path_factory):
    """SmolLM2 with two of its layers as student and with four as teacher; and a model of 500 tokens of its own."""
    place, tokenizer = tmp_path_factory.mktemp("views"), AutoTokenizer.from_pretrained(smol)
    for name, layers in (("student", 2), ("same", 4)):
        model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.config.layer_types = None
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    other = byte_level()
    model = model_of(other, 7, hidden=128)
    model.save_pretrained(place / "other")
    other.save_pretrained(place / "other")
    for name in ("student", "same", "other"):
        (place / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return {name: str(place / name) for name in ("student", "same", "other")}


@pytest.fixture(scope="module")
def url(places, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with VllmServer(places["other"], log, "--max-model-len", "400", "--max-logprobs", "100") as server:
        yield server.url


@pytest.mark.parametrize("estimator", ["sampled", "topk_tail", "chunk_likelihood"])
def test_a_server_of_another_tokenizer_equals_the_local_teacher(places, url, estimator):
    student = AutoModelForCausalLM.from_pretrained(places["student"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(places["student"])
    found = []
    for teacher in (LocalTeacher(places["other"], dtype="float32"), ServerTeacher(url, "served", repo=places["other"])):
        own = {"t": OwnTerms(view=View(chat_template="own"), estimator=Estimator(estimator, top_k=64))}
        found.append(loss_of(TeacherPanel({"t": teacher}, own=own), student, tokenizer))
    (local, expected), (remote, gradients) = found
    torch.testing.assert_close(remote.loss_sum, local.loss_sum, rtol=1e-3, atol=1e-2)
    print(f"{estimator}: {float(local.loss_sum):.5f} here, {float(remote.loss_sum):.5f} by the server")
    assert_same_gradients(gradients, expected, 1e-3)


@pytest.mark.parametrize("place", ["here", "server"])
def test_a_panel_of_two_tokenizers_trains_in_trl_and_lightning(places, place, request, tmp_path):
    other = {"model": places["other"]}
    if place == "server":
        other = {"kind": "server", "url": request.getfixturevalue("url"), "model": "served", "repo": places["other"]}
    panel = {
        "combine": "weighted_kl",
        "teachers": {
            "same": {"model": places["same"]},
            "other": {**other, "estimator": "topk_tail", "view": {"chat_template": "own"}},
        },
    }
    greedy = {"do_sample": False}
    trl = TeacherPanelTrainer(
        model=places["student"],
        args=TeacherPanelConfig(
            **settings(
                tmp_path / "trl", max_completion_length=8, lr_scheduler_type="constant", max_steps=2, max_grad_norm=1e9,
                optim="adamw_torch", weight_decay=0.01, gradient_checkpointing=False, panel=panel, learning_rate=1e-4,
                generation_kwargs=greedy,
            )
        ),
        train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    trl.train()
    plain = Plain(places["student"], lr=1e-4)
    kd = TeacherPanelCorrection(panel=panel, max_completion_length=8, generation_kwargs=greedy)
    rows = DataLoader(ROWS, batch_size=4, collate_fn=lambda rows: {k: [r[k] for r in rows] for k in rows[0]})
    trainer(tmp_path / "lightning", [kd], max_steps=2).fit(plain, rows)
    print(place, losses(trl), plain.losses)
    assert plain.losses == pytest.approx(losses(trl), rel=1e-3)
    logged = [entry for entry in trl.state.log_history if "divergence/other" in entry]
    assert len(logged) == 2 and all(entry["divergence/other"] > 0 and entry["divergence/same"] > 0 for entry in logged)
