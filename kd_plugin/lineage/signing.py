"""Signing a checkpoint with a local key, through ``model-signing`` (an optional package).

Digests show that files changed after the record was written; a signature shows who vouches for the record.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from kd_plugin.errors import ConfigError, LineageError, MissingDependencyError
from kd_plugin.lineage.record import SIGNATURE, lineage_directory
from kd_plugin.lineage.verify import verify


def sign(directory: Path, private_key: Path) -> Path:
    """Sign every file of a checkpoint and return the signature's path, ``lineage.sig``.

    Of a checkpoint that is a single file its lineage is signed, which holds the file's digest.

    Args:
        directory: a checkpoint whose files are whole.
        private_key: PEM file of an elliptic-curve key, such as ``openssl ecparam -name prime256v1 -genkey`` makes.

    Raises:
        MissingDependencyError: ``model-signing`` is not installed.
        ConfigError: the key cannot be read.
        LineageError: the checkpoint is tampered or incomplete; only what is whole is signed.
    """
    hashing, signing, _ = _library()
    report = verify(directory)
    if report.exit_code in (2, 3):
        raise LineageError(f"{directory} is not whole, and is not signed: {report.problems[0]}")
    directory = lineage_directory(directory).resolve()  # the library takes paths that are ignored literally
    path = directory / SIGNATURE
    path.unlink(missing_ok=True)
    ignoring = hashing.Config().set_ignored_paths(paths=[path], ignore_git_paths=True)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(ignoring)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"The key {str(private_key)!r} cannot be read: {error}. Expected a PEM file.") from error
    config.sign(directory, path)
    return path


def signature_problem(directory: Path, public_key: Path) -> str | None:
    """Return why the signature of a checkpoint does not hold for ``public_key``, or None when it does.

    Raises:
        MissingDependencyError: ``model-signing`` is not installed.
        ConfigError: the key cannot be read.
    """
    _, _, verifying = _library()
    directory = lineage_directory(directory).resolve()
    path = directory / SIGNATURE
    if not path.is_file():
        return f"{SIGNATURE} is missing: the checkpoint was not signed"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"The key {str(public_key)!r} cannot be read: {error}. Expected a PEM file.") from error
    try:
        config.verify(directory, path)
    except Exception as error:
        # Malformed bundles and wrong keys end in exceptions of several libraries; each means that it does not hold.
        return f"the signature does not hold: {str(error)[:500] or type(error).__name__}"
    return None


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise MissingDependencyError(
            "Signatures need the packages model-signing and pyopenssl: pip install 'kd-plugin[sign]'."
        ) from error
    return hashing, signing, verifying
