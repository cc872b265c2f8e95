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
_CHECKED = 16  # drafts a pass: more positions at once leave the processor's cache
_ENDED = -1

# Told which prompts, and the states that predict the tokens of each one's draft, (draft, hidden), it returns the greedy
# choices.
Judge = Callable[[Sequence[int], Sequence[torch.Tensor]], list[tuple[int, ...]]]


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
        drafts: Sequence[Sequence[int]] | None = None,
        judge: Judge | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        """See `LanguageModel.generate_bounded`, and for `judge` its `follow`."""
        self._lm = lm
        self._prompts = prompts
        self._rooms = rooms
        self._batch_size = batch_size
        self._on_batch = on_batch
        self._drafts: list[tuple[int, ...]] = (
            [()] * len(prompts) if drafts is None else [tuple(draft) for draft in drafts]
        )
        if judge is None:  # which wants to see the whole of each
            self._drafts = [draft[:room] for draft, room in zip(self._drafts, rooms, strict=True)]
        self._judge = judge
        self._answers: list[list[int]] = [[] for _ in prompts]
        # The longest first: what is left for the end is short, and does not keep a large batch waiting for a few rows.
        self._waiting = deque(sorted(range(len(prompts)), key=lambda i: (rooms[i], len(prompts[i])), reverse=True))
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
        read, states = self._read([self._waiting.popleft() for _ in range(min(n, len(self._waiting)))])
        parts = self._check_drafts(read, states)
        self._record(read)
        if read.going:
            parts.append(self._without_others(read, read.going))
        if self._rows is not None:
            parts.append(self._rows)
        if parts:
            self._rows = self._together(parts)
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
        rows.chosen = self._lm.greedy(states[:, -1])
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

    def _together(self, parts: Sequence[_Rows]) -> _Rows:
        """Return one batch of all; where caches do not join, there is one part only."""
        if not self._lm.caches_join:
            return parts[0]
        return _Rows(
            [i for rows in parts for i in rows.owners],
            torch.cat([rows.chosen for rows in parts]),
            _left_aligned([rows.mask for rows in parts]),
            joined([rows.cache for rows in parts]),
        )

    # ------------------------------------------------------------------ drafts

    def _check_drafts(self, read: _Rows, states: torch.Tensor) -> list[_Rows]:
        """Accept each draft as far as it is the greedy choice. Without a judge, one that begins wrong is not read.

        Args:
            read: Prompts; a row whose draft was read belongs to nobody afterwards.
            states: What predicts each one's first token, (batch, hidden).

        Returns:
            The rows whose answers begin with a draft and are not whole. Where caches do not join, such a prompt waits
            again, and has no draft then.
        """
        chosen = read.chosen.tolist()
        drafts = {place: self._drafts[i] for place, i in enumerate(read.owners) if self._drafts[i]}
        if self._judge is None:
            drafts = {place: draft for place, draft in drafts.items() if len(draft) > 1 and draft[0] == chosen[place]}
        places = sorted(drafts, key=lambda place: len(drafts[place]))
        parts = []
        for start in range(0, len(places), _CHECKED):
            rows = self._check(read, states, places[start : start + _CHECKED])
            if rows.going and self._lm.caches_join:
                parts.append(self._without_others(rows, rows.going))
            elif rows.going:
                for place in rows.going:
                    i = rows.owners[place]
                    self._drafts[i], self._answers[i] = (), []
                    self._waiting.appendleft(i)
        return parts

    def _check(self, read: _Rows, states: torch.Tensor, places: Sequence[int]) -> _Rows:
        """Read the drafts of some prompts; return them as rows that go on where the draft is not the greedy choice."""
        owners = [read.owners[place] for place in places]
        drafts = [self._drafts[i] for i in owners]
        where = torch.tensor(places, device=read.mask.device)
        mask, cache = read.mask[where], kept(read.cache, where)
        own = mask[:, :0]
        after = states[where, None][:, :0]
        if len(drafts[-1]) > 1:  # the longest
            ids, own = self._lm.pad([draft[:-1] for draft in drafts])
            positions = mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=mask.device)
            positions = positions.clamp(max=self._lm.max_positions - 1)  # behind a short draft
            after = self._lm.last_states(ids, torch.cat([mask, own], dim=-1), cache, positions=positions)
        found = [
            torch.cat([states[place, None], row[: len(draft) - 1]])
            for place, row, draft in zip(places, after, drafts, strict=True)
        ]
        for place, (i, greedy) in enumerate(zip(owners, (self._judge or self._greedy)(owners, found), strict=True)):
            self._begin(i, greedy_beginning(greedy, drafts[place]))
            own[place, len(self._answers[i]) - 1 :] = 0  # the last token is still to be read, the others were rejected
            read.owners[places[place]] = _ENDED
        chosen = torch.tensor([self._answers[i][-1] for i in owners], device=mask.device)
        going = [_ENDED if self._has_ended(i) else i for i in owners]
        return _Rows(going, chosen, torch.cat([mask, own], dim=-1), cache)

    def _greedy(self, _: Sequence[int], states: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        greedy = self._lm.greedy(torch.cat(list(states)))
        return [tuple(part.tolist()) for part in greedy.split([len(each) for each in states])]

    # ------------------------------------------------------------------ prompts

    def _read(self, batch: Sequence[int]) -> tuple[_Rows, torch.Tensor]:
        """Run prompts, those of like length together, so that little is padded; return also their last states."""
        openings, joins = self._openings, self._lm.caches_join
        rests = {i: self._prompts[i][len(openings[i]) :] for i in batch}
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
        last = torch.cat(states)
        owners = [i for group in groups for i in group]
        return _Rows(owners, self._lm.greedy(last), _left_aligned(masks), caches[0]), last

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


def of_like_length(lengths: Sequence[int], *, pass_cost: int = _PASS, most: int | None = None) -> list[slice]:
    """Return the partition of rising lengths whose passes, each padded to its longest, cost least in all.

    Args:
        lengths: In tokens.
        pass_cost: What a pass costs beside its tokens, in tokens.
        most: Tokens of a pass, padding included; a longer sequence is a pass of its own.
    """
    best, cuts = [0], [0]
    for end in range(1, len(lengths) + 1):
        length = lengths[end - 1]
        first = 0 if most is None else max(0, min(end - 1, end - most // max(1, length)))
        cost, cut = min((best[start] + pass_cost + (end - start) * length, start) for start in range(first, end))
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
