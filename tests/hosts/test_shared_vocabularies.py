"""A student and teachers that share a part of their tokens, in every host: added tokens, padded heads, other ids."""

import shutil

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.cache.manifest import keep_tokens
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.errors import CacheCorruptionError, DataError, VocabularyError
from kd_plugin.lightning import KDDataModule, OfflineKDModule, TeacherPanelModule
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.checks import require_one_vocabulary
from kd_plugin.teachers import CachedTeacher, LocalTeacher, ServerTeacher
from kd_plugin.transformers import PanelSettings, TeacherPanelMixin
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.vocab import Vocabulary
from tests.fake_vllm import fake_vllm
from tests.hosts.runs import losses, prompts, settings
from tests.lightning.help import trainer
from tests.tiny import byte_tokenizer, save_tiny

ADDED = {
    "plain": (),
    "more": ("<think>", "</think>"),  # as Qwen3 beside Qwen2.5
    "own": ("<hint>", "<think>"),  # one token of its own, one that stands elsewhere
}
PAIRS = [("plain", "more"), ("more", "plain"), ("own", "more")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Students and teachers with 272 rows, of which 259 to 261 are tokens."""
    base = tmp_path_factory.mktemp("shared")
    return {
        (role, kind): save_tiny(base / f"{role}-{kind}", variant="padded", seed=seed, added=added)
        for seed, role in enumerate(("student", "teacher"))
        for kind, added in ADDED.items()
    }


class PlainPanelTrainer(TeacherPanelMixin, Trainer):
    pass


def panel_trainer(directory, student, teachers, rows=None, **options):
    return TeacherPanelTrainer(
        model=student,
        teacher_models=teachers if isinstance(teachers, dict) else {"t": teachers},
        args=TeacherPanelConfig(**settings(directory, **{"max_steps": 1, "max_completion_length": 8, **options})),
        train_dataset=prompts() if rows is None else Dataset.from_list(rows),
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_loss_is_over_shared_tokens_and_the_rest(student, teacher, divergence, models, tmp_path):
    made = panel_trainer(tmp_path, models["student", student], models["teacher", teacher], divergence=divergence)
    tokens = 259 + len(ADDED[student])
    assert made._vocabulary.size == tokens and not made._vocabulary.is_cut
    shared = made._vocabulary.shared_with(made.panel.teachers["t"].vocabulary)
    assert shared.runs == ((0, 259),)
    made.model.train()
    batch = made._generate_and_score_completions([dict(row) for row in made.train_dataset.select(range(4))])
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
    start, scored = batch["prompt_ids"].shape[1], batch["completion_mask"].bool()
    with torch.no_grad():
        q, p = (
            model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1, :size]
            for model, size in ((made.model, tokens), (made.panel.teachers["t"].model, shared.teacher_size))
        )
        found, _, count = made._compute_loss(made.model, {"batch": batch["scored"].micro_batches([4])[0]}, None)
    covered = (batch["completion_ids"] >= 259).int().cumsum(1) <= (batch["completion_ids"] >= 259).int()
    values = divergence_from_logits(q[scored], p[scored], Divergence(divergence), 1.0, shared)
    expected = (values * covered[scored]).sum() / count  # after a token that it cannot read the teacher says nothing
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "exact", "combine": "mixture"},
        {"estimator": "exact", "combine": "confidence"},
        {"estimator": "sampled", "combine": "weighted_kl"},
        {"estimator": "topk_tail", "combine": "weighted_kl"},
        {"combine": "weighted_kl", "rollouts": "interleaved"},
    ],
)
@pytest.mark.parametrize("student", ["plain", "own"])
def test_every_estimator_and_mode_with_teachers_of_two_vocabularies(options, student, models, tmp_path):
    teachers = {name: models["teacher", name] for name in ("plain", "more")}
    made = panel_trainer(
        tmp_path, models["student", student], teachers, divergence="reverse_kl", max_steps=2, save_rollouts=2, **options
    )
    made.train()
    assert len(losses(made)) == 2
    logged = made.state.log_history[0]
    assert 0.0 < logged["rest_mass/more"] < 1.0 and logged["student_rest_mass/more"] >= 0.0
    assert ("rest_mass/plain" in logged) == (student == "own" or options.get("combine") == "mixture")


def test_a_server_of_a_larger_vocabulary(models, tmp_path):
    path = models["teacher", "more"]
    local, tokenizer = LocalTeacher(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    with fake_vllm(local.model, tokenizer) as (url, _):
        for top_k, estimator in ((5, "topk_tail"), ("all", "topk_tail"), (5, "sampled")):
            server = ServerTeacher(url, tokenizer=tokenizer, top_k=top_k, repo=path, license="apache-2.0")
            for student in ("plain", "own"):
                made = panel_trainer(
                    tmp_path / f"{top_k}{estimator}{student}", models["student", student], server, estimator=estimator,
                    divergence="reverse_kl",
                )  # fmt: skip
                made.train()
                assert len(losses(made)) == 1


def test_all_tokens_from_a_server_equal_the_exact_loss(models, tmp_path):
    path = models["teacher", "more"]
    local, tokenizer = LocalTeacher(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    with fake_vllm(local.model, tokenizer) as (url, _):
        server = ServerTeacher(url, tokenizer=tokenizer, top_k="all", repo=path, license="apache-2.0")
        runs = {}
        for kind, teacher, estimator in (("server", server, "topk_tail"), ("local", local, "exact")):
            made = panel_trainer(
                tmp_path / kind, models["student", "own"], teacher, estimator=estimator, divergence="forward_kl"
            )
            made.train()
            runs[kind] = losses(made)
    assert runs["server"] == pytest.approx(runs["local"], rel=1e-4)


@pytest.mark.parametrize(("top_k", "estimator", "own"), [("all", "topk_tail", "exact"), (5, "sampled", "sampled")])
def test_a_server_without_some_of_the_students_tokens_equals_the_local_teacher(top_k, estimator, own, models, tmp_path):
    """Also where the student writes those, which are impossible to the teacher and not free."""
    path = save_tiny(tmp_path / "teacher", variant="untied", seed=1)  # a server speaks of padded rows too
    local, tokenizer = LocalTeacher(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    with fake_vllm(local.model, tokenizer) as (url, _):
        server = ServerTeacher(url, tokenizer=tokenizer, top_k=top_k, repo=path, license="apache-2.0")
        runs = {}
        for kind, teacher, by in (("server", server, estimator), ("local", local, own)):
            student = AutoModelForCausalLM.from_pretrained(models["student", "own"])
            with torch.no_grad():
                student.lm_head.weight[259:261] *= 40.0  # its own tokens are likely
            made = TeacherPanelTrainer(
                model=student,
                processing_class=AutoTokenizer.from_pretrained(models["student", "own"]),
                teacher_models={"t": teacher},
                args=TeacherPanelConfig(
                    **settings(
                        tmp_path / kind, max_steps=1, max_completion_length=8, estimator=by, divergence="reverse_kl"
                    )
                ),
                train_dataset=prompts(),
            )
            made.train()
            runs[kind] = losses(made)
            logged = made.state.log_history[0]["student_rest_mass/t"]
            assert logged > 0.1
    assert runs["server"] == pytest.approx(runs["local"], rel=1e-4)
    assert runs["local"][0] > 1.0  # nats: a tenth of the mass at log(a tenth / a millionth) each


def test_transformers_and_lightning(models, tmp_path):
    student, teacher = models["student", "own"], models["teacher", "more"]
    made = PlainPanelTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=TrainingArguments(**settings(tmp_path / "plain", max_steps=1)),
        teacher_models={"t": teacher},
        panel_settings=PanelSettings(max_completion_length=8),
        processing_class=AutoTokenizer.from_pretrained(student),
        train_dataset=prompts(count=4),
    )
    made.train()
    assert len(losses(made)) == 1
    module = TeacherPanelModule(student, teacher_models={"t": teacher}, max_completion_length=8)
    host = trainer(tmp_path / "lightning", max_steps=1)
    host.fit(module, DataLoader([{"prompt": "a"}, {"prompt": "bc"}], batch_size=2, collate_fn=_columns))
    assert host.global_step == 1


def _columns(rows):
    return {"prompt": [row["prompt"] for row in rows]}


def test_a_prompt_with_a_token_that_the_teacher_has_not(models, tmp_path):
    made = panel_trainer(tmp_path, models["student", "own"], models["teacher", "more"], [{"prompt": "a<hint>b"}] * 4)
    with pytest.raises(DataError, match=r"holds token 259, which teacher 't' has not.*chat_template: own"):
        made.train()


ROWS = [{"prompt": f"q{i}", "completion": f" answer {'y' * (i % 5)}."} for i in range(8)]


@pytest.fixture(scope="module")
def cache(models, tmp_path_factory):
    """Of a teacher with two tokens more, by its own tokenizer; every token is listed."""
    teacher = LocalTeacher(models["teacher", "more"], dtype="float32")
    directory = tmp_path_factory.mktemp("cache") / "c"
    return capture(Dataset.from_list(ROWS), teacher, directory, targets=TopK(261), progress=False).path


@pytest.mark.parametrize("student", ["plain", "own"])
def test_a_cache_of_a_larger_vocabulary_teaches_offline_as_the_live_teacher_does(
    student, models, cache, tmp_path, caplog
):
    args = OfflineKDConfig(**settings(tmp_path / "trl", max_steps=1, per_device_train_batch_size=8))
    made = OfflineKDTrainer(models["student", student], args, teacher_cache=cache)
    assert "share 259 token ids" in caplog.text and "of its mass at the first" in caplog.text
    begun = AutoModelForCausalLM.from_pretrained(models["student", student])
    made.train()
    shared = made.teacher_cache.shared
    teacher, total, count = LocalTeacher(models["teacher", "more"], dtype="float32").model, 0.0, 0
    for row in TeacherCache(cache).dataset():
        ids = torch.tensor([row["input_ids"]])
        scored = torch.tensor(row["completion_mask"][1:]).bool()
        with torch.no_grad():
            q, p = (model(ids).logits[0, :-1][scored] for model in (begun, teacher))
        values = divergence_from_logits(q[:, : shared.student_size], p[:, :261], Divergence("forward_kl"), 1.0, shared)
        total, count = total + values.sum(), count + len(values)
    # Stored log-probabilities are float16
    assert losses(made) == pytest.approx([float(total / count)], rel=2e-3)
    host = trainer(tmp_path, max_steps=1)
    module = OfflineKDModule(models["student", student], cache=str(cache))
    host.fit(module, datamodule=KDDataModule(cache=str(cache), batch_size=4))
    assert host.global_step == 1


def test_a_cache_on_the_panel_and_in_the_warm_up(models, cache, tmp_path):
    made = panel_trainer(
        tmp_path / "panel", models["student", "own"], CachedTeacher(cache), ROWS, estimator="topk_tail",
        divergence="forward_kl", on_policy_fraction=0.0, max_completion_length=32,
    )  # fmt: skip
    made.train()
    assert len(losses(made)) == 1
    warm = panel_trainer(
        tmp_path / "warm", models["student", "own"], models["teacher", "more"], warmup_cache=str(cache),
        warmup_cache_steps=1, max_steps=2,
    )  # fmt: skip
    warm.train()
    assert len(losses(warm)) == 2


def test_a_cache_without_its_tokens_and_one_with_others(models, cache, tmp_path):
    for name in ("bare", "damaged"):
        shutil.copytree(cache, tmp_path / name, ignore=shutil.ignore_patterns("mapped"))
    (tmp_path / "bare" / "vocabulary.json").unlink()
    plain = Vocabulary.from_tokenizer(byte_tokenizer())
    with pytest.raises(VocabularyError, match=r"261 token ids.*the student has 259.*student_tokenizer"):
        TeacherCache(tmp_path / "bare").require_compatible(plain)
    (tmp_path / "damaged" / "vocabulary.json").write_bytes(b"no")
    with pytest.raises(CacheCorruptionError, match="its digest does not match"):
        TeacherCache(tmp_path / "damaged").require_compatible(plain)
    keep = tmp_path / "damaged" / "vocabulary.json"
    keep.unlink()
    keep_tokens(tmp_path / "damaged", plain)
    with pytest.raises(CacheCorruptionError, match="holds other tokens"):
        TeacherCache(tmp_path / "damaged").require_compatible(plain)


def test_a_row_of_the_cache_that_the_student_cannot_read(models, tmp_path):
    rows = [*ROWS, {"prompt": "q", "completion": " <think> no"}]
    teacher = LocalTeacher(models["teacher", "more"], dtype="float32")
    path = capture(Dataset.from_list(rows), teacher, tmp_path / "c", targets=TopK(8), progress=False).path
    args = OfflineKDConfig(**settings(tmp_path / "run", max_steps=1))
    with pytest.raises(DataError, match=r"row 8 holds token 259 of the teacher.*student_tokenizer"):
        OfflineKDTrainer(models["student", "plain"], args, teacher_cache=path)


def test_it_is_said(models, caplog):
    panel = TeacherPanel({"t": LocalTeacher(models["teacher", "more"])})
    own = Vocabulary.from_tokenizer(byte_tokenizer(added=ADDED["own"]))
    assert require_one_vocabulary(panel, own).size == 261
    assert "share 259 token ids; the student has 2 more and the teacher 2" in caplog.text
    assert "Under another id, and so not shared: '<think>'" in caplog.text
