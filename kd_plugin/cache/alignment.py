"""Notice a cache whose targets belong to the token beside.

Off by one between tokens and stored distributions is the classic bug of this field, and it trains without an
error. It shows in the data alone: a neighbour of the text's next token is likelier under the target than the next
token is. That alone proves nothing, though: an untrained teacher over text that is not its own says little about the
next token, and may well favour a token that it has just read. So three things are asked, each against chance:

1. The neighbour is likelier than the next token, by 4 standard errors (1 in 30,000) and by half a nat.
2. The next token is less likely than a draw from the target would be, by as much. A teacher's own text never is.
3. By +1 nothing more: an aligned target has read neither token, so that only chance prefers the later one.
   By -1 the target may have read the token and repeat it. So either the teacher must know the text: give the token two
   ahead of it more than a token of another row, by 3 standard errors, where neither is a repetition. Or, untrained, it
   must not follow that token. What a causal teacher says depends most on the last token that it has read: targets after
   equal tokens are alike. Shifted, they are no less alike, by 2 standard errors, where tokens one earlier are equal;
   of draws, which agree less, they must be more alike, or the token before just as likely as a draw. Or the token is 3
   nats likelier, and yet like a draw within half a nat: one that is repeated is far likelier than a draw, or certain.

An untrained teacher's aligned targets follow the last token by 8 standard errors and more (draws: 3), so that the last
alternatives need an accident as rare as the others. The aim is a false alarm in at most 1 of 1,000 caches; the
tests count over architectures, scales, texts and kinds of targets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.targets import Sampled
from kd_plugin.errors import CacheError
from kd_plugin.signals import SparseSignal

logger = logging.getLogger(__name__)
_LIKELIER, _KNOWS, _FOLLOWS = 4.0, 3.0, 2.0  # standard errors
_MARGIN, _FAR, _NOT_COPIED = 0.5, 3.0, -0.1  # nats
_RECENT = 4  # tokens that a teacher may repeat
_FEWEST, _FEWEST_ROWS, _FEWEST_PAIRS, _MOST_PAIRS = 64, 4, 16, 1024
_BUCKETS = 1024
_LEAST = -30.0  # nats, below which no log-probability counts
_OFFSETS = (-1, 0, 1)


@dataclass(frozen=True)
class Mean:
    """A mean over positions, in nats, and its standard error with rows as independent draws.

    Attributes:
        value: the mean.
        error: its standard error; infinite where too few rows or positions are there to tell.
    """

    value: float
    error: float

    def beyond(self, errors: float) -> bool:
        """Whether the mean is more than so many standard errors above 0, or below it for a negative number."""
        return self.value > errors * self.error if errors > 0 else self.value < errors * self.error


@dataclass(frozen=True)
class TargetFit:
    """Mean log-probability, in nats, that targets give to the text's tokens.

    Attributes:
        logprob: offset to mean: 0 is the token that the target is for, -1 the one before it, 1 the one after.
        error: offset to the standard error of its mean advantage over offset 0, in nats.
        positions: number of positions looked at.
        ahead: offset (1 and -1) to by how much its tokens are likelier than those of offset 0.
        beyond_draw: offset to by how much its tokens are likelier than draws from the targets.
        follows: by how much more alike targets are, from -2 to 2, where the tokens before the last one read are equal
            than where those themselves are.
        knows: by how much likelier the next token is than that of another row, where neither is a repetition.
        sampled: whether targets are draws, of which few agree.
    """

    logprob: Mapping[int, float]
    error: Mapping[int, float]
    positions: int
    ahead: Mapping[int, Mean] = field(default_factory=dict)
    beyond_draw: Mapping[int, Mean] = field(default_factory=dict)
    follows: Mean = Mean(0.0, torch.inf)
    knows: Mean = Mean(0.0, torch.inf)
    sampled: bool = False

    def __str__(self) -> str:
        if not self.positions:
            return "alignment not checked: no position has a token on both sides."
        before, own, after = (self.logprob[offset] for offset in _OFFSETS)
        verdict = f"shifted by {self.shift:+d} token" if self.shift else "aligned"
        return (
            f"{verdict}; over {self.positions} positions the targets give the text's next token {own:.2f} nats, "
            f"the one before it {before:.2f}, the one after it {after:.2f}."
        )

    @property
    def shift(self) -> int:
        """The offset at which targets fit best, 0 unless another one fits clearly better and was predicted."""
        best = max(self.logprob, key=self.logprob.__getitem__)
        if best == 0 or self.positions < _FEWEST:
            return 0
        likelier = self.ahead[best].beyond(_LIKELIER) and self.ahead[best].value > _MARGIN
        if not (likelier and self.beyond_draw[0].beyond(-_LIKELIER)):
            return 0
        if best == 1:
            return 1
        drawn = not (self.beyond_draw[-1].beyond(_LIKELIER) or self.beyond_draw[-1].beyond(-_LIKELIER))
        undecided = self.follows.error < torch.inf and not self.follows.beyond(-_FOLLOWS)
        untrained = self.follows.beyond(_FOLLOWS) or (undecided and (drawn or not self.sampled))
        predicted = (
            self.ahead[-1].value > _FAR and self.beyond_draw[-1].value < _MARGIN and self.logprob[-1] < _NOT_COPIED
        )
        return -1 if self.knows.beyond(_KNOWS) or untrained or predicted else 0


def measure_alignment(cache: TeacherCache, rows: int = 64) -> TargetFit:
    """Hold the targets of up to ``rows`` rows, spread over the cache, against the tokens beside them."""
    dataset = cache.dataset()
    step = max(1, len(dataset) // rows)
    chosen = [dataset[row] for row in list(range(0, len(dataset), step))[:rows]]
    targets, size = cache.manifest.settings.targets, cache.manifest.vocab_size
    counted = isinstance(targets, Sampled) and targets.logprobs == "mean"
    parts = []
    texts = [torch.as_tensor(example["input_ids"]).long() for example in chosen]
    for number, (example, tokens) in enumerate(zip(chosen, texts, strict=True)):
        index = torch.as_tensor(example["teacher_index"])
        inner = torch.arange(1, max(len(tokens) - 2, 1))
        inner = inner[index[inner] >= 0]
        if len(inner):
            parts.append(
                _row(tokens, texts[(number + 1) % len(texts)], inner, cache.signal(index[inner]), size, counted)
            )
    if not parts:
        return TargetFit(dict.fromkeys(_OFFSETS, 0.0), dict.fromkeys(_OFFSETS, 0.0), 0)
    ahead = {o: _mean([part.logprob[o] - part.logprob[0] for part in parts]) for o in (-1, 1)}
    return TargetFit(
        logprob={o: float(torch.cat([part.logprob[o] for part in parts]).mean()) for o in _OFFSETS},
        error={-1: ahead[-1].error, 0: 0.0, 1: ahead[1].error},
        positions=sum(len(part.of_a_draw) for part in parts),
        ahead=ahead,
        beyond_draw={o: _mean([part.logprob[o] - part.of_a_draw for part in parts]) for o in _OFFSETS},
        follows=_follows(parts),
        knows=_mean([part.knows for part in parts]),
        sampled=isinstance(targets, Sampled),
    )


def require_aligned(cache: TeacherCache, rows: int = 64, *, allow_misaligned: bool = False) -> TargetFit:
    """Refuse a cache whose targets fit the neighbouring token better than their own.

    Args:
        cache: the cache.
        rows: how many of its rows are looked at.
        allow_misaligned: take it all the same, with a warning.

    Raises:
        CacheError: names the shift that was found.
    """
    found = measure_alignment(cache, rows)
    if found.shift:
        message = (
            f"The targets in {cache.path} are shifted by {found.shift:+d} token: over {found.positions} positions they "
            f"give the text's next token {found.logprob[0]:.2f} nats on average, but its neighbour at {found.shift:+d} "
            f"{found.logprob[found.shift]:.2f} nats. The target stored at position t must be the distribution over "
            "token t+1. Capture again with this package, or mend what wrote the cache. If you know that it is right, "
            "set allow_misaligned=True."
        )
        if not allow_misaligned:
            raise CacheError(message)
        logger.warning("%s It is trained on all the same, since allow_misaligned is set.", message)
    return found


@dataclass(frozen=True)
class _Row:
    """What targets of a row say of tokens at offsets and of a draw, (N,) each; and the tokens around the last read."""

    logprob: Mapping[int, Tensor]
    of_a_draw: Tensor
    context: Tensor  # (N, 3), a column an offset
    signal: SparseSignal
    knows: Tensor  # (F,) of the F positions where neither the next token nor another row's is a repetition


def _row(tokens: Tensor, other: Tensor, at: Tensor, signal: SparseSignal, vocab_size: int, counted: bool) -> _Row:
    """Hold the targets at positions ``at`` (N,) of a row against its tokens, and those of another row."""
    logprob = {offset: _logprob_of(tokens[at + 1 + offset], signal, vocab_size) for offset in _OFFSETS}
    context = torch.stack([tokens[at + offset] for offset in _OFFSETS], dim=1)
    foreign, own = other[(at + 1).clamp(max=len(other) - 1)], tokens[at + 1]
    recent = tokens[(at[:, None] - torch.arange(_RECENT)).clamp(min=0)]
    fresh = (at + 1 < len(other)) & (recent != own[:, None]).all(1) & (recent != foreign[:, None]).all(1)
    knows = (logprob[0] - _logprob_of(foreign, signal, vocab_size))[fresh & (own != foreign)]
    return _Row(logprob, _of_a_draw(signal, vocab_size, counted), context, signal, knows)


def _follows(parts: list[_Row]) -> Mean:
    """Compare how alike targets of different rows are where the tokens at one offset are equal, and no others."""
    context = torch.cat([part.context for part in parts])
    row = torch.cat([torch.full((len(part.context),), i) for i, part in enumerate(parts)])
    pairs = []
    for column in (0, 1):
        order = context[:, column].argsort(stable=True)
        first, second = order[:-1], order[1:]
        equal = context[first] == context[second]
        use = equal[:, column] & (equal.sum(dim=1) == 1) & (row[first] != row[second])
        pairs.append(torch.stack([first[use], second[use]])[:, :_MOST_PAIRS])
    if min(pair.shape[1] for pair in pairs) < _FEWEST_PAIRS:
        return Mean(0.0, torch.inf)
    signal = SparseSignal.joined([replace(part.signal, draws=None, sampled_token_logprobs=None) for part in parts])
    features = _features(signal, torch.cat(pairs, dim=1))
    alike = dict(zip((-1, 0), (features[0] * features[1]).sum(1).split([p.shape[1] for p in pairs]), strict=True))
    ours, theirs = alike[-1].double(), alike[0].double()
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)) ** 0.5
    return Mean(float(ours.mean() - theirs.mean()), float(error))


def _features(signal: SparseSignal, at: Tensor) -> Tensor:
    """Return a vector of length 1 for each target in ``at`` (2, N), as (2, N, _BUCKETS); alike ones have alike vectors.

    Square roots of the listed probabilities, less their mean over all, with the vocabulary folded into so many buckets.
    """
    ids, half = signal.ids[at], (signal.logprobs[at].float() / 2).exp()
    mixed = (ids * 2_654_435_761) % 4_294_967_296  # multiplicative hashing
    folded = half.new_zeros((*at.shape, _BUCKETS))
    folded.scatter_add_(-1, mixed % _BUCKETS, half * (1 - 2 * (mixed >> 31)))
    folded -= folded.flatten(0, 1).mean(dim=0)
    return folded / folded.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _mean(rows: list[Tensor]) -> Mean:
    """Return the mean over positions of some rows; its error is the larger of that by positions and that by rows."""
    held = [row.double() for row in rows if len(row)]
    if len(held) < _FEWEST_ROWS:
        return Mean(0.0, torch.inf)
    values = torch.cat(held)
    mean = values.mean()
    by_position = values.std() / len(values) ** 0.5
    sums = torch.stack([(row - mean).sum() for row in held])
    by_row = sums.norm() / len(values) * (len(held) / (len(held) - 1)) ** 0.5
    return Mean(float(mean), float(torch.maximum(by_position, by_row)))


def _of_a_draw(signal: SparseSignal, vocab_size: int, counted: bool) -> Tensor:
    """Return what a target says on average (N,) of a token that was drawn from the teacher's distribution, in nats.

    For sampled targets each draw is held against the others: a draw that stands alone would not be listed.
    """
    share = _share(signal, vocab_size)
    if signal.draws is not None:
        draws = signal.draws.float()
        others = torch.log1p(-1 / draws.clamp(min=2)) if counted else 0.0
        said = torch.where(draws > 1, signal.logprobs.float() + others, share[:, None])
        return torch.where(draws > 0, draws * said, 0.0).sum(dim=1) / draws.sum(dim=1)
    listed = torch.special.entr(signal.logprobs.float().exp()).sum(dim=1)
    mass = signal.tail_logmass.float().exp()
    return torch.where(mass > 0, mass * share, 0.0) - listed


def _share(signal: SparseSignal, vocab_size: int) -> Tensor:
    """Return what a target gives to a token that it does not list, (N,): an even part of the tail."""
    unlisted = (vocab_size - (signal.logprobs > -torch.inf).sum(dim=1)).clamp(min=1)
    return (signal.tail_logmass.float() - unlisted.log()).clamp(min=_LEAST)


def _logprob_of(tokens: Tensor, signal: SparseSignal, vocab_size: int) -> Tensor:
    """Return what each target gives to one token, (N,); unlisted tokens share the tail evenly."""
    listed = (signal.ids == tokens[:, None]) & (signal.logprobs > -torch.inf)
    own = torch.where(listed, signal.logprobs.float(), -torch.inf).amax(dim=1)
    return torch.where(listed.any(dim=1), own, _share(signal, vocab_size)).clamp(min=_LEAST)
