from types import SimpleNamespace

import pytest

from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lineage import RunLineage, Source, directory
from kd_plugin.lineage.discovery import discover
from kd_plugin.lineage.registry import default_registry

COMMIT = "b" * 40


@pytest.fixture
def reachable(monkeypatch, tmp_path):
    """A hub that answers from memory: one repository with card, licence file, weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(directory._Reach, "problem", None)
    snapshot = tmp_path / "models--org--m" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    fetched = []

    def repo_info(self, repo, revision, repo_type, timeout, files_metadata):
        assert timeout <= 5
        names = {"README.md": 50, "LICENSE": 2 << 20, "model.safetensors": 1 << 40}
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in names.items()])

    def download(repo, name, revision, repo_type):
        fetched.append(name)
        (snapshot / name).write_text("---\nlicense: gemma\n---\n")
        return str(snapshot / name)

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return fetched


def test_the_hub_gives_card_and_commit_and_never_weights_or_huge_files(reachable):
    node = discover(Source("t", ref="org/m"), default_registry()).node
    assert (node.repo, node.revision, node.licenses) == ("org/m", COMMIT, ("gemma",))
    assert reachable == ["README.md"]


def test_a_declaration_milder_than_the_hubs_card_does_not_stand(reachable):
    node = discover(Source("t", ref="org/m", license="mit"), default_registry()).node
    assert node.licenses == ("gemma",)


def test_a_hub_out_of_reach_is_asked_once_and_the_record_says_what_it_fell_back_to(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(directory._Reach, "problem", None)
    asked = []

    def fail(self, repo, **kwargs):
        asked.append(repo)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", fail)
    run = RunLineage(method="sft", student=Source("s", ref="org/s", license="mit"), teachers=[Source("t", ref="org/t")])
    assert asked == ["org/s"]
    with pytest.raises(LicenseRefusedError, match="hub: could not be reached: ConnectionError"):
        run.require_trainable()


def test_offline_is_said_and_nothing_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *a, **k: pytest.fail("the hub was asked"))
    node = discover(Source("t", ref="org/m"), default_registry()).node
    assert [(e.where, e.value) for e in node.evidence] == [("hub", "not asked: HF_HUB_OFFLINE is set")]
