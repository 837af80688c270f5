"""Hashing that is spread over the nodes of a run."""

import hashlib

import pytest

from kd_plugin.lineage import hashing
from kd_plugin.lineage.proof import Place, Shares, hash_share


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_plugin.lineage.proof._PATIENCE", 0.2)
    for shard in range(5):
        (tmp_path / f"model-{shard}.safetensors").write_bytes(bytes([shard]) * 1000)
    return tmp_path


def subjects(checkpoint, place, monkeypatch, others=(), then=None):
    """Hash as the writer does, and return what it read itself."""
    read = []
    sha256_file = hashing.sha256_file

    def reading(path):
        read.append(path.name)
        return sha256_file(path)

    shares = Shares(checkpoint, place)
    for other in others:
        hash_share(checkpoint, other)
    if then:
        then()
    monkeypatch.setattr("kd_plugin.lineage.proof.sha256_file", reading)
    found = hashing.subjects(checkpoint, digest=shares.digest, order=shares.order)
    shares.remove()
    assert {s.path: s.sha256 for s in found} == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.glob("*.safetensors")
    }
    return sorted(read)


def test_each_node_hashes_its_share(checkpoint, monkeypatch):
    read = subjects(checkpoint, Place(0, 2, True), monkeypatch, [Place(1, 2, True)])
    assert read == ["model-0.safetensors", "model-2.safetensors", "model-4.safetensors"]
    assert sorted(p.name for p in checkpoint.iterdir()) == [f"model-{i}.safetensors" for i in range(5)]


def test_a_node_that_did_not_come_is_not_waited_for(checkpoint, monkeypatch):
    assert len(subjects(checkpoint, Place(0, 2, True), monkeypatch)) == 5


def test_a_digest_of_an_earlier_save_is_not_taken(checkpoint, monkeypatch):
    def save_again():
        (checkpoint / "model-1.safetensors").write_bytes(b"other" * 200)

    assert "model-1.safetensors" in subjects(
        checkpoint, Place(0, 2, True), monkeypatch, [Place(1, 2, True)], then=save_again
    )


def test_a_node_waits_until_the_writer_asks_and_leaves_nothing_where_nobody_does(checkpoint):
    before = sorted(checkpoint.iterdir())
    hash_share(checkpoint, Place(1, 2, True))
    assert sorted(checkpoint.iterdir()) == before


def test_digests_that_come_after_the_record_are_taken_away(checkpoint, monkeypatch):
    shares = Shares(checkpoint, Place(0, 2, True))
    sha256_file = hashing.sha256_file

    def late(path):
        shares.remove()
        return sha256_file(path)

    monkeypatch.setattr("kd_plugin.lineage.proof.sha256_file", late)
    hash_share(checkpoint, Place(1, 2, True))
    assert list(checkpoint.glob(".kd-*")) == []


def test_verify_never_takes_digests_from_beside_the_weights(checkpoint):
    Shares(checkpoint, Place(0, 1, True))
    hash_share(checkpoint, Place(0, 1, True))
    forged = (checkpoint / ".kd-digests-0").read_text().replace("a", "b")
    (checkpoint / ".kd-digests-0").write_text(forged)
    assert {s.path: s.sha256 for s in hashing.subjects(checkpoint)}["model-0.safetensors"] == hashlib.sha256(
        bytes(1000)
    ).hexdigest()


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": "16", "RANK": "8", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}, Place(1, 2, True)),
        ({"WORLD_SIZE": "16", "RANK": "9", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(1, 2, False)),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place(0, 1, False)),
        ({"WORLD_SIZE": "x", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place()),
    ],
)
def test_the_place_comes_from_the_launcher(environment, place):
    assert Place.from_environment(environment) == place
