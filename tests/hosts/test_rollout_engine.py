"""Servers generate for the student in every host: the run is that of the transformers engine, or it is stopped."""

import logging

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.vllm import engine as server_engine
from kd_plugin.teachers import LocalTeacher, client
from kd_plugin.transformers import TeacherPanelMixin
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import LORA, assert_same, losses, prompts, settings, weights
from tests.tiny import save_tiny

GREEDY = {"top_k": 1, "max_completion_length": 10, "divergence": "reverse_kl"}
STEPS = {"max_steps": 3, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture
def engine(student_dir, untied_student_dir, tokenizer, tmp_path):
    """Return a function that starts a scripted server of a student and gives its url and its behaviour."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def start(tied=False, **behaviour):
            directory = student_dir if tied else untied_student_dir
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            return stack.enter_context(fake_vllm(model, tokenizer, Behaviour(**behaviour)))

        yield start


def block(*urls, sync, **options):
    where = {"url": urls[0]} if len(urls) == 1 else {"urls": list(urls)}
    return {"kind": "vllm", **where, "sync": sync, "max_retries": 1, **options}


def trl(directory, student, teacher, engine=None, lora=False, **options):
    return TeacherPanelTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_models={"t": teacher},
        args=TeacherPanelConfig(**settings(directory, rollout_engine=engine, **{**GREEDY, **STEPS, **options})),
        train_dataset=prompts(),
        processing_class=LocalTeacher(student).tokenizer,
        peft_config=LORA if lora else None,
    )


class PanelTrainer(TeacherPanelMixin, Trainer):
    pass


def plain(directory, student, teacher, engine=None, lora=False, **options):
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    return PanelTrainer(
        model=get_peft_model(model, LORA) if lora else model,
        args=TrainingArguments(**settings(directory, **{**STEPS, **options})),
        teacher_models={"t": teacher},
        panel_settings=PanelSettings(rollout_engine=engine, **GREEDY),
        train_dataset=prompts(),
        processing_class=LocalTeacher(student).tokenizer,
    )


@pytest.mark.parametrize("sync", ["adapter", "reload"])
@pytest.mark.parametrize("host", [trl, plain])
def test_it_trains_as_with_transformers_generation(host, sync, engine, teacher, untied_student_dir, tmp_path):
    """Greedy: the same tokens, so the same losses and weights, and the servers follow each step."""
    url, behaviour = engine()
    chosen, lora = block(url, sync=sync, chunk=4), sync == "adapter"
    mine = host(tmp_path / "a", untied_student_dir, teacher, chosen, lora)
    mine.train()
    theirs = host(tmp_path / "b", untied_student_dir, teacher, None, lora)
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-4, abs=1e-4) and len(losses(mine)) == 3
    assert_same(weights(mine), weights(theirs), 1e-4)
    path = "/v1/load_lora_adapter" if lora else "/collective_rpc"
    assert [p for p, _, _ in behaviour.requests].count(path) == 3
    sent = {
        str(body.get("lora_path") or body["kwargs"]["weights_path"]) for p, _, body in behaviour.requests if p == path
    }
    assert {one.rpartition("-")[2] for one in sent} == {"00000000", "00000001", "00000002"}
    assert not list((tmp_path / "a" / "rollout-engine").iterdir()), "what was sent is no checkpoint, and goes"
    salts = {body["cache_salt"] for p, _, body in behaviour.requests if p == "/v1/completions" and "seed" in body}
    assert salts == {"policy-0", "policy-1", "policy-2"}
    history = mine.state.log_history[1]
    assert history["rollouts/staleness"] == 0 and history["rollouts/parity"] < 1e-4
    assert history["rollouts/sync_seconds"] > 0 and history["rollouts/tokens_per_second"] > 0


@pytest.mark.parametrize("sync", ["adapter", "reload"])
@pytest.mark.parametrize("variant", ["padded", "softcapped", "scaled", "biased", "moe", "wide_tokenizer"])
def test_heads_of_the_world_agree_with_the_server(variant, sync, teacher, tokenizer, tmp_path):
    """Rows beyond the tokenizer or one too few, a soft-cap, a scale, a bias, experts: all arrive and pass the probe."""
    student, lora = save_tiny(tmp_path / "student", variant=variant, seed=1, scale=2.0), sync == "adapter"
    if variant == "wide_tokenizer":
        teacher = LocalTeacher(save_tiny(tmp_path / "teacher", variant=variant, seed=2), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="eager").eval()
    with fake_vllm(model, tokenizer, Behaviour()) as (url, _):
        runs = [
            plain(tmp_path / str(number), student, teacher, chosen, lora, max_steps=2, learning_rate=1e-3)
            for number, chosen in enumerate((block(url, sync=sync, chunk=4), None))
        ]
        for run in runs:
            run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-3) and len(losses(runs[0])) == 2
    assert_same(weights(runs[0]), weights(runs[1]), 1e-3)
    assert runs[0].state.log_history[1]["rollouts/parity"] < 1e-4


def test_evaluation_and_resume_generate_by_the_weights_of_their_step(engine, teacher, untied_student_dir, tmp_path):
    url, _ = engine()
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    undisturbed = plain(tmp_path / "a", untied_student_dir, teacher, block(url, sync="reload"), **common)
    undisturbed.train()
    again = plain(tmp_path / "a", untied_student_dir, teacher, block(url, sync="reload"), **common)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(weights(again), weights(undisturbed), 1e-5)
    evaluated = again.evaluate(prompts(count=4))
    own = plain(tmp_path / "b", untied_student_dir, teacher, None)
    own.model.load_state_dict(again.model.state_dict())
    assert evaluated["eval_loss"] == pytest.approx(own.evaluate(prompts(count=4))["eval_loss"], rel=1e-4)
    assert not list((tmp_path / "a" / "rollout-engine").iterdir()), "an evaluation leaves no weights behind either"


def test_behaviour_logprobs_and_versions_come_with_every_token(engine, teacher, untied_student_dir, tmp_path):
    """The sampled estimator's ratio is that of the tokens where they were drawn: 1 for weights of the same step."""
    url, _ = engine()
    options = {"estimator": "sampled", "top_k": 0, "max_steps": 1}
    run = trl(tmp_path / "a", untied_student_dir, teacher, block(url, sync="reload", chunk=3), **options)
    run.model.train()
    output = run._generate_and_score_completions([dict(row) for row in run.train_dataset.select(range(4))])
    behaviour, mask = output["scored"].behaviour_logprobs, output["completion_mask"].bool()
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = run.model(input_ids=ids, attention_mask=attention).logits[:, output["prompt_ids"].shape[1] - 1 : -1]
    own = logits.log_softmax(-1).gather(-1, output["completion_ids"].unsqueeze(-1))[..., 0]
    torch.testing.assert_close(behaviour[mask], own[mask], atol=1e-4, rtol=1e-4)
    assert all(one.versions == [0] * len(one.ids) for one in run._drawn)
    run.train()


def test_a_tied_head_that_a_server_keeps_is_caught_and_named(engine, teacher, student_dir, tmp_path):
    """What vLLM 0.32 does on a CPU; what was learned before is saved."""
    url, _ = engine(tied=True)
    run = trl(tmp_path, student_dir, teacher, block(url, sync="reload"))
    with pytest.raises(
        ServerError, match=r"weights of step 1: .*stale is the output head, which is tied to model\.emb"
    ):
        run.train()
    assert (tmp_path / "checkpoint-1").is_dir()
    url, _ = engine(tied=True, keeps_tied_head=False)
    trl(tmp_path / "b", student_dir, teacher, block(url, sync="reload")).train()


@pytest.mark.parametrize(
    ("sync", "forgets", "message"),
    [
        (
            "reload",
            lambda name: name == "model.layers.1.mlp.up_proj.weight",
            r"stale is model\.layers\.1\.mlp\.up_proj",
        ),
        ("reload", lambda name: True, "all of them: the update did not arrive"),
        ("adapter", lambda name: True, "all of them: the update did not arrive"),
    ],
)
def test_weights_that_did_not_arrive_are_caught_and_named(
    sync, forgets, message, engine, teacher, untied_student_dir, tmp_path
):
    url, _ = engine(forgets=forgets)
    run = plain(tmp_path, untied_student_dir, teacher, block(url, sync=sync), lora=sync == "adapter")
    with pytest.raises(ServerError, match=message):
        run.train()
    assert run.state.global_step == 1, "at the first sync both had the same weights"


def test_a_wrong_scale_is_caught_and_named(engine, teacher, untied_student_dir, tmp_path, monkeypatch):
    import json

    write = server_engine.AdapterWeights.write

    def misscaled(self, directory, *, here):
        write(self, directory, here=here)
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))

    monkeypatch.setattr(server_engine.AdapterWeights, "write", misscaled)
    url, _ = engine()
    with pytest.raises(ServerError, match="the adapter's scale, which seems to be 2 times the student's"):
        plain(tmp_path, untied_student_dir, teacher, block(url, sync="adapter"), lora=True).train()


def test_another_base_is_caught_before_the_first_step(engine, teacher, student_dir, tmp_path):
    url, _ = engine(tied=True)
    run = plain(tmp_path, student_dir, teacher, block(url, sync="adapter"), lora=True)
    with torch.no_grad():  # in its place the server has what is on disk
        run.model.base_model.model.model.layers[0].mlp.up_proj.weight.add_(0.05)
    with pytest.raises(ServerError, match=r"weights of step 0: .* Does it serve the student's base"):
        run.train()


def test_it_falls_back_where_that_is_wanted(engine, teacher, student_dir, tmp_path, caplog):
    url, behaviour = engine(tied=True)
    chosen = block(url, sync="reload", on_mismatch="transformers")
    mine = plain(tmp_path / "a", student_dir, teacher, chosen)
    with caplog.at_level(logging.ERROR):
        mine.train()
    assert "The student generates in this process from now on" in caplog.text
    theirs = plain(tmp_path / "b", student_dir, teacher, None)
    theirs.train()
    assert_same(weights(mine), weights(theirs), 1e-4)
    assert [p for p, _, _ in behaviour.requests].count("/collective_rpc") == 2


def test_of_two_servers_one_dies_and_nothing_is_lost_or_comes_twice(
    engine, teacher, untied_student_dir, tmp_path, caplog
):
    """Killed in mid-batch: its rows go on where they were, on the other one, and the run is that of one server."""
    (a, _), (b, dying) = engine(), engine(dies_at=6)
    chosen = block(a, b, sync="reload", chunk=4, max_concurrency=1)
    mine = plain(tmp_path / "a", untied_student_dir, teacher, chosen)
    with caplog.at_level(logging.ERROR):
        mine.train()
    theirs = plain(tmp_path / "b", untied_student_dir, teacher, None)
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-4, abs=1e-4)
    assert_same(weights(mine), weights(theirs), 1e-4)
    assert caplog.text.count("is left out for the rest of the run") == 1 and dying.completions == 6
    assert mine.state.log_history[-2]["rollouts/engines_lost"] == 1


def test_when_no_server_is_left_what_was_learned_is_saved(engine, teacher, untied_student_dir, tmp_path):
    url, behaviour = engine()
    run = plain(tmp_path, untied_student_dir, teacher, block(url, sync="reload"))
    behaviour.dies_at = 9
    with pytest.raises(ServerError, match="No rollout engine is left"):
        run.train()
    step = run.state.global_step
    assert step > 0 and (tmp_path / f"checkpoint-{step}").is_dir()


@pytest.mark.parametrize("sync", ["adapter", "reload"])
def test_a_second_training_sends_its_own_weights(sync, engine, teacher, untied_student_dir, tmp_path):
    """Its steps begin at 0 again, as those of the weights that the servers still have."""
    url, behaviour = engine()
    run = plain(tmp_path / "a", untied_student_dir, teacher, block(url, sync=sync), lora=sync == "adapter", max_steps=1)
    own = plain(tmp_path / "b", untied_student_dir, teacher, None, lora=sync == "adapter", max_steps=1)
    for trainer in (run, own):
        trainer.train()
        trainer.train()
    assert_same(weights(run), weights(own), 1e-4)
    path = "/v1/load_lora_adapter" if sync == "adapter" else "/collective_rpc"
    assert [p for p, _, _ in behaviour.requests].count(path) == 2 and not behaviour.adapters


def test_two_trainers_of_one_process_have_an_adapter_each(engine, teacher, untied_student_dir, tmp_path):
    """They take turns on one server, and neither generates by the other's."""
    url, _ = engine()
    chosen, rows = block(url, sync="adapter"), prompts(count=4)
    pair = [plain(tmp_path / name, untied_student_dir, teacher, chosen, lora=True) for name in "ab"]
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in pair[1].model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    alone = plain(tmp_path / "c", untied_student_dir, teacher, None, lora=True)
    expected = alone.evaluate(rows)["eval_loss"]
    found = [pair[number].evaluate(rows)["eval_loss"] for number in (0, 1, 0)]
    assert found[0] == pytest.approx(expected, rel=1e-4) and found[2] == found[0]
    assert abs(found[1] - expected) > 1e-2, "the other is another"


def test_an_adapter_of_an_earlier_run_is_no_other_student(engine, teacher, untied_student_dir, tmp_path):
    url, _ = engine()
    plain(tmp_path / "a", untied_student_dir, teacher, block(url, sync="adapter"), lora=True, max_steps=1).train()
    plain(tmp_path / "b", untied_student_dir, teacher, block(url, sync="reload"), max_steps=1).train()
    with pytest.raises(ConfigError, match="serves 'tiny'; 'big' is asked for"):
        plain(tmp_path / "c", untied_student_dir, teacher, block(url, sync="reload", model="big")).train()


@pytest.mark.parametrize(
    ("behaviour", "sync", "message"),
    [
        ({"takes_adapters": False}, "adapter", r"--enable-lora --max-lora-rank RANK"),
        ({"takes_weights": False}, "reload", r"VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_without_the_flags_is_refused_with_them(
    behaviour, sync, message, engine, teacher, untied_student_dir, tmp_path
):
    url, _ = engine(**behaviour)
    with pytest.raises(ConfigError, match=message):
        plain(tmp_path, untied_student_dir, teacher, block(url, sync=sync), lora=sync == "adapter").train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sync": "relod"}, "Did you mean 'reload'"),
        ({"urll": "x"}, "unknown key 'urll'"),
        ({"url": None, "max_staleness": 1}, "without url: vLLM generates in this process, where max_staleness is 0"),
        ({"url": None, "sync": "nccl"}, "without url: .* sync is adapter or reload"),
        ({"options": {"seed": 1}}, "options are those of vLLM in this process"),
        ({"urls": ["http://a"]}, "both url and urls are set"),
        ({"max_staleness": -1}, "max_staleness is -1"),
        ({"kind": "sglang"}, "expected one of vllm"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_a_block_that_cannot_be_meant_is_refused(change, message):
    given = {"kind": "vllm", "url": "http://127.0.0.1:1", "sync": "reload", **change}
    with pytest.raises(ConfigError, match=message):
        PanelSettings(rollout_engine=given)


def test_what_does_not_go_together_is_refused(teacher, student_dir, tmp_path):
    chosen = block("http://127.0.0.1:1", sync="reload")
    with pytest.raises(ConfigError, match="interleaved"):
        trl(tmp_path, student_dir, teacher, chosen, rollouts="interleaved", top_k=0)
    with pytest.raises(ConfigError, match="use_vllm is TRL's own"):
        TeacherPanelConfig(**settings(tmp_path, rollout_engine=chosen, use_vllm=True))
    with pytest.raises(ConfigError, match="sync is 'reload', and the student trains an adapter"):
        plain(tmp_path, student_dir, teacher, chosen, lora=True)
    with pytest.raises(ConfigError, match="sync is 'adapter', and the student has no adapter"):
        plain(tmp_path, student_dir, teacher, block("http://127.0.0.1:1", sync="adapter"))
    with pytest.raises(ConfigError, match="temperature 2"):
        trl(tmp_path, student_dir, teacher, chosen, estimator="sampled", top_k=0, temperature=2.0)


def test_without_a_url_vllm_must_be_installed(teacher, untied_student_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"has no url, .* it is not installed here\. Name the servers"):
        plain(tmp_path, untied_student_dir, teacher, {"kind": "vllm", "sync": "reload"})


def test_yaml_takes_the_same_names(tmp_path):
    (tmp_path / "engine.yaml").write_text("rollout_engine: {kind: vllm, url: 'http://HEAD:8000', sync: adapter}\n")
    assert PanelSettings(rollout_engine=str(tmp_path / "engine.yaml")).engine_settings().addresses == (
        "http://HEAD:8000",
    )
