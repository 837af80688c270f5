"""Who responds to a generation batch: the student alone, the student with the panel's tokens, or the dataset.

Shape suffixes: B rows, C response columns, V tokens of the run's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_plugin.divergence.projection import exact_logits
from kd_plugin.panel.batches import Assigned, Host
from kd_plugin.panel.roster import Assignment, TeacherPanel
from kd_plugin.panel.scoring import Signal, score_rows
from kd_plugin.panel.text.corrections import recorded_responses
from kd_plugin.rollouts import Drawn, RolloutEngine
from kd_plugin.rollouts.in_process import interleave
from kd_plugin.rollouts.rows import (
    Rollouts,
    assembled,
    behaviour_logprobs,
    completion_ids,
    cut_loops,
    left_padded,
    mixed_seed,
    on_policy_rows,
    render,
    require_prompts,
    seeded,
    until_end,
)
from kd_plugin.sharding import gathered_heads, most_of_any_rank
from kd_plugin.signals import HiddenSignal, shared_mask
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.vocab import Vocabulary

_INTERLEAVED = 1 << 20  # added to a rank: keeps its generator apart from that of the on-policy rows


class Responder:
    """Has a generation batch responded to: by the student, by the student and the panel in turns, or by the dataset.

    Args:
        host: the trainer.
        panel: the teachers.
        settings: of the rollouts, under the names of ``TeacherPanelConfig``.
        vocabulary: of the run; V tokens.
        tokenizer: the student's.
        end_tokens: ids that end a response.
        pad_token_id: fills up short rows.
        seed: of the run.
        chat_options: further arguments of ``apply_chat_template``.
    """

    def __init__(
        self,
        host: Host,
        panel: TeacherPanel,
        settings: Any,
        *,
        vocabulary: Vocabulary,
        tokenizer: Any,
        end_tokens: Sequence[int],
        pad_token_id: int,
        seed: int,
        chat_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.host, self.panel, self.settings, self.vocabulary = host, panel, settings, vocabulary
        self.tokenizer, self.end_tokens, self.pad_token_id = tokenizer, tuple(end_tokens), pad_token_id
        self.seed, self.chat_options = seed, chat_options
        self._fraction = settings.on_policy_schedule()

    def assign(self, rows: Sequence[Mapping[str, Any]], rows_at_once: int, *, draw: int = 0) -> Assigned:
        """Say which teachers score each row of a generation batch, and which rows the student generates.

        Args:
            rows: with ``prompt``, what names teachers, and ``completion`` where the dataset fills rows.
            rows_at_once: rows in a teacher's forward pass.
            draw: which generation batch of its optimizer step this is.

        Raises:
            DataError: a row names no teacher of the panel, or has no completion where one is needed.
        """
        assignments = tuple(self.panel.assign(row) for row in rows)
        if self.panel.text.recorded and self.host.training:
            return Assigned(assignments, tuple(recorded_responses(rows)), rows_at_once, tuple(rows))
        host, fraction = self.host, self._fraction.at(self.host.step)
        if not host.training or fraction >= 1.0:
            return Assigned(assignments, (None,) * len(rows), rows_at_once, tuple(rows))
        rank = mixed_seed(0, 0, host.rank, draw)
        own = on_policy_rows(len(rows), fraction, seed=self.seed, step=host.step, rank=rank)
        given = [None if generates else self._completion(row) for generates, row in zip(own, rows, strict=True)]
        return Assigned(assignments, tuple(given), rows_at_once, tuple(rows))

    def _completion(self, row: Mapping[str, Any]) -> list[int]:
        return completion_ids(
            self.tokenizer,
            row,
            end_tokens=self.end_tokens,
            max_length=self.settings.max_completion_length,
            chat_options=self.chat_options,
        )

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the rows' prompts as the student reads them, token ids."""
        return render(self.tokenizer, [row["prompt"] for row in rows], self.chat_options)

    def respond(self, assigned: Assigned, prompts: Sequence[Sequence[int]], engine: RolloutEngine) -> list[Drawn]:
        """Return the response to each prompt: the student's own, interleaved with the panel's, or the dataset's.

        Args:
            assigned: see :meth:`assign`. Where it has another number of rows, as where a tool's result lets some go
                on, the student generates all.
            prompts: token ids.
            engine: lets the student generate.

        Raises:
            DataError: a prompt without a token, or with one that a head of the run has no row for.
        """
        require_prompts(prompts)
        self.vocabulary.require_rows(prompts, "The prompt of row")
        given = assigned.given if len(assigned.given) == len(prompts) else (None,) * len(prompts)
        rows = [row for row, ids in enumerate(given) if ids is None]
        own = dict(zip(rows, self._generate(assigned, rows, prompts, engine) or [], strict=True))
        return [own[row] if ids is None else Drawn(ids) for row, ids in enumerate(given)]

    def assembled(self, prompts: Sequence[Sequence[int]], drawn: Sequence[Drawn]) -> tuple[Rollouts, Tensor | None]:
        """Return B prompts with their responses, and (B, C) nats of their tokens where another engine drew them."""
        rollouts = assembled(
            prompts,
            [one.ids for one in drawn],
            end_tokens=self.end_tokens,
            pad_token_id=self.pad_token_id,
            device=self.host.device,
        )
        width = rollouts.input_ids.shape[1] - rollouts.completion_start
        return rollouts, behaviour_logprobs(drawn, width, self.host.device)

    def accompany(self, engine: RolloutEngine) -> bool:
        """Take part in a generation of other ranks without a row of its own; False where none of them generates."""
        return self._generate(Assigned((), (), 1), [], [], engine) is not None

    def _generate(
        self, assigned: Assigned, rows: list[int], prompts: Sequence[Sequence[int]], engine: RolloutEngine
    ) -> list[Drawn] | None:
        """Let the student generate for some rows; None if no rank that generates with this one has any."""
        interleaved = self.settings.rollouts == "interleaved" and self.host.training
        together = self.host.ranks > 1 and (engine.together or interleaved)
        if not (self._most(len(rows)) if together else len(rows)):
            return None
        chosen = [list(prompts[row]) for row in rows]
        if not rows and (interleaved or not engine.takes_nothing):
            chosen = [list(ids) for ids in prompts[:1]] or [[self.pad_token_id]]  # what follows it is not used
        if interleaved:
            assignments = [assigned.assignments[row] for row in rows or [0]]
            found = self._interleaved(assignments, chosen, assigned.rows_at_once, engine)
        else:
            found = engine.generate(chosen)
        found = self._without_loops(found[: len(rows)])
        versions = [version for one in found for version in one.versions or ()]
        if versions and self.host.training:
            self.host.note({"rollouts/staleness": self.host.step - sum(versions) / len(versions)})
        return found

    def _without_loops(self, found: list[Drawn]) -> list[Drawn]:
        """Cut responses where they repeat themselves, exactly, also those of an engine that did not stop there."""
        if not self.settings.repetition_stop:
            return found
        kept, looping = cut_loops([one.ids for one in found], self.settings.repetition_stop)
        self.host.note({"rollouts/looping": looping})
        return [one.cut(len(ids)) for one, ids in zip(found, kept, strict=True)]

    def _interleaved(
        self, assignments: Sequence[Assignment], prompts: list[list[int]], rows_at_once: int, engine: RolloutEngine
    ) -> list[Drawn]:
        """Let the student propose blocks of tokens, of which the panel replaces those outside its support."""
        host, settings = self.host, self.settings
        with engine.proposing() as generate:

            def propose(prefixes: list[list[int]], count: int) -> list[list[int]]:
                ids, mask = left_padded(prefixes, self.pad_token_id)
                output = generate(ids.to(host.device), mask.to(host.device), count)
                return [until_end(row, self.end_tokens) for row in output[:, ids.shape[1] :].tolist()]

            def score(rows: Sequence[int], prefixes: list[list[int]], proposals: list[list[int]]) -> list[Tensor]:
                return panel_logprobs(
                    self.panel,
                    [assignments[row] for row in rows],
                    prefixes,
                    proposals,
                    vocabulary=self.vocabulary,
                    pad_token_id=self.pad_token_id,
                    device=host.device,
                    rows_at_once=rows_at_once,
                    step=host.step,
                )

            found = interleave(
                prompts,
                propose,
                score,
                max_new_tokens=settings.max_completion_length,
                block=settings.interleaved_block,
                top_k=settings.interleaved_top_k,
                end_tokens=self.end_tokens,
                generator=seeded(self.seed, host.step, _INTERLEAVED + host.rank),
                most=self._most,
            )
        replaced, tokens = sum(sum(one.replaced) for one in found), sum(len(one.tokens) for one in found)
        host.note({"rollouts/replaced": replaced / max(tokens, 1)})
        return [Drawn(list(one.tokens)) for one in found]

    def _most(self, count: int) -> int:
        """Return the largest count of any rank; a collective call."""
        return most_of_any_rank([count], self.host.device)[0]


@torch.no_grad()
def panel_logprobs(
    panel: TeacherPanel,
    assignments: Sequence[Assignment],
    prefixes: Sequence[Sequence[int]],
    proposals: Sequence[Sequence[int]],
    *,
    vocabulary: Vocabulary,
    pad_token_id: int,
    device: torch.device,
    rows_at_once: int,
    step: int = 0,
) -> list[Tensor]:
    """Return log Σ wᵢ·pᵢ at each proposed token, the mixture of those who score the row.

    Args:
        panel: the teachers.
        assignments: for each row who scores it.
        prefixes: token ids before the proposal.
        proposals: token ids whose places are scored; at least one a row.
        vocabulary: of the run; V tokens.
        pad_token_id: fills up short rows.
        device: where the teachers take their inputs.
        rows_at_once: rows in a teacher's forward pass.
        step: optimizer step, for weights with a schedule.

    Returns:
        For each row (len(proposal), V) nats; ``-inf`` for what a teacher that lists only some tokens leaves out, and
        for tokens that it does not share with the student.
    """
    start, width = max(map(len, prefixes)), max(map(len, proposals))
    ids = torch.full((len(prefixes), start + width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (prefix, proposal) in enumerate(zip(prefixes, proposals, strict=True)):
        used = slice(start - len(prefix), start + len(proposal))
        ids[row, used] = torch.tensor([*prefix, *proposal])
        mask[row, used] = 1
    scores = score_rows(
        panel,
        assignments,
        ids.to(device),
        mask.to(device),
        completion_start=start,
        positions=[range(len(proposal)) for proposal in proposals],
        rows_at_once=rows_at_once,
        vocabulary=vocabulary,
    )
    found = []
    sharded = panel.sharded_heads()
    with gathered_heads(list(sharded.values())) as heads:
        opened = dict(zip(sharded, heads, strict=True))
        for assignment, row_scores in zip(assignments, scores, strict=True):
            weights, signals = panel.weights_of(assignment, step), row_scores.with_heads(opened).distributions
            terms = [
                _logprobs(signals[name], vocabulary.size) + torch.tensor(weight).log()
                for name, weight in zip(assignment.teachers, weights, strict=True)
                if weight > 0
            ]
            found.append(torch.stack(terms).logsumexp(dim=0))
    return found


def _logprobs(signal: Signal, vocab_size: int) -> Tensor:
    assert not isinstance(signal, ChunkSignal)  # a panel with views does not interleave
    if isinstance(signal, HiddenSignal):
        logits = exact_logits(signal.head, signal.hidden)
        if signal.shared is not None:
            ids = torch.arange(logits.shape[1], device=logits.device)
            logits = logits.masked_fill_(~shared_mask(signal.shared, ids), -torch.inf)
            logits = torch.nn.functional.pad(logits, (0, max(vocab_size - logits.shape[1], 0)), value=-torch.inf)
        return logits[:, :vocab_size].log_softmax(dim=-1)
    full = signal.logprobs.new_full((len(signal), vocab_size), -torch.inf)
    return full.scatter_reduce(1, signal.ids, signal.logprobs, reduce="amax")
