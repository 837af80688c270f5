import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.monitor.watch import AlarmSettings, LengthAlarm, Responses
from kd_plugin.panel import Estimator, TeacherPanel
from kd_plugin.panel.anchor import starting_student
from kd_plugin.panel.identity import differences, panel_identity
from kd_plugin.rollouts.rows import ends_in_loop, loop_end, repetition
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.vocab import Vocabulary
from tests.text_teachers import ScriptedTeacher
from tests.tiny import byte_tokenizer, tiny_llama


def slow_loop_end(tokens, repeats, longest):
    """Look at every beginning, in plain words."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, longest + 1):
            tail = tokens[end - period * repeats : end]
            if period * repeats <= end and tail == tail[:period] * repeats:
                return end
    return None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(2, 4), st.integers(1, 6))
def test_a_loop_is_found_where_it_is_complete(tokens, repeats, longest):
    end = slow_loop_end(tokens, repeats, longest)
    assert loop_end(tokens, repeats, longest) == end
    if end is not None:  # the two agree at the first loop
        assert bool(ends_in_loop(torch.tensor([tokens[:end]]), 0, repeats, longest))
        assert not bool(ends_in_loop(torch.tensor([tokens[: end - 1] or [5]]), 0, repeats, longest))


def test_repetition_is_the_share_of_four_grams_that_came_before():
    assert repetition([]) == repetition([1, 2, 3]) == repetition(list(range(50))) == 0.0
    assert repetition([7] * 103) == pytest.approx(0.99)
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4]) == pytest.approx(1 / 6)


def ring(alarm, lengths=(), truncated=0.0, repeated=0.0):
    return [alarm.observe(Responses(length, truncated, repeated)) for length in lengths]


def test_it_rings_when_responses_grow_or_shrink_and_then_keeps_quiet_for_a_window():
    alarm = LengthAlarm(AlarmSettings(length=2.0, window=2))
    assert ring(alarm, [10, 10, 15, 19]) == [None] * 4
    first, *rest = ring(alarm, [30, 40, 50, 60])
    assert first == "responses grew from 10.0 to 24.5 tokens"
    assert rest[:2] == [None, None] and rest[2] == "responses grew from 10.0 to 55.0 tokens"
    alarm = LengthAlarm(AlarmSettings(length=2.0, window=1))
    assert ring(alarm, [10, 4])[1] == "responses shrank from 10.0 to 4.0 tokens"


def test_it_rings_at_the_limit_and_at_repetition():
    alarm = LengthAlarm(AlarmSettings(truncated=0.5, repetition=0.3, window=1))
    assert ring(alarm, [5], truncated=0.4, repeated=0.2) == [None]
    assert ring(alarm, [5], 0.5, 0.3) == ["50% of responses are truncated by the limit; 30% of 4-grams are repeated"]


def test_a_resumed_alarm_rings_when_an_undisturbed_one_would():
    seen = [10, 12, 11, 30, 40, 41, 50, 20, 60]
    whole = LengthAlarm(AlarmSettings(length=2.0, window=2))
    expected = ring(whole, seen)
    assert sum(said is not None for said in expected) == 2
    for cut in range(len(seen)):
        first, second = (LengthAlarm(AlarmSettings(length=2.0, window=2)) for _ in range(2))
        before = ring(first, seen[:cut])
        second.load(first.state())
        assert before + ring(second, seen[cut:]) == expected


@pytest.mark.parametrize(
    "wrong",
    [{"length": 0.5}, {"truncated": 2.0}, {"repetition": -0.1}, {"window": 0}, {"action": "stopp"}, {"factor": 1.0}],
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(ConfigError, match=r"Did you mean 'stop'" if name == "action" else str(wrong[name])):
        AlarmSettings(**wrong)


VOCABULARY = Vocabulary.from_tokenizer(byte_tokenizer())
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def score(teacher, ids):
    return teacher.score(ids, torch.ones_like(ids), torch.arange(ids.numel())).hidden


def test_the_start_of_a_lora_student_is_its_base_and_costs_no_memory():
    ids = torch.randint(3, 250, (2, 9))
    base = tiny_llama(seed=1)
    expected = base.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    student = get_peft_model(base, LORA)
    start = starting_student(student, VOCABULARY)
    torch.testing.assert_close(score(start, ids), expected)
    changed = student(input_ids=ids, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    assert not torch.allclose(changed, expected)
    own = {p.data_ptr() for p in student.parameters()}
    assert all(p.data_ptr() in own for p in start.model.parameters())
    assert any(p.requires_grad for p in student.parameters())  # the student still learns


def test_the_start_of_a_full_student_stays_when_the_student_changes():
    ids = torch.randint(3, 250, (2, 9))
    student = tiny_llama(seed=1)
    start = starting_student(student, VOCABULARY)
    before = score(start, ids)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(score(start, ids), before)
    assert all(p.requires_grad for p in student.parameters())


def test_a_student_that_trains_a_part_of_its_base_has_no_start():
    config = LoraConfig(r=4, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    model = tiny_llama(seed=1)
    student = get_peft_model(model, config)
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="norm"):
        starting_student(student, VOCABULARY)


@pytest.mark.parametrize("estimator", ["exact", "topk_tail", "sampled"])
def test_a_panel_is_its_own_also_as_lightning_keeps_it(estimator):
    """A checkpoint of Lightning keeps tuples, a file of JSON gives lists back."""
    panel = TeacherPanel(
        {"t": ScriptedTeacher()}, estimator=Estimator(estimator), text=CorrectionSettings(accept="teacher")
    )
    identity = panel_identity(panel, Divergence("reverse_kl"), 1.0)
    assert differences(identity, identity) == differences(json.loads(json.dumps(identity)), identity) == []
    other = TeacherPanel({"t": ScriptedTeacher()}, text=CorrectionSettings(accept="teacher", threshold=0.9))
    assert any(
        "threshold" in change for change in differences(identity, panel_identity(other, Divergence("reverse_kl"), 1.0))
    )
