"""Which weights a teacher has, by content: so that a run that goes on with others is noticed."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.lineage.hashing import sha256_file, weight_files


def reference_identity(reference: str, revision: str | None) -> dict[str, Any]:
    """Describe weights by the sha256 of their files, for a directory; by hub id and commit elsewhere."""
    path = Path(reference)
    if path.is_dir():
        return {"weights": _files_digest(path)}
    return {"repo": reference, "revision": revision}


def tensors_digest(model: nn.Module) -> str:
    """Digest a model's parameters, whatever device and module tree holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files_digest(directory: Path) -> str:
    """Digest the weight files of a directory; a file that has not changed is read once a process."""
    digest = hashlib.sha256()
    for file in weight_files(directory):
        status = file.stat()
        digest.update(_sha256(file, status.st_size, status.st_mtime_ns).encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, modified: int) -> str:
    return sha256_file(file)
