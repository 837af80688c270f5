"""Finding the student in a module that holds it, and what its configuration and its tokenizer say of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.models import output_rows
from kd_plugin.upstream import reference_of


def find_student(module: nn.Module, path: str | None = None) -> PreTrainedModel:
    """Return the transformers causal language model inside ``module``; of a PEFT model its base.

    Args:
        module: the user's module.
        path: attribute path of the student, such as ``"net.model"``; None searches the whole module.

    Raises:
        ConfigError: no such attribute, no causal language model, or several of them.
    """
    owner = type(module).__name__
    if path is not None:
        names = [name for name, _ in module.named_modules() if name]
        if path not in names:
            top = [name for name in names if "." not in name]
            raise ConfigError(
                f"student={path!r} names no part of {owner}; its attributes with modules are "
                f"{', '.join(map(repr, top)) or 'none'}.{nearest(path, names)}"
            )
        module = module.get_submodule(path)
    found: dict[str, PreTrainedModel] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(outer + ".") or outer == "" for outer in found)
        if not inside and _is_causal(part):
            found[name] = part  # type: ignore[assignment]
    where = owner if path is None else f"{owner}.{path}"
    if not found:
        raise ConfigError(
            f"{where} holds no transformers causal language model. Assign one to an attribute, such as self.model = "
            "AutoModelForCausalLM.from_pretrained(...), in __init__, setup or configure_model."
        )
    if len(found) > 1:
        raise ConfigError(
            f"{where} holds {len(found)} causal language models: {', '.join(found)}. Say which one is the student: "
            f"student={next(iter(found))!r}."
        )
    return next(iter(found.values()))


def as_trained(module: nn.Module, student: PreTrainedModel) -> Any:
    """Return the student with its adapter, where the module holds it wrapped by PEFT; other PEFT models are others'."""
    adapted = (m for m in module.modules() if hasattr(m, "peft_config") and any(p is student for p in m.modules()))
    return next(adapted, student)


def config_of(student: PreTrainedModel | str, **where: Any) -> Any:
    """Return the configuration of a student, or of the reference that it will be loaded from, with its ``revision``."""
    return AutoConfig.from_pretrained(student, **where) if isinstance(student, str) else student.config


def student_rows(model: PreTrainedModel | str) -> int | None:
    """Return the rows of a student's head, from its configuration where it is not loaded."""
    return output_rows(config_of(model) if isinstance(model, str) else model)


def load_tokenizer(model: PreTrainedModel | str, **where: Any) -> Any:
    """Load the tokenizer that a student's ``config`` names.

    Raises:
        ConfigError: it names none.
    """
    reference = reference_of(model)
    if not reference:
        raise ConfigError(
            "The student was built in memory and names no tokenizer, so its token ids cannot be compared with the "
            "teacher's. Pass tokenizer=..."
        )
    return AutoTokenizer.from_pretrained(reference, **where)


def _is_causal(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel) or module.config.is_encoder_decoder:
        return False
    return module.get_output_embeddings() is not None
