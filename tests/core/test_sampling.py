"""The sampled estimator takes tokens from the student's whole distribution only; why, by enumeration."""

import itertools

import pytest
import torch
from transformers import GenerationConfig

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.divergence.sampled import fused_sampled_divergence
from kd_plugin.errors import ConfigError
from kd_plugin.panel import Estimator, TeacherPanel
from kd_plugin.panel.sampling import _FREE, completed, require_same_student, require_whole_distribution
from kd_plugin.signals import OutputHead
from tests.core.test_divergence_oracle import N, V, student, teacher
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def panel():
    return TeacherPanel({"t": tiny_llama()}, estimator=Estimator("sampled"))


class TestByEnumeration:
    """No sampling: every token takes its turn, weighed by the probability that it would be drawn with."""

    def bias(self, behaviour, *, known=False, bounds=(0.5, 2.0)):
        """Return the distance of the mean gradient from the exact one, relative to the exact one's norm.

        Args:
            behaviour: makes (N, V) probabilities of the draws from the student's logits.
            known: whether their log-probabilities are, as vLLM gives them.
            bounds: of the importance ratio.
        """
        leaves, own = student(bias=False)
        signal = teacher(1)
        logits, their_logits = own.logits(leaves[0]), signal.head.logits(signal.hidden)
        drawn = behaviour(logits.detach())
        logp = their_logits.log_softmax(-1)
        exact = torch.autograd.grad(
            divergence_from_logits(logits, their_logits, Divergence("reverse_kl"), 1.0).sum(), leaves
        )
        mean = [torch.zeros_like(leaf) for leaf in leaves]
        for token in range(V):
            loss = fused_sampled_divergence(
                leaves[0], own, torch.full((N,), token), logp[:, token], weights=drawn[:, token],
                behaviour_logprobs=drawn[:, token].log() if known else None, ratio_bounds=bounds,
            )  # fmt: skip
            mean = [m + g for m, g in zip(mean, torch.autograd.grad(loss.loss_sum, leaves), strict=True)]
        away = sum((m - e).square().sum() for m, e in zip(mean, exact, strict=True)).sqrt()
        return float(away / sum(e.square().sum() for e in exact).sqrt())

    def test_the_students_own_distribution_has_none(self):
        assert self.bias(lambda logits: logits.softmax(-1)) < 1e-9

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_another_temperature_is_not_made_good_by_bounded_ratios(self, temperature):
        def draws(logits):
            return (logits / temperature).softmax(-1)

        assert self.bias(draws) > 0.3
        assert self.bias(draws, known=True) > 0.05
        assert self.bias(draws, known=True, bounds=(0.0, 1e12)) < 1e-9  # the ratio itself would be right

    def test_tokens_that_are_never_drawn_are_not_made_good_by_any_ratio(self):
        def nucleus(logits):
            kept = logits.topk(3).indices
            return torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept)).softmax(-1)

        assert self.bias(nucleus) > 0.05
        assert self.bias(nucleus, known=True, bounds=(0.0, 1e12)) > 0.05

    def test_rows_that_are_left_out_for_their_later_tokens_bias_the_earlier_ones(self):
        """Two tokens at most, of which 0 ends a response; the mask leaves out responses without it."""
        torch.manual_seed(0)
        size, head = 3, OutputHead(torch.eye(3, dtype=torch.float64))
        logits = torch.randn(1 + size, size, dtype=torch.float64).mul_(2).requires_grad_()  # of the first, and after it
        theirs = torch.randn_like(logits).mul_(2)
        q, logp = logits.detach().softmax(-1), theirs.log_softmax(-1)
        kl = (logits.softmax(-1) * (logits.log_softmax(-1) - logp)).sum(-1)
        mean, exact = {}, {}
        for masked in (False, True):
            mean[masked], objective = torch.zeros_like(logits), 0.0
            for first, second in itertools.product(range(size), range(size)):
                places, tokens = ([0], [0]) if first == 0 else ([0, 1 + first], [first, second])
                chance = q[0, first] * (q[1 + first, second] if first else 1.0 / size)
                if masked and tokens[-1] != 0:
                    continue
                loss = fused_sampled_divergence(
                    logits[places], head, torch.tensor(tokens), logp[places, tokens],
                    weights=chance.expand(len(places)),
                )  # fmt: skip
                mean[masked] += torch.autograd.grad(loss.loss_sum, logits)[0]
                objective = objective + chance * kl[places].sum()
            exact[masked] = torch.autograd.grad(objective, logits, retain_graph=True)[0]
        torch.testing.assert_close(mean[False], exact[False])
        assert (mean[True] - exact[True]).norm() > 0.1 * exact[True].norm()


class TestTheAllowList:
    def whole(self, **changes):
        return completed(GenerationConfig(do_sample=True, top_k=0, **changes), None)

    def test_plain_sampling_is_taken(self, panel):
        free = {"max_new_tokens": 7, "eos_token_id": [1, 2], "use_cache": False, "renormalize_logits": True}
        require_whole_distribution(panel, self.whole(), 1.0)
        require_whole_distribution(panel, self.whole(temperature=2.0, typical_p=1.0, **free), 2.0)

    def test_every_other_setting_that_transformers_knows_is_refused(self, panel):
        """Whatever a release adds is refused until it is looked at."""
        names = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in _FREE]
        assert len(names) > 40
        for name in names:
            config = self.whole()
            setattr(config, name, "something else")
            with pytest.raises(ConfigError, match=rf"{name}='something else' with estimator='sampled' \(teacher 't'\)"):
                require_whole_distribution(panel, config, 1.0)

    def test_what_transformers_fills_in_counts(self, panel):
        """Left at None, top_k is 50, and a checkpoint's own settings stand."""
        with pytest.raises(ConfigError, match="top_k=50 with"):
            require_whole_distribution(panel, completed(GenerationConfig(do_sample=True), None), 1.0)
        own = GenerationConfig(typical_p=0.9, suppress_tokens=[3])
        filled = completed(GenerationConfig(do_sample=True, top_k=0, suppress_tokens=[]), own)
        with pytest.raises(ConfigError, match=r"typical_p=0\.9.*own generation config.*in generation_kw"):
            require_whole_distribution(panel, filled, 1.0, ["do_sample", "top_k", "suppress_tokens"])

    def test_other_estimators_take_any_draws(self):
        other = TeacherPanel({"t": tiny_llama()})
        require_whole_distribution(other, self.whole(top_p=0.5, temperature=0.3), 1.0)


def test_a_student_with_dropout_is_another_one_at_each_pass(panel):
    require_same_student(panel, tiny_llama())
    noisy = tiny_llama()
    noisy.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn has attention_dropout=0\.1"):
        require_same_student(panel, noisy)
    noisy = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.2))
    with pytest.raises(ConfigError, match=r"student's 1 has dropout=0\.2"):
        require_same_student(panel, noisy)
    noisy[1].p = 0.0  # as TRL's disable_dropout sets it
    require_same_student(panel, noisy)
