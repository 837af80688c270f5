"""docs/support.md: what it calls refused raises, and what it calls supported names tests that are there."""

import ast
import re
from pathlib import Path

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lightning import OfflineKD, TeacherPanelCorrection
from kd_plugin.lightning.student import require_launchable
from kd_plugin.lightning.student import require_supported as require_strategy
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import losses, prompts, settings
from tests.lightning.help import Plain, collate, trainer
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama

CHECKOUT = Path(__file__).parents[2]
HOSTS = ("OfflineKDTrainer", "TeacherPanelTrainer", "OfflineKD", "TeacherPanelCorrection")
ROWS = [{"prompt": f"q{i}", "completion": f" answer {'y' * (i % 5)}."} for i in range(8)]
HEAD = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
VIRTUAL = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def table():
    """Return each row of the page as its name, four words and the tests that it names."""
    lines = (CHECKOUT / "docs" / "support.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [(name, words, re.findall(r"`([^`]+)`", last)) for name, *words, last in cells[2:] if any(words)]


ROWS_OF_THE_TABLE = table()
REFUSED = [(name, host) for name, words, _ in ROWS_OF_THE_TABLE for host, word in zip(HOSTS, words, strict=True)
           if word == "refused"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("support")
    return {
        "moe": save_tiny(base / "moe", variant="moe", seed=5),
        "router": save_tiny(base / "router", variant="moe", seed=5, output_router_logits=True),
    }


@pytest.fixture(scope="module")
def cache(teacher_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "c"
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return str(capture(Dataset.from_list(ROWS), teacher, directory, targets=TopK(16), progress=False).path)


class Run:
    """Starts each host on a tiny student, with changes."""

    def __init__(self, directory, student, teacher, cache):
        self.directory, self.student, self.teacher, self.cache = directory, student, teacher, cache

    def OfflineKDTrainer(self, model=None, rows=None, peft_config=None, compute_loss_func=None, **fields):
        return OfflineKDTrainer(
            model or self.student,
            OfflineKDConfig(**settings(self.directory, **{"max_steps": 1, **fields})),
            train_dataset=rows,
            teacher_cache=self.cache,
            peft_config=peft_config,
            compute_loss_func=compute_loss_func,
        )

    def TeacherPanelTrainer(self, model=None, rows=None, peft_config=None, **fields):
        given = {"max_steps": 1, "max_completion_length": 5, **fields}
        return TeacherPanelTrainer(
            model or self.student,
            args=TeacherPanelConfig(**settings(self.directory, **given)),
            train_dataset=rows or prompts(),
            teacher_models={"t": self.teacher},
            peft_config=peft_config,
        )

    def OfflineKD(self, model=None, extra=(), **fields):
        module = Plain(model or self.student)
        kd = OfflineKD(self.cache, tokenizer=byte_tokenizer(), **fields)
        loader = DataLoader(
            TeacherCache(self.cache).dataset(), batch_size=4, collate_fn=lambda rows: {**collate(rows), **dict(extra)}
        )
        trainer(self.directory, [kd], max_steps=1).fit(module, loader)
        return module

    def TeacherPanelCorrection(self, model=None, extra=(), **fields):
        module = Plain(model or self.student)
        kd = TeacherPanelCorrection(
            {"t": self.teacher}, tokenizer=byte_tokenizer(), **{"max_completion_length": 5, **fields}
        )
        loader = DataLoader(
            [{"prompt": "a"}, {"prompt": "bc"}],
            batch_size=2,
            collate_fn=lambda rows: {"prompt": [row["prompt"] for row in rows], **dict(extra)},
        )
        trainer(self.directory, [kd], max_steps=1).fit(module, loader)
        return module


def everywhere(trl, lightning=None):
    """One way to be refused for both TRL trainers, and one for both Lightning callbacks."""
    return {host: lightning if number > 1 and lightning is not None else trl for number, host in enumerate(HOSTS)}


def image_rows(run, host):
    rows = [{**row, "image": "picture.png"} for row in ROWS]
    return getattr(run, host)(rows=Dataset.from_list(rows))


def strategies(*made):
    """Ask Lightning's checks alone: a strategy of several ranks cannot start here."""

    def refused(run, host):
        for strategy, check in made:
            with pytest.raises(ConfigError) as error:
                check(strategy)
        raise error.value

    return refused


class _Trainer:
    accumulate_grad_batches = 1

    def __init__(self, strategy):
        self.strategy, self.world_size = strategy, 2


def launched(**config):
    strategy = DeepSpeedStrategy(config={"zero_optimization": {"stage": 2}, **config})
    return strategies((strategy, lambda s: require_launchable(_Trainer(s), tiny_llama())))


def split(**sizes):
    return lambda run, host: getattr(run, host)(parallelism_config=ParallelismConfig(**sizes))


def fields(**given):
    return lambda run, host: getattr(run, host)(**given)


def adapted(config):
    def made(run, host):
        torch.manual_seed(0)
        return getattr(run, host)(
            model=get_peft_model(AutoModelForCausalLM.from_pretrained(run.student, dtype="float32"), config)
        )

    return made


def with_model(kind, **given):
    return lambda run, host: getattr(run, host)(model=run.models[kind], **given)


def encoder_decoder(run, host):
    config = T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return getattr(run, host)(model=T5ForConditionalGeneration(config))


class _FSDP1:
    strategy = FSDPStrategy.__new__(FSDPStrategy)


SAMPLED = {"estimator": "sampled", "divergence": "reverse_kl"}
_TRLS = "DistillationTrainer does not support sequence-dim parallelism"  # in its own configuration
# How to meet each refusal of the table, and what the message says
WAYS = {
    "an adapter on the output head (`lm_head` in `target_modules`)": (
        everywhere(fields(peft_config=HEAD), adapted(HEAD)),
        "lm_head",
    ),
    "prompt tuning, prefix tuning, p-tuning": (
        everywhere(fields(peft_config=VIRTUAL), adapted(VIRTUAL)),
        "Prompt-learning PEFT methods shift every position",
    ),
    "their router loss, with `ce_weight` above 0": (
        everywhere(with_model("router"), with_model("router", ce_weight=0.5)),
        "asks for a router loss. The panel's loss has none",
        "asks for a router loss. A student that returns router logits cannot generate",
    ),
    "their router loss, with `ce_weight` 0": (everywhere(with_model("router")), "asks for a router loss"),
    "rows with images": (
        everywhere(image_rows, fields(extra={"pixel_values": torch.zeros(1)}.items())),
        "teachers score text, and no cache holds images",
    ),
    "encoder-decoder students": (everywhere(encoder_decoder), "no transformers causal language model"),
    '`loss_type="dft"`': (everywhere(fields(loss_type="dft")), "offline KD replaces the loss"),
    "`label_smoothing_factor`": (everywhere(fields(label_smoothing_factor=0.1)), "smooths one-hot labels"),
    "`compute_loss_func`": (everywhere(fields(compute_loss_func=lambda *a, **k: 0)), "targets would not be used"),
    'NEFTune with `estimator="sampled"`': (
        everywhere(fields(neftune_noise_alpha=5.0, **SAMPLED)),
        "neftune_noise_alpha=5.0 with estimator='sampled'",
    ),
    "`sampled` with draws from another distribution, or with dropout": (
        everywhere(fields(generation_kwargs={"typical_p": 0.5}, **SAMPLED)),
        "typical_p=0.5 with estimator='sampled'",
    ),
    "FSDP1": (
        everywhere(None, strategies((_FSDP1(), require_strategy))),
        "FSDP is reached through ModelParallelStrategy",
    ),
    "context parallelism (`cp_size`)": (everywhere(split(cp_size=2)), "context parallelism is not supported", _TRLS),
    "sequence parallelism (`sp_size`, DeepSpeed's `sequence_parallel_size`)": (
        everywhere(split(sp_size=2), launched(sequence_parallel_size=2)),
        "sequence parallelism is not supported",
        _TRLS,
    ),
    "tensor parallelism (`tp_size`, DeepSpeed's `autotp_size`, Lightning's `tensor_parallel_size`)": (
        everywhere(split(tp_size=2), launched(tensor_parallel={"autotp_size": 2})),
        "tensor parallelism is not supported",
    ),
    'vLLM with `rollouts="interleaved"`': (
        everywhere(fields(use_vllm=True, rollouts="interleaved")),
        "needs transformers generation",
    ),
    '`rollout_engine` with `rollouts="interleaved"`': (
        everywhere(fields(rollout_engine={"url": "http://127.0.0.1:1"}, rollouts="interleaved")),
        "which a rollout_engine on a server cannot",
    ),
}


@pytest.mark.parametrize(("name", "host"), REFUSED, ids=[f"{host}-{name[:40]}" for name, host in REFUSED])
def test_what_is_called_refused_raises(name, host, tmp_path, student_dir, teacher_dir, cache, models):
    ways, *messages = WAYS[name]
    run = Run(tmp_path, student_dir, teacher_dir, cache)
    run.models = models
    with pytest.raises((ConfigError, DataError, ValueError), match="|".join(map(re.escape, messages))):
        ways[host](run, host)


@pytest.mark.parametrize("row", ROWS_OF_THE_TABLE, ids=[name[:40] for name, _, _ in ROWS_OF_THE_TABLE])
def test_what_is_called_supported_names_tests_that_are_there(row):
    name, words, tests = row
    assert set(words) <= {"supported", "refused", "untested", "-"}
    assert bool(tests) == ("supported" in words), name
    for test in tests:
        path, *inside = test.split("::")
        tree = ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))
        for part in inside:
            named = [node for node in tree.body if getattr(node, "name", None) == part]
            assert named, f"{name}: {test} is not there"
            tree = named[0]


def test_no_way_to_be_refused_is_left_over():
    assert set(WAYS) == {name for name, _ in REFUSED}


class TestRouterLoss:
    def test_a_student_without_one(self, models, tmp_path, teacher_dir, cache):
        run = Run(tmp_path, models["moe"], teacher_dir, cache)
        for made in (run.OfflineKDTrainer(router_aux_loss_coef=0.0), run.TeacherPanelTrainer()):
            made.train()
            assert len(losses(made)) == 1
        for module in (run.OfflineKD(), run.TeacherPanelCorrection()):
            assert len(module.losses) == 1

    @pytest.mark.parametrize("ce_weight", [0.0, 1.0])
    def test_offline_has_that_of_sft(self, ce_weight, models, tmp_path, teacher_dir, cache):
        run = Run(tmp_path / "a", models["moe"], teacher_dir, cache)
        rows = Dataset.from_list(ROWS)
        weights = {"ce_weight": ce_weight, "kd_weight": 1.0 - ce_weight}
        plain = run.OfflineKDTrainer(rows=rows, router_aux_loss_coef=0.0, **weights)
        mine = run.OfflineKDTrainer(rows=rows, router_aux_loss_coef=0.5, **weights)
        sft = SFTTrainer(
            models["moe"],
            SFTConfig(**settings(tmp_path / "b", max_steps=1, router_aux_loss_coef=0.5, completion_only_loss=True)),
            train_dataset=rows,
        )
        for made in (plain, mine, sft):
            made.train()
        auxiliary = [made.state.log_history[0]["aux_loss"] for made in (mine, sft)]
        assert auxiliary[0] == pytest.approx(auxiliary[1], rel=1e-5)
        assert losses(mine)[0] == pytest.approx(losses(plain)[0] + 0.5 * auxiliary[0], rel=1e-3)
        if ce_weight:
            assert losses(mine)[0] == pytest.approx(losses(sft)[0], rel=1e-4)

    def test_lightning_trains_it_with_the_modules_loss(self, models, tmp_path, teacher_dir, cache):
        coefficient, found, seen = 0.5, {}, []
        for kind in ("moe", "router"):
            model = AutoModelForCausalLM.from_pretrained(models[kind], dtype="float32")
            model.router_aux_loss_coef = coefficient
            run = Run(tmp_path, model, teacher_dir, cache)
            if kind == "router":
                model.register_forward_hook(lambda m, args, out: seen.append(getattr(out, "aux_loss", None)))
            found[kind] = run.OfflineKD(ce_weight=0.25).losses[0]
        plain, whole = found["moe"], found["router"]
        (auxiliary,) = [float(one) for one in seen if one is not None][-1:]
        assert whole == pytest.approx(plain + 0.25 * coefficient * auxiliary, rel=1e-3)


def test_chunked_nll_is_nll(tmp_path, student_dir, teacher_dir, cache):
    with pytest.warns(FutureWarning, match="chunked_nll"):
        made = Run(tmp_path, student_dir, teacher_dir, cache).OfflineKDTrainer(loss_type="chunked_nll")
    made.train()
    assert len(losses(made)) == 1
