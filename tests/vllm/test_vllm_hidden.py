"""Hidden states of a real vLLM server, with the head read from the checkpoint, are those of the local teacher."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin import LocalTeacher, ServerTeacher
from kd_plugin.cache import Sampled
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.modes import MODES
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.panel import TeacherPanel, panel_loss, score_rows
from kd_plugin.panel.scoring import scored_positions
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.hidden import states as hidden_states
from kd_plugin.teachers.hidden.states import FLAGS, POOLER
from tests.core.panel_help import assert_same_gradients
from tests.core.test_divergence_oracle import DIVERGENCES
from tests.tiny import save_tiny
from tests.vllm.server import VllmServer
from tests.vllm.test_vllm import PROSE, assert_same_draws, pytestmark, rounding_of  # noqa: F401 - marks

START = 8
OPTIONS = ("--runner", "pooling", "--convert", "embed", "--pooler-config", POOLER)


@pytest.fixture(scope="module")
def pooler(smol, tmp_path_factory):
    log = tmp_path_factory.mktemp("pooler") / "server.log"
    with VllmServer(smol, log, *OPTIONS, "--max-model-len", "600") as server:
        yield server.url


@pytest.fixture(scope="module")
def student(smol):
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    return model.eval()


def batch(tokenizer):
    """Two rows of different lengths."""
    rows = [tokenizer(text)["input_ids"] for text in (PROSE[:200], PROSE[:90])]
    width = max(map(len, rows))
    ids = torch.full((2, width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids, mask, [range(len(row) - START) for row in rows]


def scored(panel, rows):
    ids, mask, positions = rows
    return score_rows(
        panel, [panel.assign({"teacher_id": "t"} if panel.mode.one_teacher else {})] * 2, ids, mask, START, positions, 2
    )


def loss_of(panel, scores, student, rows, divergence, temperature=1.0):
    """Return the mean loss and its gradient in the student's hidden states and head."""
    ids, mask, _ = rows
    with torch.no_grad():
        hidden = student.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, START - 1 : -1]
    where = scored_positions(scores, ids.shape[1] - START, ids.device)
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where).requires_grad_()
    head = OutputHead.from_model(student, 49152)
    tokens = ids[:, START:].reshape(-1).index_select(0, where)
    loss = panel_loss(panel, scores, hidden, head, tokens, divergence=divergence, temperature=temperature)
    mean = loss.loss_sum / len(where)
    return float(mean.detach()), torch.autograd.grad(mean, [hidden, head.weight])


def test_the_signal_equals_that_of_the_local_teacher(pooler, smol, local):
    ids, mask, positions = batch(local.tokenizer)
    flat = torch.tensor([r * ids.shape[1] + START - 1 + c for r in range(2) for c in positions[r]])
    mine = ServerTeacher(pooler, "served", signal="hidden", repo=smol, server_dtype="float32").score(ids, mask, flat)
    theirs = local.score(ids, mask, flat)
    apart = float((mine.hidden - theirs.hidden).abs().max())
    a, b = (one.head.logits(one.hidden).log_softmax(-1) for one in (mine, theirs))
    print(
        f"states {apart:.1e} apart at a scale of {float(theirs.hidden.abs().max()):.1f}; log-probabilities "
        f"{float((a - b).abs().max()):.1e} nats over {tuple(a.shape)}"
    )
    assert a.shape[1] == 49152 and apart < 1e-3 and float((a - b).abs().max()) < 1e-3


@pytest.mark.parametrize("combine", list(MODES))
def test_losses_and_gradients_equal_the_local_panels(combine, pooler, smol, local, student):
    """All divergences, alone and beside a second teacher."""
    rows = batch(local.tokenizer)
    server = ServerTeacher(pooler, "served", signal="hidden", repo=smol, server_dtype="float32")
    panels = [TeacherPanel({"t": one, "second": student_copy(student)}, combine=combine) for one in (server, local)]
    scores = [scored(panel, rows) for panel in panels]
    worst = 0.0
    for divergence, temperature in itertools.product(DIVERGENCES, (1.0, 2.0)):
        (mine, gradient), (theirs, expected) = (
            loss_of(panel, score, student, rows, divergence, temperature)
            for panel, score in zip(panels, scores, strict=True)
        )
        worst = max(worst, abs(mine - theirs))
        assert mine == pytest.approx(theirs, abs=1e-4), (divergence, temperature)
        assert_same_gradients(gradient, expected, 1e-4)
    print(f"{combine}: losses at most {worst:.1e} nats apart")


def student_copy(student):
    """A second teacher of the same vocabulary, which is not the student."""
    import copy

    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    tokenizer_source = LocalTeacher(student.config._name_or_path).tokenizer
    return LocalTeacher(other, tokenizer=tokenizer_source, license="apache-2.0")


def test_sampled_targets_come_from_a_server(pooler, smol, local, tmp_path):
    """The draws of an in-process capture, but for those on an edge between two tokens."""
    rows, options = [{"text": PROSE}, {"text": PROSE[::-1]}], {"targets": Sampled(50), "progress": False}
    server = ServerTeacher(pooler, "served", signal="hidden", repo=smol, server_dtype="float32")
    mine, theirs = capture(rows, server, tmp_path / "s", **options), capture(rows, local, tmp_path / "l", **options)

    def logprobs(ids):
        (states,) = server.states([ids])
        return server.head.logits(states[:-1].float()).log_softmax(-1)

    rounding = rounding_of(logprobs, local, mine.dataset()["input_ids"])
    assert_same_draws(mine, theirs, local, rounding)
    assert mine.tokens > 200


def test_a_large_checkpoint_is_judged_by_its_head_alone(pooler, smol, monkeypatch):
    monkeypatch.setattr(hidden_states, "RUN_BELOW", 0)
    ServerTeacher(pooler, "served", signal="hidden", repo=smol, server_dtype="float32").check()


def test_limits_and_another_dtype_are_said(pooler, smol, tmp_path):
    teacher = ServerTeacher(pooler, "served", signal="hidden", repo=smol, server_dtype="float32")
    with pytest.raises(DataError, match=r"takes 600\. Set max_length=600, or .* --max-model-len 601"):
        teacher.states([[5] * 601])
    with pytest.raises(ConfigError, match=r"computes in float32, and bfloat16 is expected .*--dtype bfloat16"):
        ServerTeacher(pooler, "served", signal="hidden", repo=smol, server_dtype="bfloat16").check()


def test_bfloat16_is_measured(smol, local, student, tmp_path):
    """A server in bfloat16 against the teacher in float32 and in bfloat16 here."""
    rows = batch(local.tokenizer)
    with VllmServer(smol, tmp_path / "log", *OPTIONS, "--max-model-len", "600", dtype="bfloat16") as server:
        far = ServerTeacher(server.url, "served", signal="hidden", repo=smol, server_dtype="bfloat16")
        near = LocalTeacher(smol, dtype="bfloat16")
        panels = {name: TeacherPanel({"t": one}) for name, one in (("far", far), ("near", near), ("exact", local))}
        scores = {name: scored(panel, rows) for name, panel in panels.items()}
    for divergence in (Divergence("forward_kl"), Divergence("reverse_kl")):
        found = {n: loss_of(panels[n], scores[n], student, rows, divergence) for n in panels}
        cosine = {
            n: float(torch.cosine_similarity(found[n][1][0].flatten(), found["exact"][1][0].flatten(), dim=0))
            for n in ("far", "near")
        }
        print(f"{divergence.name}: { ({n: round(f[0], 4) for n, f in found.items()}) }, gradient's cosine {cosine}")
        assert found["far"][0] == pytest.approx(found["exact"][0], abs=0.05) and cosine["far"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runner", "pooling", "--convert", "embed"), r"pooling_task"),
        ((*OPTIONS[:5], '{"task":"token_embed"}'), r"normalizes its hidden states"),
    ],
)
def test_a_server_without_the_flags_is_refused_with_them(options, message, tmp_path):
    model = save_tiny(tmp_path / "tiny", seed=2, hidden=128, tied=False)  # vLLM needs heads of 32 at least
    with VllmServer(model, tmp_path / "log", *options, "--max-model-len", "512") as server:
        with pytest.raises(ConfigError, match=message) as error:
            ServerTeacher(server.url, "served", signal="hidden", repo=model).check()
        assert (FLAGS if "normalizes" not in message else POOLER) in str(error.value)


def test_a_server_that_generates_is_refused_with_the_flags(url, smol):
    with pytest.raises(ConfigError, match=r"has no /pooling") as error:
        ServerTeacher(url, "served", signal="hidden", repo=smol).check()
    assert FLAGS in str(error.value)


def test_another_model_and_a_longer_context_are_refused(tmp_path, monkeypatch):
    one = save_tiny(tmp_path / "one", seed=2, hidden=128, tied=False)
    other = save_tiny(tmp_path / "other", seed=3, hidden=128, tied=False)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with VllmServer(one, tmp_path / "log", *OPTIONS, "--max-model-len", "1024") as server:
        with pytest.raises(ConfigError, match=r"takes 1024 tokens, .* made for 512.*--max-model-len 512"):
            ServerTeacher(server.url, "served", signal="hidden", repo=one).check()
        monkeypatch.setattr(hidden_states, "_require_context", lambda *_: None)
        ServerTeacher(server.url, "served", signal="hidden", repo=one).check()
        with pytest.raises(ConfigError, match="serves other weights than"):
            ServerTeacher(server.url, "served", signal="hidden", repo=other).check()
