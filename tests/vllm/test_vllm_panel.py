"""A panel of real vLLM servers gives the loss and gradients of the same models in this process, in float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin import LocalTeacher, ServerTeacher
from kd_plugin.divergence import Divergence
from kd_plugin.panel import Estimator, TeacherPanel, panel_loss, score_rows
from kd_plugin.panel.scoring import scored_positions
from kd_plugin.signals import OutputHead
from tests.core.panel_help import assert_same_gradients
from tests.vllm.test_vllm import PROSE, pytestmark  # noqa: F401 - marks

START = 8


def corrected(teacher, student, estimator, divergence):
    """Return the loss of two rows of different lengths, and its gradient in the student's head and hidden states."""
    tokenizer = LocalTeacher(student.config._name_or_path).tokenizer
    rows = [tokenizer(text)["input_ids"] for text in (PROSE, PROSE[:150])]
    width = max(map(len, rows)) - START
    ids = torch.full((2, START + width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    panel = TeacherPanel({"t": teacher}, estimator=Estimator(estimator, top_k=64, student_top_k=0))
    positions = [range(len(row) - START) for row in rows]
    scores = score_rows(panel, [panel.assign({})] * 2, ids, mask, START, positions, rows_at_once=2)
    with torch.no_grad():
        hidden = student.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, START - 1 : -1]
    where = scored_positions(scores, width, ids.device)
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where).requires_grad_()
    head = OutputHead.from_model(student, len(tokenizer))
    tokens = ids[:, START:].reshape(-1).index_select(0, where)
    loss = panel_loss(panel, scores, hidden, head, tokens, divergence=Divergence(divergence))
    return loss, torch.autograd.grad(loss.loss_sum / len(where), [hidden, head.weight]), len(where)


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [("sampled", "reverse_kl"), ("topk_tail", "reverse_kl"), ("topk_tail", "forward_kl"), ("topk_tail", "jsd")],
)
def test_a_server_equals_the_local_teacher(estimator, divergence, smol, local, url):
    student = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    server = ServerTeacher(url, "served", repo=smol, top_k=64)
    mine, gradient, count = corrected(server, student, estimator, divergence)
    theirs, expected, _ = corrected(local, student, estimator, divergence)
    assert count > 60
    mean = abs(float((mine.loss_sum - theirs.loss_sum).detach())) / count
    most = float((mine.by_teacher[0].divergence - theirs.by_teacher[0].divergence).abs().max())
    print(f"{estimator}, {divergence}: {count} positions, mean apart {mean:.1e} nats, one position {most:.1e} nats")
    assert mean < 1e-3 and most < 1e-3
    assert_same_gradients(gradient, expected, 1e-3)
