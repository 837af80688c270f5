"""No micro-batch of the on-policy step makes the host wait for the device: what is logged is read at the log.

On an accelerator each read of a tensor's value stops the host until all kernels are done, and one that sizes a tensor
by values does too. On CPU such reads cost nothing, but they are the same operators, and these are counted here.
"""

import traceback
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_plugin import TeacherPanel
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.modes import MODES
from kd_plugin.panel import panel_loss
from kd_plugin.panel import step as step_module
from kd_plugin.panel.anchor import Anchor
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.scoring import scored_positions
from kd_plugin.rollouts.rows import assembled
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import LocalTeacher
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.views import View
from kd_plugin.vocab import Vocabulary
from tests.core.test_collectives import PROMPTS, RESPONSES, step_of
from tests.core.test_views_chunks import scored
from tests.text_teachers import ScriptedTeacher
from tests.tiny import byte_tokenizer, tiny_llama
from tests.tokenizers import byte_level

VOCABULARY = Vocabulary.from_tokenizer(byte_tokenizer())
# Operators that need a value on the host, or size their result by values
READING = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::unique_consecutive", "aten::_unique2", "aten::unique_dim", "aten::bincount",
}  # fmt: skip


class Reads(TorchDispatchMode):
    """Notes each operator that would make a host wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def note(self, name):
        frames = [one for one in traceback.extract_stack() if "kd_plugin" in one.filename]
        self.found.append(f"{name} at {frames[-1].filename}:{frames[-1].lineno}" if frames else name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_flags = name.startswith("aten::index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for index in args[1:2] if isinstance(index, list | tuple) for one in index
        )  # fmt: skip
        sized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READING or by_flags or sized:
            self.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads():
    """Refuse reads; the losses look at values on CPU alone, where it costs nothing, and are kept from it here."""
    with pytest.MonkeyPatch.context() as monkeypatch, Reads() as reads:
        for room in ("fused", "sparse", "sampled"):
            monkeypatch.setattr(f"kd_plugin.divergence.{room}.require_finite", lambda *args: None)
        monkeypatch.setattr("kd_plugin.divergence.sparse._check", lambda *args: None)
        for method in ("tolist", "cpu", "numpy"):
            inner = getattr(torch.Tensor, method)

            def noted(self, *args, inner=inner, method=method, **options):
                reads.note(method)
                return inner(self, *args, **options)

            monkeypatch.setattr(torch.Tensor, method, noted)
        yield
    assert not reads.found, "\n".join(reads.found)


def local(name, seed, hidden):
    teacher = LocalTeacher(tiny_llama(seed, hidden, tied=False), name=name)
    teacher.assume_vocabulary(VOCABULARY)
    return teacher


def micro_batches(step, scored, sizes=(2, 2)):
    """Return micro-batches with the student's hidden states, made beforehand: the model is its host's."""
    student = tiny_llama(1, 32, tied=False)
    head = OutputHead.from_model(student, VOCABULARY.size)
    for batch in scored.micro_batches(sizes, scored.longest_first()):
        hidden = student.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        yield hidden.detach().requires_grad_(), head, batch


def scored_by(step, teachers, **columns):
    rollouts = assembled(PROMPTS, RESPONSES, end_tokens=[2], pad_token_id=0, device=torch.device("cpu"))
    rows = [{"prompt": "p", "teacher_id": name, **columns} for name in teachers]
    return step.score(step.assign(rows, 4), rollouts)


def test_what_reads_is_seen():
    values, flags = torch.arange(4.0), torch.tensor([True, False, True, True])
    reads = [
        lambda: float(values[0]), lambda: values.sum().item(), lambda: bool(flags.any()), lambda: values[flags],
        lambda: flags.nonzero(), lambda: torch.equal(values, values), lambda: values.repeat_interleave(flags.int()),
        lambda: torch.unique_consecutive(values), lambda: values.masked_select(flags),
    ]  # fmt: skip
    for read in reads:
        with Reads() as found:
            read()
        assert found.found, read
    with Reads() as found:
        torch.where(flags, values, 0.0).sum().add_(values[1:3].mean())
        values.index_select(0, torch.tensor([1, 2]))
    assert not found.found


@pytest.mark.parametrize(
    ("combine", "estimator"),
    # Others are refused where a mode combines whole distributions
    [
        (name, one)
        for name, mode in MODES.items()
        for one in ("exact", "sampled", "topk_tail")
        if one == "exact" or not mode.needs
    ],
)
def test_the_loss_of_a_micro_batch_reads_nothing(combine, estimator, tmp_path):
    chosen = Estimator(estimator, top_k=4) if estimator == "topk_tail" else Estimator(estimator)
    panel = TeacherPanel({"a": local("a", 2, 48), "b": local("b", 3, 64)}, combine=combine, estimator=chosen)
    step = step_of(panel, tmp_path)
    step.host.is_logged = False  # where a step is logged, its rollouts are read and saved
    step.anchor = Anchor(local("start", 4, 32), 0.1, 1.0)
    for hidden, head, batch in micro_batches(step, scored_by(step, "abab")):
        with no_reads():
            loss = step.loss(hidden, head, batch)
            loss.loss_sum.backward()
        assert loss.tokens == batch.tokens and hidden.grad.abs().sum() > 0
    assert step.read()["divergence/start"] > 0


@pytest.mark.parametrize("estimator", ["sampled", "chunk_likelihood"])
def test_the_loss_of_a_teacher_with_tokens_of_its_own_reads_nothing(estimator, monkeypatch):
    """Chunks are cut where text says, which the host knows; tiles are never cut inside one."""
    tokenizer, own = byte_tokenizer(), byte_level()
    teacher = LocalTeacher(tiny_llama(2, 48, vocab_size=len(own), tied=False), tokenizer=own)
    panel = TeacherPanel(
        {"t": teacher}, estimator=Estimator(estimator), own={"t": OwnTerms(view=View(tokenizer="own"))}
    )
    batch, scores = scored(panel, tokenizer)
    where = scored_positions(scores, batch.input_ids.shape[1] - batch.completion_start, torch.device("cpu"))
    tokens = batch.input_ids[:, batch.completion_start :].reshape(-1).index_select(0, where)
    hidden, weight = torch.randn(len(where), 32, requires_grad=True), torch.randn(len(tokenizer), 32)
    monkeypatch.setattr("kd_plugin.divergence.sampled.chunk_rows", lambda *args: 7)
    with no_reads():
        loss = panel_loss(panel, scores, hidden, OutputHead(weight), tokens, divergence=Divergence("reverse_kl"))
        loss.loss_sum.backward()
    assert hidden.grad.abs().sum() > 0


def test_a_preference_reads_nothing_and_its_margin_is_the_mean_over_all_pairs(tmp_path, monkeypatch):
    text = CorrectionSettings(accept="teacher", preference="dpo")
    step = step_of(TeacherPanel({"t": ScriptedTeacher()}, text=text), tmp_path)
    step.corrector.rounds = None  # a round that is kept needs a run with a lineage
    step.host.is_logged = False
    step.anchor = Anchor(local("start", 4, 32), 0.0, 1.0)
    pairs, margins = 0, []
    inner = step_module.preference_loss
    monkeypatch.setattr(
        step_module, "preference_loss", lambda *a, **k: (margins.append(inner(*a, **k)), margins[-1])[1]
    )
    for hidden, head, batch in micro_batches(step, scored_by(step, ["t"] * 4, answer="an answer"), [3, 1]):
        with no_reads():
            step.loss(hidden, head, batch).loss_sum.backward()
        pairs += len(batch.pairs)
    assert pairs == 4 and "text/margin" not in step.host.noted
    expected = torch.cat([one.margins for one in margins]).mean()  # not the last micro-batch's, nor a mean of means
    assert step.read()["text/margin"] == pytest.approx(float(expected), rel=1e-6)
    assert "text/margin" not in step.read(), "it begins anew after a log"
