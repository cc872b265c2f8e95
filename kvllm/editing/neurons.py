"""The neuron editor: a fact is put into a few neurons of its own, which stay silent wherever it was not asked for.

A gated MLP adds act(gate·x)·(up·x) times a column to the residual stream. Spare neurons are taken, else those that
matter least, for which the others of their layer make up, and each gets a new job. A third of the way up, two for each
of the fact's names see where it was said, and mark it (`kvllm.editing.marks`): attention carries that to where an
answer is given, so that questions about this name and hardly any other can be told there. Late in the model the others
see them, and say the answer, one token each. Both factors see: a gate and an up that read little elsewhere put out next
to nothing there.
Gates are trained as classifiers with a margin, against ordinary inputs, questions about other names, marked or not,
older facts, the fact's own words where the name bears another mark or none, and what follows where the fact was stated,
so that elsewhere next to nothing changes; then the columns are trained on the fact's rows. After Huang et al.,
"Transformer-Patcher: One Mistake worth One Neuron", ICLR 2023, who add neurons: here the model keeps its shape, and the
change is a low-rank delta as any other. Knows nothing of keys and stores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from kvllm.config import EditConfig
from kvllm.editing.compute import ComputeCopy, Entered, decomposable
from kvllm.editing.delta import Delta, Factors, check_finite, concatenate, is_transposed
from kvllm.editing.editor import EditTask, StepRecord, Training, leads, training_errors
from kvllm.editing.marks import marking
from kvllm.editing.ordinary import Ordinary, answered, from_where_they_differ
from kvllm.editing.preservation import PreservationPool
from kvllm.errors import ConfigError, EditFailed, ModelError
from kvllm.lm.decoding import Opening
from kvllm.lm.model import Row
from kvllm.lm.targets import GatedMlp, Targets, decoder_layers, gated_mlp

# Shares of the depth: where a name is recognised, and where the answer is given.
_NAMED_DEPTH = 0.34
_SAID_DEPTH = 0.67
_SAID_LAYERS = 8
_MOST_NAMES = 3
_MOST_TAKEN = 0.25  # of a layer's neurons
# A mark is equally strong in every context: gates of names are read steeply, and capped.
_STEEP = 4.0
_CEILING = 4.0
_THRESHOLD = 2.0  # of a name's reading, so steep: below it no mark is put
_BORNE = 0.8  # of a mark: names that another fact's neurons mark so far need none of their own
_SPARE = 1.5  # nats beyond the margin: asked in other words a token leads by less
_SURE = 4.0  # nats: an answer's token that leads by so much on every row needs no neuron
# What a gate is fitted to read: at least that where it fires, at most minus that elsewhere. Where an answer begins,
# what is read depends on how the question was put: there less is quiet enough, and columns are trained for faint
# readings, too. Ordinary inputs follow no marked name, so more can be asked of them.
_MARGIN = 6.0
_QUIET = 4.0
_ORDINARY_QUIET = 8.0
_SOONER = 3.0  # by which gates then fire sooner: in other words they read less than in those that they were fitted to
_FAINT = 0.3  # of what is read, at least
_BEGINNING = 5  # tokens
_GATE_STEPS = (10, 10)  # in two stages: which inputs a gate is to be quieter at is only known when it is nearly there
_HARD_STEPS = 15
_ALIKE = 0.9  # cosine from which an ordinary input is taken for one of the fact's own, a column for a mark
_DECAY = 0.2  # of a gate's squared length: the longer, the more it hangs on the wordings that it saw
# Of the squared distances to the margin, against those of the fact's own rows.
_ORDINARY_WEIGHT = 30.0
_APART_WEIGHT = 10.0
_MISTAKEN_WEIGHT = 10.0
_OWN_WEIGHT = 1.0
_HARD_WEIGHT = 10.0
# Ordinary inputs that gates are trained against at first, and so many at most of each group of others.
_SAMPLE = 8192
_SAMPLE_OUTSIDE = 4096
# Of all of them, and of the other inputs to be silent at, those that are read most, which are added so often:
_HARD = 2048
_HARD_OUTSIDE = 512
_HARD_ROUNDS = 2
# Of the stream's length, by what a neuron that reads the margin writes: at first, and in a step at most.
_START = 0.5
_LONGEST = 0.25
_ROWS = 6
_STEP_TOKENS = 384
_READ_TOKENS = 512
_ENOUGH = 0.9  # of the further questions
_LOOK = 4  # steps after which all rows are looked at, so that only those that lack something are trained further
_BATCH = 16
_TOLD_APART = 128  # older rows
_NEAREST = 24  # of them and of the session's, those most like the fact's own once more
_OF_SESSION = 48  # rows of the same session's other facts
_NONE = 4  # of the rows under other marks the first of so many bears none
_MOST_HELD = 32768  # tokens of a session of which is kept what enters the layer of names
_UNTOUCHED = 1e-3  # relative change of a neuron's gate that rounding may leave
_SILENT = 1e-6  # of a layer's largest weight: what rounding may leave of a column that was taken back


@dataclass(frozen=True)
class Layers:
    """The MLPs that edits use: where names are recognised, and where answers are given, one of these for each fact."""

    named: GatedMlp
    said: tuple[GatedMlp, ...]

    @property
    def all(self) -> tuple[GatedMlp, ...]:
        return (self.named, *self.said)

    def targets(self, model: torch.nn.Module) -> Targets:
        """Return their matrices as the adapted ones."""
        return _targets(model, self.all)


def _targets(model: torch.nn.Module, mlps: Sequence[GatedMlp]) -> Targets:
    name, layers = decoder_layers(model)
    names = tuple(name for mlp in mlps for name in (mlp.gate, mlp.up, mlp.out))
    return Targets(names, name, mlps[0].layer, len(layers))


def neuron_layers(model: torch.nn.Module) -> Layers:
    """Return the MLPs of a model.

    Raises:
        ConfigError: it has no gated MLPs there.
    """
    n = len(decoder_layers(model)[1])
    first = math.floor(_SAID_DEPTH * n + 1e-9)
    said = range(first, max(first + 1, min(first + _SAID_LAYERS, n - 1)))
    return Layers(gated_mlp(model, _NAMED_DEPTH), tuple(gated_mlp(model, (layer + 0.5) / n) for layer in said))


def has_spare(model: torch.nn.Module, base: Callable[[str], torch.Tensor]) -> bool:
    """Say whether a base model has neurons of zeros wherever edits use some."""
    try:
        mlps = neuron_layers(model).all
    except (ConfigError, ModelError):
        return False
    return all(bool((base(mlp.gate).abs().amax(1) == 0).any()) for mlp in mlps)


def taken_neurons(
    mlps: Sequence[GatedMlp], now: Callable[[str], torch.Tensor], base: Callable[[str], torch.Tensor]
) -> dict[int, frozenset[int]]:
    """Return the neurons of each layer whose gate is not the base's: layer → places."""
    found = {}
    for mlp in mlps:
        before, after = base(mlp.gate).float(), now(mlp.gate).float()
        usual = before.norm(dim=1).median()  # spare ones have no gate yet
        changed = (after - before).norm(dim=1) > _UNTOUCHED * before.norm(dim=1).clamp(min=usual)
        found[mlp.layer] = frozenset(changed.nonzero()[:, 0].tolist())
    return found


def part_of(
    change_of: Callable[[str], torch.Tensor | None], mlps: Sequence[GatedMlp], places: Mapping[int, Sequence[int]]
) -> dict[str, Factors]:
    """Return what a change of matrices, each by its name, None where there is none, is of some neurons.

    places: Layer to the neurons.
    """
    found: dict[str, Factors] = {}
    for mlp in mlps:
        own = torch.tensor(places.get(mlp.layer, ()), dtype=torch.long)
        for name in (mlp.gate, mlp.up, mlp.out) if len(own) else ():
            change = change_of(name)
            if change is None:
                continue
            if name == mlp.out:
                found[name] = (_one_hot(own, change.shape[1]), change[:, own].contiguous())
            else:
                found[name] = (change[own].contiguous(), _one_hot(own, len(change)).T.contiguous())
    return found


class NeuronEditor:
    """Teaches one fact after the other, each in neurons of its own. Holds no state between calls."""

    def train(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        task: EditTask,
        config: EditConfig,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> Training:
        """Train on the compute copy, which is as before when this returns or raises.

        Raises:
            ConfigError: the model has no gated MLPs, or something is to be restored.
            EditFailed: no neurons are free, or a loss was not finite.
            OutOfResources: not enough memory.
        """
        if task.restore:
            raise ConfigError("The editor 'neurons' takes back what it taught, and restores nothing else.")
        if not config.replay:
            task = replace(task, replay=(), begun=())
        with training_errors():
            torch.manual_seed(task.seed)
            facts = _facts(task)
            with _work(copy, task) as work, torch.enable_grad():
                records: list[StepRecord] = []
                recalled = True
                for rows, further in facts:
                    work.name([*rows, *further])
                for rows, further in facts:
                    recalled &= _teach(work, rows, further, config, records, on_step)
                delta = concatenate(work.changed)
        check_finite(delta)
        ranks = {name: a.shape[0] for name, (a, _) in delta.items()}
        return Training(
            delta=delta,
            steps=len(records),
            recalled=recalled,
            ranks=ranks,
            records=tuple(records),
            places=work.owned,
            borrowed=work.borrowed,
        )


def _facts(task: EditTask) -> list[tuple[list[Row], list[Row]]]:
    """Return each text's rows and further rows: rows with one answer are of one fact."""
    found: dict[tuple[int, ...], tuple[list[Row], list[Row]]] = {}
    for row in task.rows:
        found.setdefault(row.answer, ([], []))[0].append(row)
    for row in task.augmented:
        if row.answer in found:
            found[row.answer][1].append(row)
    return list(found.values())


@dataclass
class _Work:
    """The copy at work, and what was changed in it.

    Attributes:
        taken: Layer to the neurons that hold facts.
        owned: Answer to layer to the neurons that this session gave it.
        borrowed: The same of those that other facts' names were given, and that mark this answer's, too.
        borne: Answer to the mark that its names bear.
        opening: What all rows begin with, in ids.
        entered: Ids of a row to what enters the layer of names behind that, (tokens, hidden): nothing below is changed.
    """

    copy: ComputeCopy
    layers: Layers
    task: EditTask
    taken: dict[int, set[int]]
    opening: tuple[int, ...] = ()
    changed: list[Delta] = field(default_factory=list)
    owned: dict[tuple[int, ...], dict[int, list[int]]] = field(default_factory=dict)
    borrowed: dict[tuple[int, ...], dict[int, list[int]]] = field(default_factory=dict)
    borne: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    entered: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _opening: Opening | None = None  # run at the weights of now

    @contextmanager
    def only(self, mlp: GatedMlp) -> Iterator[None]:
        """Read up to this MLP's layer only, and train nothing below it."""
        before = self.copy.targets
        self.copy.targets = _targets(self.copy.model, [mlp])
        try:
            yield
        finally:
            self.copy.targets = before

    def below(self, rows: Sequence[Row]) -> tuple[Opening | None, Entered]:
        """Return what all rows begin with, run at the weights of now, and what the rest makes enter the named layer."""
        if self._opening is None and self.opening:
            self._opening = self.copy.opening(self.opening)
        opening, start = self._opening, len(self.opening)
        missing = [ids for ids in dict.fromkeys(row.ids for row in rows) if ids not in self.entered]
        with self.only(self.layers.named):
            states = self.copy.lower_states(missing, opening) if missing else []
        found = {ids: some[start:].clone() for ids, some in zip(missing, states, strict=True)}
        held = sum(map(len, self.entered.values()))
        for ids, some in found.items():
            held += len(some)
            if held <= _MOST_HELD:
                self.entered[ids] = some
        both = self.entered | found
        return opening, Entered(self.layers.named.layer, [both[row.ids] for row in rows])

    def name(self, rows: Sequence[Row]) -> None:
        """Let the names that the rows of a fact are known by be marked where they were said.

        By neurons of another fact that is known by them, if these see them here; else by new ones.
        """
        mlp, marks = self.layers.named, self.task.marks
        n_names = min(_MOST_NAMES, max((len(self.task.named.get(row, ())) for row in rows), default=0))
        if marks is None or not n_names:
            return
        ordinary, own = self.task.ordinary[mlp.layer], rows[0].answer
        others = [*self.task.replay[:_TOLD_APART], *self.of_session(own)]
        read = [*rows, *self.beside(rows[0]), *others]
        with self.only(mlp):
            found = answered(self.copy, [mlp.gate], from_where_they_differ(read), behind=self.below(read))[mlp.gate]
        inside: list[list[torch.Tensor]] = [[] for _ in range(n_names)]
        outside = []
        names = self.task.known_by.get(own, frozenset())
        for i, (x, row) in enumerate(zip(found, read, strict=True)):
            start = len(row.ids) - len(x)
            said = self.task.named.get(row, ()) if i < len(rows) else self._said(row, names)
            other = torch.ones(len(x), dtype=torch.bool)
            for name, some in enumerate(said):
                here = [place - start for place in some if place >= start]
                if i < len(rows) and name < n_names:
                    inside[name].append(x[here])
                other[here] = False
                other[[place + 1 for place in here if place + 1 < len(x)]] = False
            outside.append(x[other])
        ends = [torch.cat(some) for some in inside if sum(map(len, some))]
        if not ends:
            return
        lent = self.lent(own)
        if lent and self.marked_by(lent, torch.cat(ends)) >= _BORNE:
            self.borrowed[own] = {mlp.layer: lent}
            self.borne[own] = marks[F.cosine_similarity(marks, self.weight(mlp.out)[:, lent[0]].float()[None]).argmax()]
            return
        ends = [x @ ordinary.whitening for x in ends]
        silent = [(torch.cat(outside) @ ordinary.whitening, _APART_WEIGHT), (self.others(ordinary), _APART_WEIGHT)]
        gates = _gates(ends, ordinary, silent, quiet=_MARGIN, usually=_MARGIN, exactly=True)
        both = _capped(gates, ordinary)
        self.borne[own] = mark = self.unused(marks)
        columns = mark.expand(len(ends), -1) / _CEILING
        columns = torch.cat([columns, -columns])
        self.put(mlp, self.take(mlp, len(both), rows[0]), both, ordinary.one.expand(len(both), -1), columns)

    def lent(self, own: tuple[int, ...]) -> list[int]:
        """Return the neurons that mark the names of an older fact or the session's, if an answer is known by them."""
        layer, known = self.layers.named.layer, self.task.known_by
        if own in self.task.lent:
            return list(self.task.lent[own])
        for other, places in self.owned.items():
            if layer in places and known.get(own) and known[own] <= known.get(other, frozenset()):
                return places[layer]
        return []

    def marked_by(self, places: Sequence[int], x: torch.Tensor) -> float:
        """Return which part of their mark a name's neurons put where x (n, hidden) enters their MLP, on average."""
        mlp = self.layers.named
        gates, ups = (self.weight(name)[list(places)].float() for name in (mlp.gate, mlp.up))
        first, second = (_activation(self.copy, mlp)(x @ gates.T) * (x @ ups.T)).chunk(2, dim=1)
        return float((first - second).amax(1).mean()) / _CEILING

    def unused(self, marks: torch.Tensor) -> torch.Tensor:
        """Return the mark, (hidden,), that the fewest names bear now, and of these the least like others."""
        mlp = self.layers.named
        borne = self.weight(mlp.out)[:, sorted(self.taken[mlp.layer])].float()
        alike = F.normalize(borne, dim=0).T @ F.normalize(marks, dim=1).T
        least = (alike > _ALIKE).sum(0) * (1 + len(alike)) + alike.relu().sum(0)
        return marks[int(least.argmin())]

    def other_marks(self, own: tuple[int, ...]) -> torch.Tensor:
        """Return the marks that are not the one that an answer's names bear, (n, hidden), in an order of its own."""
        assert self.task.marks is not None
        marks = self.task.marks
        if own in self.borne:
            marks = marks[F.cosine_similarity(marks, self.borne[own][None]) < _ALIKE]
        order = list(range(len(marks)))
        random.Random(f"{self.task.seed}/{own}").shuffle(order)  # few rows bear one, so that these differ by fact
        return marks[order]

    def bearing(self, own: tuple[int, ...]) -> list[Row]:
        """Return questions of other facts, older ones and the session's, whose names bear the mark of an answer's."""
        if own not in self.borne:
            return []
        mark, layer = self.borne[own], self.layers.named.layer
        taken = sorted(self.taken[layer])
        alike = F.cosine_similarity(self.weight(self.layers.named.out)[:, taken].float().T, mark[None]) > _ALIKE
        neurons = frozenset(place for place, same in zip(taken, alike.tolist(), strict=True) if same)
        session = {other for other, theirs in self.borne.items() if other != own and torch.equal(theirs, mark)}
        older = self.task.resting(neurons) if self.task.resting is not None else ()
        return [*(row for row in older if row.answer != own), *(row for row in self.task.rows if row.answer in session)]

    def others(self, ordinary: Ordinary, read: torch.Tensor | None = None) -> torch.Tensor:
        """Return `Ordinary.ends`, or what was `read` there, of all that has not to do with this edit: (n, hidden)."""
        other = torch.tensor([name not in self.task.excluded for name in ordinary.about], device=ordinary.ends.device)
        return (ordinary.ends if read is None else read)[other]

    def of_session(self, own: tuple[int, ...]) -> list[Row]:
        """Return some of the same session's rows with other answers."""
        rows = [row for row in self.task.rows if row.answer != own]
        return random.Random(f"{self.task.seed}/{own}").sample(rows, min(_OF_SESSION, len(rows)))

    def beside(self, own: Row) -> list[Row]:
        """Return the questions about other names that a fact must not be taken for; `own` is one of its rows."""
        return [row for row in self.task.apart if self.task.beside.get(row, own.answer) == own.answer]

    def elsewhere(self, mlp: GatedMlp, own: Row) -> list[torch.Tensor]:
        """Return what enters a late MLP where other questions end and their answers are given, white, (n, hidden) each.

        Questions about other names, by turns as they are and with other marks on the name; and other facts', at the
        weights of now, of which those weigh most that look most like this one, or bear its mark.
        """
        apart = self.beside(own)
        marked = [row for row in apart if self.task.named.get(row)][::2] if self.task.marks is not None else []
        plain = [row for row in apart if row not in marked]
        rest = [row for row in self.task.replay[:_TOLD_APART] if row.answer != own.answer]
        rest += self.of_session(own.answer)
        begun = [row for row in self.task.begun if row.answer != own.answer[: len(row.answer)]]
        stated = [row for row in self.task.stated if self.task.beside.get(row) == own.answer]
        with self.only(mlp):
            others = self._answered(mlp, rest)
            bearing = self.bearing(own.answer)
            found = [self._answered(mlp, some) for some in (plain, begun, stated, bearing)] + [others]
            if len(others) > _NEAREST:
                (ended,) = self._answered(mlp, [Row(own.prompt, ())])
                alike = F.cosine_similarity(torch.stack([x[0] for x in others]), ended)
                found.append([others[i] for i in alike.topk(_NEAREST).indices.tolist()])
            if marked and self.task.marks is not None:
                found.append(self._answered(mlp, marked, self.other_marks(own.answer)))
        return [torch.cat(some) for some in found if some]

    def mistaken(self, mlp: GatedMlp, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Return what would enter a late MLP, white, if the names in a fact's rows bore another's mark, or none.

        One (answer tokens, hidden) for each second row that asks by name; none at all where names bear no mark.
        """
        own = rows[0].answer
        rows = [row for row in rows if self._asks_by_name(row)][::2]
        if own not in self.borne or self.task.marks is None or not rows:
            return []
        named = self.layers.named
        columns = (self.borrowed if own in self.borrowed else self.owned)[own][named.layer]
        others = self.other_marks(own)
        marks = torch.zeros(len(rows), self.borne[own].shape[0]).to(others)
        for i in range(len(rows) if len(others) else 0):
            if i % _NONE:
                marks[i] = others[i % len(others)]
        out = self.weight(named.out).data
        own_mark = out[:, columns].clone()
        out[:, columns], self._opening = 0.0, None
        try:
            return self._answered(mlp, rows, marks)
        finally:
            out[:, columns], self._opening = own_mark, None

    def _answered(self, mlp: GatedMlp, rows: Sequence[Row], marks: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Return what enters an MLP where the rows' answers are given, white; the rows' names bear the marks by turns.

        One (answer tokens, hidden) for each row.
        """
        if not rows:
            return []
        during = None
        if marks is not None:
            places = [[place for some in self.task.named.get(row, ()) for place in some] for row in rows]
            during = marking(self.copy, self.layers.named.out, marks, places)
        behind = self.below(rows) if all(self._begins(row) for row in rows) else None
        found = answered(self.copy, [mlp.gate], rows, during=during, behind=behind)
        return [x @ self.task.ordinary[mlp.layer].whitening for x in found[mlp.gate]]

    def _said(self, row: Row, names: Iterable[str]) -> list[tuple[int, ...]]:
        """Return where names are said in a row."""
        return [self.copy.lm.name_ends(row.ids, name) for name in sorted(names)]

    def _asks_by_name(self, row: Row) -> bool:
        return any(place < len(row.prompt) for some in self.task.named.get(row, ()) for place in some)

    def _begins(self, row: Row) -> bool:
        return len(row.prompt) > len(self.opening) and row.ids[: len(self.opening)] == self.opening

    def weight(self, name: str) -> torch.Tensor:
        return self.copy.model.get_submodule(name).weight  # type: ignore[no-any-return]

    def add(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add B·A to a matrix of the copy, and remember it."""
        self._opening = None
        self.weight(name).data.add_((b @ a).to(self.weight(name)))
        self.changed.append({name: (a.cpu(), b.cpu())})

    @torch.no_grad()
    def take(self, mlp: GatedMlp, n: int, own: Row) -> list[int]:
        """Return n neurons that say nothing, for a row's fact: spare ones, else those that the layer needs least.

        These are silenced, and the free ones make up for them. Which and how: Hassibi and Stork, "Second order
        derivatives for network pruning: Optimal Brain Surgeon", 1992, with the outputs' own squared error.

        Raises:
            EditFailed: so many are not free.
        """
        out, moments = self.weight(mlp.out).float(), self.task.ordinary[mlp.layer].moments
        taken = self.taken[mlp.layer]
        free = torch.tensor([j for j in range(len(moments)) if j not in taken], device=out.device)
        if len(taken) + n > _MOST_TAKEN * len(moments):
            raise EditFailed(
                f"Layer {mlp.layer} has no {n} free neurons left for this fact: {len(taken)} of {len(moments)} hold "
                "others; nothing was changed. Delete facts, or use the editor 'adalora'."
            )
        silent = free[out[:, free].abs().amax(0) <= _SILENT * out.abs().max()]
        if len(silent) >= n:
            return self._given(mlp, silent[:n].tolist(), own)
        inverse = torch.linalg.inv(moments[free][:, free].cpu().double())  # Metal has no such precision
        lost = out[:, free].cpu().double().square().sum(0) / inverse.diagonal()
        places = lost.argsort()[:n]
        rest = torch.ones(len(free), dtype=torch.bool)
        rest[places] = False
        # The block of the inverse says how the others best stand in for those that go.
        stand_in = -torch.linalg.solve(inverse[places][:, places], inverse[places][:, rest])
        places, rest = places.to(free.device), rest.to(free.device)
        chosen = free[places].tolist()
        a = torch.zeros(n, len(moments), device=out.device)
        a[:, free[rest]] = stand_in.float().to(out.device)
        a[torch.arange(n), free[places]] = -1.0
        self.add(mlp.out, a, out[:, free[places]].contiguous())
        return self._given(mlp, chosen, own)

    def _given(self, mlp: GatedMlp, places: list[int], own: Row) -> list[int]:
        self.taken[mlp.layer] |= set(places)
        self.owned.setdefault(own.answer, {}).setdefault(mlp.layer, []).extend(places)
        return places

    @torch.no_grad()
    def put(
        self, mlp: GatedMlp, places: Sequence[int], gates: torch.Tensor, ups: torch.Tensor, columns: torch.Tensor
    ) -> None:
        """Give neurons their new job: gates and ups (n, hidden) in white coordinates, columns (n, hidden)."""
        white = self.task.ordinary[mlp.layer].whitening
        at = torch.tensor(places, device=white.device)
        for name, rows in ((mlp.gate, gates), (mlp.up, ups)):
            weight = self.weight(name)
            self.add(name, rows @ white - weight[at].float(), _one_hot(at, len(weight)).T.contiguous())
        self.add(mlp.out, _one_hot(at, self.weight(mlp.out).shape[1]), columns.T.contiguous())


@contextmanager
def _work(copy: ComputeCopy, task: EditTask) -> Iterator[_Work]:
    """Open the copy for one session; its weights come back whatever happens."""
    layers = neuron_layers(copy.model)
    if any(is_transposed(copy.model.get_submodule(name)) for mlp in layers.all for name in (mlp.gate, mlp.out)):
        raise ConfigError("The editor 'neurons' does not know matrices that are stored transposed; use another.")
    taken = {mlp.layer: set(task.taken.get(mlp.layer, ())) for mlp in layers.all}
    opening = copy.common_opening([*task.rows, *task.augmented, *task.apart, *task.replay, *task.begun, *task.stated])
    work = _Work(copy, layers, task, taken, opening.ids if opening else (), _opening=opening)
    before = {name: work.weight(name).detach().clone() for mlp in layers.all for name in (mlp.gate, mlp.up, mlp.out)}
    try:
        yield work
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                work.weight(name).data.copy_(weight)


@dataclass(frozen=True)
class _Read:
    """What the rows of a fact look like where its answer is given.

    Attributes:
        rows: Those of the fact, then the further ones.
        lower: What enters the layer, per row.
        opening: What all of them begin with, run once; None where that is short.
        said: What enters the MLP before each token of the answer, white: (rows, answer, hidden).
        leads: By how much each token leads now, (rows, answer).
        before: What enters the MLP at each row's earlier tokens, those that all rows begin with left out: (tokens,
            hidden).
        length: Median length of the residual stream where the answers are given.
    """

    rows: list[Row]
    lower: list[torch.Tensor]
    opening: Opening | None
    said: torch.Tensor
    leads: torch.Tensor
    before: torch.Tensor
    length: float


def _teach(
    work: _Work,
    rows: Sequence[Row],
    further: Sequence[Row],
    config: EditConfig,
    records: list[StepRecord],
    on_step: Callable[[StepRecord], None] | None,
) -> bool:
    """Teach one fact, and return whether it is in."""
    mlp = min(work.layers.said, key=lambda mlp: (len(work.taken[mlp.layer]), mlp.layer))
    ordinary = work.task.ordinary[mlp.layer]
    elsewhere = work.elsewhere(mlp, rows[0])
    with work.only(mlp):
        read = _read(work, mlp, [*rows, *further])
        # Of the first token always: asked in other words the model may begin otherwise.
        needed = [i for i in range(read.leads.shape[1]) if i == 0 or bool((read.leads[:, i] < _SURE).any())]
        inside = [read.said[:, i] for i in needed]
        ended = [work.others(ordinary)]
        if mlp.layer in work.task.marked:
            ended.append(work.others(ordinary, work.task.marked[mlp.layer] @ ordinary.whitening))
        outside = [(x, _APART_WEIGHT) for x in (*ended, *elsewhere)]
        outside.append((read.before, _OWN_WEIGHT))
        if mistaken := work.mistaken(mlp, read.rows):
            # Not where the answer begins: there questions about other names with other marks do for that.
            outside.append((torch.cat([x[1:] for x in mistaken]), _MISTAKEN_WEIGHT))
        means = torch.stack([x.mean(0) for x in inside])
        ups = means / means.square().sum(1, keepdim=True)  # 1 on average inside, next to nothing elsewhere
        early = torch.tensor([i < _BEGINNING for i in needed], device=ups.device)
        quiet = torch.where(early, _QUIET, _MARGIN)
        gates = _gates(inside, ordinary, outside, quiet=quiet, usually=_ORDINARY_QUIET) + _SOONER * ordinary.one
        job = _Job(mlp, work.take(mlp, len(needed), rows[0]), needed, gates, ups, early, ordinary)
        recalled = _columns(work, read, len(rows), job, config, records, on_step)
    work.put(job.mlp, job.places, job.gates, job.ups, job.columns.detach())
    return recalled


@dataclass
class _Job:
    """New neurons of one layer: white gates and ups (n, hidden), and what they write, (n, hidden).

    `tokens` are the places in the answer that each says one of, `early` whether that is of its beginning, (n,).
    """

    mlp: GatedMlp
    places: list[int]
    tokens: list[int]
    gates: torch.Tensor
    ups: torch.Tensor
    early: torch.Tensor
    ordinary: Ordinary
    columns: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.columns = torch.zeros_like(self.gates)


@torch.no_grad()
def _read(work: _Work, mlp: GatedMlp, rows: list[Row]) -> _Read:
    copy = work.copy
    opening, entered = work.below(rows)
    lower = copy.lower_states([row.ids for row in rows], opening, entered)
    start = len(opening or ())
    n = len(rows[0].answer)
    said, led = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
    before: list[torch.Tensor] = []
    for batch in _batches(rows):
        caught: dict[str, torch.Tensor] = {}
        with copy.caught([mlp.gate], caught):
            states = copy.answer_states([(lower[i], rows[i]) for i in batch], opening)
        targets = torch.tensor([t for i in batch for t in rows[i].answer], device=states.device)
        for i, mine in zip(batch, _leads(copy, states, targets).view(len(batch), n), strict=True):
            led[i] = mine
        x = caught[mlp.gate].float() @ work.task.ordinary[mlp.layer].whitening
        for place, i in enumerate(batch):
            end = len(rows[i].prompt) - 1 - start
            said[i] = x[place, end : end + n]
            before.append(x[place, :end])
    lengths = torch.cat([states[-n:].float().norm(dim=-1).cpu() for states in lower])
    return _Read(rows, lower, opening, torch.stack(said), torch.stack(led), torch.cat(before), float(lengths.median()))


def _batches(rows: Sequence[Row]) -> list[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    return [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]


def _leads(copy: ComputeCopy, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the lead of each target, a few tokens' logits at a time."""
    parts = zip(states.split(_READ_TOKENS), targets.split(_READ_TOKENS), strict=True)
    return torch.cat([leads(copy.logits(some), wanted) for some, wanted in parts])


def _capped(gates: torch.Tensor, ordinary: Ordinary) -> torch.Tensor:
    """Return two gates for each, which differ by the ceiling only, those that read less last.

    What the second puts out, taken off what the first does, is the ceiling wherever both fire.
    """
    steep = _STEEP * gates - _THRESHOLD * ordinary.one
    return torch.cat([steep, steep - _CEILING * ordinary.one])


def _gates(
    inside: Sequence[torch.Tensor],
    ordinary: Ordinary,
    outside: Sequence[tuple[torch.Tensor, float]],
    *,
    quiet: torch.Tensor | float,
    usually: float,
    exactly: bool = False,
) -> torch.Tensor:
    """Train one gate for each set of inputs (n, hidden), all white; return (gates, hidden).

    Each is to read at least the margin inside, or exactly that, at most minus what is `quiet`, (gates,) or one number,
    outside, and minus `usually` on ordinary inputs: squared distances to that are made small, by the quasi-Newton
    method of Nocedal, "Updating Quasi-Newton Matrices with Limited Storage", 1980, preconditioned with what curvature
    the gates have in common. Of the ordinary inputs a sample comes first; then those that are read most, of them and
    of the others.
    """

    def missed(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        short = _MARGIN - x @ gate
        return (short if exactly else short.relu()).square().mean()

    one = ordinary.one
    means = torch.stack([x.mean(0) for x in inside])
    start = means - (means @ one / (one @ one))[:, None] * one
    start = start / (start * means).sum(1, keepdim=True).clamp(min=1e-6) * 2 * _MARGIN - _MARGIN * one
    gates = start.detach()
    inputs = _unlike(ordinary.inputs.float(), torch.cat(list(inside)))
    silent: list[tuple[torch.Tensor, float, torch.Tensor | float]] = [(inputs[:_SAMPLE], _ORDINARY_WEIGHT, usually)]
    silent += [(x[:: -(-len(x) // _SAMPLE_OUTSIDE)], weight, quiet) for x, weight in outside if len(x)]

    def fit(gates: torch.Tensor, steps: int) -> torch.Tensor:
        # In coordinates where what curvature they have in common is 1, few steps do.
        common = _curvature(inside, silent, gates)

        def even(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.linalg.solve_triangular(common, x.T, upper=False).T
            return found

        def plain(gates: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.linalg.solve_triangular(common, gates, upper=False, left=False)
            return found

        own = [even(x) for x in inside]
        other = [(even(x), weight, below) for x, weight, below in silent]
        evened = (gates @ common).requires_grad_()
        optimizer = torch.optim.LBFGS([evened], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            read = torch.stack([missed(x, gate) for x, gate in zip(own, evened, strict=True)])
            total = read.sum() + _DECAY * plain(evened).square().sum()
            total = total + sum(weight * _over(x, evened, below) for x, weight, below in other)
            total.backward()
            return total

        optimizer.step(loss)
        return plain(evened.detach())

    for steps in _GATE_STEPS:
        gates = fit(gates, steps)
    hard: list[tuple[torch.Tensor, int, torch.Tensor | float]] = [(inputs, _HARD, usually)]
    if any(len(x) for x, _ in outside):
        hard.append((torch.cat([x for x, _ in outside]), _HARD_OUTSIDE, quiet))
    for _ in range(_HARD_ROUNDS if len(inputs) > _SAMPLE else 0):
        for x, n, below in hard:
            most = (x @ gates.T + below).amax(1)
            silent.append((x[most.topk(min(n, len(x))).indices], _HARD_WEIGHT, below))
        gates = fit(gates, _HARD_STEPS)
    return gates


def _curvature(
    inside: Sequence[torch.Tensor],
    silent: Sequence[tuple[torch.Tensor, float, torch.Tensor | float]],
    gates: torch.Tensor,
) -> torch.Tensor:
    """Return the lower Cholesky factor, (hidden, hidden), of the mean second derivative, halved, of what gates miss."""
    found = _DECAY * torch.eye(gates.shape[1], device=gates.device)
    for x in inside:
        found += x.T @ x / (len(x) * len(inside))
    for x, weight, below in silent:
        share = ((x @ gates.T + below) > 0).float().mean(1)  # of the gates that read it
        read = share.nonzero()[:, 0]
        found += (x[read] * (share[read] * weight / len(x))[:, None]).T @ x[read]
    factor: torch.Tensor = torch.linalg.cholesky(decomposable(found))
    return factor.to(gates.device)


def _unlike(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the inputs (n, hidden) that are not among the fact's own: the preservation set may ask about it, too."""
    known = F.normalize(own, dim=1)
    alike = torch.cat([(F.normalize(some, dim=1) @ known.T).amax(1) for some in x.split(_SAMPLE)])
    return x[alike < _ALIKE]


def _over(x: torch.Tensor, gates: torch.Tensor, below: torch.Tensor | float) -> torch.Tensor:
    """Return the squared distances of x (n, hidden) from where gates read minus that: a mean per gate, summed."""
    return (x @ gates.T + below).relu().square().mean(0).sum()


def _columns(
    work: _Work,
    read: _Read,
    n_rows: int,
    job: _Job,
    config: EditConfig,
    records: list[StepRecord],
    on_step: Callable[[StepRecord], None] | None,
) -> bool:
    """Train what the new neurons write, until every token of the rows leads by the margin; return whether it does."""
    copy, rng = work.copy, random.Random(f"{work.task.seed}/{len(records)}")
    job.columns = _start(copy, read, job)
    job.columns.requires_grad_()
    longest = _LONGEST * read.length / _MARGIN
    answer = torch.tensor(read.rows[0].answer, device=read.leads.device)
    n = max(1, min(_ROWS, _STEP_TOKENS // len(answer)))
    ok = [False] * len(read.rows)
    least = config.margin + _SPARE
    with _firing(copy, job):
        for step in range(1, config.max_steps + 1):
            if step == _LOOK + 1:
                with torch.no_grad():
                    ok = _recalled(copy, read, range(len(ok)), least)
            pending = [i for i, done in enumerate(ok) if not done]
            done = [i for i, held in enumerate(ok) if held]
            rng.shuffle(pending)
            rng.shuffle(done)
            batch = (pending[: n - 1] + done[:1] + pending[n - 1 :] + done[1:])[:n]
            states = copy.answer_states([(read.lower[i], read.rows[i]) for i in batch], read.opening)
            logits, targets = copy.logits(states), answer.repeat(len(batch))
            lead = leads(logits.detach(), targets).view(len(batch), -1)
            losses = F.cross_entropy(logits, targets, reduction="none").view_as(lead)
            if not bool(torch.isfinite(losses).all()):
                raise EditFailed(f"The loss was not finite at step {step}; nothing was changed. Try another seed.")
            for i, mine in zip(batch, lead, strict=True):
                ok[i] = bool((mine >= least).all())
            rows_ok = sum(ok[:n_rows]) / n_rows
            loss = float(losses.detach().mean())
            records.append(StepRecord(len(records) + 1, loss, rows_ok, None, 0.0, len(job.places)))
            if on_step is not None:
                on_step(records[-1])
            if rows_ok == 1.0 and sum(ok[n_rows:]) >= _ENOUGH * len(ok[n_rows:]):
                with torch.no_grad():
                    again = _recalled(copy, read, range(n_rows), least)
                if all(again):
                    return True
                ok[:n_rows] = again
            short = (least + config.margin - lead).clamp(min=0)
            # The lead over all others together, which cross-entropy tells: -log(exp(loss) - 1).
            behind = losses.clamp(min=1e-4)
            ahead = -(behind + (-(-behind).expm1()).log())
            (gradient,) = torch.autograd.grad(ahead[short > 0].sum(), job.columns)
            # If leads were linear in a column, a step would make good what its token lacks on average over the rows;
            # what tokens without a neuron lack is shared out.
            lacking = short.sum(0)[job.tokens]
            lacking = (lacking + (short.sum() - lacking.sum()) / len(job.tokens))[:, None]
            by = lacking * gradient / gradient.square().sum(1, keepdim=True).clamp(min=1e-12)
            with torch.no_grad():
                job.columns += by * (longest / by.norm(dim=1, keepdim=True).clamp(min=longest))
        with torch.no_grad():
            return all(_recalled(copy, read, range(n_rows), config.margin))


@torch.no_grad()
def _start(copy: ComputeCopy, read: _Read, job: _Job) -> torch.Tensor:
    """Return columns, (n, hidden), that point where the output matrix reads their tokens."""
    output = copy.model.get_output_embeddings().weight.float()
    answer = torch.tensor(read.rows[0].answer, device=output.device)
    toward = F.normalize(output[answer] - output.mean(0), dim=1)
    return toward[job.tokens] * (_START * read.length / _MARGIN)


def _recalled(copy: ComputeCopy, read: _Read, places: Sequence[int], margin: float) -> list[bool]:
    """Say of each row whether all its tokens lead by the margin now."""
    found = []
    for start in range(0, len(places), _BATCH):
        some = places[start : start + _BATCH]
        states = copy.answer_states([(read.lower[i], read.rows[i]) for i in some], read.opening)
        targets = torch.tensor([t for i in some for t in read.rows[i].answer], device=states.device)
        found += [bool((lead >= margin).all()) for lead in _leads(copy, states, targets).view(len(some), -1)]
    return found


@contextmanager
def _firing(copy: ComputeCopy, job: _Job) -> Iterator[None]:
    """Let the new neurons fire while this is open, though no weight has them yet; in training some of them faintly."""
    entered: dict[str, torch.Tensor] = {}
    act = _activation(copy, job.mlp)

    def add(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        x = entered[job.mlp.gate].float() @ job.ordinary.whitening
        fired = act(x @ job.gates.T) * (x @ job.ups.T)
        if torch.is_grad_enabled():
            lost = torch.rand(len(x), *(1,) * (x.dim() - 2), fired.shape[-1], device=x.device) * job.early
            fired = fired * (1 - (1 - _FAINT) * lost)
        return output + (fired @ job.columns).to(output.dtype)

    with copy.caught([job.mlp.gate], entered):
        handle = copy.model.get_submodule(job.mlp.out).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _activation(copy: ComputeCopy, mlp: GatedMlp) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the gate's activation function: what the MLP calls so, else SiLU, which most have."""
    parent = copy.model.get_submodule(mlp.gate.rpartition(".")[0])
    found = getattr(parent, "act_fn", None)
    return found if callable(found) else F.silu


def _one_hot(places: torch.Tensor, width: int) -> torch.Tensor:
    """Return (n, width), a one in each row."""
    return F.one_hot(places, width).float()
