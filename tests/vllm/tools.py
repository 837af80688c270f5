"""A tiny student that calls a tool and then says what the tool said, by what it learned: nobody writes for it."""

from itertools import chain

import torch
from trl.chat_template_utils import qwen3_template

from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import losses, prompts, settings
from tests.tiny import byte_tokenizer, tiny_model

# The tool's description is left out, so that prompts stay short
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>'
SAYS = "42!<|im_end|>"
BETWEEN = "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"


def tokenizer():
    found = byte_tokenizer()
    found.chat_template, found.response_template = TEMPLATE, qwen3_template
    return found


def save_student(path, steps=150):
    """Teach a student the two turns, save it, and return where."""
    own, model = tokenizer(), tiny_model(seed=1, hidden=128, scale=1.0).train()
    rows = []
    for row in prompts("conversational", count=8)["prompt"]:
        parts = own.apply_chat_template(row, tokenize=False, add_generation_prompt=True), CALL, BETWEEN, SAYS
        ids = [own(part, add_special_tokens=False)["input_ids"] for part in parts]
        labels = [part if number in (1, 3) else [-100] * len(part) for number, part in enumerate(ids)]
        rows.append((list(chain(*ids)), list(chain(*labels))))
    width = max(len(ids) for ids, _ in rows)
    ids, labels = (
        torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in rows])
        for part, fill in ((0, own.pad_token_id), (1, -100))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(path)
    own.save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    print(f"the student that calls a tool: loss {loss.item():.1e} after {steps} steps")
    return str(path)


def calling(out, student, teacher, engine):
    """Train in TRL with the tool; return losses, calls of the tool, and the texts that are trained on."""
    called, texts = [], []

    def now() -> int:
        """
        Tell the time.

        Returns:
            The time.
        """
        called.append(1)
        return 42

    own = tokenizer()
    common = {"top_k": 1, "max_completion_length": 160, "divergence": "reverse_kl", "max_steps": 2}
    trainer = TeacherPanelTrainer(
        model=student,
        teacher_models={"t": LocalTeacher(teacher, dtype="float32", tokenizer=own)},
        args=TeacherPanelConfig(**settings(out, rollout_engine=engine, learning_rate=1e-4, **common)),
        train_dataset=prompts("conversational", count=8),
        processing_class=own,
        tools=[now],
    )
    score = trainer.panel_step.score

    def scored(assigned, rollouts, **kwargs):
        for row, mask in zip(rollouts.input_ids[:, rollouts.completion_start :].tolist(), kwargs["used"], strict=True):
            texts.append(own.decode([token for token, is_used in zip(row, mask, strict=True) if is_used]))
        return score(assigned, rollouts, **kwargs)

    trainer.panel_step.score = scored
    trainer.train()
    return losses(trainer), len(called), texts
