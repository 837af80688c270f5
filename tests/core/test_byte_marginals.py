"""Two tokenizers compared byte by byte: the marginals, their gradient, and what the estimate is unbiased for."""

import itertools

import numpy as np
import pytest
import torch

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.across import byte_masses as byte_masses_module
from kd_plugin.divergence.across.byte_marginals import fused_byte_divergence
from kd_plugin.divergence.across.byte_masses import ModelRows, byte_masses
from kd_plugin.divergence.across.sorted_tokens import END, REST, SortedTokens
from kd_plugin.divergence.reference import from_logprobs
from kd_plugin.errors import ConfigError
from kd_plugin.panel import Estimator, TeacherPanel
from kd_plugin.panel.checks import require_defined_panel, require_one_vocabulary
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.viewing import readers_of
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.views.align import align
from kd_plugin.views.aligned import Aligned
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.views.covers import Side, Spans, Texts, byte_steps
from kd_plugin.views.projection import Projection
from kd_plugin.views.tokens import TokenText
from kd_plugin.vocab import Vocabulary
from tests.core.panel_help import assert_same_gradients
from tests.core.test_views_chunks import ANSWERS, OWN, loss_of, model_of, scored, teacher_of
from tests.tiny import byte_tokenizer
from tests.tokenizers import TEXTS, byte_level, sentencepiece, wordpiece


def marginals_by_definition(raw, spans, tokens, table, logprobs):
    """At each byte: {symbol: probability}, and the probability of what ends there unknown, by adding up every token.

    Args:
        raw: the text.
        spans: (begin, end) of each token.
        tokens: ids.
        table: SortedTokens.
        logprobs: (n, V) over the tokens with a text and the end.
    """
    found = []
    begins = [begin for begin, _ in spans]
    for byte in range(len(raw) + 1):
        mass, rest, path = {}, 0.0, 1.0
        for j, (begin, end) in enumerate(spans):
            if begin > byte:
                break
            for v in range(logprobs.shape[1]):
                p = path * logprobs[j, v].exp()
                text = table.texts[v]
                if v == table.end:
                    if begin == byte:
                        mass[END] = mass.get(END, 0.0) + p
                    continue
                if text is None or not text.startswith(raw[begin:byte]):
                    continue
                if len(text) > byte - begin:
                    symbol = text[byte - begin]
                    mass[symbol] = mass.get(symbol, 0.0) + p
                elif not (byte == end and j + 1 < len(spans)):
                    rest = rest + p
            path = path * logprobs[j, tokens[j]].exp()
        found.append((mass, 0.0 if byte in begins else rest))
    return found


def choices_by_definition(raw, spans, table, logprobs):
    """For each choice inside each token: its position, the byte, {symbol: probability}, and that of ending there."""
    for j, (begin, end) in enumerate(spans):
        for byte in range(begin, min(end, len(raw)) + 1):
            mass, ends = {}, 0.0
            for v in range(logprobs.shape[1]):
                text, p = table.texts[v], logprobs[j, v].exp()
                if v == table.end and byte == begin:
                    mass[END] = p
                elif text is not None and text.startswith(raw[begin:byte]) and len(text) > byte - begin:
                    mass[text[byte - begin]] = mass.get(text[byte - begin], 0.0) + p
                elif text == raw[begin:byte]:
                    ends = ends + p
            yield j, byte, (mass, ends)


def divergence_by_definition(student, teacher, divergence):
    common = sorted(set(student[0]) & set(teacher[0]))
    sides = []
    for mass, rest in (student, teacher):
        other = rest + sum(p for symbol, p in mass.items() if symbol not in common)
        sides.append(([mass[symbol] for symbol in common], torch.as_tensor(other, dtype=torch.float64)))
    if sides[0][1] > 0:
        (listed_s, other_s), (listed_t, other_t) = sides
        least = 1e-6 * (sum(listed_t) + other_t)  # what a teacher cannot say is not free
        sides = [([*listed_s, other_s], None), ([*listed_t, torch.maximum(other_t, least)], None)]
    if not sides[0][0]:
        return torch.zeros((), dtype=torch.float64)
    logs = [torch.stack(listed).log().log_softmax(0).unsqueeze(0) for listed, _ in sides]
    return from_logprobs(*logs, divergence)[0]


def toy(texts, raw, tokens, seed, width=6):
    """A vocabulary with random distributions along one tokenization of ``raw``, with the end behind it."""
    table = SortedTokens([*texts, None], end=len(texts))
    ids = [texts.index(t) for t in tokens] + [len(texts)]
    begins = np.cumsum([1, *map(len, tokens)])  # behind the space before a text
    spans = Spans(begins, np.append(begins[1:], len(raw) + 2), np.ones(len(ids), bool))
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(ids), width, generator=draw, dtype=torch.float64)
    weight = torch.randn(len(texts) + 1, width, generator=draw, dtype=torch.float64)
    return Side(table, np.array(ids), spans), hidden.requires_grad_(), weight.requires_grad_()


FINE = [b"a", b"b", b"c"]
COARSE = [b"a", b"b", b"c", b"ab", b"abc", b"bc", b"ca", b"abca"]
LONG = [b"b", b"c", b"abc", b"abca"]  # those that begin with "a" are those that begin with "ab"


def awkward_head(weight):
    """A head with rows that are padding and would be likeliest, a bias, a scale, and a soft-cap."""
    rows = torch.cat([weight, 9.0 + torch.zeros(3, weight.shape[1], dtype=weight.dtype)])
    bias = torch.linspace(-1.0, 2.0, len(rows), dtype=weight.dtype)
    return OutputHead(rows, bias, vocab_size=len(weight), logit_scale=0.7, softcap=3.0)


def logprobs_by_definition(hidden, head):
    logits = head.logit_scale * (hidden @ head.weight.T + (0.0 if head.bias is None else head.bias))
    logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    return logits[:, : head.vocab_size].log_softmax(-1)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((COARSE, [b"ab", b"ca", b"b", b"c"]), (FINE, [b"a", b"b", b"c", b"a", b"b", b"c"])),
        ((FINE, [b"a", b"b", b"c", b"a", b"b", b"c"]), (COARSE, [b"abca", b"bc"])),
        ((COARSE, [b"abc", b"ab", b"c"]), (COARSE, [b"a", b"bc", b"a", b"bc"])),
        ((FINE, [b"a", b"b", b"c", b"a", b"b", b"c"]), (LONG, [b"abc", b"abc"])),
        ((LONG, [b"abca", b"b", b"c"]), (COARSE, [b"ab", b"ca", b"b", b"c"])),
    ],
)
@pytest.mark.parametrize("wide", [0, 1024])  # from how many tokens on the rows of a range are summed together
@pytest.mark.parametrize("head_of", [OutputHead, awkward_head])
def test_loss_and_gradient_are_those_of_the_definition(student, teacher, divergence, wide, head_of, monkeypatch):
    monkeypatch.setattr(byte_masses_module, "_WIDE", wide)
    raw, divergence = b"abcabc", Divergence(divergence)
    sides = [toy(*side[:1], raw, side[1], seed) for seed, side in enumerate((student, teacher))]
    (mine, hidden, weight), (theirs, hidden_t, weight_t) = sides
    steps = byte_steps(Texts.of([raw]), mine, theirs)
    whose, said_at = (
        [(b - 1, e - 1) for b, e in zip(s.spans.begins.tolist(), s.spans.ends.tolist(), strict=True)]
        for s in (mine, theirs)
    )
    head, head_t = head_of(weight), head_of(weight_t.detach())
    logq, logp = logprobs_by_definition(hidden, head), logprobs_by_definition(hidden_t, head_t).detach()
    said = marginals_by_definition(raw, said_at, theirs.tokens, theirs.table, logp)
    factor = torch.linspace(0.5, 2.0, len(mine.tokens), dtype=torch.float64)
    expected = sum(
        factor[j] * divergence_by_definition(choice, said[byte], divergence)
        for j, byte, choice in choices_by_definition(raw, whose, mine.table, logq)
    )
    for rows in (None, 2):
        loss = fused_byte_divergence(
            hidden, head, HiddenSignal(hidden_t.detach(), head_t), steps, divergence, weights=factor, _rows=rows,
        )  # fmt: skip
        torch.testing.assert_close(loss.loss_sum, expected)
        torch.testing.assert_close(loss.values @ factor, expected)
        found = torch.autograd.grad(loss.loss_sum, [hidden, weight])
        assert_same_gradients(found, torch.autograd.grad(expected, [hidden, weight], retain_graph=True), 1e-9)


class TestOneTokenizer:
    """The same vocabulary on both sides, in which each text has one way to be cut: bytes are parts of a token."""

    TOKENS = (b"a", b"ba", b"bb", b"bca", b"bcb")

    def losses(self):
        for token in self.TOKENS:
            sides = []
            for seed in (3, 4):
                side, hidden, weight = toy(list(self.TOKENS), token, [token], seed)
                one = Spans(side.spans.begins[:1], side.spans.ends[:1], side.spans.used[:1])
                own = Side(SortedTokens(self.TOKENS, None), side.tokens[:1], one)
                sides.append((own, hidden[:1].detach().requires_grad_(), weight))
            (mine, hidden, weight), (theirs, hidden_t, weight_t) = sides
            weight, weight_t = weight[:-1].detach().requires_grad_(), weight_t[:-1].detach()
            steps = byte_steps(Texts.of([token]), mine, theirs)
            loss = fused_byte_divergence(
                hidden, OutputHead(weight), HiddenSignal(hidden_t.detach(), OutputHead(weight_t)), steps, Divergence(),
            )  # fmt: skip
            logq, logp = (hidden @ weight.T).log_softmax(-1), (hidden_t.detach() @ weight_t.T).log_softmax(-1)
            exact = from_logprobs(logq, logp, Divergence())[0]
            gradients = [torch.autograd.grad(x, [hidden, weight], retain_graph=True) for x in (loss.loss_sum, exact)]
            yield logq[0, int(mine.tokens[0])].exp().detach(), loss.loss_sum.detach(), exact.detach(), gradients

    def test_the_mean_is_the_divergence_over_tokens(self):
        found = list(self.losses())
        mean = sum(q * value for q, value, _, _ in found)
        torch.testing.assert_close(mean, found[0][2])
        assert len({round(float(value), 6) for _, value, _, _ in found}) > 1  # each token's is another

    def test_a_byte_does_not_answer_for_those_behind_it(self):
        found = list(self.losses())
        mean = sum(q * mine[0] for q, _, _, (mine, _) in found)
        expected = found[0][3][1][0]
        assert 0.01 * expected.norm() < (mean - expected).norm() < expected.norm()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_what_the_teacher_cannot_say_is_unlearned(divergence):
    """A tokenizer may have no token for some bytes (SmolLM2's has none for 21): a student must not flee there."""
    raw, tokens = b"abcabc", [b"a", b"b", b"c", b"a", b"b", b"c"]
    mine, _, _ = toy([*FINE, b"z"], raw, tokens, 1)
    theirs, hidden_t, weight_t = toy(FINE, raw, tokens, 2)
    steps = byte_steps(Texts.of([raw]), mine, theirs)
    said, head = HiddenSignal(hidden_t.detach(), OutputHead(weight_t.detach())), OutputHead(torch.eye(5).double())
    logits = torch.zeros(7, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(300):
        loss = fused_byte_divergence(logits, head, said, steps, Divergence(divergence)).loss_sum
        (logits.grad,) = torch.autograd.grad(loss, logits)
        optimizer.step()
    found = logits.detach().softmax(-1)
    assert float(found[:, 3].max()) < 1e-3
    expected = (hidden_t @ weight_t.T).softmax(-1).detach()  # its end is the fourth, the student's the fifth
    torch.testing.assert_close(found[:, [0, 1, 2, 4]], expected, rtol=0, atol=2e-3)


def steps_of(tokenizer, own, text, ended=True):
    """Return the student's tokens of a text, and where they are compared with those of another tokenizer."""
    student, teacher = TokenText(tokenizer, "the student"), TokenText(own, "the teacher")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ended
    found = align(ids, student, teacher, ended=ended, teacher_end=own.eos_token_id)
    projection = Projection(student, teacher, (own.eos_token_id, tokenizer.eos_token_id))
    aligned = Aligned.of(found, range(len(ids)), projection)
    nothing = HiddenSignal(torch.zeros(len(aligned.asked), 1), OutputHead(torch.zeros(1, 1)))
    return ids, ChunkSignal(nothing, (aligned,)).byte_steps(torch.tensor(ids))


def check_groups(covers, size, seed):
    """Hold that groups of a row add up: each is the range of the next byte, down to the token itself.

    To 1e-3 nats: up to 60,000 float32 are added one by one.
    """
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=draw) for n in (len(covers.tokens), size))
    logits = hidden @ weight.T
    head, dtype = OutputHead(weight), torch.float32
    masses = byte_masses(ModelRows(hidden, head, covers.table, covers.tokens, covers.ranges, 1.0, dtype, dtype, 7))
    first, after = masses.first.log() + masses.top[:, None], masses.after.log() + masses.after_top[:, None]
    spoken = [i for i, text in enumerate(covers.table.texts) if text is not None or i == covers.table.end]
    torch.testing.assert_close(first.logsumexp(1), logits[:, spoken].logsumexp(1), rtol=0, atol=1e-3)
    place = {
        key: e for e, key in enumerate(zip(covers.ranges.rows.tolist(), covers.ranges.depth.tolist(), strict=True))
    }
    for row in torch.nonzero(covers.known)[:, 0].tolist():
        token = int(covers.tokens[row])
        if token == covers.table.end:
            torch.testing.assert_close(first[row, END], logits[row, token], rtol=0, atol=1e-3)
            continue
        text = covers.table.texts[token]
        group = first[row, text[0]]
        for depth in range(1, len(text) + 1):
            if (row, depth) not in place:
                break
            here = after[place[row, depth]]
            torch.testing.assert_close(group, here.logsumexp(0), rtol=0, atol=1e-3)
            if depth == len(text):
                assert here[REST] >= logits[row, token] - 1e-3
            else:
                group = here[text[depth]]


SMALL = {"bytes": byte_tokenizer(), "byte_level": byte_level(), "sentencepiece": sentencepiece()}
STRANGE = ["déjà vu 🙂 naïve", "  two  spaces\n\ttab", "for i in range(10):\n    print(i)", "中文 тест ñ"]


def check_pair(student, teacher, text, seed):
    ids, steps = steps_of(student, teacher, text)
    check_groups(steps.student, len(student), seed)
    check_groups(steps.teacher, len(teacher), seed + 1)
    assert steps.student.rows.tolist() == sorted(steps.student.rows.tolist())
    compared = len(set(steps.owner.tolist()))
    # Nearly every token is compared somewhere, but special ones, and letters that a tokenizer writes as others (NFC)
    share = 0.3 if text in (TEXTS["combining"], TEXTS["marks"]) else 0.9
    assert compared >= share * len(ids), (text, compared, len(ids))


@pytest.mark.parametrize("teacher", SMALL)
@pytest.mark.parametrize("student", SMALL)
def test_groups_add_up_between_tokenizers_of_all_families(student, teacher):
    for seed, text in enumerate(STRANGE):
        check_pair(SMALL[student], SMALL[teacher], text, seed)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_panel_is_compared_byte_by_byte_and_the_loss_falls(divergence):
    tokenizer, own = byte_level(), byte_tokenizer()
    student, teacher = model_of(tokenizer, 1), teacher_of(own)
    panel = TeacherPanel({"t": teacher}, estimator=Estimator("byte_marginals"), own={"t": OwnTerms(view=OWN)})
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    values = []
    for _ in range(8):
        loss, gradients = loss_of(panel, student, tokenizer, divergence)
        values.append(float(loss.loss_sum))
        (one,) = loss.by_teacher
        torch.testing.assert_close(one.divergence.sum(), loss.loss_sum.detach())
        assert bool((one.divergence >= -1e-5).all())
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("answers", [ANSWERS, ["17 \x1d makes 18.<|im_end|>", "\x1d\x1d", "a\x1db, \x1d"]])
def test_a_byte_without_a_token_in_the_teachers_tokenizer_is_unlearned(answers):
    """As in SmolLM2's, which drops such a byte from a text; the student writes it, or only could."""
    tokenizer, own = byte_tokenizer(), byte_level(missing="\x1d")
    assert own("\x1d", add_special_tokens=False)["input_ids"] == []
    panel = TeacherPanel({"t": teacher_of(own)}, estimator=Estimator("byte_marginals"), own={"t": OwnTerms(view=OWN)})
    student, (byte,) = model_of(tokenizer, 1), tokenizer("\x1d", add_special_tokens=False)["input_ids"]
    optimizer, masses = torch.optim.Adam(student.parameters(), lr=3e-3), []
    for _ in range(100):
        _, gradients = loss_of(panel, student, tokenizer, answers=answers)
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            assert bool(gradient.isfinite().all())
            parameter.grad = gradient
        optimizer.step()
        with torch.no_grad():
            batch, _ = scored(panel, tokenizer, answers)
            logits = student(batch.input_ids, attention_mask=batch.attention_mask).logits
        masses.append(float(logits[:, batch.completion_start - 1 : -1].softmax(-1)[..., byte].mean()))
    assert masses[-1] < 0.3 * masses[0], masses  # without a cost it stays as it is


def test_what_byte_marginals_cannot_do_is_refused_with_the_reason():
    byte_marginals = Estimator("byte_marginals")
    plain = TeacherPanel({"t": teacher_of(byte_tokenizer())}, estimator=byte_marginals)
    with pytest.raises(ConfigError, match="reads the student's tokens"):
        require_one_vocabulary(plain, Vocabulary.from_tokenizer(byte_tokenizer()))
    panel = TeacherPanel({"t": teacher_of(wordpiece())}, estimator=byte_marginals, own={"t": OwnTerms(view=OWN)})
    with pytest.raises(ConfigError, match="teacher 't' does not say which bytes"):
        require_one_vocabulary(panel, Vocabulary.from_tokenizer(byte_tokenizer()))
    panel = TeacherPanel({"t": teacher_of(byte_tokenizer())}, estimator=byte_marginals, own={"t": OwnTerms(view=OWN)})
    with pytest.raises(ConfigError, match="the student does not say which bytes"):
        readers_of(panel, wordpiece(), Vocabulary.from_tokenizer(wordpiece()), pad_token_id=0, ends=[0])
    two = {"a": teacher_of(byte_tokenizer()), "b": teacher_of(byte_tokenizer())}
    with pytest.raises(ConfigError, match="knows the bytes of its tokens"):
        require_defined_panel(TeacherPanel(two, combine="mixture", estimator=byte_marginals), Divergence(), 1.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_groups_add_up_between_real_tokenizers(real):
    for number, (student, teacher) in enumerate(itertools.permutations(real, 2)):
        for text in list(TEXTS.values())[number % 4 :: 4]:
            check_pair(real[student], real[teacher], text, number)
