"""Estimators against the exact divergence; what is not defined is refused with its reason."""

import math

import pytest
import torch

from kd_plugin.cache import Sampled, TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.listed import joined_ids, listed_from
from kd_plugin.divergence.reference import divergence_from_logits, from_logprobs
from kd_plugin.divergence.sampled import fused_sampled_divergence
from kd_plugin.errors import ConfigError, DataError, NonFiniteError
from kd_plugin.panel import Estimator, OwnTerms, TeacherPanel
from kd_plugin.panel.checks import require_defined_panel
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.teachers import CachedTeacher, LocalTeacher, ServerTeacher
from tests.core.panel_help import assert_same_gradients, corrected, rows
from tests.core.test_divergence_oracle import DIVERGENCES, N, V, ids_of, student, teacher
from tests.fake_vllm import fake_vllm
from tests.tiny import tiny_llama


class TestSampled:
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_its_mean_over_the_students_tokens_is_the_gradient_of_the_reverse_kl(self, softcap, temperature):
        """No sampling: every token of the vocabulary takes its turn, weighed by the student's probability."""
        leaves, own = student(bias=True, softcap=softcap)
        signal = teacher(1)
        logits = own.logits(leaves[0])
        q = torch.softmax(logits / temperature, -1).detach()
        logp = torch.log_softmax(signal.head.logits(signal.hidden) / temperature, -1)
        exact = divergence_from_logits(
            logits, signal.head.logits(signal.hidden), Divergence("reverse_kl"), temperature
        ).sum()
        total, gradients = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
        for token in range(V):
            loss = fused_sampled_divergence(
                leaves[0], own, torch.full((N,), token), logp[:, token], temperature=temperature, weights=q[:, token],
                _rows=5,
            )  # fmt: skip
            total += loss.loss_sum.detach()
            for gradient, part in zip(gradients, torch.autograd.grad(loss.loss_sum, leaves), strict=True):
                gradient += part
        torch.testing.assert_close(total, exact.detach())
        for gradient, expected in zip(gradients, torch.autograd.grad(exact, leaves), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)

    def test_it_is_not_the_derivative_of_its_value(self):
        """The differentiated log-ratio does not contain the teacher; this gradient does."""
        leaves, own = student(bias=False)
        tokens = torch.arange(N)
        found = [
            torch.autograd.grad(fused_sampled_divergence(leaves[0], own, tokens, logp).loss_sum, leaves)[0]
            for logp in (torch.full((N,), -1.0).double(), torch.full((N,), -9.0).double())
        ]
        assert (found[0] - found[1]).abs().max() > 0.1

    def test_importance_ratios_are_bounded(self):
        leaves, own = student(bias=False)
        tokens = torch.arange(N)
        logq = torch.log_softmax(own.logits(leaves[0]), -1).gather(1, tokens[:, None])[:, 0].detach()
        logp = torch.randn(N).double() - 3
        shift = torch.linspace(-2.0, 2.0, N).double()
        ratio = shift.exp().clamp(0.5, 2.0)
        oracle = (ratio * (logq - logp) * torch.log_softmax(own.logits(leaves[0]), -1)[torch.arange(N), tokens]).sum()
        got = fused_sampled_divergence(
            leaves[0], own, tokens, logp, behaviour_logprobs=logq - shift, ratio_bounds=(0.5, 2.0), _rows=4
        )
        expected = torch.autograd.grad(oracle, leaves)
        for mine, theirs in zip(torch.autograd.grad(got.loss_sum, leaves), expected, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_positions_without_weight_add_nothing_and_nan_is_not_masked(self):
        leaves, own = student(bias=False)
        tokens, logp = torch.arange(N), torch.zeros(N).double()
        logp[2] = math.nan
        with pytest.raises(NonFiniteError):
            fused_sampled_divergence(leaves[0], own, tokens, logp)
        weights = torch.ones(N).double()
        weights[2] = 0.0
        loss = fused_sampled_divergence(leaves[0], own, tokens, logp, weights=weights)
        assert loss.entropy[2] == loss.logprobs[2] == 0
        with pytest.raises(ConfigError, match="one a position"):
            fused_sampled_divergence(leaves[0], own, tokens[:-1], logp)


class TestOffPolicy:
    """Tokens that another policy drew: the ratio of now to then makes their mean the reverse KL's gradient again."""

    POSITIONS, DRAWS = 6, 3000

    @pytest.fixture(params=["an older student", "another temperature"])
    def deviations(self, request):
        """Return a function that gives the estimate's deviation from the exact gradient, in standard errors squared.

        It is the mean over positions and hidden units, so 1 for an unbiased estimate, whatever its variance.
        """
        model, judge, older = tiny_llama(seed=1), tiny_llama(seed=2), tiny_llama(seed=1)
        draw = torch.Generator().manual_seed(0)
        if request.param == "an older student":
            for parameter in older.parameters():
                parameter.data += 0.03 * torch.randn(parameter.shape, generator=draw)
        ids = rows()[0][:1, : self.POSITIONS]
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0]
            teacher_logits = judge(ids).logits[0]
            behaviour = older(ids).logits[0]
        behaviour = (behaviour / (1.0 if request.param == "an older student" else 2.0)).log_softmax(-1)
        head = OutputHead(model.lm_head.weight.detach(), None, 259)
        leaf = hidden.clone().requires_grad_()
        exact = divergence_from_logits(head.logits(leaf), teacher_logits, Divergence("reverse_kl"), 1.0).sum()
        (exact,) = torch.autograd.grad(exact, leaf)
        tokens = torch.multinomial(behaviour.exp(), self.DRAWS, replacement=True, generator=draw)
        logp, logb = (x.gather(1, tokens).flatten() for x in (teacher_logits.log_softmax(-1), behaviour))

        def measured(corrected, bounds=(0.0, math.inf)):
            drawn = hidden.repeat_interleave(self.DRAWS, 0).requires_grad_()
            loss = fused_sampled_divergence(
                drawn, head, tokens.flatten(), logp, behaviour_logprobs=logb if corrected else None, ratio_bounds=bounds
            )
            (gradient,) = torch.autograd.grad(loss.loss_sum, drawn)
            gradient = gradient.view(self.POSITIONS, self.DRAWS, -1)
            error = gradient.std(1) / self.DRAWS**0.5
            return float((((gradient.mean(1) - exact) / error) ** 2).mean())

        return measured

    def test_the_ratio_takes_the_bias_away_and_its_bounds_bring_little_back(self, deviations):
        with_ratio, bounded, without = deviations(True), deviations(True, (0.5, 2.0)), deviations(False)
        assert with_ratio < 1.5, "unbiased: one standard error, squared"
        assert without > 5, "biased by far more than chance"
        assert bounded < without / 2


class TestListing:
    def test_written_and_student_tokens_are_listed_once_with_the_rest_exact(self):
        signal = teacher(1)
        logp = torch.log_softmax(signal.head.logits(signal.hidden) / 1.5, -1)
        further = torch.stack([logp.argmax(-1), torch.arange(N), torch.arange(N), torch.full((N,), 40)], -1)
        found = listed_from(signal, 5, further, 1.5)
        for row in range(N):
            real = found.logprobs[row] != -math.inf
            ids = found.ids[row][real].tolist()
            assert len(ids) == len(set(ids))
            assert set(ids) == {*logp[row].topk(5).indices.tolist(), *further[row].tolist()}
            torch.testing.assert_close(found.logprobs[row][real], logp[row][found.ids[row][real]])
            others = [v for v in range(V) if v not in ids]
            torch.testing.assert_close(found.tail_logmass[row], logp[row][others].logsumexp(0))

    def test_no_more_than_the_vocabulary_is_listed(self):
        signal = HiddenSignal(torch.ones(1, 2), OutputHead(torch.ones(3, 2)))
        assert listed_from(signal, 9, torch.zeros(1, 0, dtype=torch.int64), 1.0).ids.shape == (1, 3)

    def test_padding_is_no_earlier_token(self):
        first, second = torch.tensor([[0, 7]]), torch.tensor([[0, 7, 0]])
        _, again = joined_ids(first, second, listed=torch.tensor([[False, True]]))
        assert again.tolist() == [[False, False, False, True, True]]


def panel(teachers, estimator="exact", combine="weighted_kl", own=None, **options):
    return TeacherPanel(teachers, combine=combine, estimator=Estimator(estimator, **options), own=own)


@pytest.fixture(scope="module")
def local(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture(scope="module")
def other(other_teacher_dir):
    return LocalTeacher(other_teacher_dir, dtype="float32")


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_topk_tail_with_everything_listed_is_exact(divergence, temperature, local, other):
    model = tiny_llama(seed=1).train()
    asked = {"divergence": divergence, "temperature": temperature}
    mine = corrected(panel({"a": local, "b": other}, "topk_tail", top_k=259), model, [{}] * 4, rows(), **asked)
    theirs = corrected(panel({"a": local, "b": other}), model, [{}] * 4, rows(), **asked)
    torch.testing.assert_close(mine[0].loss_sum, theirs[0].loss_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[0].entropy, theirs[0].entropy, rtol=1e-4, atol=1e-4)
    assert_same_gradients(mine[1], theirs[1], 1e-4)


@pytest.mark.parametrize("student_top_k", [0, 3, None])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_topk_tail_is_the_divergence_of_merged_outcomes(name, student_top_k, local):
    model, batch = tiny_llama(seed=1).train(), rows()
    loss, _ = corrected(
        panel({"a": local}, "topk_tail", top_k=4, student_top_k=student_top_k), model, [{}] * 4, batch, divergence=name
    )
    ids, mask, positions = batch
    logq, logp = (
        m(input_ids=ids, attention_mask=mask).logits[:, 5:-1].log_softmax(-1).detach() for m in (model, local.model)
    )
    expected = 0.0
    for row, used in enumerate(positions):
        for c in used:
            q, p = logq[row, c], logp[row, c]
            count = 4 if student_top_k is None else student_top_k
            listed = {*p.topk(4).indices.tolist(), int(ids[row, 6 + c]), *q.topk(count).indices.tolist()}
            rest = [v for v in range(259) if v not in listed]
            coarse = [torch.cat([x[sorted(listed)], x[rest].logsumexp(0)[None]])[None] for x in (q, p)]
            expected += from_logprobs(*coarse, Divergence(name))
    torch.testing.assert_close(loss.loss_sum.detach(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("estimator", "divergence"), [("sampled", "reverse_kl"), ("topk_tail", "reverse_kl"),
                                                       ("topk_tail", "forward_kl"), ("topk_tail", "jsd")])  # fmt: skip
def test_a_server_equals_a_local_teacher(estimator, divergence, local, other, tokenizer):
    """Through HTTP and JSON, against a server that answers as vLLM does; ``make test-vllm`` takes a real one."""
    model = tiny_llama(seed=1).train()
    with fake_vllm(local.model, tokenizer) as (url, _), fake_vllm(other.model, tokenizer) as (other_url, _):
        servers = {
            "a": ServerTeacher(url, tokenizer=tokenizer, top_k=16, repo="x/a"),
            "b": ServerTeacher(other_url, tokenizer=tokenizer, top_k=16, repo="x/b"),
        }
        options = {"top_k": 16, "student_top_k": 0}
        mine = corrected(panel(servers, estimator, **options), model, [{}] * 4, rows(), divergence=divergence)
    theirs = corrected(
        panel({"a": local, "b": other}, estimator, **options), model, [{}] * 4, rows(), divergence=divergence
    )
    torch.testing.assert_close(mine[0].loss_sum, theirs[0].loss_sum, rtol=1e-3, atol=1e-3)
    assert_same_gradients(mine[1], theirs[1], 1e-3)
    for one, two in zip(mine[0].by_teacher, theirs[0].by_teacher, strict=True):
        assert one.teacher == two.teacher
        torch.testing.assert_close(one.divergence, two.divergence, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def cached(local, tmp_path_factory):
    ids, mask, positions = rows()
    columns = {"input_ids": [], "completion_mask": []}
    for row, used in enumerate(positions):
        columns["input_ids"].append(ids[row][mask[row] != 0].tolist())
        columns["completion_mask"].append([0] * (6 - row % 3) + [1] * len(used))
    from datasets import Dataset

    directory = tmp_path_factory.mktemp("cached") / "cache"
    capture(Dataset.from_dict(columns), local, directory, targets=TopK(259), progress=False)
    return directory


def test_a_cached_teacher_equals_the_one_that_filled_it(cached, local, tokenizer):
    model = tiny_llama(seed=1).train()
    teacher = CachedTeacher(cached, tokenizer=tokenizer)
    assert teacher.vocabulary.size == 259 and teacher.source.kind == "teacher_outputs"
    mine = corrected(panel({"a": teacher}, "topk_tail"), model, [{}] * 4, rows())
    theirs = corrected(panel({"a": local}), model, [{}] * 4, rows())
    torch.testing.assert_close(mine[0].loss_sum, theirs[0].loss_sum, rtol=1e-3, atol=1e-3)  # stored in float16
    assert_same_gradients(mine[1], theirs[1], 1e-2)
    with pytest.raises(DataError, match=r"is not in the cache.*only rows with fixed completions"):
        corrected(panel({"a": teacher}, "topk_tail"), model, [{}] * 4, rows(seed=1))


def test_a_mixed_panel_is_the_sum_of_its_parts(cached, local, other, tokenizer):
    """Four ways to reach a teacher and three estimators in one loss."""
    model = tiny_llama(seed=1).train()
    with fake_vllm(other.model, tokenizer) as (url, _):
        teachers = {
            "local": local,
            "server": ServerTeacher(url, tokenizer=tokenizer, top_k=16, repo="x/y"),
            "cached": CachedTeacher(cached),
            "asked": other,
        }
        estimators = {"local": "exact", "server": "topk_tail", "cached": "topk_tail", "asked": "sampled"}
        own = {name: OwnTerms(estimator=Estimator(e)) for name, e in estimators.items()}
        loss, gradient = corrected(panel(teachers, own=own), model, [{}] * 4, rows())
        alone = [corrected(panel({n: t}, own={n: own[n]}), model, [{}] * 4, rows()) for n, t in teachers.items()]
    torch.testing.assert_close(loss.loss_sum, sum(one.loss_sum for one, _ in alone) / 4, rtol=1e-4, atol=1e-4)
    summed = [sum(parts) / 4 for parts in zip(*(g for _, g in alone), strict=True)]
    assert_same_gradients(gradient, summed, 1e-4)
    assert {j.teacher for j in loss.by_teacher} == set(teachers)


SERVER = ServerTeacher("http://127.0.0.1:9", tokenizer=object(), repo="x/y")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "divergence", "message"),
        [
            ({"estimator": "sampled", "combine": "mixture"}, "reverse_kl", "mean of the teachers' probabilities.*one"),
            ({"estimator": "topk_tail", "combine": "mixture"}, "reverse_kl", "different ones for each teacher"),
            ({"estimator": "sampled", "combine": "confidence"}, "reverse_kl", "entropy of each teacher"),
            ({"estimator": "sampled"}, "forward_kl", "forward_kl cannot be estimated from the token that the student"),
            ({"estimator": "sampled"}, "jsd", "only reverse_kl is a mean over the student's own tokens"),
            ({"estimator": "exact"}, "reverse_kl", "is a server.*needs all of it.*'topk_tail' or 'sampled'"),
        ],
    )
    def test_combinations_that_are_not_defined(self, options, divergence, message):
        with pytest.raises(ConfigError, match=message):
            require_defined_panel(panel({"a": SERVER}, **options), Divergence(divergence), 1.0)

    def test_a_servers_tokens_at_another_temperature(self):
        with pytest.raises(ConfigError, match=r"at 1.0, and from some tokens those at another temperature"):
            require_defined_panel(panel({"a": SERVER}, "topk_tail"), Divergence(), 2.0)

    def test_a_cache(self, cached, tmp_path, local):
        with pytest.raises(ConfigError, match=r"is a cache: its rows were not generated by the student"):
            require_defined_panel(panel({"a": CachedTeacher(cached)}, "sampled"), Divergence(), 1.0)
        ids, mask, _ = rows()
        from datasets import Dataset

        data = Dataset.from_dict({"input_ids": ids.tolist(), "completion_mask": mask.tolist()})
        capture(data, local, tmp_path / "drawn", targets=Sampled(5), progress=False)
        drawn = panel({"a": CachedTeacher(tmp_path / "drawn")}, "topk_tail")
        require_defined_panel(drawn, Divergence("forward_kl"), 1.0)
        with pytest.raises(ConfigError, match=r"cache of sampled targets.*reverse_kl is none"):
            require_defined_panel(drawn, Divergence("reverse_kl"), 1.0)

    def test_a_mixture_of_teachers_with_divergences_of_their_own(self, local):
        own = {"a": OwnTerms(divergence=Divergence("jsd"))}
        with pytest.raises(ConfigError, match="one distribution of all teachers, which has one divergence"):
            require_defined_panel(panel({"a": local}, combine="mixture", own=own), Divergence(), 1.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "samples"}, "Did you mean 'sampled'"),
            ({"top_k": 0}, "at least 1"),
            ({"student_top_k": -1}, "at least 0"),
            ({"ratio_bounds": (1.5, 2.0)}, "0 <= low <= 1 <= high"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(ConfigError, match=message):
            Estimator(**options)
