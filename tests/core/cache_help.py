"""What the tests of the teacher cache share."""

from pathlib import Path

import torch

from kd_plugin.teachers import LocalTeacher

WORDS = ["red", "green", "blue", "stone", "river", "cloud", "seven", "eleven"]


def text(i: int, words: int) -> str:
    return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(words))


def prompt_rows(count: int) -> list[dict[str, str]]:
    """Rows of different lengths, in no order of length."""
    return [
        {"prompt": f"Say {i}: {text(i, i % 5)} ", "completion": text(i + 1, 1 + i * 5 % 7), "domain": "ab"[i % 2]}
        for i in range(count)
    ]


def live_logprobs(teacher: LocalTeacher, input_ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The oracle: the teacher alone with one row, no padding, its own head, float64 softmax. (L, V)."""
    with torch.no_grad():
        logits = teacher.model(input_ids=torch.tensor([input_ids])).logits[0]
    return (logits[:, : teacher.vocabulary.size].double() / temperature).log_softmax(-1)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def shards_of(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(directory).items() if name.startswith("data/")}


def flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(data)
