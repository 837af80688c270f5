"""What a run under DeepSpeed must not contradict, found before any weights are loaded.

That includes the lock that a killed build of a DeepSpeed op leaves behind, on which later runs wait for ever without a
word.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.limits import deepspeed_splits, refuse_splits

logger = logging.getLogger(__name__)
# No op takes as long to build. A younger lock may be that of a build on another machine, in a home that both share
STALE_SECONDS = 900.0
# A key of ours in a DeepSpeed configuration, which DeepSpeed leaves alone: what `kd-plugin plan` made the file for
MADE_FOR = "kd_plugin"
_SHAPE = ("hidden_size", "num_hidden_layers")
_DEVICES = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class OpLock:
    """A lock that no process of this machine holds.

    Attributes:
        op: DeepSpeed's name of what was built, such as ``cpu_adam``.
        path: the file.
        seconds: its age.
    """

    op: str
    path: Path
    seconds: float

    def __str__(self) -> str:
        """Say what it does, and which file to delete."""
        if self.seconds < STALE_SECONDS:
            doubt = f"No process of this machine holds it. Unless another one builds {self.op} now, delete {self.path}."
        else:
            doubt = f"No build takes so long: delete {self.path}."
        return (
            f"a build of DeepSpeed's op {self.op} left a lock behind, {self.seconds / 60:.0f} minutes old, on which "
            f"runs that need the op wait for ever. {doubt}"
        )


def op_directory() -> Path:
    """Return where torch builds ops in this environment, each in a directory of its own; nothing is made."""
    from torch.utils.cpp_extension import get_default_build_root

    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is not None:
        return Path(named)
    hip, cuda = getattr(torch.version, "hip", None), torch.version.cuda
    kind = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{kind}"


def abandoned_locks() -> list[OpLock]:
    """Find the locks of ops that no process here is building; nothing is deleted.

    A build holds its lock open to its end (``torch.utils.file_baton``), so one that nobody has open is left over,
    or belongs to another machine.
    """
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return []
    found = {path.resolve(): path for path in op_directory().glob("*/lock")}
    if not found:
        return []
    held, locks = _open_files(), []
    for real, path in found.items():
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # its build ended meanwhile
            continue
        if str(real) not in held:
            locks.append(OpLock(path.parent.name, path, max(age, 0.0)))
    return locks


def require_unlocked(ops: Collection[str]) -> None:
    """Refuse to wait for ever for one of ``ops``, which the run is about to load; speak of other and of young locks.

    Raises:
        ConfigError: names the file to delete, and its age.
    """
    for lock in abandoned_locks():
        if lock.op in ops and lock.seconds >= STALE_SECONDS:
            raise ConfigError(f"This run would hang: {lock}")
        logger.warning("%s", lock)


def _open_files() -> set[str]:
    """Return what the processes of this machine have open, as far as they may be asked."""
    import psutil  # DeepSpeed needs it too

    paths: set[str] = set()
    for process in psutil.process_iter():
        try:
            paths.update(file.path for file in process.open_files())
        except psutil.Error:  # it ended, or is another user's
            continue
    return paths


def made_for(student: str, hidden_size: int, num_hidden_layers: int) -> dict[str, Any]:
    """Return what a configuration says under ``MADE_FOR``, so that it is not taken for another student by mistake."""
    return {"student": student, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}


def require_launchable(
    config: Mapping[str, Any], student: Any, *, micro_batch: int | None, accumulation: int, ranks: int
) -> None:
    """Refuse a DeepSpeed configuration that contradicts the trainer or the student, before anything is loaded.

    Args:
        config: the DeepSpeed configuration.
        student: the transformers configuration of the student; None where it is not known.
        micro_batch: rows of a rank in a forward pass, as the trainer has it; None where it is not known.
        accumulation: micro-batches in a step, likewise.
        ranks: processes of the run.

    Raises:
        ConfigError: ranks would share rows or layers, batch sizes contradict, the configuration was made for another
            student, or an offload cannot be.
    """
    refuse_splits(deepspeed_splits(config))
    if micro_batch is not None:
        require_batches(config, micro_batch=micro_batch, accumulation=accumulation, ranks=ranks)
    if student is not None:
        require_student(config, student)
    require_offload(config)


def require_batches(config: Mapping[str, Any], *, micro_batch: int, accumulation: int, ranks: int) -> None:
    """Refuse batch sizes that contradict each other; those left out or ``auto`` follow from the others.

    Args:
        config: the DeepSpeed configuration.
        micro_batch: rows of a rank in a forward pass, as the trainer has it.
        accumulation: micro-batches in a step, likewise.
        ranks: processes of the run.

    Raises:
        ConfigError: names both figures, and where each stands.
    """
    whole = micro_batch * accumulation * ranks
    wanted = {
        "train_micro_batch_size_per_gpu": (micro_batch, "rows a rank in the trainer's arguments"),
        "gradient_accumulation_steps": (accumulation, "in the trainer's arguments"),
        "train_batch_size": (whole, f"= {micro_batch} rows x {accumulation} accumulated x {ranks} ranks"),
    }
    for key, (right, where) in wanted.items():
        given = config.get(key, "auto")
        if given != "auto" and given != right:
            raise ConfigError(
                f"Batch sizes contradict: {key} is {given} in the DeepSpeed configuration, and {right} {where}. Set "
                f'"{key}": "auto" there, or make the two agree.'
            )


def require_filled(config: Mapping[str, Any], where: str = "") -> None:
    """Refuse ``auto``, for hosts that fill in nothing.

    Raises:
        ConfigError: names the first key that is ``auto``.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            require_filled(value, f"{where}{key}.")
        elif value == "auto":
            raise ConfigError(
                f'{where}{key} is "auto" in the DeepSpeed configuration, which transformers fills in and Lightning '
                "does not. Leave the key out, or write a number."
            )


def require_student(config: Mapping[str, Any], student: Any) -> None:
    """Refuse a configuration whose buckets were measured for another student.

    Args:
        config: the DeepSpeed configuration. What it was made for is told by the key that ``kd-plugin plan`` writes,
            or by bucket sizes that follow, as transformers fills them in, from a hidden size.
        student: the transformers configuration of the student.

    Raises:
        ConfigError: names both shapes.
    """
    text = student.get_text_config()
    own = {name: getattr(text, name, None) for name in _SHAPE}
    made = config.get(MADE_FOR) or {}
    other = {name: made[name] for name in _SHAPE if name in made and own[name] not in (None, made[name])}
    if not other:
        hidden = _hidden_size_of_buckets(config.get("zero_optimization") or {})
        if hidden is not None and own["hidden_size"] not in (None, hidden):
            other = {"hidden_size": hidden}
    if other:
        theirs = ", ".join(f"{name} {value}" for name, value in other.items())
        ours = ", ".join(f"{name} {own[name]}" for name in other)
        named = f" ({made['student']})" if "student" in made else ""
        raise ConfigError(
            f"The DeepSpeed configuration was made for another student{named}: {theirs}; this one has {ours}. Its "
            "buckets would not fit. Write one with `kd-plugin plan --student ... --output DIR`, or set its "
            'reduce_bucket_size and stage3_* sizes to "auto".'
        )


def require_offload(config: Mapping[str, Any]) -> None:
    """Refuse offloading that the stage has not, that has no place to go, or whose DeepSpeed op cannot be had.

    An op that DeepSpeed compiles on first use is compiled here, which may take a minute; one whose build was killed
    would be waited for without end, and is refused. Locks of other ops are only spoken of.

    Raises:
        ConfigError: says which, and what to install or to set.
    """
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    devices = {}
    for key in ("offload_param", "offload_optimizer"):
        asked = zero.get(key) or {}
        device = asked.get("device", "none")
        if device not in _DEVICES:
            raise ConfigError(
                f"{key}.device is {device!r}; expected one of {', '.join(_DEVICES)}." + nearest(str(device), _DEVICES)
            )
        if device == "none":
            continue
        least = 3 if key == "offload_param" or device == "nvme" else 1
        if stage < least:
            raise ConfigError(
                f"{key} to {device} needs ZeRO stage {least}{' or more' if least < 3 else ''}; the DeepSpeed "
                f'configuration has stage {stage}. Set "stage": {least}, or leave {key} out.'
            )
        if device == "nvme":
            _require_place(key, asked.get("nvme_path"))
        devices[key] = device
    on_disk = "nvme" in devices.values()
    steps_on_host = "offload_optimizer" in devices and config.get("zero_force_ds_cpu_optimizer", True)
    # async_io loads pin_memory before itself
    require_unlocked((["pin_memory", "async_io"] if on_disk else []) + (["cpu_adam"] if steps_on_host else []))
    if on_disk:
        way_out = 'libaio (integrations/deepspeed/unpack_libaio.sh needs no root), or set "device": "cpu"'
        _require_op("AsyncIOBuilder", "async_io", "nvme", way_out)
    if steps_on_host:
        _require_op("CPUAdamBuilder", "cpu_adam", "cpu", "g++ and ninja, or leave offload_optimizer out")


def _hidden_size_of_buckets(zero: Mapping[str, Any]) -> int | None:
    """Return the hidden size h that 10 h and 0.9 h**2 came from, as transformers fills them in; None for others."""
    persistence, prefetch = zero.get("stage3_param_persistence_threshold"), zero.get("stage3_prefetch_bucket_size")
    if not isinstance(persistence, int) or persistence % 10:
        return None
    hidden = persistence // 10
    return hidden if prefetch == int(0.9 * hidden * hidden) else None


def _require_place(key: str, path: Any) -> None:
    if not path:
        raise ConfigError(f"{key} goes to nvme and names no nvme_path; set it to a directory on a local disk.")
    place = Path(path)
    existing = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"{key}.nvme_path is {path}, and {existing} is no directory to write in. Name one on a local disk of "
            "every node."
        )


def _require_op(builder: str, op: str, device: str, way_out: str) -> None:
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().create_op_builder(builder)
    reason = "it is not for this accelerator"
    if found is not None:
        try:
            if found.is_compatible():
                found.load()
                return
            reason = str(found.error_log or "what it is built from is not installed").strip()
        except Exception as error:  # what a compiler can raise is not to be listed; the reason is passed on
            reason = " ".join(str(error).split())[:300]
    raise ConfigError(
        f"The DeepSpeed configuration offloads to {device}, and DeepSpeed's op {op} cannot be had here: {reason}. "
        f"Install {way_out}; `ds_report` lists the ops."
    )
