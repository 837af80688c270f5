"""Which tokens the sampled estimator may learn from: those drawn from the student's whole distribution.

The gradient of KL(q ‖ p) is the mean over y ∼ q of (log q(y) − log p(y))·∇log q(y). Tokens drawn from any other b need
the factor q(y)/b(y), and that corrects nothing where it is cut off by ``ratio_bounds`` (a temperature), where b(y) is 0
(nucleus, top-k, suppressed tokens, greedy and beam search) or where b is not known. So every setting of generation is
held against the values that leave q as it is; one that is not known here must be at its default.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from kd_plugin.errors import ConfigError
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.rollouts.vllm.in_process import require_vllm
from kd_plugin.upstream import default_generation_parameters, is_dropout

# What decides when a rollout ends, or how it is computed, and never which token comes next
_FREE = frozenset(
    {
        *("max_length", "max_new_tokens", "max_time", "stop_strings"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "disable_compile", "compile_config"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("early_stopping", "length_penalty"),  # of beams alone
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "renormalize_logits", "transformers_version"),
    }
)
# The values under which a setting of `generate` changes nothing; any other setting must be None or at its default
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "top_k": (0, None),
    "top_p": (1.0, None),
    "min_p": (0.0, None),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "repetition_penalty": (1.0, None),
    "suppress_tokens": ([], None),
    "begin_suppress_tokens": ([], None),
    "bad_words_ids": ([], None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "guidance_scale": (1.0, None),
    "cache_implementation": (None, "dynamic", "dynamic_full", "offloaded", "static", "offloaded_static", "hybrid"),
    "token_healing": (False, None),
    "use_mtp": (False, None),
}
# Likewise of vLLM's SamplingParams, where all that may be set stands here
_VLLM_FREE = frozenset({"max_tokens", "stop", "stop_token_ids", "detokenize", "skip_special_tokens"})
_VLLM_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "logit_bias": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "structured_outputs": (None,),
    "structured_outputs_regex": (None,),
}
# What modules call a noise of training that `generate` may not see, or sees otherwise
_NOISE = ("attention_dropout", "attn_dropout", "dropout", "router_jitter_noise", "jitter_noise")


def sampled_teacher(panel: TeacherPanel) -> str | None:
    """Return the first teacher that is estimated from the sampled token, or None."""
    names = (n for n in panel.names if (panel.own[n].estimator or panel.estimator).name == "sampled")
    return next(names, None)


def require_server_engine(panel: TeacherPanel, args: Any) -> None:
    """Refuse what servers that generate for the student cannot do; nothing is loaded or sent for it.

    Args:
        panel: the teachers, and how they are estimated.
        args: a host's configuration.

    Raises:
        ConfigError: interleaved rollouts, sampled tokens at another temperature than 1, or vLLM in this process
            where there is none.
    """
    engine = args.engine_settings()
    if engine is None:
        return
    if engine.in_process:
        require_vllm()
    if args.rollouts == "interleaved":
        raise ConfigError(
            "rollouts='interleaved' replaces tokens while the student generates, which a rollout_engine on a server "
            "cannot. Leave one of the two out."
        )
    if engine.max_staleness and args.on_policy_schedule().values() != (1.0, 1.0):
        raise ConfigError(
            "max_staleness above 0 with on_policy_fraction below 1: which rows the student generates is drawn at their "
            "own step, and they are generated before it. Set one of the two back."
        )
    name = sampled_teacher(panel)
    if name is not None and args.temperature != 1.0:
        raise ConfigError(
            f"estimator='sampled' (teacher {name!r}) at temperature {args.temperature} with a rollout_engine: a server "
            "tells the log-probabilities of its tokens at temperature 1. Use temperature=1, or another estimator."
        )


def require_sampling(panel: TeacherPanel, args: Any) -> None:
    """Refuse settings of a run under which the sampled estimator would be biased; nothing is loaded for it.

    What the student's checkpoint sets of its own is looked at by :func:`require_whole_distribution`.

    Args:
        panel: the teachers, and how they are estimated.
        args: a host's configuration, with the names of TRL's ``DistillationConfig``.

    Raises:
        ConfigError: tokens would not be drawn from the student's whole distribution, at the teacher's temperature.
    """
    name = sampled_teacher(panel)
    if name is None:
        return
    if args.rollouts == "interleaved":
        raise ConfigError(
            f"rollouts='interleaved' with estimator='sampled' (teacher {name!r}): tokens that the panel put in "
            "were not drawn from the student. Use another estimator, or let the student generate alone."
        )
    if args.on_policy_schedule().values() != (1.0, 1.0):
        raise ConfigError(
            f"on_policy_fraction below 1 with estimator='sampled' (teacher {name!r}): the dataset's tokens were "
            "not drawn from the student. Use another estimator, or let the student generate all rows."
        )
    if args.mask_truncated_completions:
        raise ConfigError(
            f"mask_truncated_completions with estimator='sampled' (teacher {name!r}): whether a token is trained on "
            "would depend on the tokens after it, so that those that are left were not drawn from the student's "
            "distribution. Use another estimator, or a longer max_completion_length in its place."
        )
    if panel.reward is not None:
        raise ConfigError(
            f"A reward with estimator='sampled' (teacher {name!r}): how much a token counts would depend on the tokens "
            "after it, and the estimator's mean would be the gradient of no divergence. Use another estimator."
        )
    if getattr(args, "neftune_noise_alpha", None):
        raise ConfigError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} with estimator='sampled' (teacher {name!r}): tokens are "
            "drawn from another student than the noisy one of the loss. Leave it out, or use another estimator."
        )
    for other, own in panel.own.items():
        sampled = (own.estimator or panel.estimator).name == "sampled"
        if sampled and own.temperature not in (None, args.temperature):
            raise ConfigError(
                f"Teacher {other!r} has temperature={own.temperature} and estimator='sampled', but the student samples "
                f"at temperature={args.temperature}: the estimator needs tokens drawn at the temperature of the "
                f"divergence. Set temperature={own.temperature} for the run, or use another estimator."
            )
    if getattr(args, "use_vllm", False):
        regex = {"structured_outputs_regex": args.vllm_structured_outputs_regex}
        for key, value in {**regex, **draw_settings(args)}.items():
            if key not in _VLLM_FREE:
                _require(key, value, (args.temperature,) if key == "temperature" else _VLLM_NEUTRAL.get(key), name)
        return
    settings, known = {"do_sample": True, **draw_settings(args)}, vars(GenerationConfig())
    for key, value in settings.items():
        if key not in known:
            _require(key, value, None, name)
    require_whole_distribution(panel, GenerationConfig(**settings), args.temperature)


def draw_settings(args: Any) -> dict[str, Any]:
    """Return what a host's configuration says of how a token is drawn."""
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {**{key: getattr(args, key) for key in fields}, **(args.generation_kwargs or {})}


def require_whole_distribution(
    panel: TeacherPanel, config: GenerationConfig, temperature: float, given: Container[str] | None = None
) -> None:
    """Refuse a generation configuration that draws tokens from another distribution than the student's whole one.

    Args:
        panel: the teachers, and how they are estimated.
        config: as ``generate`` will use it; see :func:`completed`.
        temperature: of the divergence.
        given: names that the host or the user set; anything else is said to come from the student's checkpoint. None
            says nothing of where a setting comes from.

    Raises:
        ConfigError: names the setting and its neutral value.
    """
    name = sampled_teacher(panel)
    if name is None:
        return
    defaults = default_generation_parameters()
    known = vars(GenerationConfig())  # a checkpoint's further entries are none of `generate`'s
    for key, value in vars(config).items():
        if key.startswith("_") or key in _FREE or key not in known:
            continue
        allowed = _NEUTRAL.get(key, (defaults.get(key), None))
        origin = "" if given is None or key in given else " It stands in the student's own generation configuration."
        _require(key, value, (temperature,) if key == "temperature" else allowed, name, origin)


def completed(config: GenerationConfig, checkpoint: GenerationConfig | None) -> GenerationConfig:
    """Return ``config`` as ``generate`` (transformers 5.23) completes it: from the checkpoint's, then by defaults."""
    whole = copy.deepcopy(config)
    if checkpoint is not None:
        whole.update(**checkpoint.to_dict(), defaults_only=True, allow_custom_entries=True)
    whole.update(**default_generation_parameters(), defaults_only=True)
    return whole


def own_generation_config(model: PreTrainedModel | str, revision: str | None = None) -> GenerationConfig | None:
    """Return the generation configuration that a model brings, without loading its weights; None for none."""
    if not isinstance(model, str):
        return model.generation_config  # type: ignore[no-any-return]
    try:
        return GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:
        return None  # a checkpoint need not have one


def require_same_student(panel: TeacherPanel, student: nn.Module) -> None:
    """Refuse a student with dropout, or another noise of its own, for the sampled estimator.

    The tokens are drawn under other noise than that of the loss, so from another student.

    Raises:
        ConfigError: names the module.
    """
    name = sampled_teacher(panel)
    if name is None:
        return
    for place, module in student.named_modules():
        found = {"p": module.p} if is_dropout(module) else {k: getattr(module, k, None) for k in _NOISE}
        for key, value in found.items():
            if isinstance(value, float) and value > 0.0:
                raise ConfigError(
                    f"The student's {place} has {'dropout' if key == 'p' else key}={value}, with estimator='sampled' "
                    f"(teacher {name!r}): tokens are drawn from another student than the loss sees. Set it to 0, in "
                    "the model's configuration or the adapter's, or with TRL's disable_dropout; or use another "
                    "estimator."
                )


def _require(key: str, value: Any, allowed: tuple[Any, ...] | None, teacher: str, origin: str = "") -> None:
    if allowed is None:
        raise ConfigError(
            f"{key}={value!r} with estimator='sampled' (teacher {teacher!r}): it is not known to leave the student's "
            "distribution as it is, and that estimator is unbiased for tokens drawn from all of it only. Leave it out, "
            "or use another estimator."
        )
    if value in allowed:
        return
    neutral = next((one for one in allowed if one is not None), None)
    raise ConfigError(
        f"{key}={value!r} with estimator='sampled' (teacher {teacher!r}): that estimator is unbiased for tokens drawn "
        f"from the student's whole distribution only.{origin} Set {key}={neutral!r}"
        + (" in generation_kwargs" if origin and neutral is not None else " there" if origin else "")
        + ", or use another estimator."
    )
