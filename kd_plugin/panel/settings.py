"""Settings of the teacher panel: who is on it, which responses it scores, and what watches over the run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.spec import Divergence, DivergenceSettings, choices
from kd_plugin.errors import ConfigError, nearest
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.weights import Schedule, as_schedule
from kd_plugin.rollouts.decoding import Draws
from kd_plugin.rollouts.vllm.settings import EngineSettings, engine_settings
from kd_plugin.settings import option, require_known, settings

AlarmAction = Literal["warn", "lower_learning_rate", "stop"]


@settings
class TeacherSettings(DivergenceSettings):
    """The panel; who is on it, and how its teachers are combined."""

    teacher_models: dict[str, Any] | str | None = option(
        default=None, help="Name to path or hub id of each teacher. Used where the trainer is given none."
    )
    combine: str = option(
        default="route",
        help="How teachers are combined: " + ", ".join(f"{name!r} {mode.help}" for name, mode in MODES.items()) + ".",
    )
    teacher_weights: dict[str, Any] | str | None = option(
        default=None,
        help="Name to weight, for all but 'route'; scaled to sum to one. Equal where left out. A weight is a "
        "number, or a schedule: {start: 0.0, end: 1.0, steps: 200, begin: 0, shape: linear}.",
    )
    domain_weights: dict[str, Any] | str | None = option(
        default=None, help="Domain to such a mapping, for rows with that `domain`, in the place of `teacher_weights`."
    )
    confidence_temperature: float = option(
        default=1.0,
        help="Nats, for 'confidence': a small one leaves the surest teacher alone at each token, a large one "
        "leaves `teacher_weights`.",
    )
    routes: dict[str, Any] | str | None = option(
        default=None, help="Domain to teacher, for rows that have a `domain` and no `teacher_id`."
    )
    text: dict[str, Any] | str | None = option(
        default=None,
        help="How text teachers evaluate and correct: a mapping with evaluate, threshold, correct, accept, verifier, "
        "answer_column, earlier_weight, keep_weight, preference, preference_beta, templates, min_teachers, ceiling, "
        "recorded.",
    )
    reward: dict[str, Any] | str | None = option(
        default=None,
        help="A verifier that weighs the divergence by whether a response is right: {verifier: math_verify, weight: 1} "
        "masks wrong responses, {right: X, wrong: Y} as weight says both factors.",
    )
    panel: dict[str, Any] | str | None = option(
        default=None,
        help="The whole panel in one block, or a path to YAML with it: `teachers` (each with its `kind`), "
        "`combine`, `divergence`, weights, `routes`, `estimator`. In the place of the fields above.",
    )
    estimator: str = option(
        default="exact",
        help="How divergences are estimated: 'exact' (teachers in this process), 'sampled' (policy gradient on "
        "the sampled token; reverse_kl only), 'topk_tail' (listed tokens and the rest as one), 'chunk_likelihood' "
        "(what stands there against anything else) or 'byte_marginals' (the next byte; teachers in this process with "
        "another tokenizer).",
    )
    top_k_tail: int = option(default=64, help="Tokens that 'topk_tail' lists of a teacher in this process.")
    student_top_k: int | None = option(
        default=None,
        help="Tokens of the student that 'topk_tail' lists beside, where the teacher is in this process. Left "
        "out, as many as of the teacher. 0 makes it equal to a server's list of `top_k_tail` tokens.",
    )
    ratio_bounds: list[float] = option(
        help="For 'sampled': between which the ratio of the student's probability of a token now to that when "
        "it was sampled is kept.",
        factory=lambda: [0.5, 2.0],
    )
    panel_values: str = option(
        default="always",
        help="'always' computes every teacher's divergence at each step. 'logging' does so at logging steps "
        "only; between them teachers that share a head are projected together (reverse_kl), with the same "
        "gradient. The logged loss is then that of the logging step.",
    )
    allow_other_eos: bool = option(
        default=False,
        help="Take teachers that end their responses with another token than the student, which are refused: "
        "the student would unlearn to stop.",
    )
    allow_changed_panel: bool = option(
        default=False,
        help="Resume although the panel is not the one of the checkpoint; what changed then stands in the "
        "lineage. Without it such a resume is refused.",
    )
    divergence: str | None = option(
        default=None,
        help=f"{choices(beta='beta')}. Left out, `beta` decides as in TRL: 0 forward KL, 1 reverse KL, else JSD.",
    )
    beta: float = option(
        default=1.0, help="As in TRL: weight of the teacher in jsd; 0 is the forward KL, 1 the reverse KL."
    )
    shard_teachers: bool = option(
        default=False,
        help="Under DeepSpeed: shard local teachers over all ranks by ZeRO-3 also where the student trains under "
        "ZeRO-1 or 2. Under ZeRO-3 they are sharded in any case.",
    )

    def check_panel(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            ConfigError: an unknown name, or a value out of range.
        """
        require_known("combine", self.combine, tuple(MODES))
        require_known("panel_values", self.panel_values, ("always", "logging"))
        if len(self.ratio_bounds) != 2:
            raise ConfigError(f"ratio_bounds are {self.ratio_bounds}; expected two numbers, low and high.")
        Estimator(self.estimator, self.top_k_tail, self.student_top_k, tuple(self.ratio_bounds))  # type: ignore[arg-type]
        self.resolved_divergence()

    def resolved_divergence(self) -> Divergence:
        """Return the divergence that ``divergence``, ``beta`` and ``skew_alpha`` name.

        Raises:
            ConfigError: an unknown name, or ``jsd`` with a ``beta`` at either end.
        """
        if self.divergence is None:
            return Divergence.from_beta(self.beta)
        return self.chosen_divergence(self.divergence, beta=self.beta)


@settings
class RolloutSettings:
    """Whose completions the panel scores; who generates them, and from when on."""

    rollouts: str = option(
        default="student",
        help="'student' lets it generate alone, as in TRL. 'interleaved' (speculative KD) has the panel replace "
        "each token that it does not rank among its first `interleaved_top_k`.",
    )
    rollout_engine: dict[str, Any] | str | None = option(
        default=None,
        help="Servers that generate for the student, as a block or a path to YAML with it: {kind: vllm, url: ..., "
        "sync: adapter or reload, max_staleness: 0}. Left out, it generates in this process.",
    )
    rollout_draws: str = option(
        default="multinomial",
        help="'multinomial' draws the tokens that TRL draws with the same seed. 'uniform' draws from the same "
        "distribution with one random number per row instead of one per token of the vocabulary, which is faster on "
        "CPUs.",
    )
    interleaved_top_k: int = option(
        default=25, help="Rank up to which the panel lets a student's token stand, for 'interleaved'."
    )
    interleaved_block: int = option(
        default=16, help="Tokens that the student proposes before the panel is asked, for 'interleaved'."
    )
    on_policy_fraction: dict[str, Any] | str | float | None = option(  # TRL's parser takes the second type
        default=None,
        help="Share of rows whose completion the student generates; the dataset's `completion` fills the others. "
        "A number, or a schedule over optimizer steps such as {start: 0, end: 1, steps: 200}. Left out, all rows.",
    )
    warmup_cache: str | None = option(
        default=None,
        help="Teacher cache, or several with commas between, that the first `warmup_cache_steps` fit offline.",
    )
    warmup_cache_steps: int = option(default=0, help="Optimizer steps on `warmup_cache` before the student generates.")
    warmup_divergence: str = option(
        default="forward_kl", help="Divergence of the steps on `warmup_cache`, at the captured temperature."
    )
    allow_misaligned: bool = option(
        default=False,
        help="Warm up on a `warmup_cache` whose targets seem to belong to the token beside, with a warning.",
    )

    def check_rollouts(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            ConfigError: a value is out of range, or contradicts another.
        """
        require_known("rollouts", self.rollouts, ("student", "interleaved"))
        require_known("rollout_draws", self.rollout_draws, get_args(Draws))
        self.engine_settings()
        if self.interleaved_top_k < 1 or self.interleaved_block < 1:
            raise ConfigError(
                f"interleaved_top_k is {self.interleaved_top_k} and interleaved_block {self.interleaved_block}; "
                "expected numbers of at least 1."
            )
        lowest, highest = self.on_policy_schedule().values()
        if not 0.0 <= lowest <= highest <= 1.0:
            raise ConfigError(f"on_policy_fraction goes from {lowest} to {highest}; expected shares between 0 and 1.")
        if self.warmup_cache_steps < 0:
            raise ConfigError(f"warmup_cache_steps is {self.warmup_cache_steps}; expected a number of at least 0.")
        if self.warmup_cache_steps and not self.warmup_cache:
            raise ConfigError("warmup_cache_steps is set, but no warmup_cache; name the cache to warm up on.")
        if self.warmup_cache and not self.warmup_cache_steps:
            raise ConfigError("warmup_cache is set, but warmup_cache_steps is 0; say how many steps to fit it.")

    def engine_settings(self) -> EngineSettings | None:
        """Return what ``rollout_engine`` describes; None where the student generates in this process.

        Raises:
            ConfigError: an unknown key, or a value that cannot be meant.
        """
        return engine_settings(self.rollout_engine)

    def on_policy_schedule(self) -> Schedule:
        """Return ``on_policy_fraction`` as a schedule."""
        value: Any = 1.0 if self.on_policy_fraction is None else self.on_policy_fraction
        if isinstance(value, str):
            with suppress(ValueError):  # the schedule's own error names what was seen
                value = float(value)
        return as_schedule(value, "on_policy_fraction")

    def warmup_caches(self) -> list[str]:
        """Return the directories that ``warmup_cache`` names."""
        return [path.strip() for path in (self.warmup_cache or "").split(",") if path.strip()]


@dataclass(frozen=True)
class AlarmSettings:
    """When a run is thought to go wrong, and what is done then.

    Attributes:
        length: factor over the first window's mean response length, above or below which it rings; 0 is off.
        truncated: share of responses truncated by the limit; 0 is off.
        repetition: share of repeated 4-grams; 0 is off.
        window: generation batches that are averaged; the first window is the baseline.
        action: ``warn``, ``lower_learning_rate`` by ``factor``, or ``stop`` after a save.
        factor: what the learning rate is multiplied by.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    length: float = 0.0
    truncated: float = 0.0
    repetition: float = 0.0
    window: int = 8
    action: AlarmAction = "warn"
    factor: float = 0.5

    def __post_init__(self) -> None:
        if self.length and self.length <= 1.0:
            raise ConfigError(f"length_alarm is {self.length}; expected a factor above 1, such as 2, or 0 for none.")
        for name in ("truncated", "repetition"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}_alarm is {getattr(self, name)}; expected a share between 0 and 1.")
        if self.window < 1:
            raise ConfigError(f"alarm_window is {self.window}; expected at least one generation batch.")
        if self.action not in get_args(AlarmAction):
            raise ConfigError(
                f"Unknown alarm_action {self.action!r}; expected one of {', '.join(get_args(AlarmAction))}."
                + nearest(self.action, list(get_args(AlarmAction)))
            )
        if not 0.0 < self.factor < 1.0:
            raise ConfigError(f"alarm_factor is {self.factor}; expected a number between 0 and 1.")

    @property
    def is_set(self) -> bool:
        """Whether anything can ring it."""
        return bool(self.length or self.truncated or self.repetition)


@settings
class WatchSettings:
    """Metrics, saved rollouts and guards; what watches over a run and acts when it goes wrong."""

    watch_positions: int = option(
        default=64,
        help="Scored positions of a micro-batch whose full distributions are compared at logging steps: each "
        "teacher's entropy, agreement and support, and where teachers disagree. 0 leaves these metrics out.",
    )
    save_rollouts: int = option(
        default=0,
        help="Rows of each logging step and rank that are kept under output_dir/rollouts, for `kd-plugin trace`.",
    )
    save_rollouts_top_k: int = option(
        default=5, help="Likeliest tokens of each teacher that are kept with a saved rollout."
    )
    mask_truncated_completions: bool = option(
        default=False, help="Leave truncated completions out of the loss, as in GRPOConfig."
    )
    repetition_stop: int = option(
        default=0,
        help="End a rollout when it repeats the same sequence (of up to 32 tokens) this many times in a row; what "
        "follows is neither scored nor trained on. 0 is off.",
    )
    anchor_weight: float = option(
        default=0.0,
        help="Weight of KL(student || its start), in nats per token, beside the panel's divergence. The start "
        "of a LoRA student is its base without the adapter; another student is copied. 0 is off.",
    )
    length_alarm: float = option(
        default=0.0, help="Ring when the mean response length leaves its start by this factor, up or down. 0 is off."
    )
    truncation_alarm: float = option(
        default=0.0, help="Ring when this share of responses is truncated by the limit. 0 is off."
    )
    repetition_alarm: float = option(
        default=0.0, help="Ring when this share of 4-grams in responses is repeated. 0 is off."
    )
    alarm_window: int = option(default=8, help="Generation batches that alarms average; the first window is the start.")
    alarm_action: str = option(
        default="warn",
        help="What an alarm does: 'warn', 'lower_learning_rate' (by `alarm_factor`), or 'stop' after a save.",
    )
    alarm_factor: float = option(
        default=0.5, help="What the learning rate is multiplied by, for 'lower_learning_rate'."
    )

    def check_watch(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            ConfigError: names the field, the value and what was expected.
        """
        for name in ("watch_positions", "save_rollouts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number of at least 0.")
        if self.save_rollouts_top_k < 1:
            raise ConfigError(f"save_rollouts_top_k is {self.save_rollouts_top_k}; expected a number of at least 1.")
        if self.repetition_stop < 0 or self.repetition_stop == 1:
            raise ConfigError(
                f"repetition_stop is {self.repetition_stop}; expected how often a sequence may come in a row, from 2, "
                "or 0 for no limit."
            )
        if not 0.0 <= self.anchor_weight < float("inf"):
            raise ConfigError(f"anchor_weight is {self.anchor_weight}; expected a number of at least 0.")
        self.alarm_settings()

    def alarm_settings(self) -> AlarmSettings:
        """Return the alarm that the fields describe."""
        return AlarmSettings(
            length=self.length_alarm,
            truncated=self.truncation_alarm,
            repetition=self.repetition_alarm,
            window=self.alarm_window,
            action=self.alarm_action,  # type: ignore[arg-type]
            factor=self.alarm_factor,
        )


@settings
class PanelSettings(WatchSettings, RolloutSettings, TeacherSettings):
    """All that decides what an on-policy step does, under the names of ``TeacherPanelConfig``.

    Raises:
        ConfigError: an unknown name, a value out of range, or two that contradict each other.
    """

    teacher_model_name_or_path: str | None = option(default=None, help="The only teacher, as in TRL.")
    teacher_model_revision: str | None = option(default=None, help="Its branch, tag or commit.")
    teacher_model_init_kwargs: dict[str, Any] | None = option(
        default=None, help="Arguments of `from_pretrained` for teachers."
    )
    trust_remote_code: bool = option(default=False, help="Run Python code that a teacher's repository ships.")
    max_completion_length: int = option(default=512, help="Tokens of a response at most.")
    temperature: float = option(default=1.0, help="Of generation and of the divergence.")
    top_p: float = option(default=1.0, help="Sample from the likeliest tokens that reach this mass.")
    top_k: int = option(default=0, help="Sample from so many of the likeliest tokens; 0 for no limit.")
    min_p: float | None = option(default=None, help="Smallest share of the likeliest token's probability.")
    repetition_penalty: float = option(default=1.0, help="1 for none.")
    cache_implementation: str | None = option(default=None, help="Of `generate`'s key-value cache.")
    generation_kwargs: dict[str, Any] | None = option(default=None, help="Further arguments of `generate`.")
    chat_template_kwargs: dict[str, Any] | None = option(
        default=None, help="Further arguments of `apply_chat_template`."
    )

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; expected a positive number.")
        # TRL's configuration may hold None, for no limit of its own
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length}; expected at least 1.")
        self.check_panel()
        self.check_rollouts()
        self.check_watch()
