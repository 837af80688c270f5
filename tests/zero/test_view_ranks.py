"""Teachers that read the student's words by views and by tokens of their own, on ranks: the steps of one process."""

import pytest

from tests.tiny import save_tiny
from tests.tokenizers import byte_level
from tests.zero.ranks import run_all

pytestmark = pytest.mark.zero
ESTIMATORS = ["byte_marginals", "topk_tail", "chunk_likelihood"]  # `sampled` needs draws, which differ by rank


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An untied student, a teacher with its tokenizer, and one with another."""
    place = tmp_path_factory.mktemp("views")
    other = byte_level()
    path = save_tiny(place / "bpe", seed=7, hidden=48, vocab_size=len(other), tied=False)
    other.save_pretrained(path)
    student = save_tiny(place / "student", seed=1, tied=False)
    return {"student": student, "same": save_tiny(place / "same", seed=2, hidden=48, tied=False), "bpe": path}


def jobs(models, directory, whole=True, **how):
    """One row a rank, of different lengths under each view; routed, a rank often has no row for a teacher."""
    hint = {"context": "Hint: {{ hint }}"}
    solver = {"model": models["same"], "view": hint}
    own = {"chat_template": "own", "tokenizer": "own", "system": "Be right."}
    panels = {
        name: {"teachers": {"solver": solver, "bpe": {"model": models["bpe"], "estimator": name, "view": own}}}
        for name in ESTIMATORS
    }
    panels |= {"routed": {**panels["byte_marginals"], "combine": "route"}}
    if whole:  # an average of the student's weights needs them whole
        panels["itself"] = {"teachers": {"now": {"kind": "self", "weights": "ema", "decay": 0.5, "view": hint}}}
    common = {"method": "panel", "student": models["student"], "hints": True, "given": True, "steps": 4, "prompts": 16}
    found = {}
    for name, panel in panels.items():
        arguments = {"panel": {"combine": "weighted_kl", **panel}, **how.get("arguments", {})}
        told = {**common, "output_dir": str(directory / name), **how, "arguments": arguments}
        found[name] = told | ({"routing": 3} if name == "routed" else {}) | ({"lora": True} if name == "itself" else {})
    return found


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    found = run_all(jobs(models, directory, stage=None, rows=2), directory / "job", 1, timeout=600)
    assert all(all(loss > 0 for loss in one[0]["losses"]) for one in found.values())
    return found


@pytest.mark.parametrize("host", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_ranks_train_as_one_process(host, alone, models, tmp_path):
    how = {"stage": {"zero2": 2, "zero3": 3}.get(host), "rows": 1, "arguments": {}}
    if host == "zero3":
        how["arguments"] = {"shard_teachers": True}
    if host == "fsdp2":
        how |= {"fsdp": {"reshard_after_forward": True}, "arguments": {"gradient_checkpointing": False}}
    found = run_all(jobs(models, tmp_path, host in ("ddp", "zero2"), **how), tmp_path / "job", timeout=600)
    assert len(found) >= 4
    for name, ranks in found.items():
        for rank in ranks:
            assert rank["losses"] == pytest.approx(alone[name][0]["losses"], rel=1e-3, abs=1e-5), name
            assert rank["norm"] == pytest.approx(alone[name][0]["norm"], rel=1e-4), name
