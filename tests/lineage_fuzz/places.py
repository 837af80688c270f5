"""What the targets read, made once a process in a temporary folder: models, checkpoints, a cache."""

import tempfile
from functools import cache
from pathlib import Path

from kd_plugin.capturing import capture
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.teachers import LocalTeacher
from tests.core.lineage_help import RUN, checkpoint, model_dir
from tests.tiny import save_tiny

_FOLDER = tempfile.TemporaryDirectory(prefix="kd-fuzz-")
ROOT = Path(_FOLDER.name)


@cache
def student() -> Path:
    return Path(model_dir(ROOT, "student", "mit"))


@cache
def _card_place(kind: str) -> Path:
    made = Path(model_dir(ROOT, f"card-{kind}"))
    if kind == "dataset":
        (made / "model.safetensors").unlink()
        (made / "config.json").unlink()
    return made


def card_dir(card: bytes, kind: str = "model") -> Path:
    """Return a directory with this card and nothing else that speaks of terms."""
    place = _card_place(kind)
    (place / "README.md").write_bytes(card)
    return place


@cache
def taught(licence: str) -> Path:
    """Return a checkpoint that a teacher of this licence taught, with its record."""
    saved = checkpoint(ROOT / licence)
    teacher = Source("t", ref=model_dir(ROOT, f"teacher-{licence}", licence))
    base = Source("student", ref=str(student()))
    RunLineage(method="x", student=base, teachers=[teacher], config={"run": RUN}).write(saved, step=1)
    return saved


@cache
def captured() -> Path:
    """Return a teacher cache of a tiny model under the MIT licence."""
    rows = [{"prompt": f"Say {i}: ", "completion": "red"} for i in range(5)]
    teacher = LocalTeacher(save_tiny(ROOT / "tiny-teacher", "mit", seed=2), dtype="float32")
    declared = {"datasets": [{"name": "rows", "license": "mit", "generated_by": []}]}
    capture(rows, teacher, ROOT / "cache", shard_rows=3, lineage=declared, progress=False)
    return ROOT / "cache"
