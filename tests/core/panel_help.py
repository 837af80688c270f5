"""A micro-batch of fixed rows, scored by a panel and turned into a loss, without a trainer."""

import torch

from kd_plugin.divergence import Divergence
from kd_plugin.panel import panel_loss, score_rows
from kd_plugin.panel.scoring import scored_positions
from kd_plugin.signals import OutputHead

START, WIDTH = 6, 8


def rows(count=4, seed=0):
    """Prompts padded on the left and completions padded on the right, of different lengths."""
    ids = torch.randint(3, 259, (count, START + WIDTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    positions = []
    for row in range(count):
        mask[row, : row % 3] = 0
        used = WIDTH - row % 4
        mask[row, START + used :] = 0
        positions.append(range(used))
    return ids, mask, positions


def corrected(panel, student, rows_of, batch, order=None, divergence="reverse_kl", temperature=1.0, **options):
    """Return the loss of a batch and the gradients of the student that it gives."""
    ids, mask, positions = batch
    order = list(range(len(ids))) if order is None else order
    ids, mask, positions = ids[order], mask[order], [positions[i] for i in order]
    assignments = [panel.assign(rows_of[i]) for i in order]
    scores = score_rows(panel, assignments, ids, mask, START, positions, rows_at_once=3)
    backbone = student.base_model
    hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, START - 1 : -1]
    where = scored_positions(scores, WIDTH, hidden.device)
    tokens = ids[:, START:].reshape(-1).index_select(0, where)
    loss = panel_loss(
        panel,
        scores,
        hidden.reshape(-1, hidden.shape[-1]).index_select(0, where),
        OutputHead.from_model(student, 259),
        tokens,
        divergence=divergence if isinstance(divergence, Divergence) else Divergence(divergence),
        temperature=temperature,
        **options,
    )
    parameters = [p for p in student.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss.loss_sum, parameters, allow_unused=True)


def assert_same_gradients(mine, theirs, relative=1e-5):
    """Compare by the norm of the difference, relative to the norm of the whole."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if b is not None]
    difference = torch.sqrt(sum(((a - b).double() ** 2).sum() for a, b in pairs))
    size = torch.sqrt(sum((b.double() ** 2).sum() for _, b in pairs))
    assert difference <= relative * size, f"differs by {float(difference / size):.2e} of the norm"
