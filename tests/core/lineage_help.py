"""What the lineage tests share: model directories with a card, and checkpoints with weights. No model is built."""

from pathlib import Path
from typing import Any

from kd_plugin.lineage import RunLineage, Source

RUN = {"id": "run-1", "date": "2026-11-24"}


def model_dir(root: Path, name: str, card: str | None = None, license_text: str | None = None) -> str:
    """Make a model directory; ``card`` is YAML front matter, or just a licence id."""
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(name.encode() * 100)
    (directory / "config.json").write_text("{}")
    if card is not None:
        front = card if ":" in card else f"license: {card}"
        (directory / "README.md").write_text(f"---\n{front}\n---\n\n# {name}\n")
    if license_text is not None:
        (directory / "LICENSE").write_text(license_text)
    return str(directory)


def checkpoint(root: Path, name: str = "checkpoint-1", weights: bytes = b"weights") -> Path:
    """Make a directory as a trainer leaves it: weights, and files that are no weights."""
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(weights * 1000)
    (directory / "optimizer.pt").write_bytes(b"moments")
    (directory / "training_args.bin").write_bytes(b"arguments")
    return directory


def run_of(root: Path, *teachers: str, student: str = "apache-2.0", config: dict[str, Any] | None = None, **kwargs):
    """Describe a panel run whose teachers have the given licences and are called t0, t1, ..."""
    base = root / "student"
    reference = str(base) if base.is_dir() else model_dir(root, "student", student)
    sources = []
    for i, licence in enumerate(teachers):
        place = root / f"teacher-{i}-{licence}"
        sources.append(Source(f"t{i}", ref=str(place) if place.is_dir() else model_dir(root, place.name, licence)))
    merged = {"run": RUN, **(config or {})}
    return RunLineage(
        method="teacher_panel", student=Source("student", ref=reference), teachers=sources, config=merged, **kwargs
    )
