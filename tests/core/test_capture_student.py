"""Captures for a student's tokenizer: targets at its positions, in its tokens, of a teacher that reads by a view."""

import hashlib
import json

import pytest
import torch
from datasets import Dataset

from kd_plugin import CachedTeacher, LocalTeacher, capture
from kd_plugin.cache import Generation, Sampled, TopK
from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError, DataError, VocabularyError
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.panel import Estimator, TeacherPanel, panel_loss, score_rows
from kd_plugin.panel.roster import OwnTerms
from kd_plugin.panel.scoring import scored_positions
from kd_plugin.panel.viewing import readers_of
from kd_plugin.rollouts.rows import assembled
from kd_plugin.signals import OutputHead
from kd_plugin.views import View
from kd_plugin.vocab import Vocabulary
from tests.core.panel_help import assert_same_gradients
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama

OWN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)
ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}", "hint": f"it is {a + b}"} for a in range(3) for b in range(4)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
        "hint": row["hint"],
    }
    for row in ROWS
]


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """A teacher with two tokens more than the student, and another chat template."""
    path = save_tiny(
        tmp_path_factory.mktemp("more") / "t", seed=4, variant="padded", added=("<think>", "</think>"), license="mit"
    )
    tokenizer = byte_tokenizer(added=("<think>", "</think>"))
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(path)
    return path


def dense(cache, model, prompt_ids, ids, size, row_index):
    """Compare the targets of a row with the model's own distribution behind another prompt."""
    with torch.no_grad():
        logp = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1, :size].log_softmax(-1)
    index = [i for i in cache.teacher_index(row_index) if i >= 0]
    signal = cache.signal(torch.tensor(index))
    assert len(signal) == len(ids)
    listed = signal.logprobs > -torch.inf
    found = logp.gather(1, signal.ids)
    torch.testing.assert_close(signal.logprobs[listed], found[listed], rtol=2e-3, atol=2e-3)
    return signal, logp


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_targets_are_of_the_teachers_prompt_at_the_students_positions(kind, more, tmp_path):
    student = byte_tokenizer()
    rows = ROWS if kind == "text" else CHATS
    view = {"context": "{{ hint }}"} | ({} if kind == "text" else {"chat_template": "own"})
    teacher = LocalTeacher(more, dtype="float32")
    cache = capture(
        Dataset.from_list(rows), teacher, tmp_path / "c", targets=TopK(261), student_tokenizer=student, view=view,
        progress=False,
    )  # fmt: skip
    settings = cache.manifest.settings
    assert settings.for_student and settings.tokenizer == Vocabulary.from_tokenizer(student).fingerprint
    assert settings.view["columns"] == ["hint"] and settings.vocab_size == 259
    cache.require_compatible(Vocabulary.from_tokenizer(student))  # no warning, no error
    for row, plain in zip(rows, ROWS, strict=True):
        if kind == "text":
            own, read = student(plain["prompt"])["input_ids"], f"{plain['hint']}\n\n{plain['prompt']}"
            answer = [*student(plain["completion"])["input_ids"], student.eos_token_id]
        else:
            own = student.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
            read = f"[user]{plain['prompt']}\n\n{plain['hint']}[me]"
            whole = student.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
            answer = whole[len(own) :]
        signal, logp = dense(cache, teacher.model, student(read)["input_ids"], answer, 261, own + answer)
        # What only the teacher has is in the mass that is not listed
        assert signal.ids.max() < 259
        rest = logp[:, 259:].logsumexp(-1)
        torch.testing.assert_close(signal.tail_logmass, rest, rtol=1e-2, atol=5e-2)


def test_the_teacher_writes_what_it_is_shown_and_the_student_learns_it_behind_its_own_prompt(more, tmp_path):
    student, teacher = byte_tokenizer(), LocalTeacher(more, dtype="float32")
    cache = capture(
        Dataset.from_list([{"prompt": row["prompt"], "hint": row["hint"]} for row in ROWS]),
        teacher,
        tmp_path / "g",
        targets=TopK(8),
        generate=Generation(max_new_tokens=6, keep_unfinished=True),
        student_tokenizer=student,
        view={"context": "{{ hint }}"},
        progress=False,
    )
    held = cache.dataset()
    assert len(held) + sum(cache.manifest.dropped.values()) == len(ROWS) and len(held) >= 6
    prompts = {tuple(student(row["prompt"])["input_ids"]): row for row in ROWS}
    for example in held:
        ids, mask = example["input_ids"], example["completion_mask"]
        own = ids[: mask.index(1)]
        row = prompts[tuple(own)]
        read = student(f"{row['hint']}\n\n{row['prompt']}")["input_ids"]
        dense(cache, teacher.model, read, ids[len(own) :], 261, ids)


def test_on_a_panel_the_cache_says_what_the_teacher_says_under_the_view(more, tmp_path):
    student, view = byte_tokenizer(), View(context="{{ hint }}", chat_template="own")
    vocabulary, teacher = Vocabulary.from_tokenizer(student), LocalTeacher(more, dtype="float32")
    cache = capture(
        Dataset.from_list(CHATS), teacher, tmp_path / "c", targets=TopK(261), student_tokenizer=student,
        view={"context": "{{ hint }}", "chat_template": "own"}, progress=False,
    )  # fmt: skip
    whole = [student.apply_chat_template(row["prompt"] + row["completion"])["input_ids"] for row in CHATS]
    prompts = [student.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in CHATS]
    answers = [ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)]
    ends = [student.eos_token_id]
    batch = assembled(prompts, answers, end_tokens=ends, pad_token_id=0, device=torch.device("cpu"))
    estimator, gradients = Estimator("topk_tail", top_k=259), []
    panels = [
        TeacherPanel({"t": CachedTeacher(cache, tokenizer=student)}, estimator=estimator),
        TeacherPanel({"t": teacher}, estimator=estimator, own={"t": OwnTerms(view=view)}),
    ]
    model = tiny_llama(seed=1)
    for panel in panels:
        scores = score_rows(
            panel, [panel.assign({})] * len(CHATS), batch.input_ids, batch.attention_mask, batch.completion_start,
            [range(len(one.tokens)) for one in batch.responses], rows_at_once=4, vocabulary=vocabulary, rows=CHATS,
            readers=readers_of(panel, student, vocabulary, pad_token_id=0, ends=ends),
        )  # fmt: skip
        hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        hidden = hidden[:, batch.completion_start - 1 : -1].detach().requires_grad_()
        where = scored_positions(scores, hidden.shape[1], hidden.device)
        tokens = batch.input_ids[:, batch.completion_start :].reshape(-1)[where]
        head = OutputHead.from_model(model, 259)
        loss = panel_loss(panel, scores, hidden.flatten(0, 1)[where], head, tokens, divergence=Divergence())
        gradients.append(torch.autograd.grad(loss.loss_sum, [hidden]))
    assert_same_gradients(*gradients, 5e-3)  # a cache keeps half precision


def test_sampled_targets_keep_shared_draws_alone(more, tmp_path):
    cache = capture(
        Dataset.from_list(ROWS), LocalTeacher(more, dtype="float32"), tmp_path / "s", targets=Sampled(40),
        student_tokenizer=byte_tokenizer(), progress=False,
    )  # fmt: skip
    signal = cache.signal(torch.arange(cache.tokens))
    assert signal.ids.max() < 259 and (signal.draws.sum(1) <= 40).all() and (signal.draws.sum(1) > 20).all()


def test_a_row_that_the_teacher_cannot_read_is_counted(tmp_path, more):
    rows = [*ROWS, {"prompt": "what<hint>", "completion": "x", "hint": ""}]
    student = byte_tokenizer(added=("<hint>",))
    cache = capture(
        Dataset.from_list(rows), LocalTeacher(more, dtype="float32"), tmp_path / "c", student_tokenizer=student,
        progress=False,
    )  # fmt: skip
    assert cache.manifest.dropped == {"a token that the teacher has not": 1} and len(cache) == len(ROWS)


def test_what_it_refuses(more, tmp_path):
    teacher = LocalTeacher(more, dtype="float32")
    rows = Dataset.from_list(ROWS)
    options = {"progress": False, "student_tokenizer": byte_tokenizer()}
    with pytest.raises(DataError, match=r"row 0.*hnit"):
        capture(rows, teacher, tmp_path / "a", view={"context": "{{ hnit }}"}, **options)
    with pytest.raises(DataError, match="has no column 'prompt', which the view renders"):
        texts = Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "hint": ""}])
        capture(texts, teacher, tmp_path / "b", view={"context": "{{ hint }}"}, **options)
    with pytest.raises(ConfigError, match=r"tokenizer: own. Targets are stored over the student's tokens"):
        capture(rows, teacher, tmp_path / "d", view={"tokenizer": "own"}, **options)
    with pytest.raises(VocabularyError, match=r"4 ids differ(.|\n)*Let such a teacher write the completions"):
        swapped = byte_tokenizer(swap=("a", "b"))
        capture(rows, teacher, tmp_path / "c", progress=False, student_tokenizer=swapped)


def test_how_the_teacher_read_is_in_the_lineage_of_who_trains_on_it(more, tmp_path):
    view = {"context": "{{ hint }}"}
    cache = capture(
        Dataset.from_list(ROWS), LocalTeacher(more), tmp_path / "shown", targets=TopK(4), view=view,
        student_tokenizer=byte_tokenizer(), progress=False,
    )  # fmt: skip
    student = Source("student", ref=str(save_tiny(tmp_path / "s", seed=1, license="mit")))
    run = RunLineage(method="offline_kd", student=student, outputs=[cache.source])
    run.write(tmp_path / "s", step=1)
    record = json.loads((tmp_path / "s" / "lineage.json").read_text())
    said = record["run"]["views"]["shown"]
    assert said["context"] == hashlib.sha256(b"{{ hint }}").hexdigest() and said["columns"] == ["hint"]
    (node,) = [node for node in record["nodes"] if node["kind"] == "teacher_outputs"]
    assert node["details"]["view"]["context"] == said["context"]
