"""Which tokens are trained on: completions only, or the assistant's turns only, against plain PyTorch."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import losses, settings
from tests.tiny import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = Dataset.from_list([{"prompt": f"{i}?", "completion": f" yes {'y' * i}"} for i in range(8)])


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


CHATS = Dataset.from_list([chat("a?", "b"), chat("one", "two two", "three", "four"), chat("c", "d" * 9)])


def first_loss(directory, cache, student, rows, tokenizer, **kwargs):
    trainer = OfflineKDTrainer(
        model=student,
        args=OfflineKDConfig(
            **settings(directory, max_steps=1, learning_rate=0.0, per_device_train_batch_size=8, **kwargs)
        ),
        train_dataset=rows,
        teacher_cache=cache,
        processing_class=tokenizer,
    )
    trainer.train()
    return losses(trainer)[0]


def expected_loss(teacher_dir, student_dir, sequences):
    """Mean forward KL at the tokens whose mask is 1; ``sequences`` are (ids, mask)."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (teacher_dir, student_dir)
    )
    values = []
    for ids, mask in sequences:
        scored = torch.tensor(mask[1:]).bool()
        with torch.no_grad():
            q, p = (model(torch.tensor([ids])).logits[0, :-1][scored] for model in (student, teacher))
        values.append(divergence_from_logits(q, p, Divergence("forward_kl")))
    return float(torch.cat(values).mean())


def test_the_assistants_turns_only(tmp_path, student_dir, teacher_dir):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    teacher = LocalTeacher(teacher_dir, tokenizer=tokenizer, dtype="float32")
    cache = capture(CHATS, teacher, tmp_path / "cache", targets=TopK(259), progress=False)
    rendered = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for row in CHATS
    ]
    masks = {
        True: [(r["input_ids"], r["assistant_masks"]) for r in rendered],
        False: [(r["input_ids"], [1] * len(r["input_ids"])) for r in rendered],
    }
    assert all(0 < sum(mask) < len(mask) for _, mask in masks[True])
    for only, sequences in masks.items():
        loss = first_loss(tmp_path / str(only), cache, student_dir, CHATS, tokenizer, assistant_only_loss=only)
        assert loss == pytest.approx(expected_loss(teacher_dir, student_dir, sequences), rel=1e-4)


def test_completions_only_or_whole_texts_from_one_cache(tmp_path, student_dir, teacher_dir):
    tokenizer = byte_tokenizer()
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    cache = capture(PAIRS, teacher, tmp_path / "cache", targets=TopK(259), completion_only=False, progress=False)
    parts = [[tokenizer(row[name])["input_ids"] for name in ("prompt", "completion")] for row in PAIRS]
    for only in (True, False):
        sequences = [
            ([*prompt, *rest, tokenizer.eos_token_id], [int(not only)] * len(prompt) + [1] * (len(rest) + 1))
            for prompt, rest in parts
        ]
        loss = first_loss(tmp_path / str(only), cache, student_dir, PAIRS, tokenizer, completion_only_loss=only)
        assert loss == pytest.approx(expected_loss(teacher_dir, student_dir, sequences), rel=1e-4)
