"""Chat templates that print the date render the same on any day, and those that depend on chance are refused."""

import json
import sys

import pytest

from kd_plugin.cache import Generation, TeacherCache, TopK
from kd_plugin.cache.merge import merge
from kd_plugin.cache.templates import pinned, pinned_tokenizer, prints_time, read_template
from kd_plugin.capturing import capture
from kd_plugin.capturing.plan import estimate
from kd_plugin.capturing.tokenization import Tokenization
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.teachers import LocalTeacher
from tests.clock import set_today
from tests.core.cache_help import shards_of
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer

MONDAY, TUESDAY = "2026-08-31T23:59:58", "2026-09-01T00:00:03"
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHAT_TEMPLATE
CHATS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
    for i in range(6)
]


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def dated_teacher(teacher_dir, template=DATED):
    return LocalTeacher(teacher_dir, tokenizer=tokenizer_with(template), dtype="float32")


def texts(cache):
    return [byte_tokenizer().decode(ids) for ids in cache.dataset()["input_ids"]]


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "\n\n  {% if true %}x{{ strftime_now('%H:%M \"}} %d') }}{% endif %}",
        "   x{{ strftime_now('%m') }}",
        "{# c #}\n{% set a = strftime_now('%Y') %}{% macro m() %}{{ strftime_now('%m') }}{% endmacro %}{{ m() + a }}",
        "{% if day is not defined and strftime_now is defined %}{% set day = strftime_now('%j') %}{% endif %}{{ day }}",
        "{%- for m in messages %}{% generation %}{{ strftime_now('%d') + m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_a_pinned_template_prints_what_it_printed_then(template, monkeypatch):
    set_today(monkeypatch, MONDAY)
    tokenizer, messages = tokenizer_with(template), CHATS[0]["messages"]
    then = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prints_time(tokenizer)
    fixed = pinned_tokenizer(tokenizer, MONDAY)
    set_today(monkeypatch, TUESDAY)
    assert tokenizer.apply_chat_template(messages, tokenize=False) != then
    assert fixed.apply_chat_template(messages, tokenize=False) == then
    assert pinned(fixed.chat_template, TUESDAY) == fixed.chat_template
    assert tokenizer.chat_template == template


def test_templates_of_models_are_told_apart(monkeypatch):
    """Of those that TRL knows some print the date, and each of these says the same on another day."""
    from pathlib import Path

    trl = pytest.importorskip("trl")
    set_today(monkeypatch, MONDAY)
    found = {}
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        tokenizer = tokenizer_with(path.read_text())
        if prints_time(tokenizer):
            found[path.stem] = tokenizer
    assert {"llama3_2", "gptoss", "gptoss_training"} <= set(found) and "qwen3" not in found
    then = {name: t.apply_chat_template(CHATS[0]["messages"], tokenize=False) for name, t in found.items()}
    set_today(monkeypatch, TUESDAY)
    for name, tokenizer in found.items():
        assert (
            pinned_tokenizer(tokenizer, MONDAY).apply_chat_template(CHATS[0]["messages"], tokenize=False) == then[name]
        )


def test_named_templates_are_all_pinned():
    named = {"default": DATED, "tool_use": "tools " + DATED}
    fixed = pinned_tokenizer(tokenizer_with(named), MONDAY)
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        text = fixed.apply_chat_template(CHATS[0]["messages"], tools=tools, tokenize=False)
        assert "Today is 31 Aug 2026" in text and text.startswith("tools") == bool(tools)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ['a', 'b'] | random }}" + CHAT_TEMPLATE, r"\|random, which gives another text each time"),
        ("{{ lipsum(n=1) }}" + CHAT_TEMPLATE, "lipsum, which gives"),
        ("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHAT_TEMPLATE, "format that it makes up"),
        ("{% set now = strftime_now %}{{ now('%Y') }}" + CHAT_TEMPLATE, "hands it on"),
        ("{% if %}", "not valid Jinja"),
    ],
)
def test_templates_whose_output_cannot_be_had_again_are_refused(template, message, teacher_dir, tmp_path):
    with pytest.raises(ConfigError, match=message):
        capture(CHATS, dated_teacher(teacher_dir, template), tmp_path / "c", targets=TopK(2), progress=False)
    assert not (tmp_path / "c").exists()
    # A template that renders nothing may do as it likes
    capture([{"text": "abc"}], dated_teacher(teacher_dir, template), tmp_path / "c", targets=TopK(2), progress=False)


def test_the_date_stands_in_the_manifest_and_holds_for_whoever_goes_on(teacher_dir, tmp_path, monkeypatch):
    options = {"targets": TopK(4), "shard_rows": 2, "progress": False}
    teacher = dated_teacher(teacher_dir)
    set_today(monkeypatch, MONDAY)
    whole = capture(CHATS, teacher, tmp_path / "whole", **options)
    assert whole.manifest.settings.rendered_at == MONDAY and whole.manifest.version == 3
    begun = capture(CHATS, teacher, tmp_path / "begun", **options)
    for unit in begun.manifest.units[1:]:
        (begun.path / unit.file).unlink()
        (begun.path / "units" / f"{unit.index:05d}.json").unlink()
    set_today(monkeypatch, TUESDAY)
    resumed = capture(CHATS, teacher, begun.path, **options)
    assert shards_of(resumed.path) == shards_of(whole.path)
    assert all(text.startswith("Today is 31 Aug 2026") for text in texts(resumed))
    more = capture([{"messages": CHATS[0]["messages"] * 2}], teacher, begun.path, append=True, **options)
    assert len(more) == 7 and texts(more)[-1].startswith("Today is 31 Aug 2026")
    other = capture(CHATS, teacher, tmp_path / "other", **options)
    assert texts(other)[0].startswith("Today is 01 Sep 2026")
    with pytest.raises(ConfigError, match="rendered_at: '2026-08-31T23:59:58' against '2026-09-01T00:00:00'"):
        capture(CHATS, teacher, begun.path, date="2026-09-01", **options)
    found = whole.teacher_index(whole.dated(teacher.tokenizer).apply_chat_template(CHATS[0]["messages"])["input_ids"])
    assert found == whole.dataset()[0]["teacher_index"]


def test_a_date_of_ones_own(teacher_dir, tmp_path):
    teacher, options = dated_teacher(teacher_dir), {"targets": TopK(4), "progress": False}
    parts = [
        capture(rows, teacher, tmp_path / name, date="2026-02-03", **options)
        for name, rows in (("a", CHATS[:3]), ("b", CHATS[3:]))
    ]
    merged = merge([part.path for part in parts], tmp_path / "merged")
    assert all(text.startswith("Today is 03 Feb 2026") for text in texts(merged)) and len(merged) == 6
    with pytest.raises(ConfigError, match="rendered_at"):
        merge([parts[0].path, capture(CHATS[3:], teacher, tmp_path / "c", **options).path], tmp_path / "no")
    with pytest.raises(ConfigError, match="date='tomorrow': expected a day such as"):
        capture(CHATS, teacher, tmp_path / "d", date="tomorrow", **options)
    found = estimate(CHATS, teacher, batch_tokens=100, date="2026-02-03", targets=TopK(4))
    assert found.rows == 6


def test_workers_that_begin_on_both_sides_of_midnight_render_one_date(teacher_dir, tmp_path, monkeypatch):
    """The second one prepares before the first one's manifest is there."""
    teacher, directory = dated_teacher(teacher_dir), tmp_path / "c"
    options = {"targets": TopK(4), "shard_rows": 2, "progress": False}
    module = sys.modules["kd_plugin.capturing.capture"]
    open_engine = module.open_engine

    def slow(*args):
        monkeypatch.setattr(module, "open_engine", open_engine)
        set_today(monkeypatch, MONDAY)
        capture(CHATS[:6], teacher, directory, **options)
        for index in (1, 2):
            (directory / "units" / f"{index:05d}.json").unlink()
        return open_engine(*args)

    monkeypatch.setattr(module, "open_engine", slow)
    set_today(monkeypatch, TUESDAY)
    cache = capture(CHATS, teacher, directory, **options)
    assert cache.manifest.settings.rendered_at == MONDAY
    assert all(text.startswith("Today is 31 Aug 2026") for text in texts(cache))


def test_rows_that_nothing_is_rendered_for_have_no_date(teacher_dir, tmp_path):
    teacher = dated_teacher(teacher_dir)
    rows = [{"prompt": "a", "completion": "b"}, {"input_ids": [5, 6, 7]}]
    for i, row in enumerate(rows):
        cache = capture([row], teacher, tmp_path / str(i), targets=TopK(4), date="2026-02-03", progress=False)
        assert cache.manifest.settings.rendered_at is None and cache.manifest.version == 1
    written = [{"prompt": CHATS[0]["messages"][:1]}]
    generate = Generation(max_new_tokens=2, keep_unfinished=True)
    cache = capture(written, teacher, tmp_path / "w", targets=TopK(4), date="2026-02-03", generate=generate,
                    progress=False)  # fmt: skip
    assert texts(cache)[0].startswith("Today is 03 Feb 2026")


def test_what_a_row_gives_to_the_template_wins(monkeypatch):
    """As in TRL, which merges `chat_template_kwargs` over the rest."""
    template = (
        "{{ date_string if date_string is defined else strftime_now('%Y') }}|{{ tools | tojson }}|" + CHAT_TEMPLATE
    )
    tokenization = Tokenization(tokenizer_with(template), 259).rendered_at(MONDAY)
    row = {**CHATS[0], "tools": json.dumps([{"name": "f"}])}
    rendered = [
        byte_tokenizer().decode(tokenization({**row, "chat_template_kwargs": given}).input_ids)
        for given in (None, {"date_string": "then"}, {"tools": [{"name": "g"}]}, {"chat_template": CHAT_TEMPLATE})
    ]
    assert rendered[0].startswith('2026|[{"name": "f"}]') and rendered[1].startswith('then|[{"name": "f"}]')
    assert rendered[2].startswith('2026|[{"name": "g"}]') and rendered[3].startswith("<|im_start|>user")
    with pytest.raises(DataError, match="a chat template that prints the time"):
        tokenization({**row, "chat_template_kwargs": {"chat_template": DATED}})


MARKED = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}<|im_end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m['content'] }}<|im_end|>{% endif %}",
)


def test_the_assistants_turns_alone(teacher_dir, tmp_path):
    turns = [{"role": role, "content": text} for role, text in
             (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))]  # fmt: skip
    rows = [{"messages": turns}]
    options = {"targets": TopK(4), "progress": False, "assistant_only": True}
    cache = capture(rows, dated_teacher(teacher_dir, MARKED), tmp_path / "a", **options)
    row = cache.dataset()[0]
    scored = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert byte_tokenizer().decode(scored) == "two<|im_end|>four<|im_end|>"
    assert cache.tokens == len(scored) == sum(i >= 0 for i in row["teacher_index"])
    settings = TeacherCache(cache.path).manifest.settings
    assert settings.assistant_only and settings.scored == "the assistant's turns, in completions if any"
    # A prompt's turns are not scored, unless whole rows are
    parts = [{"prompt": turns[:3], "completion": turns[3:]}]
    for name, completion_only, expected in (("b", None, "four<|im_end|>"), ("c", False, "two<|im_end|>four<|im_end|>")):
        teacher = dated_teacher(teacher_dir, MARKED)
        cache = capture(parts, teacher, tmp_path / name, completion_only=completion_only, **options)
        row = cache.dataset()[0]
        scored = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        assert byte_tokenizer().decode(scored) == expected
    given = capture(rows, LocalTeacher(teacher_dir), tmp_path / "d", chat_template=MARKED, **options)
    assert given.manifest.settings.rendered_with is not None and given.tokens == 9
    with pytest.raises(ConfigError, match="rendered_with"):
        capture(rows, dated_teacher(teacher_dir, MARKED), tmp_path / "d", **options)


def test_turns_that_nothing_marks_are_refused(teacher_dir, tmp_path):
    options = {"targets": TopK(4), "progress": False, "assistant_only": True}
    teacher = LocalTeacher(teacher_dir)
    with pytest.raises(ConfigError, match=r"chat_template=trl\.get_training_chat_template"):
        capture(CHATS, teacher, tmp_path / "a", **options)
    with pytest.raises(ConfigError, match="chat_template is none"):
        capture(CHATS, teacher, tmp_path / "a", chat_template=DATED, **options)
    with pytest.raises(ConfigError, match="there is none to be had for this tokenizer"):
        capture(CHATS, teacher, tmp_path / "a", chat_template=pytest.importorskip("trl").get_training_chat_template,
                **options)  # fmt: skip
    with pytest.raises(ConfigError, match="with generate the teacher makes them"):
        capture(CHATS, teacher, tmp_path / "a", generate=Generation(), chat_template=MARKED, **options)
    for row in ({"text": "x"}, {"prompt": "a", "completion": "b"}, {"input_ids": [4, 5, 6]}):
        with pytest.raises(DataError, match="is no conversation, so assistant_only=True"):
            capture([row], teacher, tmp_path / "a", chat_template=MARKED, **options)
    assert not (tmp_path / "a").exists()
    assert read_template(MARKED).formats == frozenset()
