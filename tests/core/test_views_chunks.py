"""Teachers with tokens of their own: chunks, estimators over them, and the projection to the student's tokens."""

import itertools

import pytest
import torch
from transformers import PreTrainedTokenizer

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.sampled import Matching, fused_sampled_divergence
from kd_plugin.errors import ConfigError, VocabularyError
from kd_plugin.panel import Estimator, TeacherPanel, panel_loss, score_rows
from kd_plugin.panel.checks import require_one_vocabulary
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.scoring import scored_positions
from kd_plugin.panel.viewing import readers_of
from kd_plugin.rollouts.rows import assembled, render
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import Capabilities, LocalTeacher
from kd_plugin.views import View
from kd_plugin.views.align import align, end_of_turn
from kd_plugin.views.tokens import TokenText
from kd_plugin.vocab import Vocabulary
from tests.core.panel_help import assert_same_gradients
from tests.strangers import InProcessStranger
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama
from tests.tokenizers import byte_level, sentencepiece

OWN = View(tokenizer="own")
PROMPTS = [[{"role": "user", "content": text}] for text in ("Say hello.", "Où est la bibliothèque?", "2+3, please")]
ANSWERS = ["Hello to you, the teacher panel!<|im_end|>", "Elle est là, déjà… 🙂", "the answer is 5<|im_end|>"]


def model_of(tokenizer, seed, **kwargs):
    model = tiny_llama(seed=seed, vocab_size=len(tokenizer), **kwargs)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def teacher_of(tokenizer, seed=5):
    return LocalTeacher(model_of(tokenizer, seed, hidden=48), tokenizer=tokenizer)


def scored(panel, tokenizer, answers=ANSWERS, rows_at_once=2):
    batch = assembled(
        render(tokenizer, PROMPTS),
        [tokenizer(one, add_special_tokens=False)["input_ids"] if isinstance(one, str) else one for one in answers],
        end_tokens=[tokenizer.eos_token_id],
        pad_token_id=0,
        device=torch.device("cpu"),
    )
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    scores = score_rows(
        panel,
        [panel.assign({})] * len(PROMPTS),
        batch.input_ids,
        batch.attention_mask,
        batch.completion_start,
        [range(len(one.tokens)) for one in batch.responses],
        rows_at_once=rows_at_once,
        vocabulary=vocabulary,
        rows=[{"prompt": prompt} for prompt in PROMPTS],
        readers=readers_of(panel, tokenizer, vocabulary, pad_token_id=0, ends=[tokenizer.eos_token_id]),
    )
    return batch, scores


def loss_of(panel, student, tokenizer, divergence="reverse_kl", answers=ANSWERS, **options):
    batch, scores = scored(panel, tokenizer, answers)
    start = batch.completion_start
    hidden = student.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[
        :, start - 1 : -1
    ]
    width = batch.input_ids.shape[1] - start
    where = scored_positions(scores, width, hidden.device)
    loss = panel_loss(
        panel,
        scores,
        hidden.reshape(-1, hidden.shape[-1]).index_select(0, where),
        OutputHead.from_model(student, len(tokenizer)),
        batch.input_ids[:, start:].reshape(-1).index_select(0, where),
        divergence=Divergence(divergence),
        **options,
    )
    return loss, torch.autograd.grad(loss.loss_sum, list(student.parameters()), allow_unused=True)


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        (Estimator("sampled"), "reverse_kl"),
        (Estimator("topk_tail", top_k=16, student_top_k=0), "reverse_kl"),
        (Estimator("topk_tail", top_k=16, student_top_k=0), "forward_kl"),
        (Estimator("chunk_likelihood"), "jsd"),
        (Estimator("chunk_likelihood", tau=10.0), "reverse_kl"),
    ],
)
def test_the_same_tokenizer_through_chunks_is_the_ordinary_path(estimator, divergence):
    tokenizer = byte_tokenizer()
    student, teacher = tiny_llama(seed=1), teacher_of(tokenizer)
    plain = TeacherPanel({"t": teacher}, estimator=estimator)
    chunked = TeacherPanel({"t": teacher}, estimator=estimator, own={"t": OwnTerms(view=OWN)})
    theirs, expected = loss_of(plain, student, tokenizer, divergence)
    mine, gradients = loss_of(chunked, student, tokenizer, divergence)
    torch.testing.assert_close(mine.loss_sum, theirs.loss_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.by_teacher[0].divergence, theirs.by_teacher[0].divergence, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients, expected, 1e-5)


def test_all_tokens_of_the_same_vocabulary_give_the_exact_divergence():
    tokenizer = byte_tokenizer()
    student, teacher = tiny_llama(seed=1), teacher_of(tokenizer)
    exact, expected = loss_of(TeacherPanel({"t": teacher}), student, tokenizer)
    # special tokens that neither side uses join the rest: with their mass gone both are the same
    panel = TeacherPanel({"t": teacher}, estimator=Estimator("topk_tail", top_k=259), own={"t": OwnTerms(view=OWN)})
    found, gradients = loss_of(panel, student, tokenizer)
    torch.testing.assert_close(found.loss_sum, exact.loss_sum, rtol=2e-3, atol=0)
    assert_same_gradients(gradients, expected, 2e-2)


@pytest.mark.parametrize("student_of", [byte_tokenizer, byte_level, sentencepiece])
@pytest.mark.parametrize("teacher_tokens", [byte_tokenizer, byte_level, sentencepiece])
def test_chunk_log_probabilities_sum_to_those_of_the_sequence(student_of, teacher_tokens):
    tokenizer, own = student_of(), teacher_tokens()
    teacher = teacher_of(own)
    panel = TeacherPanel({"t": teacher}, estimator=Estimator("sampled"), own={"t": OwnTerms(view=OWN)})
    _, scores = scored(panel, tokenizer)
    for row, answer in zip(scores, ANSWERS, strict=True):
        prompt = own(row.prompts["t"], add_special_tokens=False)["input_ids"]
        text = answer.removesuffix("<|im_end|>")
        ended = [own.eos_token_id] if answer != text else []
        ids = torch.tensor([prompt + own(text, add_special_tokens=False)["input_ids"] + ended])
        logprobs = teacher.model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        said = row.signals["t"].chunk_logprobs(1.0, "t")
        assert bool(row.signals["t"].compared.all())
        torch.testing.assert_close(said.sum(), logprobs.sum(), rtol=0, atol=1e-4)


class TestUnbiased:
    """All texts of four letters; the student writes letters, the teacher pairs of them."""

    LETTERS, PAIRS = 3, 2

    def exact_and_mean(self, matching=None, seed=0):
        draw = torch.Generator().manual_seed(seed)
        letters, pairs, width = self.LETTERS, self.PAIRS, 5
        texts = list(itertools.product(range(letters), repeat=2 * pairs))
        states = sorted({text[:n] for text in texts for n in range(2 * pairs)})
        hidden = torch.randn(len(states), width, generator=draw, dtype=torch.float64).requires_grad_()
        weight = torch.randn(letters, width, generator=draw, dtype=torch.float64).requires_grad_()
        logq = (hidden @ weight.T).log_softmax(-1)
        # the teacher: one distribution over the pairs after each even number of letters
        logp = torch.randn(len(states), letters * letters, generator=draw, dtype=torch.float64).log_softmax(-1)
        at = {state: i for i, state in enumerate(states)}
        exact = 0.0
        for state in (s for s in states if len(s) % 2 == 0):
            visited = sum(logq[at[state[:n]], state[n]] for n in range(len(state)))
            pair = torch.cat([logq[at[state], a] + logq[at[(*state, a)]] for a in range(letters)])
            kl = (pair.exp() * (pair - logp[at[state]])).sum()
            exact = exact + (torch.as_tensor(visited, dtype=torch.float64).exp().detach() * kl)
        mean, value = [torch.zeros_like(hidden), torch.zeros_like(weight)], 0.0
        for text in texts:
            places = [at[text[:n]] for n in range(2 * pairs)]
            probability = sum(logq[place, letter] for place, letter in zip(places, text, strict=True)).exp().detach()
            said = torch.zeros(2 * pairs, dtype=torch.float64)
            for k in range(pairs):
                said[2 * k] = logp[places[2 * k], text[2 * k] * letters + text[2 * k + 1]]
            loss = fused_sampled_divergence(
                hidden[places], OutputHead(weight), torch.tensor(text), said, chunks=[2] * pairs,
                weights=probability.expand(2 * pairs), matching=matching, _rows=3,
            )  # fmt: skip
            value += loss.loss_sum.detach()
            for sums, part in zip(mean, torch.autograd.grad(loss.loss_sum, [hidden, weight]), strict=True):
                sums += part
        return exact, torch.autograd.grad(exact, [hidden, weight]), value, mean

    def test_the_mean_over_all_texts_is_the_gradient_of_the_kl_over_chunks(self):
        exact, expected, value, mean = self.exact_and_mean()
        torch.testing.assert_close(value, exact.detach())
        for mine, theirs in zip(mean, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)

    def test_matching_likelihoods_has_another_mean(self):
        _, expected, _, mean = self.exact_and_mean(Matching(Divergence("reverse_kl")))
        assert (mean[0] - expected[0]).norm() > 0.1 * expected[0].norm()


class TestProjection:
    def said(self, tokenizer, own, top_k):
        """Each row's distribution in the student's tokens, beside the teacher's own at each of its positions."""
        teacher = teacher_of(own)
        panel = TeacherPanel({"t": teacher}, estimator=Estimator("topk_tail"), own={"t": OwnTerms(view=OWN)})
        batch, scores = scored(panel, tokenizer)
        for row, response in zip(scores, batch.responses, strict=True):
            signal = row.signals["t"]
            listed, usable = signal.listed(torch.tensor(response.tokens), top_k, 1.0, "t")
            assert bool(usable.all())
            full = teacher.head.logits(signal.signal.hidden).log_softmax(-1)
            yield response.tokens, listed, signal, full

    def test_next_bytes_are_the_teachers_tokens_that_begin_with_them(self):
        tokenizer, own = byte_tokenizer(), byte_level()
        for tokens, listed, signal, full in self.said(tokenizer, own, len(own)):
            table, special = signal.projection.teacher.table, signal.projection.teacher.special
            for i in range(len(tokens) - 1):
                prefix = signal.places.prefixes[i]
                row = full[signal.places.anchors[i]].exp()
                fits = [v for v, text in enumerate(table) if text.startswith(prefix) and v not in special]
                whole = row[fits].sum() if prefix else row.sum()
                for place in (listed.logprobs[i] > -10).nonzero()[:, 0].tolist():
                    byte = int(listed.ids[i, place])
                    if byte <= tokenizer.eos_token_id:  # special tokens are matched by their role or name
                        continue
                    wanted = prefix + signal.projection.student.table[byte]
                    mass = row[[v for v in fits if table[v].startswith(wanted)]].sum()
                    assert float(listed.logprobs[i, place].exp()) == pytest.approx(float(mass / whole), abs=2e-4)
                assert float(listed.logprobs[i].exp().sum() + listed.tail_logmass[i].exp()) == pytest.approx(
                    1, abs=1e-3
                )

    def test_a_token_over_several_of_the_teachers_has_their_product(self):
        tokenizer, own = byte_level(), byte_tokenizer()
        for tokens, listed, signal, full in self.said(tokenizer, own, len(own)):
            logprobs = full.gather(1, signal.tokens[:, None])[:, 0]
            for i, token in enumerate(tokens):
                chain = logprobs[signal.teacher_chunks == signal.places.chunks[i]].sum()
                found = listed.logprobs[i][(listed.ids[i] == token) & (listed.logprobs[i] > -torch.inf)]
                assert float(found) == pytest.approx(float(chain), abs=1e-3)
                assert float(listed.logprobs[i].exp().sum() + listed.tail_logmass[i].exp()) == pytest.approx(
                    1, abs=1e-3
                )


def test_a_panel_of_three_tokenizers_is_the_sum_of_its_teachers():
    tokenizer, student = byte_level(), model_of(byte_level(), 1)
    teachers = {
        "same": teacher_of(byte_level(), 4),
        "bytes": teacher_of(byte_tokenizer()),
        "sp": teacher_of(sentencepiece()),
    }
    own = {
        "bytes": OwnTerms(view=View(), estimator=Estimator("sampled")),
        "sp": OwnTerms(view=View(), estimator=Estimator("topk_tail")),
    }
    panel = TeacherPanel(teachers, combine="weighted_kl", own=own)
    assert require_one_vocabulary(panel, Vocabulary.from_tokenizer(tokenizer)).size == len(tokenizer)
    loss, gradients = loss_of(panel, student, tokenizer)
    alone = [
        loss_of(TeacherPanel({name: teachers[name]}, own={name: own.get(name, OwnTerms())}), student, tokenizer)
        for name in teachers
    ]
    torch.testing.assert_close(loss.loss_sum, sum(one.loss_sum for one, _ in alone) / 3, rtol=1e-5, atol=1e-4)
    mean = [sum(parts) / 3 for parts in zip(*(g for _, g in alone), strict=True)]
    assert_same_gradients(gradients, mean, 1e-5)
    assert {one.teacher for one in loss.by_teacher} == set(teachers)


def test_what_needs_the_same_tokens_is_refused_with_the_reason():
    vocabulary = Vocabulary.from_tokenizer(byte_tokenizer())

    def refused(teacher, **own):
        return require_one_vocabulary(TeacherPanel({"t": teacher}, own={"t": OwnTerms(view=OWN, **own)}), vocabulary)

    with pytest.raises(ConfigError, match=r"estimator='exact' compares two distributions over the same tokens"):
        refused(teacher_of(byte_level()))
    endless, model = byte_level(520), model_of(byte_level(520), 3)
    endless.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(VocabularyError, match=r"no token that ends a turn \(no eos_token\)"):
        refused(LocalTeacher(model, tokenizer=endless), estimator=Estimator("sampled"))


class Reversing(PreTrainedTokenizer):
    """A tokenizer in Python that changes what it reads, and has no offsets."""

    def __init__(self, **kwargs):
        self.letters = {chr(i): i for i in range(32, 127)}
        super().__init__(eos_token="~", **kwargs)

    vocab_size = 127

    def get_vocab(self):
        return {f"<{letter}>": i for letter, i in self.letters.items()} | {"~": 126}

    def _tokenize(self, text, **kwargs):
        return [f"<{letter}>" for letter in text.lower()[::-1]]

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 32)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_tokenizer_that_gives_neither_text_nor_offsets_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer of teacher 'x' \(Reversing\) gives no offsets"):
        TokenText(Reversing(), "teacher 'x'")


def test_a_cache_cannot_score_other_tokens(tmp_path):
    class Cached(InProcessStranger):
        capabilities = Capabilities("a cache", frozenset({"top_k"}), any_row=False, temperature=1.0)

    panel = TeacherPanel(
        {"t": Cached(save_tiny(tmp_path))}, estimator=Estimator("topk_tail"), own={"t": OwnTerms(view=OWN)}
    )
    with pytest.raises(ConfigError, match=r"Teacher 't' is a cache: it holds targets for the tokens"):
        require_one_vocabulary(panel, Vocabulary.from_tokenizer(byte_tokenizer()))


def test_thinking_marks_stand_for_those_of_the_same_role():
    student, teacher = byte_level(), byte_level(520)
    student.add_tokens(["[THINK]", "[/THINK]"])
    teacher.add_tokens(["<think>", "</think>"])
    ids = student("[THINK]two and three[/THINK]5", add_special_tokens=False)["input_ids"]
    found = align(ids, TokenText(student, "s"), TokenText(teacher, "t"), ended=False, teacher_end=None)
    assert teacher.decode(found.tokens) == "<think>two and three</think>5"
    assert found.student_ends[0] == found.teacher_ends[0] == 1 and found.readable.all()


def test_the_end_of_a_turn_is_what_the_template_puts_behind_an_answer():
    tokenizer = byte_level()
    assert end_of_turn(tokenizer, chat=True) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = byte_level(540)
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = "{% for m in messages %}{{ m['content'] }} <|turn|>{% endfor %}"
    assert end_of_turn(other, chat=True) == other.convert_tokens_to_ids("<|turn|>")
    assert end_of_turn(other, chat=False) == other.eos_token_id
