"""What the key ``kd_plugin`` of an Axolotl configuration holds, read before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_plugin.cache.joint import JointCache
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.inputs import MIXTURE, load_mixture, load_rows
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.settings import built, option, part_of, settings

KEY = "kd_plugin"
_OTHER_ROWS = {
    "sample_packing": "packs rows after they were tokenized, without the targets of their tokens",
    "eval_sample_packing": "packs rows after they were tokenized, without the targets of their tokens",
    "pretraining_dataset": "is read as a stream of text; capture it, and train on the cache",
    "batch_flattening": "lays rows out in a way that was never tried with targets",
}


@settings
class AxolotlSettings(EvaluationSettings, LineageSettings):
    """What is distilled in an Axolotl run; without a teacher the run is followed and evaluated, and not distilled."""

    teacher_cache: dict[str, float] | str | None = option(
        default=None, help="Offline KD: directory of a teacher cache, or a mapping from several to their weights."
    )
    teacher_text: str | None = option(
        default=None, help="In its place, directory of a capture of text; the student is trained by cross-entropy."
    )
    offline: dict[str, Any] | None = option(default=None, help="Offline KD: the settings of `kd-plugin offline`.")
    panel: dict[str, Any] | None = option(
        default=None, help="On policy: the settings of `kd-plugin panel`, `teacher_models` among them."
    )
    prompts: list[dict[str, Any]] | str | None = option(
        default=None, help=f"Rows for the panel, with `prompt`: a file, a directory, a hub id, or several {MIXTURE}."
    )
    eval_prompts: list[dict[str, Any]] | str | None = option(default=None, help="Likewise, to evaluate on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_panel and self.is_offline:
            raise ConfigError(f"{KEY}: teacher_cache (or teacher_text) and panel are both set; choose one of them.")
        if self.offline is not None and not self.is_offline:
            raise ConfigError(f"{KEY}: offline is set, and neither teacher_cache nor teacher_text is.")
        if self.is_panel and self.prompts is None:
            raise ConfigError(f"{KEY}: panel needs prompts: Axolotl's `datasets` are tokenized, and a panel's are not.")
        if not self.is_panel and (self.prompts, self.eval_prompts) != (None, None):
            raise ConfigError(f"{KEY}: prompts are for panel, which is not set.")
        self.offline_settings()
        self.panel_settings()

    @property
    def is_offline(self) -> bool:
        """Whether the student is fitted to what was captured."""
        return self.teacher_cache is not None or self.teacher_text is not None

    @property
    def is_panel(self) -> bool:
        """Whether a panel scores what the student generates."""
        return self.panel is not None

    def offline_settings(self) -> OfflineSettings:
        """Return how targets are fitted; raises ConfigError for an unknown name or a value out of range."""
        return built(OfflineSettings, self.offline or {})

    def panel_settings(self) -> PanelSettings:
        """Return what decides an on-policy step; raises ConfigError for an unknown name or a value out of range."""
        return built(PanelSettings, self.panel or {})

    def evaluation(self) -> EvaluationSettings:
        """Return the user's own questions, which the student answers at each evaluation."""
        return part_of(EvaluationSettings, self)

    def rows(self) -> tuple[Any, Any]:
        """Return the rows to train and to evaluate on: a panel's prompts, or the rows of the cache and None."""
        if self.is_panel:
            return _loaded(self.prompts), _loaded(self.eval_prompts)
        assert self.teacher_cache is not None
        allow_partial = self.offline_settings().allow_partial
        return JointCache.open(self.teacher_cache, allow_partial=allow_partial).dataset(), None


def settings_of(cfg: Mapping[str, Any]) -> AxolotlSettings:
    """Read the key ``kd_plugin`` of a configuration, parsed or not.

    Raises:
        ConfigError: an unknown key, values that contradict each other, or a feature of Axolotl that cannot be combined.
    """
    given = cfg.get(KEY) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{KEY}: expected a mapping, got {given!r:.60}.")
    made = built(AxolotlSettings, {str(name): _plain(value) for name, value in given.items() if value is not None})
    if made.eval_tasks is not None:
        evaluating(cfg)
    if made.is_offline or made.is_panel:
        for name, why in _OTHER_ROWS.items():
            if cfg.get(name):
                raise ConfigError(f"{name}: {cfg[name]!r:.40} {why}. Leave it out for {KEY}.")
        if cfg.get("rl"):
            raise ConfigError(f"rl: {cfg['rl']} and {KEY} each have a trainer of their own; leave one of them out.")
    return made


def evaluating(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return when a trainer with tasks evaluates, as its arguments; Axolotl leaves that out where no rows are held out.

    Raises:
        ConfigError: the configuration does not say when.
    """
    steps, strategy, each = (cfg.get(name) for name in ("eval_steps", "eval_strategy", "evals_per_epoch"))
    if not steps and each:
        steps = 1 / (each * (cfg.get("num_epochs") or 1))
    if strategy == "no" or not (steps or strategy):
        raise ConfigError(f"{KEY}: eval_tasks are answered when the trainer evaluates; set eval_steps beside {KEY}.")
    when = {"eval_strategy": "steps", "eval_steps": steps} if steps else {"eval_strategy": strategy}
    best = {"load_best_model_at_end": True} if cfg.get("load_best_model_at_end") else {}
    return {**when, "eval_on_start": True, **best}


def _loaded(named: Any) -> Any:
    if named is None:
        return None
    return load_rows(named) if isinstance(named, str) else load_mixture(named)


def _plain(value: Any) -> Any:
    """Return what YAML holds, without the classes that Axolotl wraps it in."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
