"""What fidelity measures is what training gets."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.cache import Sampled, TopK
from kd_plugin.capturing.fidelity import fidelity
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.teachers import LocalTeacher
from tests.core.cache_help import prompt_rows

VOCABULARY = 259


@pytest.fixture(scope="module")
def found(teacher_dir, student_dir):
    settings = [TopK(4), TopK(32), TopK(VOCABULARY), Sampled(4), Sampled(64), Sampled(64, "each")]
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    return fidelity(
        prompt_rows(40), LocalTeacher(teacher_dir, dtype="float32"), student, settings=settings, sequences=12,
        batch_tokens=200, progress=False,
    )  # fmt: skip


def by_name(found):
    return {measured.name: measured for measured in found.measurements}


def test_the_whole_vocabulary_gives_the_exact_gradient_computed_by_autograd(found, teacher_dir, student_dir):
    whole = by_name(found)[f"top_k {VOCABULARY}"]
    assert whole.cosine > 1 - 1e-5 and whole.norm_ratio == pytest.approx(1, abs=1e-3) and whole.mass == 1.0
    assert whole.student_kl == pytest.approx(found.student_kl, rel=1e-3)


def test_the_exact_kl_is_that_of_plain_pytorch(found, teacher_dir, student_dir):
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (teacher_dir, student_dir)]
    tokenizer, rows = LocalTeacher(teacher_dir).tokenizer, prompt_rows(40)
    total, count = 0.0, 0
    for i in torch.linspace(0, 39, 12, dtype=torch.float64).int().tolist():
        prompt, completion = (tokenizer(rows[i][name])["input_ids"] for name in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        p, q = (model(ids).logits[0, len(prompt) - 1 : -1].detach().double().log_softmax(-1) for model in models)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert found.positions == count and found.sequences == 12
    assert found.student_kl == pytest.approx(total / count, rel=1e-5)


def test_more_is_closer_and_dearer(found):
    named = by_name(found)
    for fewer, more in (("top_k 4", "top_k 32"), ("sampled 4", "sampled 64")):
        assert named[fewer].cosine < named[more].cosine and named[fewer].mass < named[more].mass
        assert named[fewer].bytes < named[more].bytes
        assert named[fewer].target_kl > named[more].target_kl > 0
    assert named["top_k 4"].student_kl < found.student_kl  # merged outcomes hide what differs inside them
    assert named["sampled 64"].cosine == pytest.approx(named["sampled 64 each"].cosine, abs=1e-6)
    assert named["sampled 64"].bytes < named["sampled 64 each"].bytes


def test_the_recommendation_is_the_best_within_the_budget(found):
    named = by_name(found)
    budget = named["sampled 64"].bytes
    best = found.recommend(budget)
    fitting = [m for m in found.measurements if m.bytes <= budget]
    assert best.bytes <= budget and best.cosine == max(m.cosine for m in fitting) and len(fitting) < 6
    with pytest.raises(ConfigError, match=r"No setting fits into 1 bytes.*the smallest, "):
        found.recommend(1)


def test_a_teacher_without_its_full_distribution_is_refused(student_dir):
    with pytest.raises(ConfigError, match="does not give its full distribution"):
        fidelity(prompt_rows(2), object(), torch.nn.Linear(1, 1))


def test_command_prints_a_table_and_writes_json_and_plot(tmp_path, teacher_dir, student_dir, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in prompt_rows(8)))
    arguments = ["cache", "fidelity", "--dataset", str(rows), "--teacher", teacher_dir, "--student", student_dir]
    options = ["--k=[2,8]", "--draws=[6]", "--output", str(tmp_path / "out"), "--budget_bytes=500"]
    assert main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "top_k 8" in printed and "sampled 6" in printed and "Within 500 bytes a position: " in printed
    stored = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert [m["targets"]["kind"] for m in stored["measurements"]] == ["top_k", "top_k", "sampled"]
    assert (tmp_path / "out" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    assert main(["cache", "fidelity", "--teacher", teacher_dir]) == 2
    assert "dataset is not set" in capsys.readouterr().err
