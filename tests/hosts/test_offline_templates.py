"""Training renders conversations as the capture did: on another day, and with the template that TRL trains with."""

import sys
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.clock import set_today
from tests.core.test_cache_templates import CHATS, DATED, MONDAY, TUESDAY, tokenizer_with
from tests.equivalence.test_offline_masks import expected_loss
from tests.hosts.runs import losses, settings
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, save_tiny

QWEN3, GPT_OSS = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja" for name in ("qwen3", "gptoss"))
THOUGHTS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "<think>\nhm\n</think>\n\none"},
                {"role": "user", "content": "and"},
                {"role": "assistant", "content": "<think>\nso\n</think>\n\ntwo"},
            ]
        }
        for i in range(4)
    ]
)


def build(directory, cache, student, tokenizer, dataset=None, **kwargs):
    return OfflineKDTrainer(
        model=student,
        args=OfflineKDConfig(**settings(directory, **{"max_steps": 1, "shuffle_dataset": False, **kwargs})),
        train_dataset=dataset,
        teacher_cache=cache,
        processing_class=tokenizer,
    )


def make(directory, teacher_dir, template, rows=CHATS, **kwargs):
    teacher = LocalTeacher(teacher_dir, tokenizer=tokenizer_with(template), dtype="float32")
    return capture(rows, teacher, directory, **{"targets": TopK(259), "progress": False, **kwargs})


@pytest.mark.parametrize("streamed", [False, True], ids=["held", "streamed"])
def test_the_next_day_the_rows_still_join(streamed, tmp_path, monkeypatch, teacher_dir, student_dir):
    set_today(monkeypatch, MONDAY)
    cache = make(tmp_path / "cache", teacher_dir, DATED)
    set_today(monkeypatch, TUESDAY)
    rows, tokenizer = Dataset.from_list(CHATS), tokenizer_with(DATED)
    trainer = build(tmp_path / "run", cache, student_dir, tokenizer, rows.to_iterable_dataset() if streamed else rows)
    found = list(trainer.train_dataset)
    assert [row["input_ids"] for row in found] == cache.dataset()["input_ids"]
    assert [row["teacher_index"] for row in found] == cache.dataset()["teacher_index"]
    assert tokenizer.chat_template == DATED  # what is saved with the student prints the day on which it is used
    trainer.train()
    assert len(trainer.evaluate(rows)) > 0


def test_a_cache_that_knows_no_date_says_so(tmp_path, monkeypatch, teacher_dir, student_dir):
    """As captures of an earlier version were."""
    set_today(monkeypatch, MONDAY)
    monkeypatch.setattr(sys.modules["kd_plugin.capturing.capture"], "prints_time", lambda tokenizer: False)
    cache = make(tmp_path / "cache", teacher_dir, DATED)
    monkeypatch.undo()
    assert cache.manifest.settings.rendered_at is None
    with pytest.raises(DataError, match=r"prints today's date, and the cache does not say which.*Capture again"):
        build(tmp_path / "run", cache, student_dir, tokenizer_with(DATED), Dataset.from_list(CHATS))


def test_caches_of_different_days(tmp_path, monkeypatch, teacher_dir, student_dir):
    set_today(monkeypatch, MONDAY)
    first = make(tmp_path / "a", teacher_dir, DATED)
    same = make(tmp_path / "b", teacher_dir, DATED)
    set_today(monkeypatch, TUESDAY)
    other = make(tmp_path / "c", teacher_dir, DATED)
    rows, tokenizer = Dataset.from_list(CHATS), tokenizer_with(DATED)
    with pytest.raises(ConfigError, match=r"others into each of the teacher caches: .*/a 2026-08-31.*date=\.\.\."):
        build(tmp_path / "run", [first, other], student_dir, tokenizer, rows)
    joined = build(tmp_path / "run", [first, same], student_dir, tokenizer, rows).train_dataset
    assert all(max(row) >= 0 for row in joined["teacher_index_1"])
    assert len(build(tmp_path / "run", [first, other], student_dir, tokenizer).train_dataset) == 12


def test_a_training_template_that_prints_the_date(tmp_path, monkeypatch, teacher_dir, student_dir):
    tokenizer = tokenizer_with(GPT_OSS.read_text())
    set_today(monkeypatch, MONDAY)
    cache = make(tmp_path / "cache", teacher_dir, tokenizer.chat_template, assistant_only=True,
                 chat_template=trl.get_training_chat_template)  # fmt: skip
    set_today(monkeypatch, TUESDAY)
    trainer = build(tmp_path / "run", cache, student_dir, tokenizer, Dataset.from_list(CHATS), assistant_only_loss=True)
    assert trainer.train_dataset["teacher_index"] == cache.dataset()["teacher_index"]
    assert trainer.chat_template == trl.get_training_chat_template(tokenizer)


def test_several_turns_with_the_template_that_trl_trains_with(tmp_path, teacher_dir, student_dir):
    tokenizer = tokenizer_with(QWEN3.read_text())
    turns = make(tmp_path / "turns", teacher_dir, tokenizer.chat_template, THOUGHTS, assistant_only=True,
                 chat_template=trl.get_training_chat_template)  # fmt: skip
    trainer = build(tmp_path / "a", turns, student_dir, tokenizer, THOUGHTS, assistant_only_loss=True,
                    learning_rate=0.0, per_device_train_batch_size=4)  # fmt: skip
    used = sum(label != -100 for row in trainer.train_dataset["labels"] for label in row)
    assert turns.tokens == used < sum(map(len, trainer.train_dataset["input_ids"])) / 2
    trainer.train()
    rendered = [
        tokenizer.apply_chat_template(
            row["messages"], chat_template=trl.get_training_chat_template(tokenizer), return_assistant_tokens_mask=True
        )
        for row in THOUGHTS
    ]
    sequences = [(row["input_ids"], row["assistant_masks"]) for row in rendered]
    assert losses(trainer)[0] == pytest.approx(expected_loss(teacher_dir, student_dir, sequences), rel=1e-4)
    assert len(build(tmp_path / "own", turns, student_dir, tokenizer).train_dataset) == 4
    # Rendered by one template and trained by the other, in both directions, and masked otherwise than trained
    whole = make(tmp_path / "whole", teacher_dir, tokenizer.chat_template, THOUGHTS)
    assert len(build(tmp_path / "b", whole, student_dir, tokenizer, THOUGHTS).train_dataset) == 4
    with pytest.raises(DataError, match=r"4 of 4 rows .* by its training template, .*capture with assistant_only=True"):
        build(tmp_path / "b", whole, student_dir, tokenizer, THOUGHTS, assistant_only_loss=True)
    with pytest.raises(DataError, match=r"by a template in the place of the tokenizer's own.*assistant_only_loss=True"):
        build(tmp_path / "b", turns, student_dir, tokenizer, THOUGHTS)


def test_targets_at_the_assistants_turns_do_not_do_for_whole_conversations(tmp_path, teacher_dir, student_dir):
    from tests.core.test_cache_templates import MARKED

    cache = make(tmp_path / "cache", teacher_dir, MARKED, assistant_only=True)
    rows, tokenizer = Dataset.from_list(CHATS), tokenizer_with(MARKED)
    build(tmp_path / "a", cache, student_dir, tokenizer, rows, assistant_only_loss=True).train()
    with pytest.raises(DataError, match=r"have no target in.*The capture scored the assistant's turns"):
        build(tmp_path / "b", cache, student_dir, tokenizer, rows)


def test_a_template_that_changed_since_the_capture(tmp_path, teacher_dir, student_dir):
    """The two are compared token by token: the first that differs is named."""
    cache = make(tmp_path / "cache", teacher_dir, CHAT_TEMPLATE)
    changed = tokenizer_with(CHAT_TEMPLATE.replace("<|im_end|>", "<|im_end|> "))
    said = r"6 of 6 rows .* rendered conversations by another chat template than training"
    differs = r".* equals one of the cache up to token \d+; then it has 'Ġ' .*, and the cache 'Ċ'"
    with (
        pytest.warns(UserWarning, match="captured with another chat template"),
        pytest.raises(DataError, match=said + differs),
    ):
        build(tmp_path / "run", cache, student_dir, changed, Dataset.from_list(CHATS))


def test_what_rows_give_to_the_template_joins(tmp_path, teacher_dir, student_dir):
    """Thinking switched off, tools, and a date of the row's own."""
    template = QWEN3.read_text().replace("{%- if tools %}", "{{ day if day is defined else '' }}{%- if tools %}", 1)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"q{i}"}], "completion": [{"role": "assistant", "content": "a"}],
             "tools": [tool], "chat_template_kwargs": {"enable_thinking": False, "day": f"day {i}"}}
            for i in range(3)
        ]
    )  # fmt: skip
    cache = make(tmp_path / "cache", teacher_dir, template, rows)
    trainer = build(tmp_path / "run", cache, student_dir, tokenizer_with(template), rows)
    assert trainer.train_dataset["teacher_index"] == cache.dataset()["teacher_index"]
    text = byte_tokenizer().decode(cache.dataset()[1]["input_ids"])
    assert "day 1" in text and '"name": "f"' in text


def test_the_command_finds_the_training_template(tmp_path, student_dir, capsys):
    teacher = save_tiny(tmp_path / "teacher", seed=2)
    tokenizer_with(QWEN3.read_text()).save_pretrained(teacher)
    THOUGHTS.to_json(tmp_path / "rows.jsonl")
    arguments = ["--dataset", str(tmp_path / "rows.jsonl"), "--teacher", teacher, "--k", "4"]
    out = ["--output_dir", str(tmp_path / "cache"), "--assistant_only", "true"]
    assert main(["capture", *arguments, *out]) == 0, capsys.readouterr().err
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert "the assistant's turns" in capsys.readouterr().out
    tokenizer = tokenizer_with(QWEN3.read_text())
    trainer = build(
        tmp_path / "run", str(tmp_path / "cache"), student_dir, tokenizer, THOUGHTS, assistant_only_loss=True
    )
    assert len(trainer.train_dataset) == 4
    (tmp_path / "dated.jinja").write_text(DATED)
    out = ["--output_dir", str(tmp_path / "dated"), "--chat_template", str(tmp_path / "dated.jinja")]
    (tmp_path / "capture.yaml").write_text("date: 2026-02-03\n")
    assert main(["capture", "--config", str(tmp_path / "capture.yaml"), *arguments, *out]) == 0
    assert main(["cache", "info", str(tmp_path / "dated")]) == 0
    assert "printed the time 2026-02-03T00:00:00" in capsys.readouterr().out
    assert main(["capture", *arguments, *out[:-1], str(tmp_path / "none.jinja")]) == 2
    assert "chat_template: " in capsys.readouterr().err
