"""Weights that are sent tensor by tensor: everything of ``sync: nccl`` but NCCL, in whose place stand queues."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.rollouts.vllm import engine as server_engine
from kd_plugin.rollouts.vllm import transfer
from kd_plugin.rollouts.vllm.weights import AllWeights
from kd_plugin.teachers import LocalTeacher
from tests.fake_transfer import Inbox
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import assert_same, losses, weights
from tests.hosts.test_rollout_engine import block, plain
from tests.tiny import tiny_model


class Queues:
    """A group whose members are the scripted servers."""

    def __init__(self, servers):
        self.servers = servers

    def broadcast(self, tensor, src):
        assert src == 0 and tensor.is_contiguous()
        for server in self.servers:
            server.transfer.put(tensor)


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture
def servers(untied_student_dir, tokenizer, monkeypatch):
    """Two scripted servers of two workers each, and the group that was opened for them."""
    import contextlib

    opened = []
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(2):
            model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
            behaviour = Behaviour(transfer=Inbox())
            started.append(stack.enter_context(fake_vllm(model, tokenizer, behaviour)))
        behaviours = [behaviour for _, behaviour in started]
        inboxes = [behaviour.transfer for behaviour in behaviours]

        def open_group(address, port, members):
            opened.append(members)
            return Queues(behaviours)

        monkeypatch.setattr(transfer, "open_group", open_group)
        monkeypatch.setattr(server_engine, "require_gpu", lambda device: None)
        yield [url for url, _ in started], behaviours, opened
        for inbox in inboxes:
            inbox.close()


def test_every_server_follows_each_step(servers, teacher, untied_student_dir, tmp_path, caplog):
    urls, behaviours, opened = servers
    mine = plain(tmp_path / "a", untied_student_dir, teacher, block(*urls, sync="nccl"))
    mine.train()
    theirs = plain(tmp_path / "b", untied_student_dir, teacher, None)
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-4, abs=1e-4)
    assert_same(weights(mine), weights(theirs), 1e-4)
    assert "never run on a GPU" in caplog.text
    assert opened == [5], "one group of this process and all workers, for the whole run"
    own = [p for p, _, _ in behaviours[0].requests if p not in ("/v1/completions", "/v1/models", "/get_world_size")]
    step = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert own == ["/init_weight_transfer_engine", *step * 3]
    told = [body["init_info"] for one in behaviours for p, _, body in one.requests if p == own[0]]
    assert [one["rank_offset"] for one in told] == [1, 3] and {one["world_size"] for one in told} == {5}
    assert {one["master_address"] for one in told} == {"127.0.0.1"}, "the servers are on this machine"
    assert not (tmp_path / "a" / "rollout-engine").exists(), "no file is written"


def test_weights_are_sent_in_the_dtype_that_is_asked_for(servers, teacher, untied_student_dir, tmp_path):
    urls, behaviours, _ = servers
    chosen = block(*urls, sync="nccl", dtype="bfloat16", tolerance=0.5)
    plain(tmp_path, untied_student_dir, teacher, chosen, max_steps=1).train()
    told = next(body["update_info"] for p, _, body in behaviours[0].requests if p == "/update_weights")
    assert set(told["dtype_names"]) == {"bfloat16"}


def test_a_tensor_that_does_not_arrive_stops_the_run(servers, teacher, untied_student_dir, tmp_path):
    urls, behaviours, _ = servers
    behaviours[1].forgets = lambda name: name == "lm_head.weight"
    with pytest.raises(ServerError, match="does not have the student's weights of step 1"):
        plain(tmp_path, untied_student_dir, teacher, block(*urls, sync="nccl")).train()


@pytest.mark.parametrize("breaks_at", [0, 7, 17])
def test_a_server_that_dies_in_the_middle_ends_the_run(
    breaks_at, servers, teacher, untied_student_dir, tmp_path, monkeypatch
):
    """At the first tensor, among them, and at the last; all layers are gathered, for ranks gather together."""
    urls, behaviours, _ = servers
    run = plain(tmp_path, untied_student_dir, teacher, block(*urls, sync="nccl"))
    names = AllWeights(run.model).described()["names"]
    behaviours[1].breaks_at = len(names) + min(breaks_at, len(names) - 1)  # of the second sync
    gathered, layers = [], AllWeights.layers

    def noted(self):
        for layer in layers(self):
            gathered.extend(layer)
            yield layer

    monkeypatch.setattr(AllWeights, "layers", noted)
    with pytest.raises(ServerError, match=r"failed while weights were sent: .*start them again and resume"):
        run.train()
    assert gathered == names * 2 and run.state.global_step == 1 and (tmp_path / "checkpoint-1").is_dir()
    paths = [path for path, _, _ in behaviours[0].requests]
    begun = [number for number, path in enumerate(paths) if path == "/start_weight_update"]
    assert len(begun) == 2 and "/v1/completions" not in paths[begun[1] :], "nothing is generated by half of the weights"


def test_a_server_without_the_flags_is_refused_with_them(servers, teacher, untied_student_dir, tmp_path):
    urls, behaviours, _ = servers
    behaviours[0].transfer = None
    with pytest.raises(ConfigError, match=r"VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config"):
        plain(tmp_path, untied_student_dir, teacher, block(*urls, sync="nccl")).train()


def test_on_a_cpu_it_is_refused(teacher, untied_student_dir, tmp_path):
    with pytest.raises(ConfigError, match="sends weights from GPU to GPU, and the student is on cpu"):
        plain(tmp_path, untied_student_dir, teacher, block("http://127.0.0.1:1", sync="nccl"))


def test_an_adapter_is_not_sent_so(teacher, untied_student_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"sync is .nccl., and the student trains an adapter\. Use sync=.adapter."):
        plain(tmp_path, untied_student_dir, teacher, block("http://127.0.0.1:1", sync="nccl"), lora=True)


@pytest.mark.parametrize("variant", ["untied", "tied", "moe"])
def test_what_is_described_is_what_is_sent(variant):
    """In its order; experts as a checkpoint has them, one by one."""
    sender = AllWeights(tiny_model(variant), torch.bfloat16)
    sent = [pair for layer in sender.on_device() for pair in layer.items()]
    told = sender.described()
    assert told["names"] == [name for name, _ in sent] and len(set(told["names"])) == len(sent)
    assert told["shapes"] == [list(tensor.shape) for _, tensor in sent]
    assert set(told["dtype_names"]) == {"bfloat16"} == {str(tensor.dtype)[6:] for _, tensor in sent}
    assert any("experts.3.up_proj.weight" in name for name in told["names"]) == (variant == "moe")
