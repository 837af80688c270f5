"""What a teacher says in its own vocabulary, said in the student's.

Both models go on from the same text, the student at any boundary of its tokens. There the teacher's distribution over
the text to come is read from its last token boundary before: the tokens that begin with what stands between are those
that are still possible, and each stands for the student token by which its remaining text begins. What a teacher's
token cannot be matched to, and what it does not list, is one outcome, the rest. So the two distributions become
distributions over the same outcomes, and any divergence between them is at most the one between the texts.

Where the student's token covers several of the teacher's, the product of their probabilities belongs to that token.
This follows the idea of merging probabilities over spans (TRL's GOLD) and of projecting one vocabulary to the other by
the text of its tokens (X-Token, arXiv 2605.21699), with the text before taken into account to the byte.

Shape suffixes: n student positions, M teacher positions, K listed tokens, J = K + 1 entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kd_plugin.divergence.across.sorted_tokens import SortedTokens
from kd_plugin.divergence.listed import listed_from, with_sampled_token
from kd_plugin.errors import DataError
from kd_plugin.signals import HiddenSignal, SparseSignal
from kd_plugin.views.tokens import TokenText

_UNSEEN, _NONE = -2, -1
_KEPT = 1e-4  # share of a token's probability that stays where a part of it is said otherwise


@dataclass(frozen=True)
class Places:
    """Where student positions lie in the chunks and in the teacher's tokens.

    Attributes:
        chunks: (n,) int64 the chunk of each position that is compared, -1 for none.
        impossible: (n,) int64 the chunk of each that the teacher cannot have written, -1 for none.
        anchors: (n,) int64 the teacher position whose token each lies in, among the M; -1 for none.
        covers: (n,) bool, whether the student's token reaches to the end of that token or beyond.
        prefixes: the bytes between the beginning of that token and the position.
        count: k, the number of chunks.
        sizes: how many positions in a row are of one chunk, or of none; n in all.
    """

    chunks: Tensor
    impossible: Tensor
    anchors: Tensor
    covers: Tensor
    prefixes: tuple[bytes, ...]
    count: int
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chunks)


class Projection:
    """From a teacher's tokens to the student's, by their text.

    Args:
        student: the text of the student's tokens.
        teacher: the text of the teacher's tokens.
        ends: the tokens by which both end a response, the teacher's first; None where one has none.
        size: tokens that the student's head has a row for; None for all.
    """

    def __init__(
        self,
        student: TokenText,
        teacher: TokenText,
        ends: tuple[int | None, int | None],
        size: int | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.ends = ends
        self._size = len(student.table) if size is None else size
        self._table = np.full(len(teacher.table), _UNSEEN, np.int64)
        named = {content: i for i, content in student.added.items()}
        for i in teacher.special:  # read as what it is, not as the letters of its name
            self._table[i] = named.get(student.counterpart(teacher.added.get(i, "")), _NONE)
        if ends[0] is not None and ends[1] is not None:
            self._table[ends[0]] = ends[1]
        self._rest_of: dict[bytes, int] = {}
        self._by_bytes = {text: i for i, text in reversed(list(enumerate(student.table))) if text}
        self._longest = max(map(len, self._by_bytes), default=1)

    @cached_property
    def sorted_vocabularies(self) -> tuple[SortedTokens, SortedTokens]:
        """Both vocabularies by the bytes of their tokens, the student's first; the two ends stand for each other.

        Thinking marks stand as the teacher's, as in the response that it reads.
        """
        paired = self.ends[0] is not None and self.ends[1] is not None
        teacher, student = self.ends if paired else (None, None)
        return (
            SortedTokens(self.student.texts(self.teacher)[: self._size], student),
            SortedTokens(self.teacher.texts(), teacher),
        )

    def first_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return the student token by which the text of each teacher token begins; -1 for none."""
        for i in np.unique(ids[self._table[ids] == _UNSEEN]):
            content = self.teacher.added.get(int(i))
            text = self.teacher.table[i] if content is None else self.student.counterpart(content).encode("utf-8")
            self._table[i] = self.first_token(text)
        return self._table[ids]

    def first_token(self, text: bytes) -> int:
        """Return the student token by which a text begins, as its tokenizer cuts it; -1 for none."""
        if text not in self._rest_of:
            found = self._begun(text)
            self._rest_of[text] = found if found < self._size else _NONE
        return self._rest_of[text]

    def _begun(self, text: bytes) -> int:
        if text in self._by_bytes:
            return self._by_bytes[text]
        try:
            ids, ends = self.student.write(text.decode("utf-8"))
        except (UnicodeDecodeError, DataError):
            known = (self._by_bytes.get(text[:n], _NONE) for n in range(min(self._longest, len(text)), 0, -1))
            return next((i for i in known if i != _NONE), _NONE)
        first = np.flatnonzero(ends > 0)
        return int(ids[first[0]]) if len(first) else _NONE


def project(
    projection: Projection,
    signal: HiddenSignal | SparseSignal,
    tokens: Tensor,
    logprobs: Tensor,
    teacher_chunks: Tensor,
    places: Places,
    student_tokens: Tensor,
    top_k: int,
    temperature: float,
) -> tuple[SparseSignal, Tensor]:
    """Return a teacher's distributions over the student's tokens, and (n,) bool, where there is one.

    Args:
        projection: between the vocabularies.
        signal: at M teacher positions.
        tokens: (M,) the teacher's tokens that stand next.
        logprobs: (M,) nats of them.
        teacher_chunks: (M,) the chunk of each.
        places: of the n student positions.
        student_tokens: (n,) that are scored.
        top_k: K of a teacher in this process.
        temperature: of the comparison.
    """
    usable = places.anchors >= 0
    if not len(tokens):
        nothing = logprobs.new_full((len(places), 1), -math.inf)
        ids = torch.zeros_like(nothing, dtype=torch.int64)
        return SparseSignal(ids, nothing, torch.zeros_like(nothing[:, 0])), usable
    anchors = places.anchors.clamp(min=0)
    asked, place = anchors.unique(return_inverse=True)
    if isinstance(signal, HiddenSignal):
        own = replace(signal, hidden=signal.hidden.index_select(0, asked))
        signal = listed_from(own, top_k, tokens[asked].unsqueeze(-1), temperature)
    else:
        signal = with_sampled_token(signal.select(asked), tokens[asked])
    at = signal.select(place)
    ids_nK, logp_nK, tail_n = at.ids, at.logprobs.clone(), at.tail_logmass
    mapped_nK = torch.from_numpy(projection.first_tokens(ids_nK.cpu().numpy())).to(ids_nK.device)
    passed_n = torch.zeros_like(tail_n)  # log mass of what is still possible
    inside = [i for i, prefix in enumerate(places.prefixes) if prefix]
    if inside:
        index = torch.tensor(inside, device=ids_nK.device)
        prefixes = [places.prefixes[i] for i in inside]
        possible, rest = _after(projection, ids_nK[index].cpu().numpy(), prefixes)
        here_nK = logp_nK[index].masked_fill(~torch.from_numpy(possible).to(ids_nK.device), -math.inf)
        passed_n[index] = here_nK.logsumexp(-1)
        listed_n1 = torch.log1p(-tail_n[index].exp().clamp(max=1.0 - _KEPT)).unsqueeze(-1)
        # What is not listed is taken to go on as what is listed does
        logp_nK[index] = here_nK - passed_n[index].unsqueeze(-1) + listed_n1
        mapped_nK[index] = torch.from_numpy(rest).to(ids_nK.device)
    usable = usable & torch.isfinite(passed_n)
    own_n = _own_logprobs(logprobs, teacher_chunks, places, passed_n)
    stands_nK = ids_nK == tokens[anchors].unsqueeze(-1)
    of_standing = torch.where(stands_nK, mapped_nK, _NONE).amax(-1)
    moved_n = usable & places.covers & (of_standing != student_tokens) & torch.isfinite(own_n)
    share_nK = torch.where(stands_nK & moved_n.unsqueeze(-1), own_n.unsqueeze(-1) - logp_nK, -math.inf).exp()
    logp_nK = logp_nK + torch.log1p(-share_nK.clamp(max=1.0 - _KEPT))
    own_n1 = torch.where(moved_n, own_n, -math.inf).unsqueeze(-1).to(logp_nK.dtype)
    logp_nJ = torch.cat([logp_nK, own_n1], -1)
    mapped_nJ = torch.cat([mapped_nK, student_tokens.unsqueeze(-1).to(mapped_nK)], -1)
    merged = _merged(mapped_nJ, logp_nJ, tail_n)
    return merged, usable


def _after(projection: Projection, ids: np.ndarray, prefixes: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Say which tokens (p, K) begin with each prefix, and by which student token the rest of each begins."""
    table = projection.teacher.table
    possible, rest = np.zeros(ids.shape, bool), np.full(ids.shape, _NONE, np.int64)
    for row, (prefix, listed) in enumerate(zip(prefixes, ids.tolist(), strict=True)):
        for k, i in enumerate(listed):
            text = table[i]
            if text.startswith(prefix) and i not in projection.teacher.special:
                possible[row, k] = True
                if len(text) > len(prefix):
                    rest[row, k] = projection.first_token(text[len(prefix) :])
    return possible, rest


def _own_logprobs(logprobs: Tensor, teacher_chunks: Tensor, places: Places, passed_n: Tensor) -> Tensor:
    """Return (n,) nats, the teacher's of the text of each student token after the text before it.

    The probability of a text up to a point is the product over its whole tokens and the mass of what may follow there.
    """
    before_M = torch.cat([logprobs.new_zeros(1), logprobs.cumsum(0)])
    up_to_n = before_M[places.anchors.clamp(min=0)] + passed_n
    chunks = places.chunks
    last_n = torch.ones_like(chunks, dtype=torch.bool)
    last_n[:-1] = chunks[1:] != chunks[:-1]
    ends_k = torch.zeros(places.count, dtype=torch.int64, device=logprobs.device)
    numbers_M = torch.arange(1, len(logprobs) + 1, device=logprobs.device)
    ends_k.scatter_reduce_(0, teacher_chunks, numbers_M, "amax")
    chunk_end_n = before_M[ends_k[chunks.clamp(min=0)]]
    return torch.where(last_n, chunk_end_n, torch.roll(up_to_n, -1)) - up_to_n


def _merged(ids_nJ: Tensor, logp_nJ: Tensor, tail_n: Tensor) -> SparseSignal:
    """Add up entries of one token; those of none (-1) join the tail."""
    none_nJ = (ids_nJ < 0) & (logp_nJ != -math.inf)
    tail_n = torch.logaddexp(tail_n, logp_nJ.masked_fill(~none_nJ, -math.inf).logsumexp(-1))
    gone_nJ = (ids_nJ < 0) | (logp_nJ == -math.inf)
    beyond = torch.iinfo(torch.int64).max
    sorted_nJ, order_nJ = ids_nJ.masked_fill(gone_nJ, beyond).sort(dim=-1, stable=True)
    mass_nJ = logp_nJ.masked_fill(gone_nJ, -math.inf).gather(1, order_nJ).exp()
    new_nJ = torch.zeros_like(sorted_nJ)
    new_nJ[:, 1:] = (sorted_nJ[:, 1:] != sorted_nJ[:, :-1]).long()
    place_nJ = new_nJ.cumsum(-1)
    sums_nJ = torch.zeros_like(mass_nJ).scatter_add_(1, place_nJ, mass_nJ)
    merged_nJ = torch.full_like(sorted_nJ, beyond).scatter_(1, place_nJ, sorted_nJ)
    empty_nJ = merged_nJ == beyond
    return SparseSignal(merged_nJ.masked_fill(empty_nJ, 0), sums_nJ.log().masked_fill(empty_nJ, -math.inf), tail_n)
