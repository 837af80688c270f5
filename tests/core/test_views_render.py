"""A teacher under a view reads its own prompt before the student's response, and is asked at the right tokens of it."""

import pytest
import torch
from datasets import Dataset

from kd_plugin import CachedTeacher, capture
from kd_plugin.cache import TopK
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.panel import Estimator, TeacherPanel, score_rows
from kd_plugin.panel.block import panel_from_block
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.viewing import check_view_columns, readers_of, require_viewable
from kd_plugin.rollouts.rows import assembled, render
from kd_plugin.teachers import LocalTeacher
from kd_plugin.views import View
from kd_plugin.vocab import Vocabulary
from tests.strangers import RemoteStranger
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama

OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ROWS = [
    {"prompt": [{"role": "user", "content": "2+3?"}], "solution": "5"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7*6, please?"}],
     "solution": "forty-two, since 7*6 = 42"},
    {"prompt": [{"role": "user", "content": "Hi"}], "solution": ""},
]  # fmt: skip
ANSWERS = ["five<|im_end|>", "42", "Hello to you<|im_end|>"]


def tokens(text):
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def rollouts(rows=ROWS, answers=ANSWERS):
    tokenizer = byte_tokenizer()
    return assembled(
        render(tokenizer, [row["prompt"] for row in rows]),
        [tokens(one) for one in answers],
        end_tokens=[2],
        pad_token_id=0,
        device=torch.device("cpu"),
    )


def scores_of(panel, rows=ROWS, answers=ANSWERS, rows_at_once=2):
    batch = rollouts(rows, answers)
    return score_rows(
        panel,
        [panel.assign(row) for row in rows],
        batch.input_ids,
        batch.attention_mask,
        batch.completion_start,
        [range(len(tokens(one))) for one in answers],
        rows_at_once=rows_at_once,
        rows=rows,
        readers=readers_of(
            panel, byte_tokenizer(), Vocabulary.from_tokenizer(byte_tokenizer()), pad_token_id=0, ends=[2]
        ),
    )


def viewed_panel(view, teacher=None):
    teacher = teacher or LocalTeacher(tiny_llama(seed=5), tokenizer=byte_tokenizer())
    return TeacherPanel({"t": teacher}, own={"t": OwnTerms(view=view)})


def alone(model, prompt, answer):
    """Last hidden states over the tokens of a response, from one row without any padding."""
    ids = torch.tensor([tokens(prompt) + tokens(answer)])
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    return hidden[len(tokens(prompt)) - 1 : -1]


def same(mine, theirs):
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


CONTEXT = View(context="Solution: {{ solution }}")


def test_context_goes_to_the_last_message_of_the_user_and_positions_follow_it():
    model = tiny_llama(seed=5)
    found = scores_of(viewed_panel(CONTEXT, LocalTeacher(model, tokenizer=byte_tokenizer())))
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n7*6, please?\n\n"
        "Solution: forty-two, since 7*6 = 42<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found[1].prompts["t"] == expected
    for row, answer in zip(found, ANSWERS, strict=True):
        same(row.signals["t"].hidden, alone(model, row.prompts["t"], answer))


def test_a_server_like_teacher_is_asked_at_the_same_tokens(tmp_path):
    path = save_tiny(tmp_path, seed=5)
    teacher = RemoteStranger(path)
    panel = TeacherPanel({"t": teacher}, own={"t": OwnTerms(view=CONTEXT)}, estimator=Estimator("sampled"))
    for row, answer in zip(scores_of(panel), ANSWERS, strict=True):
        hidden = alone(teacher._model, row.prompts["t"], answer)
        expected = teacher._model.lm_head(hidden).log_softmax(-1).gather(1, torch.tensor(tokens(answer))[:, None])
        same(row.signals["t"].sampled_token_logprobs, expected[:, 0])


def test_a_view_that_changes_nothing_gives_the_plain_scores():
    plain = scores_of(TeacherPanel({"t": LocalTeacher(tiny_llama(seed=5), tokenizer=byte_tokenizer())}))
    for one, other in zip(scores_of(viewed_panel(View())), plain, strict=True):
        torch.testing.assert_close(one.signals["t"].hidden, other.signals["t"].hidden)
        assert not other.prompts


def test_own_template_and_system_message():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = OTHER_TEMPLATE
    teacher = LocalTeacher(tiny_llama(seed=5), tokenizer=tokenizer)
    found = scores_of(viewed_panel(View(system="You know all.", chat_template="own"), teacher))
    assert found[1].prompts["t"] == "[system] You know all.<|im_end|>[user] 7*6, please?<|im_end|>[assistant] "


def test_template_of_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text(OTHER_TEMPLATE)
    found = scores_of(viewed_panel(View(chat_template=str(tmp_path / "t.jinja"))))
    assert found[0].prompts["t"] == "[user] 2+3?<|im_end|>[assistant] "


def test_text_prompts_take_a_context_before_them():
    rows = [{"prompt": "2+3=", "solution": "5"}]
    (found,) = scores_of(viewed_panel(CONTEXT), rows, ["5"])
    assert found.prompts["t"] == "Solution: 5\n\n2+3="
    with pytest.raises(DataError, match="prompt is text, which no chat template renders"):
        scores_of(viewed_panel(View(system="Hi")), rows, ["5"])


def test_rows_of_one_teacher_among_several_are_read_by_it_alone():
    shared = tiny_llama(seed=5)
    teachers = {name: LocalTeacher(shared, tokenizer=byte_tokenizer()) for name in ("plain", "solver")}
    panel = TeacherPanel(teachers, own={"solver": OwnTerms(view=CONTEXT)})
    rows = [{**row, "teacher_id": name} for row, name in zip(ROWS, ("solver", "plain", "solver"), strict=True)]
    found = scores_of(panel, rows)
    assert [set(one.prompts) for one in found] == [{"solver"}, set(), {"solver"}]
    same(found[2].signals["solver"].hidden, alone(shared, found[2].prompts["solver"], ANSWERS[2]))


def test_yaml_reaches_the_view_and_a_wrong_key_is_named():
    block = {"teachers": {"t": {"model": "x", "view": {"context": "{{ hint }}", "chat_template": "own"}}}}
    panel = panel_from_block(block)
    assert panel.views["t"] == View(context="{{ hint }}", chat_template="own")
    assert panel.columns == ("hint",)
    with pytest.raises(ConfigError, match=r"teacher 't', view: unknown key 'contxt'. Did you mean 'context'"):
        panel_from_block({"teachers": {"t": {"model": "x", "view": {"contxt": "a"}}}})


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"context": "{{ solution "}, "no Jinja template: line 1"),
        ({"chat_template": "onw"}, "there is no such file.*Did you mean 'own'"),
        ({"tokenizer": "mine"}, "Unknown tokenizer of a view 'mine'"),
        ({"min_coverage": 1.5}, "min_coverage is 1.5"),
    ],
)
def test_views_that_cannot_be_meant(view, message):
    with pytest.raises(ConfigError, match=message):
        View(**view)


@pytest.mark.parametrize(
    ("context", "row", "message"),
    [
        ("{{ solution }}", {"solution": None}, "prints a column that is None"),
        ("{{ solution.x.y }}", {"solution": "5"}, "cannot be rendered: 'str object' has no attribute 'x'"),
        ("{{ 1 // solution }}", {"solution": 0}, "ZeroDivisionError"),
        ("{{ solution.__class__.__mro__ }}", {"solution": "5"}, "unsafe"),
        ("{{ solution }}", {"hint": "5"}, "'solution' is undefined.*the row has 'hint'"),
    ],
)
def test_templates_that_fail_name_the_reason(context, row, message):
    with pytest.raises(DataError, match=message):
        View(context=context).context_of(row)


def test_a_missing_column_is_named_before_anything_is_loaded():
    panel = viewed_panel(CONTEXT)
    with pytest.raises(DataError, match=r"reads the column 'solution', and train has none.*Did you mean 'solutions'"):
        check_view_columns(panel, ["prompt", "solutions"], [], "train")
    with pytest.raises(DataError, match="None in this row"):
        check_view_columns(panel, ["prompt", "solution"], [{"prompt": "x", "solution": None}], "train")


def test_a_context_longer_than_the_teacher_reads_is_refused():
    rows = [{**ROWS[0], "solution": "5" * 600}]
    with pytest.raises(DataError, match=r"would read a row of 6.. tokens, and it reads 512 at most"):
        scores_of(viewed_panel(CONTEXT), rows, ANSWERS[:1])


def test_own_template_where_there_is_none():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the teacher has no chat template of its own"):
        scores_of(viewed_panel(View(chat_template="own"), LocalTeacher(tiny_llama(), tokenizer=tokenizer)))


def test_a_view_of_a_cache_is_refused_since_the_capture_decided_it(tmp_path):
    rows = Dataset.from_list([{"prompt": "2+3=", "completion": "5"}])
    teacher = LocalTeacher(save_tiny(tmp_path / "t"))
    cache = capture(rows, teacher, tmp_path / "c", targets=TopK(4), progress=False)
    panel = viewed_panel(CONTEXT, CachedTeacher(cache, tokenizer=byte_tokenizer()))
    with pytest.raises(ConfigError, match=r"Teacher 't' is a cache and has a view, .* Give the view to `kd-plugin cap"):
        require_viewable(panel, "student")


def test_views_are_refused_where_the_panel_replaces_tokens():
    with pytest.raises(ConfigError, match=r"Teacher 't' has a view, and rollouts='interleaved'"):
        require_viewable(viewed_panel(CONTEXT), "interleaved")
    require_viewable(viewed_panel(CONTEXT), "student")
