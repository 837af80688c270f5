"""How much of a response a teacher with tokens of its own can be compared on, and what it cannot have written."""

import math

import pytest
import torch

from kd_plugin.errors import DataError
from kd_plugin.panel import Estimator, TeacherPanel, score_rows
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.viewing import readers_of
from kd_plugin.rollouts.rows import assembled, render, row_spans
from kd_plugin.teachers import ServerTeacher
from kd_plugin.views.render import Reading
from kd_plugin.vocab import Vocabulary
from tests.core.panel_help import assert_same_gradients
from tests.core.test_views_chunks import OWN, PROMPTS, loss_of, scored, teacher_of
from tests.fake_vllm import fake_vllm
from tests.tiny import byte_tokenizer, tiny_llama
from tests.tokenizers import byte_level, sentencepiece


def test_a_response_that_can_hardly_be_compared_is_left_out():
    tokenizer = byte_tokenizer()
    panel = TeacherPanel({"t": teacher_of(byte_level())}, estimator=Estimator("sampled"), own={"t": OwnTerms(view=OWN)})
    _, scores = scored(panel, tokenizer, ["fine", "\ufffd\ufffd", "fine too<|im_end|>"])
    assert all("t" not in row.covered for row in scores)
    no_text = tokenizer.convert_tokens_to_ids(["ÿ"] * 4)
    ids = [[*tokenizer("ab")["input_ids"], *no_text], tokenizer("fine")["input_ids"], [2]]
    batch = assembled(render(tokenizer, PROMPTS), ids, end_tokens=[2], pad_token_id=0, device=torch.device("cpu"))
    scores = score_rows(
        panel, [panel.assign({})] * 3, batch.input_ids, batch.attention_mask, batch.completion_start,
        [range(len(one)) for one in ids], rows_at_once=2, rows=[{"prompt": prompt} for prompt in PROMPTS],
        readers=readers_of(panel, tokenizer, Vocabulary.from_tokenizer(tokenizer), pad_token_id=0, ends=[2]),
    )  # fmt: skip
    assert ["t" in row.covered for row in scores] == [True, False, False]
    # What the teacher cannot have written counts all the same; the last byte may be a character that was cut
    assert scores[0].covered["t"].tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("teacher_tokens", [byte_tokenizer, byte_level, sentencepiece])
def test_what_the_teacher_cannot_have_written_is_not_free(teacher_tokens):
    """Bytes that are no text are a millionth likely, a chunk each, where only the text that stands there is scored."""
    tokenizer = byte_tokenizer()
    junk = tokenizer.convert_tokens_to_ids("ÿ")
    begun = tokenizer.convert_tokens_to_ids("Ã")  # the first byte of a character of two
    text = tokenizer("so it is", add_special_tokens=False)["input_ids"]
    answers = [
        [*text, junk, *text, junk, tokenizer.eos_token_id],
        [*text, junk, junk, *text],
        [*text, *text, begun],  # cut by a limit of length
    ]
    panel = TeacherPanel(
        {"t": teacher_of(teacher_tokens())}, estimator=Estimator("sampled"), own={"t": OwnTerms(view=OWN)}
    )
    _, scores = scored(panel, tokenizer, answers)
    impossible = math.log(1e-6)
    for row, answer in zip(scores, answers, strict=True):
        signal = row.signals["t"]
        said, at = signal.chunk_logprobs(1.0, "t"), [c for c, token in enumerate(answer) if token == junk]
        assert said[at].tolist() == pytest.approx([impossible] * len(at))
        assert sum(signal.places.sizes) == len(answer)
        own = signal.places.impossible
        assert own[at].tolist() == list(range(len(at))) and int((own >= 0).sum()) == len(at)
        assert signal.counted.tolist() == [token != begun for token in answer]
        assert signal.compared.tolist() == [token not in (junk, begun) for token in answer]
    student = tiny_llama(seed=1)
    loss, _ = loss_of(panel, student, tokenizer, answers=answers)
    assert loss.by_teacher[0].divergence[len(text)] > 0.0  # less likely to the teacher than to the student


def test_a_run_that_can_hardly_be_compared_is_refused():
    tokenizer, own = byte_tokenizer(), byte_level()
    no_text = tokenizer.convert_tokens_to_ids(["ÿ"] * 4)
    panel = TeacherPanel({"t": teacher_of(own)}, estimator=Estimator("sampled"), own={"t": OwnTerms(view=OWN)})

    def reader():
        found = readers_of(panel, tokenizer, Vocabulary.from_tokenizer(tokenizer), pad_token_id=0, ends=[2])
        return found["t"]

    def read(reader, good, bad):
        ids = [tokenizer("fine")["input_ids"]] * good + [[*tokenizer("ab")["input_ids"], *no_text]] * bad
        prompts = [PROMPTS[0]] * len(ids)
        batch = assembled(render(tokenizer, prompts), ids, end_tokens=[2], pad_token_id=0, device=torch.device("cpu"))
        positions = [range(len(one)) for one in ids]
        plain = Reading(
            batch.input_ids, batch.attention_mask, batch.completion_start, positions, row_spans(batch.attention_mask)
        )
        return reader.read([{"prompt": prompt} for prompt in prompts], plain)

    one = reader()
    read(one, good=20, bad=4)  # together enough
    with pytest.raises(DataError, match=r"Teacher 't' can be compared at 5\d% of the tokens of the last 44 responses"):
        read(one, good=0, bad=20)
    read(reader(), good=0, bad=31)  # too few responses to tell


@pytest.mark.parametrize("estimator", ["sampled", "chunk_likelihood"])
@pytest.mark.parametrize("nothing", ["in some rows", "in one cut row", "in all rows"])
def test_a_server_scores_rows_of_which_nothing_can_be_compared(nothing, estimator):
    """It is asked for no position of them, and for none at all in the last case: the same as the local teacher."""
    tokenizer, own = byte_tokenizer(), byte_level()
    junk, text = tokenizer.convert_tokens_to_ids("ÿ"), tokenizer("no", add_special_tokens=False)["input_ids"]
    answers = {
        "in some rows": [[junk] * 3, "fine<|im_end|>", [junk, junk, *text]],
        "in one cut row": ["so it is", [junk], "fine<|im_end|>"],
        "in all rows": [[junk] * 5, [junk] * 2, [junk] * 4],
    }[nothing]
    local, student = teacher_of(own), tiny_llama(seed=1)
    found = {}
    with fake_vllm(local.model, own) as (url, _):
        for teacher in (local, ServerTeacher(url, tokenizer=own, repo="a/b", license="apache-2.0")):
            panel = TeacherPanel({"t": teacher}, estimator=Estimator(estimator), own={"t": OwnTerms(view=OWN)})
            found[teacher] = loss_of(panel, student, tokenizer, answers=answers)
    (mine, gradients), (theirs, expected) = found.values()
    torch.testing.assert_close(mine.loss_sum, theirs.loss_sum, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients, expected, 1e-4)
    assert float(mine.loss_sum.detach()) != 0.0
