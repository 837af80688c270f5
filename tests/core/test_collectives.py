"""All heads of a micro-batch are opened once, in one order on every rank, before anything depends on a rank's rows.

The weights of one process play those of a rank under ZeRO-3: outside of a gathering they are empty, as DeepSpeed leaves
them, so that whatever reads one without opening it fails; and each gathering is noted with what it opens.
"""

from contextlib import contextmanager

import pytest
import torch

import kd_plugin.sharding as sharding
from kd_plugin import LocalTeacher, TeacherPanel, capture
from kd_plugin.cache import TopK
from kd_plugin.errors import ConfigError
from kd_plugin.monitor.run import PanelRun
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.panel.step import PanelStep
from kd_plugin.rollouts.rows import assembled
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.vocab import Vocabulary
from tests.core.cache_help import prompt_rows
from tests.tiny import byte_tokenizer, tiny_llama

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12], [13, 14]]
RESPONSES = [[20, 21, 22, 2], [23, 24, 25, 26], [27, 28, 29], [30, 31, 32, 33]]
# What the rows of a rank ask: of one teacher, of the other, of both, of neither
RANKS = {"a": ["a"] * 4, "b": ["b"] * 4, "both": ["a", "b", "a", "b"], "nothing": None}


class Host:
    """The smallest host: one process, which logs each step."""

    device, rank, ranks, step, training, is_logged = torch.device("cpu"), 0, 1, 0, True, True

    def __init__(self):
        self.noted = {}

    def sum_over_ranks(self, values):
        return values

    def note(self, metrics):
        self.noted |= metrics


class Gatherings(list):
    """Which parameters each gathering opened; `part` makes a parameter one that a rank holds a part of."""

    def __init__(self):
        self.whole = {}

    def part(self, name, parameter):
        self.whole[id(parameter)] = (name, parameter.data)
        parameter.ds_status = "NOT_AVAILABLE"
        parameter.data = torch.empty(0)

    @contextmanager
    def __call__(self, parameters):
        parted = {id(p): p for p in parameters if id(p) in self.whole and not p.numel()}
        if not parted:  # open already, or whole on each rank
            yield
            return
        self.append([self.whole[key][0] for key in parted])
        for key, parameter in parted.items():
            parameter.data = self.whole[key][1]
        yield
        for parameter in parted.values():
            parameter.data = torch.empty(0)


@pytest.fixture
def models():
    """A student and two teachers, each with a head of its own."""
    return {
        name: tiny_llama(seed, hidden, tied=False)
        for name, seed, hidden in (("student", 1, 32), ("a", 2, 48), ("b", 3, 64))
    }


def panel_of(models, how):
    own = {}
    if how == "mixed estimators":
        own = {"a": OwnTerms(estimator=Estimator("sampled")), "b": OwnTerms(estimator=Estimator("topk_tail", top_k=4))}
    teachers = {name: LocalTeacher(models[name], name=name) for name in "ab"}
    for teacher in teachers.values():
        teacher.assume_vocabulary(Vocabulary.from_tokenizer(byte_tokenizer()))
    combine = "weighted_kl" if how != "routed" else "route"
    return TeacherPanel(teachers, combine=combine, own=own)


def step_of(panel, tmp_path, caches=(), **settings):
    tokenizer = byte_tokenizer()
    if caches:
        settings |= {"warmup_cache": ",".join(str(cache.path) for cache in caches), "warmup_cache_steps": 1}
    return PanelRun(PanelSettings(save_rollouts=4, **settings), panel).step(
        Host(),
        tmp_path,
        tokenizer=tokenizer,
        vocabulary=Vocabulary.from_tokenizer(tokenizer),
        end_tokens=[2],
        pad_token_id=0,
        seed=0,
    )


def losses_of_a_rank(step, student, teachers, gatherings):
    """Return the losses of two micro-batches whose rows ask these teachers, and what was gathered for each."""
    named = [{"prompt": "", "teacher_id": name} for name in teachers or ["a"] * 4]
    assigned = step.assign(named, 4)
    rollouts = assembled(PROMPTS, RESPONSES, end_tokens=[2], pad_token_id=0, device=torch.device("cpu"))
    used = [[0] * 4] * 4 if teachers is None else None
    scored = step.score(assigned, rollouts, used=used)
    head = OutputHead.from_model(student, step.vocabulary.size)
    for name, teacher in step.panel.teachers.items():
        gatherings.part(name, teacher.head.weight)
    gatherings.part("student", head.weight)
    found = []
    for batch in scored.micro_batches([2, 2], scored.longest_first()):
        hidden = student.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        found.append(float(step.loss(hidden.detach(), head, batch).loss_sum.detach()))
    for key, parameter in [(id(p), p) for p in (head.weight, *(t.head.weight for t in step.panel.teachers.values()))]:
        parameter.data = gatherings.whole.pop(key)[1]
        del parameter.ds_status
    return found


def sequences(models, how, tmp_path, monkeypatch):
    """Return for each rank what it gathered, one list a gathering, and its losses."""
    seen, losses = {}, {}
    for rank, teachers in RANKS.items():
        gatherings = Gatherings()
        monkeypatch.setattr(sharding, "gathering", gatherings)
        step = step_of(panel_of(models, how), tmp_path / rank)
        losses[rank] = losses_of_a_rank(step, models["student"], teachers, gatherings)
        seen[rank] = list(gatherings)
    return seen, losses


def require_one_order(seen):
    """Refuse ranks that gather other things, in another order, or another number of times."""
    first, *others = seen.values()
    assert all(other == first for other in others), seen


@pytest.mark.parametrize("how", ["routed", "weighted", "mixed estimators"])
def test_every_rank_opens_the_same_heads_once_whatever_its_rows_ask(how, models, tmp_path, monkeypatch):
    seen, losses = sequences(models, how, tmp_path, monkeypatch)
    require_one_order(seen)
    assert seen["nothing"] == [["student", "a", "b"]] * 2, "one gathering for each micro-batch"
    assert losses["nothing"] == [0.0, 0.0] and all(losses["a"])


def test_a_gathering_that_depends_on_the_rows_is_seen(models, tmp_path, monkeypatch):
    inner = PanelStep.loss

    def planted(step, hidden, head, batch):
        if any("a" in one.signals for one in batch.scores):  # as signals that gather when they are read would do
            with sharding.gathering([step.panel.teachers["a"].head.weight]):
                pass
        return inner(step, hidden, head, batch)

    monkeypatch.setattr(PanelStep, "loss", planted)
    with pytest.raises(AssertionError, match="a"):
        require_one_order(sequences(models, "routed", tmp_path, monkeypatch)[0])


def test_a_head_that_nobody_opened_is_refused(models, monkeypatch):
    head = OutputHead.from_model(models["student"], 259)
    gatherings = Gatherings()
    gatherings.part("student", head.weight)
    hidden = torch.zeros(2, models["student"].config.hidden_size)
    with pytest.raises(ConfigError, match=r"sharded.*gathered_heads"):
        HiddenSignal(hidden, head).head.logits(hidden)
    monkeypatch.setattr(sharding, "gathering", gatherings)
    with sharding.gathered_heads([head, head]) as heads:
        assert [one.logits(hidden).shape for one in heads] == [(2, 259)] * 2
    assert gatherings == [["student"]]


def test_a_warm_up_opens_the_students_head_alone_and_once_for_two_caches(models, teacher_dir, tmp_path, monkeypatch):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    caches = [
        capture(prompt_rows(4), teacher, tmp_path / name, targets=TopK(4), progress=False) for name in ("one", "two")
    ]
    step = step_of(panel_of(models, "routed"), tmp_path, caches)
    gatherings = Gatherings()
    monkeypatch.setattr(sharding, "gathering", gatherings)
    head = OutputHead.from_model(models["student"], step.vocabulary.size)
    gatherings.part("student", head.weight)
    batches = [step.warm_up(i, 2, micro_steps=2) for i in range(2)]
    for batch in batches:
        hidden = models["student"].base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        assert float(step.loss(hidden.detach(), head, batch).loss_sum.detach()) > 0
    assert gatherings == [["student"]] * 2
    assert max(len(batch.targets) for batch in batches) == 2, "a micro-batch has rows of both caches"


class Proposing:
    """An engine whose ranks generate each for itself, and which counts the rounds of an interleaved generation."""

    together, takes_nothing, rounds = False, False, 0

    @contextmanager
    def proposing(self):
        def propose(ids, mask, count):
            self.rounds += 1
            return torch.nn.functional.pad(ids, (0, count), value=20)

        yield propose


def test_a_rank_without_rows_of_its_own_joins_each_round_of_an_interleaved_generation(models, tmp_path, monkeypatch):
    """Its round ends with those of other ranks; one that stayed away would leave them waiting at their next one."""
    step = step_of(panel_of(models, "routed"), tmp_path, rollouts="interleaved", on_policy_fraction=0.0)
    step.host.ranks = 2
    others = iter([[3], [2], [1], [0]])  # rows that the other rank still generates
    monkeypatch.setattr("kd_plugin.panel.responding.most_of_any_rank", lambda counts, device: next(others))
    rows = [{"prompt": "", "completion": "abc", "teacher_id": name} for name in "abab"]
    engine = Proposing()
    found = step.respond(step.assign(rows, 4), PROMPTS, engine)
    assert engine.rounds == 2 and next(others, None) is None
    assert [one.ids for one in found] == [byte_tokenizer()("abc<|im_end|>")["input_ids"]] * 4
