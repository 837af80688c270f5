"""The on-policy step, whatever the host: assign rows, let the student generate, score, compute the loss, log.

A host calls, for each generation batch::

    assigned = step.assign(rows, rows_at_once)
    responses = step.respond(assigned, prompts, engine)
    scored = step.score(assigned, rollouts)

or ``step.roll_out(rows, rows_at_once, engine)`` for all three, and in the student's forward pass over each micro-batch
of it ``step.loss(hidden, head, micro_batch)``. While ``step.is_warming_up``, ``step.warm_up(...)`` gives micro-batches
of cached rows instead.

Shape suffixes: B rows, L columns, N scored positions, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kd_plugin.cache.reader import TeacherCache
from kd_plugin.divergence.spec import Divergence
from kd_plugin.panel.anchor import Anchor
from kd_plugin.panel.batches import Assigned, Host, MicroBatch, RunningMean, ScoredRollouts, StepLoss, Watch
from kd_plugin.panel.loss import panel_loss
from kd_plugin.panel.responding import Responder
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import RowScores, score_rows
from kd_plugin.panel.text.corrections import Corrections, Corrector
from kd_plugin.panel.text.economics import Economics
from kd_plugin.panel.text.preference import preference_loss
from kd_plugin.panel.text.reward import weighed_rows
from kd_plugin.panel.viewing import coverage, readers_of
from kd_plugin.panel.warmup import CacheWarmup, WarmupBatch, warmup_loss, warmup_objective
from kd_plugin.rollouts import Drawn, RolloutEngine
from kd_plugin.rollouts.rows import Response, Rollouts, scored_offsets
from kd_plugin.sharding import gathered_heads
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.base import follow
from kd_plugin.text.rounds import RoundWriter
from kd_plugin.vocab import Vocabulary


class PanelStep:
    """One on-policy step of a student with a panel of teachers.

    Args:
        host: the trainer.
        panel: the teachers.
        settings: of the rollouts and of what watches over them, under the names of ``TeacherPanelConfig``.
        divergence: for teachers without one of their own.
        temperature: of generation and of the divergence.
        vocabulary: of the run.
        tokenizer: the student's.
        end_tokens: ids that end a response.
        pad_token_id: fills up short rows.
        seed: of the run.
        monitor: looks on.
        warmup_caches: teacher caches that the first steps fit offline.
        anchor: the student's start, whose weighted divergence is added and with which preferences are compared; or
            None.
        chat_options: further arguments of ``apply_chat_template``.
        rounds: keeps what text teachers say; None where nobody says anything new.
    """

    def __init__(
        self,
        host: Host,
        panel: TeacherPanel,
        settings: Any,
        *,
        divergence: Divergence,
        temperature: float,
        vocabulary: Vocabulary,
        tokenizer: Any,
        end_tokens: Sequence[int],
        pad_token_id: int,
        seed: int,
        monitor: Watch,
        warmup_caches: Sequence[TeacherCache] = (),
        anchor: Anchor | None = None,
        chat_options: Mapping[str, Any] | None = None,
        rounds: RoundWriter | None = None,
    ) -> None:
        self.host = host
        self.panel = panel
        self.settings = settings
        self.divergence = divergence
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.monitor = monitor
        self.anchor = anchor
        self.responder = Responder(
            host,
            panel,
            settings,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            end_tokens=end_tokens,
            pad_token_id=pad_token_id,
            seed=seed,
            chat_options=chat_options,
        )
        self._readers = readers_of(
            panel, tokenizer, vocabulary, pad_token_id=pad_token_id, ends=end_tokens, chat_options=chat_options
        )
        self.warmup: CacheWarmup | None = None
        if warmup_caches:
            cut = [cache.for_vocabulary(vocabulary) for cache in warmup_caches]
            self.warmup = CacheWarmup(cut, seed=seed, pad_token_id=pad_token_id)
            self._warmup_objective = warmup_objective(warmup_caches, settings.warmup_divergence)
        self._margin = RunningMean()
        self._followed: int | None = None
        self.collecting = False  # responses are corrected and kept, and nothing is scored
        self.economics = Economics(panel)
        self.corrector: Corrector | None = None
        if panel.text_teachers:
            self.corrector = Corrector(
                panel,
                host,
                self.economics,
                tokenizer,
                end_tokens,
                pad_token_id,
                vocabulary=vocabulary,
                max_length=settings.max_completion_length,
                rounds=rounds,
            )

    # Warm-up from caches

    @property
    def is_warming_up(self) -> bool:
        """Whether the present optimizer step fits the caches of the warm-up."""
        return self.warmup is not None and self.host.training and self.host.step < self.settings.warmup_cache_steps

    def warm_up(self, micro_step: int, rows: int, *, micro_steps: int, run: int | None = None) -> WarmupBatch:
        """Return this rank's micro-batch of cached rows; see :meth:`~kd_plugin.panel.warmup.CacheWarmup.batch`."""
        assert self.warmup is not None
        host = self.host
        batch = self.warmup.batch(
            host.step, micro_step, rows, micro_steps=micro_steps, run=run, rank=host.rank, ranks=host.ranks
        )
        return batch.to(host.device)

    # Rollouts

    def assign(self, rows: Sequence[Mapping[str, Any]], rows_at_once: int, *, draw: int = 0) -> Assigned:
        """Say who scores each row, and which rows the student generates; see ``responder.assign``."""
        return self.responder.assign(rows, rows_at_once, draw=draw)

    def respond(self, assigned: Assigned, prompts: Sequence[Sequence[int]], engine: RolloutEngine) -> list[Drawn]:
        """Return the response to each prompt; see ``responder.respond``."""
        return self.responder.respond(assigned, prompts, engine)

    def accompany(self, engine: RolloutEngine) -> bool:
        """Take part in a generation of other ranks without a row of its own; see ``responder.accompany``."""
        return self.responder.accompany(engine)

    def roll_out(
        self,
        rows: Sequence[Mapping[str, Any]],
        rows_at_once: int,
        engine: RolloutEngine,
        *,
        draw: int = 0,
        counted: int | None = None,
    ) -> ScoredRollouts:
        """Have responses to a generation batch generated and scored, for a host that renders no prompts of its own.

        Args:
            rows: see :meth:`~kd_plugin.panel.responding.Responder.assign`, like what follows.
            rows_at_once: see there.
            engine: lets the student generate.
            draw: see there.
            counted: see :meth:`score`.
        """
        prompts = self.responder.prompts(rows)
        assigned = self.assign(rows, rows_at_once, draw=draw)
        rollouts, behaviour = self.responder.assembled(prompts, self.respond(assigned, prompts, engine))
        return self.score(assigned, rollouts, counted=counted, behaviour_logprobs=behaviour)

    def follow(self) -> None:
        """Tell teachers of an optimizer step that was made; a host calls it before the first and after each."""
        if self._followed is not None and self.host.step > self._followed:
            for teacher in self.panel.teachers.values():
                follow(teacher)
        self._followed = self.host.step

    # Scores and loss

    def score(
        self,
        assigned: Assigned,
        rollouts: Rollouts,
        *,
        used: Sequence[Sequence[int]] | None = None,
        counted: int | None = None,
        behaviour_logprobs: Tensor | None = None,
    ) -> ScoredRollouts:
        """Have the panel, and the student's start where it is anchored, score a generation batch.

        Args:
            assigned: see :meth:`assign`.
            rollouts: its prompts and responses.
            used: B rows of flags, 1 for response tokens that count; left out, all do.
            counted: rows from the first on that count; left out, all do. Rows beyond only fill up an evaluation.
            behaviour_logprobs: (B, C) nats of the response tokens where they were drawn, if by another engine.
        """
        if self.host.training or self.host.is_logged:
            self.monitor.observe(rollouts.responses)
        offsets = self._trained_on(rollouts.responses, used, counted)
        scores, anchor = self._scores(assigned, rollouts, [[] for _ in offsets] if self.collecting else offsets)
        if self.host.training:
            self.economics.add(rollouts.responses, scores)
        corrections = self._corrections(assigned, rollouts, [bool(at) for at in offsets])
        return ScoredRollouts(rollouts, scores, anchor, behaviour_logprobs, corrections)

    def _trained_on(
        self, responses: Sequence[Response], used: Sequence[Sequence[int]] | None, counted: int | None
    ) -> list[list[int]]:
        """Return for each row the response tokens that may be trained on, as offsets; see :meth:`score`."""
        flags = [[1] * len(one.tokens) for one in responses] if used is None else used
        offsets = scored_offsets(flags, responses, mask_truncated=self.settings.mask_truncated_completions)
        return offsets if counted is None else [at if row < counted else [] for row, at in enumerate(offsets)]

    def _scores(
        self, assigned: Assigned, rollouts: Rollouts, offsets: list[list[int]]
    ) -> tuple[tuple[RowScores, ...], tuple[RowScores, ...]]:
        """Return what the teachers say at these offsets, weighed by each row's reward, and what the start says."""
        offsets, weights = weighed_rows(self.panel, self.host, self.tokenizer, assigned, rollouts.responses, offsets)
        given = rollouts.input_ids, rollouts.attention_mask, rollouts.completion_start, offsets, assigned.rows_at_once
        scores = score_rows(
            self.panel,
            assigned.assignments,
            *given,
            clock=self.monitor.clock,
            vocabulary=self.vocabulary,
            rows=assigned.rows,
            readers=self._readers,
        )
        self.host.note(coverage(scores, [name for name, reader in self._readers.items() if reader.own_tokens]))
        anchor = self.anchor.score(*given) if self.anchor is not None and self.anchor.weight else ()
        return tuple(replace(one, weight=w) for one, w in zip(scores, weights, strict=True)), tuple(anchor)

    def _corrections(self, assigned: Assigned, rollouts: Rollouts, wanted: list[bool]) -> Corrections | None:
        """Return the rows that text teachers add to those that are ``wanted``, with what the start says of them."""
        if self.corrector is None or not self.host.training:
            return None
        found = self.corrector.correct(assigned.assignments, assigned.rows, rollouts, wanted)
        return found if found is None or self.anchor is None else found.anchored(self.anchor, assigned.rows_at_once)

    def loss(self, hidden: Tensor, head: OutputHead, batch: MicroBatch | WarmupBatch) -> StepLoss:
        """Return the loss of a micro-batch; call it in the student's forward pass, on all ranks together.

        All output heads are gathered first, the student's and those of sharded teachers, in one order on every rank:
        what follows depends on the rows that this rank holds, and gathers nothing.

        Args:
            hidden: (B, L, H) last hidden states of the student, of at least those columns that predict a token.
            head: its output head, cut to the vocabulary; may be sharded.
            batch: what the student's forward pass was over.
        """
        sharded = {} if isinstance(batch, WarmupBatch) else self.panel.sharded_heads()
        with gathered_heads([head, *sharded.values()]) as (student, *teachers):
            hidden = hidden.to(student.weight.device)
            if isinstance(batch, WarmupBatch):
                loss_sum, entropy, count = warmup_loss(self._warmup_objective, hidden, student, batch.targets)
                return StepLoss(loss_sum, loss_sum.detach(), entropy, count)
            return self._loss(hidden, student, batch.with_heads(dict(zip(sharded, teachers, strict=True))))

    def _loss(self, hidden: Tensor, head: OutputHead, batch: MicroBatch) -> StepLoss:
        positions = batch.predicted_at(hidden.shape[1]).to(hidden.device)
        scored = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        tokens = batch.scored_tokens().to(hidden.device)
        behaviour = batch.behaviour_logprobs
        found = panel_loss(
            self.panel,
            batch.scores,
            scored,
            head,
            tokens,
            divergence=self.divergence,
            temperature=self.temperature,
            step=self.host.step,
            values=self.monitor.values_are_read,
            behaviour_logprobs=None if behaviour is None else behaviour.to(hidden.device),
        )
        self.monitor.see(batch, scored, head, tokens, found)
        total, divergence = found.loss_sum, found.loss_sum.detach()
        compared = preference_loss(self.panel, batch, scored, head, tokens, step=self.host.step)
        if compared is not None:
            total, divergence = total + compared.loss_sum, divergence + compared.loss_sum.detach()
            self._margin.add(compared.margins.sum(), len(compared.margins))
        if self.anchor is not None and self.anchor.weight > 0.0:
            total = total + self.anchor.loss(batch.anchor, scored, head, tokens, training=self.host.training)
        return StepLoss(total, divergence, found.entropy.sum(), len(tokens))

    def finish(self) -> None:
        """Say that training is done: what text teachers said is then a dataset; a collective call."""
        if self.corrector is not None:
            self.corrector.finish()

    def read(self) -> dict[str, float]:
        """Return what was seen since the last log, but for each teacher's divergence; a collective call."""
        found = self.monitor.read()
        if self.host.training:
            found |= self.economics.read(self.host.sum_over_ranks, self.host.device)
        if self.anchor is not None and self.anchor.weight > 0.0:
            found["divergence/start"] = self.anchor.read(
                self.host.sum_over_ranks, self.host.device, training=self.host.training
            )
        if self.panel.text.preference is not None and self.host.training:
            margin = self._margin.read(self.host.sum_over_ranks, self.host.device)
            found |= {} if margin is None else {"text/margin": margin}
        return found
