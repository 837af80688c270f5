import sys

import pytest

from kd_plugin.cli.lineage import main
from kd_plugin.errors import ConfigError, MissingDependencyError
from kd_plugin.lineage import signing
from tests.core.lineage_help import checkpoint, run_of


@pytest.fixture
def saved(tmp_path):
    directory = checkpoint(tmp_path / "out")
    run_of(tmp_path, "mit").write(directory, step=1)
    return directory


@pytest.fixture
def keys(tmp_path):
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def pair(name):
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
        encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
        public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
        return private, public

    return pair("mine"), pair("other")


def test_a_signature_holds_for_its_key_and_its_files_only(saved, keys):
    (private, public), (_, other) = keys
    assert main(["verify", str(saved), "--key", str(public)]) == 2  # not signed yet
    assert main(["sign", str(saved), "--key", str(private)]) == 0
    assert main(["verify", str(saved), "--key", str(public)]) == 0
    assert main(["verify", str(saved)]) == 0
    assert main(["verify", str(saved), "--key", str(other)]) == 2
    (saved / "optimizer.pt").write_bytes(b"changed")  # no weight file, so only the signature sees it
    assert main(["verify", str(saved)]) == 0
    assert main(["verify", str(saved), "--key", str(public)]) == 2


def test_only_what_is_whole_is_signed(saved, keys):
    (private, _), _ = keys
    (saved / "model.safetensors").write_bytes(b"changed")
    assert main(["sign", str(saved), "--key", str(private)]) == 2
    assert not (saved / signing.SIGNATURE).exists()


def test_a_key_that_is_none_is_one_clear_error(saved, keys, tmp_path):
    (tmp_path / "no.pem").write_text("no key")
    with pytest.raises(ConfigError, match="Expected a PEM file"):
        signing.sign(saved, tmp_path / "no.pem")
    with pytest.raises(ConfigError, match="Expected a PEM file"):
        main(["sign", str(saved), "--key", str(tmp_path / "none.pem")])


def test_without_the_package_the_way_out_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependencyError, match=r"kd-plugin\[sign\]"):
        signing.sign(saved, tmp_path / "key.pem")


def test_a_checkpoint_may_be_named_by_a_relative_path(saved, keys, monkeypatch):
    (private, public), (_, other) = keys
    monkeypatch.chdir(saved.parent)
    assert main(["sign", saved.name, "--key", str(private)]) == 0
    assert main(["verify", saved.name, "--key", str(public)]) == 0
    assert main(["verify", str(saved), "--key", str(public)]) == 0
    assert main(["verify", saved.name, "--key", str(other)]) == 2


def test_the_lineage_of_a_single_file_is_signed(saved, keys, tmp_path):
    (private, public), _ = keys
    single = tmp_path / "step=1.ckpt"
    single.write_bytes(b"weights")
    run_of(tmp_path, "mit").write(single, step=1)
    assert main(["sign", str(single), "--key", str(private)]) == 0
    assert main(["verify", str(single), "--key", str(public)]) == 0
    single.write_bytes(b"other weights")
    assert main(["verify", str(single), "--key", str(public)]) == 2
