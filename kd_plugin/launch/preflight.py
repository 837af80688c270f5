"""What a run under DeepSpeed must not contradict, found before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.launch.op_locks import require_unlocked

# A key of ours in a DeepSpeed configuration, which DeepSpeed leaves alone: what `kd-plugin plan` made the file for
MADE_FOR = "kd_plugin"
_SHAPE = ("hidden_size", "num_hidden_layers")
_DEVICES = ("none", "cpu", "nvme")


def made_for(student: str, hidden_size: int, num_hidden_layers: int) -> dict[str, Any]:
    """Return what a configuration says under ``MADE_FOR``, so that it is not taken for another student by mistake."""
    return {"student": student, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}


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
