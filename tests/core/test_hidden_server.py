"""A teacher whose hidden states a server gives: its signal is the local teacher's, and another server is refused."""

import copy
import json

import pytest
import torch

from kd_plugin import LocalTeacher, ServerTeacher
from kd_plugin.cache import Sampled, TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence.modes import MODES
from kd_plugin.errors import ConfigError, DataError, LicenseRefusedError, NonFiniteError, ServerError, VocabularyError
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.block import panel_from_block
from kd_plugin.signals import HiddenSignal
from kd_plugin.teachers import Teacher, client
from kd_plugin.teachers.hidden import head, states
from kd_plugin.teachers.hidden.head import Checkpoint
from tests.core.cache_help import files_of, prompt_rows, shards_of
from tests.core.panel_help import assert_same_gradients, corrected, rows
from tests.core.test_divergence_oracle import DIVERGENCES, ids_of
from tests.fake_vllm import Behaviour, fake_vllm
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama, tiny_model

pytestmark = pytest.mark.usefixtures("short_pauses")
TOLERANCE = 1e-5


@pytest.fixture
def pooled(local, tokenizer):
    """Yield the url of a server of hidden states, and what a test may change of its behaviour."""
    with fake_vllm(local.model, tokenizer, Behaviour(runner="pooling")) as (url, behaviour):
        yield url, behaviour


@pytest.fixture
def batch():
    """Rows with padding on either side, and positions in no order, the last token of a row among them."""
    ids = torch.randint(3, 259, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 7:] = 0, 0
    return ids, mask, torch.tensor([24 + 3, 2, 12 + 4, 10, 12 + 11, 24 + 6, 0])


def of(url, repo, **options):
    return ServerTeacher(url, "tiny", signal="hidden", repo=repo, license="apache-2.0", **options)


@pytest.mark.parametrize("variant", ["tied", "untied", "padded", "softcapped", "scaled", "biased", "moe"])
def test_the_signal_is_that_of_the_local_teacher(variant, variant_dir, tokenizer, batch):
    directory = variant_dir(variant)
    model = LocalTeacher(directory, dtype="float32")
    with fake_vllm(model.model, tokenizer, Behaviour(runner="pooling")) as (url, behaviour):
        teacher = of(url + "/v1/", directory, max_concurrency=2)
        assert isinstance(teacher, Teacher)
        signal, expected = teacher.score(*batch), model.score(*batch)
        assert len(behaviour.requests) == 6  # the model's name, the tokenizer, the probes, and a request a row
    assert isinstance(signal, HiddenSignal) and signal.head.vocab_size == 259 and not signal.hidden.requires_grad
    torch.testing.assert_close(signal.hidden, expected.hidden, atol=TOLERANCE, rtol=TOLERANCE)
    logits, theirs = (one.head.logits(one.hidden) for one in (signal, expected))
    assert logits.shape == (7, 259)
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("combine", list(MODES))
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=ids_of)
def test_a_panel_with_one_is_the_local_panel(combine, divergence, pooled, local, teacher_dir, other_teacher_dir):
    student = tiny_llama(seed=1)
    other = LocalTeacher(other_teacher_dir, dtype="float32")
    row = {"teacher_id": "t"} if MODES[combine].one_teacher else {}
    batch_of_four, found = rows(), []
    for teacher in (of(pooled[0], teacher_dir), local):
        panel = TeacherPanel({"t": teacher, "other": other}, combine=combine)
        loss, gradient = corrected(panel, student, [row] * 4, batch_of_four, divergence=divergence, temperature=1.5)
        found.append((loss.loss_sum, gradient))
    (mine, gradient), (theirs, expected) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradient, expected, 1e-5)


@pytest.mark.parametrize("estimator", ["sampled", "topk_tail"])
def test_every_estimator_takes_it(estimator, pooled, local, teacher_dir):
    from kd_plugin.panel import Estimator

    student, losses = tiny_llama(seed=1), []
    for teacher in (of(pooled[0], teacher_dir), local):
        panel = TeacherPanel({"t": teacher}, estimator=Estimator(estimator, top_k=8))
        losses.append(corrected(panel, student, [{}] * 4, rows())[0].loss_sum)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_only_the_file_with_the_head_is_read(tmp_path, tokenizer):
    model = tiny_model("untied", seed=3, hidden=64)
    model.save_pretrained(tmp_path, max_shard_size="80KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    kept = index["lm_head.weight"]
    for name in set(index.values()) - {kept}:
        (tmp_path / name).unlink()
    head = Checkpoint(str(tmp_path)).head(259)
    assert torch.equal(head.weight, model.lm_head.weight) and len(set(index.values())) > 3


def test_a_tied_head_is_the_input_embedding_whatever_prefix_the_checkpoint_has(tmp_path, variant_dir):
    from safetensors.torch import load_file, save_file

    tensors = load_file(f"{variant_dir('tied')}/model.safetensors")
    save_file({f"language_model.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    Checkpoint(variant_dir("tied")).config.save_pretrained(tmp_path)
    head = Checkpoint(str(tmp_path)).head(259)
    assert torch.equal(head.weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda d: (d / "config.json").unlink(), "no configuration of a model"),
        (lambda d: _rewrite(d, lambda t: t.pop("lm_head.weight")), "no tensor named like 'lm_head.weight'"),
        (lambda d: _rewrite(d, lambda t: t.update(vision=t["lm_head.weight"])), None),
        (lambda d: _rewrite(d, _quantize), "lm_head.weight of .* is stored as int8: it is quantized"),
        (lambda d: _rewrite(d, lambda t: t.update({"lm_head.weight": torch.ones(259, 8)})), "width of 8.* says 32"),
    ],
)
def test_a_checkpoint_without_a_readable_head_is_refused(change, message, tmp_path):
    save_tiny(tmp_path, variant="untied")
    change(tmp_path)
    if message is None:
        assert Checkpoint(str(tmp_path)).head(259).weight.shape == (259, 32)
        return
    with pytest.raises(ConfigError, match=message):
        Checkpoint(str(tmp_path)).head(259)


def _rewrite(directory, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / "model.safetensors")


def _quantize(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("behaviour", "options", "error", "message"),
    [
        ({"runner": "generate"}, {}, ConfigError, r"has no /pooling: it was started to generate.*--runner pooling"),
        ({"pooler": {"task": "embed", "use_activation": False}}, {}, ConfigError, r"pooling_task.*--runner pooling"),
        ({"pooler": {"task": "token_embed"}}, {}, ConfigError, r'normalizes.*"use_activation":false'),
        ({"dtype": "bfloat16"}, {}, ConfigError, r"computes in bfloat16, and float32 is expected.*--dtype float32"),
        ({}, {"server_dtype": "bfloat16"}, ConfigError, r"computes in float32, and bfloat16 .*\(server_dtype\)"),
        ({"max_model_len": 1024}, {}, ConfigError, r"takes 1024 tokens.*made for 512.*--max-model-len 512"),
        ({"name": "big"}, {}, ServerError, r"serves 'big'; 'tiny' is asked for"),
    ],
)
def test_a_server_that_was_started_otherwise_is_refused(
    behaviour, options, error, message, local, tokenizer, teacher_dir
):
    with (
        fake_vllm(local.model, tokenizer, Behaviour(**{"runner": "pooling", **behaviour})) as (url, _),
        pytest.raises(error, match=message),
    ):
        of(url, teacher_dir, **options).check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_server_in_16_bits_is_accepted_where_that_is_said_and_sends_half_the_bytes(
    dtype, pooled, local, teacher_dir, batch
):
    pooled[1].dtype = dtype
    signal = of(pooled[0], teacher_dir, server_dtype=dtype).score(*batch)
    assert signal.hidden.dtype == getattr(torch, dtype)
    torch.testing.assert_close(signal.hidden, local.score(*batch).hidden.to(signal.hidden.dtype), atol=0.05, rtol=0.05)
    assert {body["embed_dtype"] for path, _, body in pooled[1].requests[3:] if path == "/pooling"} == {dtype}


def test_another_model_behind_the_server_is_refused(tokenizer, teacher_dir, other_teacher_dir, tmp_path):
    """By its width, by its tokenizer, or, where both are the same, by what its states are."""
    twin = tiny_llama(seed=7, hidden=48, tied=False)
    for model, repo, kind, message in (
        (twin, other_teacher_dir, ConfigError, "states of width 48, and the output head .* takes 64"),
        (twin, teacher_dir, ConfigError, r"serves other weights than .*: the states of the same tokens are \d+"),
    ):
        with fake_vllm(model, tokenizer, Behaviour(runner="pooling")) as (url, _), pytest.raises(kind, match=message):
            of(url, repo).check()
    swapped = byte_tokenizer(swap=("a", "b"))
    with (
        fake_vllm(twin, swapped, Behaviour(runner="pooling")) as (url, _),
        pytest.raises(VocabularyError, match="first difference"),
    ):
        of(url, teacher_dir).check()


def test_a_large_checkpoint_is_judged_by_a_text_alone(pooled, teacher_dir, monkeypatch):
    """Random weights find no text likelier than chance: as if the states were of another model."""
    monkeypatch.setattr(states, "RUN_BELOW", 0)
    with pytest.raises(ConfigError, match=r"a plain text costs \d+\.\d nats per token .* 5\.6 would be chance"):
        of(pooled[0], teacher_dir).check()


def test_another_replica_in_the_middle_of_a_run_is_noticed(pooled, local, teacher_dir, batch):
    twin = tiny_llama(seed=7, hidden=48, tied=False)
    pooled[1].replica = lambda number: twin if number == 4 else local.model
    teacher = of(pooled[0], teacher_dir)
    teacher.check()
    with pytest.raises(ServerError, match="answers one question in two ways"):
        teacher.score(*batch)


def _spoil(field, value):
    def change(answer):
        answer["data"][0][field] = value

    return change


def _nan(answer):
    answer["content"] = b"\xff" * len(answer["content"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.pop("data"), ServerError, "without its metadata"),
        (lambda a: a.update(model="other"), ServerError, "rows of model 'other' where 2 of 'tiny' were asked"),
        (lambda a: a["data"].pop(), ServerError, "answered with 1 rows"),
        (_spoil("shape", [3, 48]), ServerError, "gave 3 states"),
        (_spoil("shape", [48]), ConfigError, "pools a row into one vector"),
        (_spoil("embed_dtype", "float16"), ServerError, "states in float16"),
        (lambda a: a.update(content=a["content"][:-4]), ServerError, r"gave \d+ bytes of \d+"),
        (_nan, NonFiniteError, "NaN or infinity"),
    ],
)
def test_a_damaged_answer_is_not_used(change, error, message, pooled, teacher_dir, batch):
    teacher = of(pooled[0], teacher_dir)
    teacher.check()
    pooled[1].change = change
    with pytest.raises(error, match=message):
        teacher.score(*batch)


def test_limits_and_padding(pooled, teacher_dir, batch):
    teacher = of(pooled[0], teacher_dir)
    pooled[1].max_model_len = 400
    with pytest.raises(DataError, match=r"takes 400\. Set max_length=400, or .* --max-model-len 401"):
        teacher.states([[5] * 401])
    assert teacher.states([[5] * 400])[0].shape == (400, 48)
    ids, mask, _ = batch
    with pytest.raises(DataError, match="padding"):
        teacher.score(ids, mask, torch.tensor([12]))
    before = len(pooled[1].requests)
    nothing = teacher.score(ids, mask, torch.zeros(0, dtype=torch.int64))
    assert nothing.hidden.shape == (0, 48) and len(pooled[1].requests) == before


def test_nothing_is_read_or_sent_before_the_gate(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(head.Checkpoint, "head", lambda *_: pytest.fail("the head was read"))
    monkeypatch.setattr(client.Client, "_once", lambda *_: pytest.fail("a request was sent"))
    teacher = ServerTeacher("https://api.openai.com/v1", "gpt-4o", signal="hidden", tokenizer=tokenizer)
    with pytest.raises(LicenseRefusedError):
        capture(prompt_rows(2), teacher, tmp_path / "c", progress=False)
    assert teacher.capabilities.gives == {"hidden"} and teacher.capabilities.temperature is None


def test_a_copy_asks_the_server_again(pooled, teacher_dir, batch):
    teacher = of(pooled[0], teacher_dir)
    teacher.check()
    before = len(pooled[1].requests)
    again = copy.deepcopy(teacher)
    again.check()
    assert len(pooled[1].requests) == before + 3
    assert torch.equal(again.score(*batch).hidden, teacher.score(*batch).hidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": "hiden"}, "Unknown signal 'hiden'.*Did you mean 'hidden'"),
        ({"signal": "hidden", "repo": "x", "top_k": 4}, "top_k is set, and signal='hidden'"),
        ({"signal": "hidden"}, "Name the directory or hub id of the weights with repo"),
        ({"signal": "hidden", "repo": "x", "server_dtype": "int8"}, "Unknown server_dtype 'int8'"),
        ({"signal": "hidden", "repo": "x", "placement": "disk"}, "Unknown placement 'disk'"),
        ({"server_dtype": "float32"}, "server_dtype='float32' is a setting of signal='hidden'"),
    ],
)
def test_settings_of_the_other_signal_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerTeacher("http://127.0.0.1:1", **options)


def test_one_line_of_yaml_makes_one(teacher_dir):
    teacher = {"kind": "server", "url": "http://127.0.0.1:1", "signal": "hidden", "repo": teacher_dir}
    panel = panel_from_block({"teachers": {"t": {**teacher, "placement": "offload"}}, "divergence": "jsd"})
    made = panel.teachers["t"]
    assert made.capabilities.gives == {"hidden"} and made.placement == "offload" and made.name == "t"
    assert made.identity["signal"] == "hidden"


@pytest.mark.parametrize("targets", [Sampled(20), TopK(100)])
def test_a_capture_from_one_is_a_capture_in_process(targets, pooled, local, teacher_dir, tmp_path):
    options = {"targets": targets, "shard_rows": 4, "progress": False, "temperature": 1.3}
    mine = capture(prompt_rows(9), of(pooled[0], teacher_dir), tmp_path / "s", **options)
    theirs = capture(prompt_rows(9), local, tmp_path / "l", **options)
    assert mine.tokens == theirs.tokens and len(mine) == 9
    if isinstance(targets, Sampled):  # in float16 on disk, where a last bit may differ
        for a, b in zip(mine.dataset(), theirs.dataset(), strict=True):
            index = torch.tensor([i for i in a["teacher_index"] if i >= 0])
            x, y = (cache.signal(index) for cache in (mine, theirs))
            assert a["input_ids"] == b["input_ids"]
            assert torch.equal(x.ids, y.ids) and torch.equal(x.draws, y.draws)
            torch.testing.assert_close(x.logprobs, y.logprobs, atol=2e-3, rtol=2e-3)
    else:
        assert shards_of(tmp_path / "s").keys() == shards_of(tmp_path / "l").keys()
    assert len(mine.manifest.engine["probe"].split()) == 32


def test_a_capture_goes_on_only_with_the_same_weights(pooled, local, teacher_dir, tmp_path, monkeypatch):
    options = {"targets": TopK(8), "shard_rows": 2, "progress": False}
    capture(prompt_rows(4), of(pooled[0], teacher_dir), tmp_path / "c", **options)
    (tmp_path / "c" / "units" / "000001.json").unlink(missing_ok=True)
    before = files_of(tmp_path / "c")
    twin = tiny_llama(seed=7, hidden=48, tied=False)
    monkeypatch.setattr(states, "_require_checkpoint", lambda *_: None)  # a large one, which is not run here
    pooled[1].replica = lambda _: twin
    with pytest.raises(ConfigError, match="other log-probabilities than the one that began this capture"):
        capture(prompt_rows(4), of(pooled[0], teacher_dir), tmp_path / "c", **options)
    assert files_of(tmp_path / "c") == before
