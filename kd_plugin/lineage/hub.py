"""What the model hub says of a repository, where it can be reached; what stood in the way, where it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd_plugin.lineage.directory import printable, speaks_of_terms

_TIMEOUT = 5.0  # seconds; a gate must not hang
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class HubAnswer:
    """The hub's files of a repository that speak of its terms.

    Attributes:
        directory: the snapshot in the hub's local cache, or None.
        problem: why there is nothing, in words; None where there is something.
        weights: sha256 of the large files that the hub holds, by name.
    """

    directory: Path | None = None
    problem: str | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


class _Reach:
    """Whether the hub answered in this process; after one failed connection it is not asked again."""

    problem: str | None = None


def ask_hub(repo: str, revision: str | None, kind: Literal["model", "dataset"]) -> HubAnswer:
    """Bring card, licence texts and NOTICE of a repository into the hub's local cache; never its weights.

    Args:
        repo: hub id.
        revision: branch, tag or commit; None is the default branch.
        kind: kind of repository.
    """
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return HubAnswer(problem="not asked: HF_HUB_OFFLINE is set")
    if _Reach.problem is not None:
        return HubAnswer(problem=_Reach.problem)
    try:
        info = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=_TIMEOUT, files_metadata=True)
        places = [
            Path(hf_hub_download(repo, file.rfilename, revision=info.sha, repo_type=kind))
            for file in getattr(info, "siblings", None) or []
            if speaks_of_terms(file.rfilename) and (file.size or 0) <= _MAX_BYTES
        ]
    except HfHubHTTPError as error:
        return HubAnswer(problem=printable(f"no answer for this repository: {type(error).__name__}"))
    except Exception as error:
        # Proxies, certificates, name resolution, two generations of HTTP clients: whatever it was, the gate goes
        # on without the hub, and the record says so.
        _Reach.problem = printable(f"could not be reached: {type(error).__name__}")
        return HubAnswer(problem=_Reach.problem)
    if not places:
        return HubAnswer(problem="the repository has neither card nor licence file")
    return HubAnswer(directory=places[0].parent, weights=_digests(info))


def _digests(info: Any) -> dict[str, str]:
    large = {file.rfilename: getattr(file, "lfs", None) for file in getattr(info, "siblings", None) or []}
    digests = {str(name): getattr(lfs, "sha256", None) for name, lfs in large.items()}
    return {name: str(digest) for name, digest in digests.items() if digest}
