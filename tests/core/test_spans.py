"""Rows without needless padding: every token is where it was, and a causal model says the same of it."""

import torch

from kd_plugin.rollouts.rows import Span, by_length, left_aligned, row_spans
from tests.tiny import tiny_llama

IDS = torch.tensor([[0, 0, 5, 6, 7, 0], [1, 2, 3, 4, 0, 0], [0, 0, 0, 8, 9, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])


def test_spans_are_the_columns_with_tokens():
    assert row_spans(MASK) == [Span(2, 5), Span(0, 4), Span(3, 6)]
    assert [span.length for span in row_spans(MASK)] == [3, 4, 3]


def test_rows_move_to_the_left_and_the_batch_is_as_wide_as_the_longest():
    ids, mask = left_aligned(IDS, MASK, row_spans(MASK))
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == [[5, 6, 7], [1, 2, 3, 4], [8, 9, 3]]


def test_some_rows_are_as_wide_as_the_longest_of_them():
    ids, mask = left_aligned(IDS[[0, 2]], MASK[[0, 2]], [row_spans(MASK)[b] for b in (0, 2)])
    assert ids.tolist() == [[5, 6, 7], [8, 9, 3]] and bool(mask.all())


def test_hidden_states_are_those_of_the_padded_rows():
    model = tiny_llama(seed=3).eval()
    spans = row_spans(MASK)
    with torch.no_grad():
        padded = model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        moved = model.base_model(
            **dict(zip(("input_ids", "attention_mask"), left_aligned(IDS, MASK, spans), strict=True))
        )
    for b, span in enumerate(spans):
        torch.testing.assert_close(
            moved.last_hidden_state[b, : span.length], padded[b, span.first : span.stop], atol=1e-5, rtol=1e-5
        )


def test_the_longest_row_comes_first_and_the_given_order_decides_between_equals():
    assert by_length([2, 5, 2, 9]) == [3, 1, 0, 2]
    assert by_length([2, 5, 2, 9], [2, 3, 1, 0]) == [3, 1, 2, 0]
