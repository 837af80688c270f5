"""Finding the student in a LightningModule, and what of a trainer must hold before anything is trained."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kd_plugin.errors import ConfigError
from kd_plugin.launch.checkpoints import resume_shards
from kd_plugin.launch.preflight import require_filled
from kd_plugin.launch.preflight import require_launchable as require_configured
from kd_plugin.lightning.upstream import resumed_from
from kd_plugin.rollouts.in_process import InProcessEngine, Sampling
from kd_plugin.sharding import called, through
from kd_plugin.student.head import config_of
from kd_plugin.vocab import Vocabulary

SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)  # DeepSpeedStrategy is a DDPStrategy


def builds_later(module: LightningModule) -> bool:
    """Whether the module may build its model after callbacks are set up."""
    return is_overridden("configure_model", module) or is_overridden("setup", module)


def require_supported(trainer: Trainer) -> None:
    """Refuse strategies that were never tried.

    Raises:
        ConfigError: names the strategy and those that work.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SUPPORTED):
        hint = " FSDP is reached through ModelParallelStrategy." if "FSDP" in type(strategy).__name__ else ""
        raise ConfigError(
            f"{type(strategy).__name__} is not supported by kd-plugin. Use a single device, DDPStrategy, "
            f"ModelParallelStrategy (FSDP2) or DeepSpeedStrategy.{hint}"
        )
    mesh = getattr(strategy, "device_mesh", None) if isinstance(strategy, ModelParallelStrategy) else None
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            f"ModelParallelStrategy splits layers over {mesh['tensor_parallel'].size()} ranks, which is Lightning's "
            "default and gives each of them the same rows; kd-plugin shards parameters instead. Set "
            f"data_parallel_size: {trainer.world_size} and tensor_parallel_size: 1."
        )


def require_launchable(trainer: Trainer, student: PreTrainedModel | str) -> None:
    """Refuse a DeepSpeed configuration that contradicts the trainer or the student, before anything is loaded.

    Args:
        trainer: for its strategy and its batches.
        student: the student, or the reference that it will be loaded from.

    Raises:
        ConfigError: ranks would share rows or layers, batch sizes contradict, ``auto`` stands where Lightning fills in
            nothing, the configuration was made for another student, or an offload cannot be.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    config: dict[str, Any] = strategy.config or {}
    require_filled(config)
    rows = getattr(getattr(trainer, "datamodule", None), "hparams", {}).get("batch_size")
    require_configured(
        config,
        config_of(student),
        micro_batch=config.get("train_micro_batch_size_per_gpu", rows),
        accumulation=trainer.accumulate_grad_batches,
        ranks=trainer.world_size,
    )


def require_resumable_ranks(trainer: Trainer) -> None:
    """Refuse to resume a DeepSpeed checkpoint of another number of ranks; take one in universal format as what it is.

    Raises:
        ConfigError: says how many ranks wrote it, and how to convert it.
    """
    strategy, checkpoint = trainer.strategy, resumed_from(trainer)
    if not isinstance(strategy, DeepSpeedStrategy) or checkpoint is None:
        return
    resume_shards(checkpoint, trainer.world_size, strategy.config or {})


def require_returned_loss(module: LightningModule) -> None:
    """Refuse modules whose step leaves no loss to add to.

    Raises:
        ConfigError: manual optimization, or a ``training_step`` that returns nothing.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ConfigError(
            f"{name} sets automatic_optimization=False and calls backward itself, so the distillation loss cannot be "
            "added to what its training_step returns. Use automatic optimization, or call the losses of "
            "kd_plugin.divergence in the step."
        )
    if not is_overridden("training_step", module) or _returns_nothing(module.training_step):
        raise ConfigError(
            f"{name}.training_step returns nothing. Return the loss, or a dictionary with the key 'loss': distillation "
            "is added to it."
        )


def loss_of(output: Any, module: LightningModule) -> Any:
    """Return the loss in what a ``training_step`` returned.

    Raises:
        ConfigError: there is none.
    """
    loss = output.get("loss") if hasattr(output, "get") else output
    if loss is None:
        raise ConfigError(
            f"{type(module).__name__}.training_step returned {'nothing' if output is None else 'no loss'}. Return the "
            "loss, or a dictionary with the key 'loss': distillation is added to it."
        )
    return loss


def shards_the_student(trainer: Trainer) -> bool:
    """Whether each rank holds a part of the student, so that all of them run every forward pass together."""
    strategy = trainer.strategy
    zero3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return zero3 or isinstance(strategy, ModelParallelStrategy)


def engine_of(
    module: LightningModule,
    student: Any,
    tokenizer: Any,
    sampling: Sampling,
    *,
    seed: int,
    vocabulary: Vocabulary | None = None,
    repeats: int = 0,
) -> InProcessEngine:
    """Return what lets a module's student generate, on any strategy; arguments as those of ``InProcessEngine``.

    Under ZeRO-3 and FSDP2 each rank generates until all are done, because each token needs the others' shards.
    """
    return InProcessEngine(
        student,
        tokenizer,
        sampling,
        device=module.device,
        seed=seed,
        vocabulary=vocabulary,
        together=module.trainer.world_size > 1 and shards_the_student(module.trainer),
        around=_units_around(module, student),
        repeats=repeats,
    )


def inside_units(module: LightningModule, student: Any) -> Callable[..., Any]:
    """Return what runs a function inside the FSDP2 units of a student and around it, which gather for it."""
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    is_unit = isinstance(base, FSDPModule)
    run: Callable[..., Any] = through(base, base) if is_unit else called
    for unit in _units_around(module, student):
        run = functools.partial(through(unit, unit), run)
    return run


def _units_around(module: LightningModule, model: Any) -> list[nn.Module]:
    """Return the FSDP2 units around the student, the innermost first: `generate` runs past what they gather.

    PEFT's ``generate`` runs the model inside, and so does ours where a module's own wrapper is what FSDP2 sharded.
    """
    if not isinstance(module.trainer.strategy, ModelParallelStrategy):
        return []
    student = model.get_base_model() if hasattr(model, "get_base_model") else model
    units = [part for part in module.modules() if isinstance(part, FSDPModule) and part is not student]
    return [unit for unit in reversed(units) if any(part is student for part in unit.modules())]


def _returns_nothing(step: Any) -> bool:
    """Whether a function's source has no ``return`` with a value; False where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(step))))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0]
    return isinstance(function, ast.FunctionDef) and not any(
        isinstance(node, ast.Return) and node.value is not None for node in _own_nodes(function)
    )


def _own_nodes(function: ast.AST) -> list[ast.AST]:
    """List the nodes of a function without those of functions inside it."""
    nodes = []
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            nodes += [child, *_own_nodes(child)]
    return nodes
