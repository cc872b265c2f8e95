"""Greedy decoding of many prompts: rows leave the batch when they end, and waiting prompts take their places.

decoding = Decoding(lm, prompts, rooms, batch_size=64)
answers = decoding.run()
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvllm.lm.cache import joined, kept
from kvllm.memory import give_back

if TYPE_CHECKING:
    from kvllm.lm.model import LanguageModel

MIN_OPENING = 8  # tokens that prompts must share for a pass of their own
_PASS = 48  # what a pass costs beside its tokens, in tokens
_ENDED = -1


@dataclass(frozen=True)
class Opening:
    """What all prompts of a call begin with, and the keys and values that one forward pass over it has made."""

    ids: tuple[int, ...]
    cache: Any

    def __len__(self) -> int:
        return len(self.ids)

    def for_rows(self, n: int) -> Any:
        """Return a cache of n rows that all begin with the opening, to be written on."""
        found = copy.deepcopy(self.cache)
        if self.ids:
            found.batch_select_indices(torch.zeros(n, dtype=torch.long, device=found.layers[0].keys.device))
        return found


@dataclass
class _Rows:
    """Prompts that have been read, or are being answered; what they hold is padded on the left.

    Attributes:
        owners: Which prompt each row answers; `_ENDED` where its answer has ended and the row is still there.
        chosen: The last token of each, (batch,): the next one to be read.
        mask: Which columns of the cache belong to each row, (batch, seq).
        cache: Their keys and values.
    """

    owners: list[int]
    chosen: torch.Tensor
    mask: torch.Tensor
    cache: Any

    @property
    def going(self) -> list[int]:
        return [place for place, owner in enumerate(self.owners) if owner != _ENDED]


class Decoding:
    """One call's prompts, the answers as far as they have come, and the batch that is being decoded."""

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        *,
        batch_size: int,
        begun: Sequence[Sequence[int]] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        """See `LanguageModel.generate_bounded`, and for `begun` its `finish`."""
        self._lm = lm
        self._prompts = prompts
        self._rooms = rooms
        self._batch_size = batch_size
        self._on_batch = on_batch
        self._drafts: list[Sequence[int]] = list(drafts) if drafts is not None else [()] * len(prompts)
        self._answers: list[list[int]] = [[] for _ in prompts]
        for i, ids in enumerate(begun or ()):
            self._begin(i, ids)
        going = [i for i in range(len(prompts)) if not self._has_ended(i)]
        # The longest first: what is left for the end is short, and does not keep a large batch waiting for a few rows.
        self._waiting = deque(sorted(going, key=lambda i: (rooms[i], len(prompts[i])), reverse=True))
        self._openings = self._shared_openings()
        self._rows: _Rows | None = None
        self._told = -1

    def run(self) -> list[tuple[int, ...]]:
        """Answer all prompts; return the new ids of each, its stop token included if it came."""
        while self._waiting or self._rows is not None:
            free = self._batch_size - (len(self._rows.owners) if self._rows is not None else 0)
            if self._waiting and (self._rows is None or (self._lm.caches_join and 4 * free >= self._batch_size)):
                self._take_in(free)
            else:
                self._step()
        self._tell()
        give_back()
        return [tuple(answer) for answer in self._answers]

    # ------------------------------------------------------------------ answers

    def _begin(self, i: int, ids: Sequence[int]) -> None:
        """Add tokens to an answer as far as it has room and does not stop."""
        for token in ids:
            if self._has_ended(i):
                return
            self._answers[i].append(token)

    def _has_ended(self, i: int) -> bool:
        answer = self._answers[i]
        return len(answer) >= self._rooms[i] or bool(answer and answer[-1] in self._lm.stop_ids)

    def _tell(self) -> None:
        """Say how many answers are whole, where that has changed."""
        total = len(self._prompts)
        done = total - len(self._waiting) - (len(self._rows.going) if self._rows is not None else 0)
        if self._on_batch is not None and done != self._told and total:
            self._on_batch(done, total)
        self._told = done

    # ------------------------------------------------------------------ the batch

    def _take_in(self, n: int) -> None:
        """Read up to n waiting prompts; those not answered by their first token or their draft join the batch."""
        read = self._read([self._waiting.popleft() for _ in range(min(n, len(self._waiting)))])
        self._check_drafts(read)
        self._record(read)
        going = read.going
        if going:
            self._rows = self._together(self._without_others(read, going))
        self._tell()
        give_back()

    def _step(self) -> None:
        """Add one token to every row; rows that have ended leave when they are many enough to be worth a copy."""
        rows = self._rows
        assert rows is not None
        going = rows.going
        # An ended row reads on, but what it reads is not its own: its positions stay within the model's.
        column = rows.mask.new_zeros(len(rows.owners), 1)
        column[going] = 1
        rows.mask = torch.cat([rows.mask, column], dim=-1)
        states = self._lm.last_states(
            rows.chosen[:, None], rows.mask, rows.cache, positions=rows.mask.sum(-1, keepdim=True) - 1
        )
        rows.chosen = self._lm.logits(states[:, -1]).argmax(-1)
        self._record(rows)
        going = rows.going
        if not going:
            self._rows = None
        elif 8 * (len(rows.owners) - len(going)) >= len(rows.owners):
            self._rows = self._without_others(rows, going)
        else:
            return
        self._tell()

    def _record(self, rows: _Rows) -> None:
        """Add the chosen token to each answer; where it ends, its row belongs to nobody."""
        for place, (i, token) in enumerate(zip(rows.owners, rows.chosen.tolist(), strict=True)):
            if i != _ENDED:
                self._answers[i].append(token)
                if self._has_ended(i):
                    rows.owners[place] = _ENDED

    def _without_others(self, rows: _Rows, places: list[int]) -> _Rows:
        """Return some of the rows, without the columns that only the others used."""
        if len(places) == len(rows.owners):
            return rows
        where = torch.tensor(places, device=rows.mask.device)
        mask = rows.mask[where]
        first = int(mask.any(0).int().argmax()) if self._lm.caches_join else 0
        return _Rows(
            [rows.owners[place] for place in places],
            rows.chosen[where],
            mask[:, first:],
            kept(rows.cache, where, first),
        )

    def _together(self, read: _Rows) -> _Rows:
        """Return the batch with the rows just read."""
        if not self._lm.caches_join:
            return read  # the batch was empty
        parts = [rows for rows in (self._rows, read) if rows is not None]
        return _Rows(
            [i for rows in parts for i in rows.owners],
            torch.cat([rows.chosen for rows in parts]),
            _left_aligned([rows.mask for rows in parts]),
            joined([rows.cache for rows in parts]),
        )

    def _check_drafts(self, read: _Rows) -> None:
        """Accept each draft as far as it is the greedy choice, where its first token is.

        Where that is the whole answer, its row has ended. Where a part of it is right, the prompt waits again, to be
        read with that part.
        """
        chosen = read.chosen.tolist()
        drafts = {place: tuple(self._drafts[i][: self._rooms[i]]) for place, i in enumerate(read.owners)}
        places = [p for p, draft in drafts.items() if len(draft) > 1 and draft[0] == chosen[p]]
        if not places:
            return
        where = torch.tensor(places, device=read.mask.device)
        ids, own = self._lm.pad([drafts[place][:-1] for place in places])
        mask = read.mask[where]
        positions = mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=mask.device)
        positions = positions.clamp(max=self._lm.max_positions - 1)  # behind a short draft
        states = self._lm.last_states(ids, torch.cat([mask, own], dim=-1), kept(read.cache, where), positions=positions)
        for place, row in zip(places, states, strict=True):
            i, draft = read.owners[place], drafts[place]
            greedy = [chosen[place], *self._lm.logits(row[: len(draft) - 1]).argmax(-1).tolist()]
            self._begin(i, greedy_beginning(greedy, draft))
            read.owners[place] = _ENDED
            if not self._has_ended(i):
                self._drafts[i] = ()
                self._waiting.appendleft(i)

    # ------------------------------------------------------------------ prompts

    def _read(self, batch: Sequence[int]) -> _Rows:
        """Run prompts, and what there is of their answers; those of like length together, so that little is padded."""
        openings, joins = self._openings, self._lm.caches_join
        rests = {i: [*self._prompts[i], *self._answers[i]][len(openings[i]) :] for i in batch}
        families: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(batch, key=lambda i: len(rests[i])):
            families.setdefault(openings[i].ids, []).append(i)
        groups = [
            family[part]
            for family in families.values()
            for part in (of_like_length([len(rests[i]) for i in family]) if joins else [slice(None)])
        ]
        states, masks, caches = [], [], []
        for group in groups:
            opening = openings[group[0]]
            ids, mask = self._left_padded([rests[i] for i in group])
            mask = torch.cat([mask.new_ones(len(group), len(opening)), mask], dim=-1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, len(opening) :]
            caches.append(opening.for_rows(len(group)))
            states.append(self._lm.last_states(ids, mask, caches[-1], positions=positions)[:, -1])
            masks.append(mask)
        if len(caches) > 1:
            caches = [joined(caches)]
        chosen = self._lm.logits(torch.cat(states)).argmax(-1)
        return _Rows([i for group in groups for i in group], chosen, _left_aligned(masks), caches[0])

    def _left_padded(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, both (batch, seq) on the model's device, every sequence ending at the last position."""
        ids, mask = self._lm.pad([sequence[::-1] for sequence in sequences])
        return ids.flip(-1), mask.flip(-1)

    def _shared_openings(self) -> list[Opening]:
        """Return for each prompt what it and others begin with; completions stand beside chats."""
        families: dict[tuple[int, ...], list[int]] = {}
        for i in self._waiting:
            prompt = self._prompts[i]
            families.setdefault(tuple(prompt[:MIN_OPENING]) if self._lm.caches_join else (), []).append(i)
        alone = self._lm.shared_opening([])
        found = [alone] * len(self._prompts)
        for family in families.values():
            shared = self._lm.shared_opening([self._prompts[i] for i in family])
            for i in family if shared else ():
                found[i] = shared
        return found


def of_like_length(lengths: Sequence[int]) -> list[slice]:
    """Return the partition of rising lengths whose passes, each padded to its longest, cost least in all."""
    best, cuts = [0], [0]
    for end in range(1, len(lengths) + 1):
        cost, cut = min((best[start] + _PASS + (end - start) * lengths[end - 1], start) for start in range(end))
        best.append(cost)
        cuts.append(cut)
    parts, end = [], len(lengths)
    while end:
        parts.append(slice(cuts[end], end))
        end = cuts[end]
    return parts[::-1]


def _left_aligned(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return masks (batch, seq) below each other, each with what it lacks in width on its left."""
    width = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])


def greedy_beginning(greedy: Sequence[int], draft: Sequence[int]) -> tuple[int, ...]:
    """Return how an answer begins: the draft as far as it is the greedy choice, and the choice where it is not.

    Args:
        greedy: The greedy choice at each place of the draft, given what the draft has before it.
        draft: A guess at the answer.
    """
    wrong = next((i for i, (g, d) in enumerate(zip(greedy, draft, strict=True)) if g != d), len(draft))
    return tuple(greedy[: wrong + 1])
