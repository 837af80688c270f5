"""What is asked of a real server to trust its answers: no alarm where it is well, and a refusal where it is not."""

import json

import pytest
import torch

from kd_plugin import ServerTeacher
from kd_plugin.cache import Generation, TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.teachers.agreement import distances
from tests.core.cache_help import prompt_rows
from tests.core.test_cache_server import assert_same
from tests.vllm.server import VllmServer
from tests.vllm.test_vllm import PROSE, TOLERANCE, pytestmark  # noqa: F401 - marks

LIMITS = ("--max-model-len", "600", "--max-logprobs", "100")
WRITE = Generation(n=2, max_new_tokens=24, temperature=0.8, top_p=0.95, keep_unfinished=True)
# Settings that a checkpoint may bring along, and that vLLM uses where a request says nothing
OF_THE_CHECKPOINT = {
    "temperature": 0.3,
    "top_k": 3,
    "top_p": 0.5,
    "repetition_penalty": 2.0,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.5,
}


def prompts(count):
    return [{"prompt": [{"role": "user", "content": f"Name {i + 2} rivers."}]} for i in range(count)]


@pytest.fixture(scope="module")
def processed(smol, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "processed.log"
    options = ("--logprobs-mode", "processed_logprobs", "--override-generation-config", json.dumps(OF_THE_CHECKPOINT))
    with VllmServer(smol, log, *LIMITS, *options) as server:
        yield ServerTeacher(server.url, repo=smol)


def test_processed_log_probabilities_are_refused_for_writing(processed, tmp_path):
    with pytest.raises(ConfigError, match=r"after temperature, top-k and penalties \(.* nats.*raw_logprobs") as error:
        capture(prompts(2), processed, tmp_path / "c", targets=TopK(20), generate=WRITE, progress=False)
    print(error.value)
    assert not (tmp_path / "c").exists()


def test_and_do_for_scoring(processed, local, tmp_path):
    options = {"targets": TopK(20), "progress": False}
    rows = [{"text": PROSE}, {"text": PROSE[40:]}]
    mine = capture(rows, processed, tmp_path / "s", **options)
    assert_same(mine, capture(rows, local, tmp_path / "l", **options), TOLERANCE)


def test_logits_are_refused(smol, tmp_path):
    with VllmServer(smol, tmp_path / "logits.log", *LIMITS, "--logprobs-mode", "raw_logits") as server:
        teacher = ServerTeacher(server.url, repo=smol)
        with pytest.raises(ServerError, match="raw_logprobs") as error:
            teacher.check()
        print(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_server_that_is_well_raises_no_alarm(smol, tmp_path, dtype):
    """Under load, so that batches differ, and with settings of the checkpoint that must not show."""
    options = ("--override-generation-config", json.dumps(OF_THE_CHECKPOINT))
    with VllmServer(smol, tmp_path / "server.log", *LIMITS, *options, dtype=dtype) as server:
        teacher = ServerTeacher(server.url, repo=smol, top_k=20, max_concurrency=16)
        scored = capture(prompt_rows(120), teacher, tmp_path / "s", targets=TopK(20), shard_rows=32, progress=False)
        assert len(scored) == 120
        written = capture(prompts(20), teacher, tmp_path / "w", targets=TopK(20), generate=WRITE, progress=False)
        assert len(written) == 40
        ids = torch.tensor([teacher.tokenizer(PROSE)["input_ids"][:40] for _ in range(16)])
        for _ in range(3):
            teacher.score(ids, torch.ones_like(ids), torch.arange(ids.numel()).view(ids.shape)[:, 10:-1].flatten())
        again = ServerTeacher(server.url, repo=smol, top_k=20)
        apart = distances(teacher.reference.long, again.reference.long)
        print(
            f"{dtype}: the probe asked for again is {apart.mean():.1e} nats apart on average, {apart.max():.1e} at most"
        )
        assert apart.mean() < 0.05
        greedy = {"targets": TopK(20), "generate": Generation(max_new_tokens=24, temperature=0, keep_unfinished=True)}
        found = capture(prompts(4), teacher, tmp_path / "g", progress=False, **greedy)
        for row in found.dataset():
            index = torch.tensor(row["teacher_index"])
            best = found.signal(index[index >= 0]).ids[:, 0]
            wrote = torch.tensor(row["input_ids"])[1:][torch.tensor(row["completion_mask"])[1:] == 1]
            assert (best == wrote).float().mean() > 0.9  # penalties of the checkpoint would forbid most
