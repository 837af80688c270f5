"""Real vLLM servers generate for the student: greedy rollouts of each step are those of transformers."""

import functools
import json
import threading
import time

import pytest
import requests
import torch
import yaml
from transformers import AutoModelForCausalLM

from kd_plugin.errors import ServerError
from kd_plugin.launch.servers import server_problems
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.rollouts.vllm.pool import EnginePool
from kd_plugin.rollouts.vllm.weights import AdapterWeights, AllWeights
from kd_plugin.teachers import LocalTeacher
from tests.tiny import save_tiny
from tests.vllm.greedy import compared_with_own, said
from tests.vllm.hosts import STEPS, lightning, trl
from tests.vllm.server import VllmServer
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks
from tests.vllm.tools import CALL, SAYS, calling, save_student

OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--max-model-len", "512", "--max-logprobs", "8")


@pytest.fixture(scope="module", autouse=True)
def dynamic():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """vLLM needs heads of 32 at least."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "tied": save_tiny(root / "tied", seed=1, hidden=128, tied=True),
        "untied": save_tiny(root / "untied", seed=1, hidden=128, tied=False),
        "teacher": save_tiny(root / "teacher", seed=2, hidden=128, tied=False),
        "experts": save_tiny(root / "experts", variant="moe", seed=1, hidden=128, head_dim=32),
    }
    return made


@pytest.fixture(scope="module", params=["untied", "tied"])
def server(request, models, tmp_path_factory):
    directory = models[request.param]
    with VllmServer(directory, tmp_path_factory.mktemp(request.param) / "log", *OPTIONS) as server:
        yield request.param, directory, server.url


@pytest.fixture
def served(server):
    """A server of a student, which adapters and new weights may reach; it has the student's first weights again."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": server[1]}}
    assert requests.post(f"{server[2]}/collective_rpc", json=body, timeout=60).status_code == 200
    assert requests.post(f"{server[2]}/reset_prefix_cache", timeout=60).status_code == 200
    return server


@pytest.fixture
def compared(monkeypatch):
    """Let the student generate as well, with the same weights, whenever a server does; count tokens and differences."""
    both, found = compared_with_own(ServerEngine.generate)
    monkeypatch.setattr(ServerEngine, "generate", both)
    yield found
    print(said(found))


def block(url, sync, **options):
    where = {"url": url} if isinstance(url, str) else {"urls": url}
    return {"kind": "vllm", **where, "sync": sync, "max_retries": 1, **options}


@pytest.mark.parametrize("sync", ["adapter", "reload"])
@pytest.mark.parametrize("host", [trl, lightning])
def test_five_steps_are_those_of_the_transformers_engine(host, sync, served, models, compared, tmp_path):
    name, directory, url = served
    run = functools.partial(host, directory=directory, teacher=models["teacher"], lora=sync == "adapter")
    if (name, sync) == ("tied", "reload"):
        with pytest.raises(ServerError, match=r"of step 1: .*stale is the output head, which is tied to model\.embed"):
            run(tmp_path / "a", engine=block(url, sync))
        return
    mine = run(tmp_path / "a", engine=block(url, sync, chunk=10))
    theirs = run(tmp_path / "b", engine=None)
    print(f"{host.__name__}, {name}, {sync}: losses {[round(x, 4) for x in mine]}")
    assert len(mine) == STEPS and mine == pytest.approx(theirs, abs=1e-3)
    assert abs(mine[-1] - mine[0]) > 1e-2, "the student must move, or nothing was shown"
    assert compared["rows"] == 4 * STEPS


@pytest.mark.parametrize("server", ["untied"], indirect=True)
def test_a_student_calls_a_tool_and_goes_on_from_what_it_said(served, models, tmp_path):
    """What it learned of tools came to the server by the first sync; each turn is a request of its own."""
    student = save_student(tmp_path / "student")
    mine, called, texts = calling(tmp_path / "a", student, models["teacher"], block(served[2], "reload", chunk=40))
    theirs, own_called, own_texts = calling(tmp_path / "b", student, models["teacher"], None)
    print(f"tools: {called} calls, losses {mine}, trained on {texts[0]!r}")
    assert mine == pytest.approx(theirs, abs=1e-3) and len(mine) == 2
    assert called == own_called == 8 and texts == own_texts == [CALL + SAYS] * 8, "the tool's words are not trained on"


def test_experts_that_do_not_arrive_stop_the_run(models, tmp_path):
    """They are sent as a checkpoint has them; vLLM 0.32 on a CPU scores otherwise after it took them."""
    with VllmServer(models["experts"], tmp_path / "log", "--max-model-len", "512", "--max-logprobs", "8") as server:
        with pytest.raises(ServerError, match=r"weights of step 0: .* nats apart") as error:
            trl(tmp_path / "a", models["experts"], models["teacher"], block(server.url, "reload"), False)
        print(error.value)


@pytest.mark.parametrize("server", ["untied"], indirect=True)
def test_the_doctor_compares_the_base(served, models, tmp_path):
    for base, problems in ((served[1], 0), (models["teacher"], 1)):
        engine = {"kind": "vllm", "url": served[2], "sync": "adapter"}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump({"model_name_or_path": base, "rollout_engine": engine}))
        found, notes = server_problems(tmp_path / "train.yaml")
        print(found, notes)
        assert len(found) == problems and not notes
        assert all("does not serve the student's base" in one for one in found)


def test_a_real_models_adapter_follows_five_steps(smol, compared, tmp_path):
    with VllmServer(smol, tmp_path / "log", *OPTIONS) as server:
        teacher = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
        teacher.save_pretrained(tmp_path / "teacher")
        LocalTeacher(smol).tokenizer.save_pretrained(tmp_path / "teacher")
        (tmp_path / "teacher" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        options = {"lora": True, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
        arguments = (smol, str(tmp_path / "teacher"))
        mine = trl(tmp_path / "a", *arguments, block(server.url, "adapter"), **options)
    theirs = trl(tmp_path / "b", *arguments, None, **options)
    print(f"SmolLM2-135M, LoRA: losses {[round(x, 4) for x in mine]}, transformers {[round(x, 4) for x in theirs]}")
    assert mine == pytest.approx(theirs, abs=1e-3)


def _stale_tensor(patch):
    write, kept = AllWeights.write, {}

    def stale(self, directory, *, here):
        from safetensors.torch import load_file, save_file

        write(self, directory, here=here)
        for file in directory.glob("model-*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                if name == "model.layers.0.mlp.down_proj.weight":
                    tensors[name] = kept.setdefault(name, tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})

    patch.setattr(AllWeights, "write", stale)


def _no_update(patch):
    load = EnginePool._load

    def once(self, client, directory):
        if self.version < 0:
            load(self, client, directory)

    patch.setattr(EnginePool, "_load", once)


def _wrong_scale(patch):
    write = AdapterWeights.write

    def scaled(self, directory, *, here):
        write(self, directory, here=here)
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))

    patch.setattr(AdapterWeights, "write", scaled)


@pytest.mark.parametrize("server", ["untied"], indirect=True)
@pytest.mark.parametrize(
    ("plant", "sync", "message"),
    [
        (_stale_tensor, "reload", r"step 1: .*stale is model\.layers\.0\.mlp\.down_proj\.weight"),
        (_no_update, "adapter", r"step 1: .*all of them: the update did not arrive"),
        (_wrong_scale, "adapter", r"the adapter's scale, which seems to be 2 times the student's"),
    ],
)
def test_the_probe_catches_what_is_planted(plant, sync, message, served, models, tmp_path, monkeypatch):
    _, directory, url = served
    plant(monkeypatch)
    with pytest.raises(ServerError, match=message) as error:
        trl(tmp_path, directory, models["teacher"], block(url, sync), sync == "adapter")
    print(error.value)


@pytest.mark.parametrize("server", ["untied"], indirect=True)
def test_the_probe_catches_another_base(served, models, tmp_path):
    with pytest.raises(ServerError, match=r"weights of step 0: .* Does it serve the student's base"):
        trl(tmp_path, models["teacher"], models["untied"], block(served[2], "adapter"), True)


@pytest.mark.parametrize("server", ["untied"], indirect=True)
def test_of_two_servers_one_is_killed_in_mid_batch(served, models, compared, tmp_path, monkeypatch):
    """Nothing lost, nothing twice: every row is answered, and the run is that of the transformers engine."""
    _, directory, url = served
    arguments = (directory, models["teacher"])
    asked, some = [], EnginePool._some

    def slow(self, client, *rest):
        asked.append(client.root)
        return some(self, client, *rest)

    monkeypatch.setattr(EnginePool, "_some", slow)
    with VllmServer(directory, tmp_path / "log", *OPTIONS) as second:

        def kill():
            while asked.count(second.url) < 7:  # in the second step's batch
                time.sleep(0.005)
            second.kill()

        killer = threading.Thread(target=kill, daemon=True)  # the run may fail before
        killer.start()
        mine = trl(tmp_path / "a", *arguments, block([url, second.url], "adapter", chunk=8), True)
        killer.join(60)
    theirs = trl(tmp_path / "b", *arguments, None, True)
    assert mine == pytest.approx(theirs, abs=1e-3) and compared["rows"] == 4 * STEPS
