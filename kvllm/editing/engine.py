"""The loaded model at one state of the ledger: replay, snapshots, training, drift. Holds everything that needs torch.

`KnowledgeBase` decides what happens and what is committed; this module moves weights and measures them.

    engine = Engine.load(store, ModelConfig(), EditConfig(), None)
    engine.follow(store.head())
"""

from __future__ import annotations

import math
import os
import platform
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from kvllm.config import ADALORA, AUTO, NEURONS, EditConfig, ModelConfig
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.contrast import contrast_questions, name_asked
from kvllm.editing.delta import (
    AdaptedWeights,
    Delta,
    Factors,
    check_finite,
    check_norm,
    concatenate,
    from_files,
    hand_changed,
    product,
)
from kvllm.editing.editor import EditTask, StepRecord, Training
from kvllm.editing.editors import EDITORS
from kvllm.editing.inputs import input_whitening
from kvllm.editing.marks import learned_marks, marked_ends
from kvllm.editing.neurons import has_spare, neuron_layers, part_of, taken_neurons
from kvllm.editing.ordinary import Ordinary, ordinary_inputs, wordings
from kvllm.editing.parts import Part, Places
from kvllm.editing.preservation import PreservationPool, PreservedItem, Prompt, build_pool, prepare_items
from kvllm.errors import BaseMismatch, ConfigError, Corrupt, ModelError, Untrusted
from kvllm.lm.model import LanguageModel, Row, shared_length
from kvllm.lm.registry import MODELS
from kvllm.lm.sources import ModelFiles, resolve
from kvllm.lm.targets import find_targets
from kvllm.probing.drift import DriftReference, base_reference, measure_drift
from kvllm.probing.encoder import HiddenStateEncoder
from kvllm.probing.runner import SPARE_TOKENS, ask_probes
from kvllm.probing.suites import DriftSuite, Probe, drift_suite
from kvllm.prompts import (
    alias_questions,
    asked_questions,
    augmented_questions,
    follow_ups,
    held_out_questions,
    language_of,
    other_questions,
    own_questions,
    telling_names,
)
from kvllm.records import Fact, Metric, Progress, Report, StoredFact
from kvllm.store import Store

# Further questions of a fact, and of many together.
_AUGMENTED = 32
_MOST_AUGMENTED = 192
# Of an edit's older facts: the nearest, with some questions each, and others at random, with one.
_REPLAYED_NEAR = 24
_QUESTIONS_PER_NEAR_FACT = 2
_REPLAYED_OTHERS = 72
# Beginnings of older facts' answers, and how long each is.
_MOST_BEGUN = 96
_BEGUN_TOKENS = 2
_MOST_RESTING = 96  # questions of older facts whose names bear one mark
_CONTRASTS = 16
_MOST_CONTRASTS = 64
_APART = 32
# Of a fact: conversations and prompts that state it before they ask something else, other questions about its name.
_FOLLOWED = 5
_TOLD = 3
_OTHERWISE = 6
_REPLY_TOKENS = 6  # of what the weights say to these
_RECITED_TOKENS = 8  # longer texts have a beginning of their own, and are not learned against this
Tick = Callable[..., None]
# Of which model and layers; what usually enters these, the marks, and what enters where marked questions end.
_Usual = tuple[tuple[Any, ...], Mapping[int, Ordinary], torch.Tensor, dict[int, torch.Tensor]]


class Engine:
    """One model in memory, bound to one store."""

    def __init__(
        self, store: Store, files: ModelFiles, lm: LanguageModel, progress: Callable[[Progress], None] | None
    ) -> None:
        self.store = store
        self.files = files
        self.lm = lm
        masters = getattr(torch, lm.config.masters)
        self.weights = AdaptedWeights(lm.model, base_digest=store.base.digest, masters=masters)
        self.head = 0
        self._progress = progress
        self._model: str | None = None
        self._copy: ComputeCopy | None = None
        self._pool: tuple[tuple[Any, ...], PreservationPool, dict[str, torch.Tensor]] | None = None
        self._ordinary: _Usual | None = None
        self._references: dict[str, DriftReference] = {}
        self._drift: dict[tuple[str, bool, str, frozenset[int]], Report] = {}
        self._away = 0
        self._sure = True

    @classmethod
    def load(
        cls,
        store: Store,
        config: ModelConfig,
        edit: EditConfig,
        progress: Callable[[Progress], None] | None,
        model: str | None = None,
    ) -> Engine:
        """Resolve and load the pinned base model.

        Args:
            store: Whose base model it is.
            config, edit: How it is held in memory, and trained.
            progress: Called while it takes time.
            model: Where the pinned files lie now; by default where they were when they were pinned.

        Raises:
            BaseMismatch: its files are not those that were pinned.
            ModelError: they cannot be found or loaded.
        """
        files = resolve_pinned(store, progress, model=model)
        if progress is not None:
            progress(Progress("model", note="loading"))
        engine = cls(store, files, LanguageModel.load(files.path, config), progress)
        engine._model = model
        return engine

    # ------------------------------------------------------------------ states

    def follow(self, head: int) -> None:
        """Bring the weights to the ledger's head, if they are elsewhere, or if an interruption left that open.

        Whoever holds them `away` keeps them: another process that commits meanwhile is followed afterwards.
        """
        if not self._away and (head != self.head or not self._sure):
            self.load_state(head)
            self.head = head
            self._sure = True

    def leave(self) -> None:
        """Hold the base's weights, where the head's state cannot be had and is to be left behind."""
        self.weights.replay([])
        self.head = 0
        self._sure = True

    def check_weights(self) -> None:
        """Refuse the head's weights where somebody has changed them since they were handed out.

        Raises:
            ModelError: naming the first such parameter.
        """
        if not self.weights.sealed:
            return
        changed = self.weights.changed_by_hand()
        recorded = self.store.edit(self.head).weights_digest if self.head else None
        if not changed and recorded is not None and self.weights.digest() != recorded:
            changed = list(self.weights.touched)
        if changed:
            raise hand_changed(changed)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Say that the weights may differ from the head's while this is open.

        Whoever leaves without `settle` (a second Ctrl-C, say, while the weights are being put back) makes the next use
        replay the ledger.
        """
        self._sure = False
        self._away += 1
        try:
            yield
        finally:
            self._away -= 1

    def settle(self) -> None:
        """Say that the weights are those of `head` again, whole."""
        self._sure = True

    def load_state(self, edit_id: int) -> None:
        """Set the weights to an edit's state by replay, and check them against the recorded digest.

        Raises:
            Corrupt: a delta is damaged, or the replay gives other weights than were recorded.
        """
        self._replay(edit_id)
        if edit_id:
            recorded = self.store.edit(edit_id).weights_digest
            if recorded is not None and self.weights.digest() != recorded:
                # A damaged snapshot is caught by its hash; this is the last net, so replay without any.
                self._replay(edit_id, snapshots=False)
                if self.weights.digest() != recorded:
                    raise Corrupt(
                        f"Replaying edit {edit_id} gives other weights than were recorded, so it was not used; "
                        f"run `kvllm verify --deep`."
                    )

    def replayed_digest(self, edit_id: int) -> str:
        """Replay an edit's state from the base, without snapshots, and return the digest; leaves the weights there."""
        self._replay(edit_id, snapshots=False)
        return self.weights.digest()

    def history_delta(self, edit_id: int) -> dict[str, Factors]:
        """Return the exact sum of an edit's history as one delta, ranks concatenated."""
        return concatenate([self._delta(sha) for sha in self.store.chain(edit_id)])

    def taken_back(self, parts: Sequence[Part]) -> dict[str, Factors]:
        """Return the change that takes parts of stored deltas out of the weights again."""
        mlps = neuron_layers(self.lm.model).all
        weights, found = self.weights, []
        for part in parts:
            delta = None if part.sha is None else self._delta(part.sha)

            def change(name: str, delta: Delta | None = delta) -> torch.Tensor | None:
                if delta is None:
                    return (weights.master(name) - weights.base(name)).cpu()  # as stored deltas are
                return product(delta[name]) if name in delta else None

            gone = delta if part.of is None and delta is not None else part_of(change, mlps, part.of or {})
            found += [{name: (a, -b) for name, (a, b) in gone.items()}, part_of(change, mlps, part.kept)]
        return concatenate(found)

    def snapshot_if_due(self, every: int) -> None:
        """Write a snapshot of the head's changed matrices where opening would replay more than `every` deltas."""
        found = self.store.nearest_snapshot(self.head)
        length = len(self.store.chain(self.head)) - (found[2] if found else 0)
        if length <= every or not self.weights.touched:
            return
        from safetensors.torch import save

        masters = {name: self.weights.master(name).contiguous() for name in self.weights.touched}
        self.store.write_snapshot(self.head, save(masters))
        self.store.drop_snapshots(keep=2)

    def check_base_files(self) -> None:
        """Hash every file of the base model again.

        Raises:
            BaseMismatch: one differs from the pinned hash.
        """
        resolve_pinned(self.store, self._progress, model=self._model, verify=True)

    def _replay(self, edit_id: int, *, snapshots: bool = True) -> None:
        chain = self.store.chain(edit_id)
        done = 0
        self.weights.replay([])
        found = self.store.nearest_snapshot(edit_id) if snapshots else None
        if found is not None and self._restore_snapshot(found[0]):
            done = found[2]
        for sha in chain[done:]:
            self.weights.apply(self._delta(sha))

    def _restore_snapshot(self, edit_id: int) -> bool:
        """Set the weights to a snapshot's, if it is one that kvllm can have written; else they stay the base's.

        A snapshot saves time and nothing else: whatever is wrong with one, the deltas are replayed instead.
        """
        data = self.store.read_snapshot(edit_id)
        if data is None:
            return False
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            state = load(data)
            sound = all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in state.values())
            # A delta changes matrices only: nothing else can have been touched.
            if not state or not sound or any(t.dim() != 2 for t in state.values()):
                return False
            self.weights.restore(state)
        except (SafetensorError, Corrupt, Untrusted, ValueError):
            self.weights.replay([])
            return False
        return True

    def _delta(self, sha: str) -> Delta:
        return from_files(self.store.read_delta(sha).files)

    @contextmanager
    def at(self, edit_id: int) -> Iterator[None]:
        """Hold the weights of an edit's state for as long as this is open; those before come back whatever happens.

        Raises:
            Corrupt: the weights that came back are not those that were there.
        """
        digest = self.weights.digest()
        try:
            with self.elsewhere():
                self.load_state(edit_id)
                yield
        finally:
            if self.weights.digest() != digest:
                self.head = -1  # the next use replays the ledger's head
                raise Corrupt(f"The weights could not be put back after edit {edit_id} was looked at; open them again.")

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Let the weights be changed while this is open; those before come back whatever happens."""
        state = self.weights.state()
        outermost = not self._away
        with self.away():
            try:
                yield
            finally:
                self.weights.restore(state)
                if outermost:
                    self.settle()

    @contextmanager
    def base_weights(self) -> Iterator[LanguageModel]:
        """The model with the base's weights, for as long as this is open.

        Raises:
            ModelError: parameters that no edit changes were changed by hand, so these are not the base's.
        """
        if changed := self.weights.changed_by_hand(edited=False):
            raise hand_changed(changed)
        with self.elsewhere():
            self.weights.replay([])
            yield self.lm

    def hidden_encoder(self) -> HiddenStateEncoder:
        """Return the encoder of keys by the base model's own hidden states."""
        return HiddenStateEncoder(self.lm, self.base_weights)

    def base_answers(self, probes: Sequence[Probe]) -> list[str]:
        """Return what the base answers to probes."""
        with self.base_weights() as lm:
            return [answer for answer, _ in ask_probes(lm, probes)]

    # ------------------------------------------------------------------ training

    def check_lengths(self, facts: Sequence[Fact], config: EditConfig) -> None:
        """Refuse texts that are longer than what is trained.

        Raises:
            ConfigError: naming the fact, its tokens and the limit.
        """
        for fact in facts:
            tokens = len(self.lm.text_ids(fact.text))
            if tokens > config.max_text_tokens:
                raise ConfigError(
                    f"The text of {fact.key!r} has {tokens} tokens, and at most {config.max_text_tokens} are trained; "
                    f"nothing was changed. Split it into several facts, or raise max_text_tokens."
                )
            asked = (*asked_questions(fact), *held_out_questions(fact), *alias_questions(fact), *fact.probes)
            needed = max(len(self.lm.prompt_ids(q)) for q in asked) + tokens + SPARE_TOKENS
            if needed > self.lm.max_positions:
                raise ConfigError(
                    f"The fact {fact.key!r} with its questions needs {needed:,} tokens, and the model "
                    f"takes {self.lm.max_positions}; nothing was changed."
                )

    def settled(self, config: EditConfig) -> EditConfig:
        """Return a configuration that names its editor: where it is "auto", what the base model allows."""
        if config.editor != AUTO:
            return config
        return replace(config, editor=NEURONS if has_spare(self.lm.model, self.weights.base) else ADALORA)

    def train(
        self,
        facts: Sequence[Fact],
        config: EditConfig,
        *,
        restore: Sequence[PreservedItem] = (),
        replay: Sequence[StoredFact] = (),
        live: frozenset[str] = frozenset(),
        language: str | None = None,
        tick: Callable[[str], Tick] | None = None,
    ) -> Training:
        """Train a delta on the compute copy from the current weights; the model itself is not touched.

        Args:
            facts: What must be answered.
            config: Of this edit.
            restore: For delete: items that must be as in the base again.
            replay: Older facts that must stay, the likeliest to collide first.
            live: Casefolded names and questions of live facts, and of what is refused, which are not preserved.
            language: Of the key; by default that of the first fact.
            tick: Makes a progress function for a stage.
        """
        config = self.settled(config)
        pool, whitening = self.pool(config, tick)
        copy = self._prepare(config)
        neurons = config.editor == NEURONS
        trained = live | {name.casefold() for f in facts for name in (f.key, *f.aliases, *asked_questions(f))}
        rows = [self.lm.row(q, f.text) for f in facts for q in asked_questions(f)]
        claimed = {item.source.prompt.casefold(): "" for item in restore}
        claimed |= {q.casefold(): f.text for f in facts for q in asked_questions(f)}
        if not neurons and self._changed_below(copy):
            pool, restore = PreservationPool(tuple(_read_now(copy, pool.items))), _read_now(copy, restore)
        task = EditTask(
            rows=rows,
            augmented=[] if restore else self._augmented(facts, config),
            replay=self._older(replay, config.seed, claimed),
            restore=restore,
            language=language or (facts[0].language or language_of(facts[0].key) if facts else "en"),
            excluded=trained,
            contrast=[] if neurons else self._contrast(copy, facts, config, trained),
            recited=[] if neurons else self._recited(copy, pool, facts, config, trained),
            seed=config.seed,
            whitening=whitening,
            **(self._silent(copy, pool, facts, config, trained, tick) if neurons else {}),
            **(self._names(facts, replay, config.seed, claimed) if neurons else {}),
            begun=self._begun(replay, config.seed, claimed) if neurons else (),
        )
        show = tick("training") if tick is not None else None
        width = min(min(copy.model.get_submodule(name).weight.shape) for name in copy.targets.names)
        # Each fact has neurons and steps of its own.
        shared_out = config if neurons else config.shared_among(len(facts), width)
        most_steps = shared_out.max_steps * (len({row.answer for row in rows}) if neurons else 1)

        def on_step(record: StepRecord) -> None:
            if show is not None:
                show(record.step, most_steps, loss=record.loss, recall=record.recall, drift=record.drift)

        try:
            editor = EDITORS[config.editor]()
        except KeyError as error:
            raise ConfigError(f"There is no editor {config.editor!r}; use one of {', '.join(EDITORS)}.") from error
        training = editor.train(copy, pool, task, shared_out, on_step=on_step)
        check_finite(training.delta)
        check_norm(training.delta)
        asked = config.to_dict()
        return replace(
            training,
            in_force={k: v for k, v in shared_out.to_dict().items() if v != asked[k]},
            neurons=self._by_key(facts, training.places),
            rests_on=self._by_key(facts, training.borrowed),
        )

    def _by_key(
        self, facts: Sequence[Fact], by_answer: Mapping[tuple[int, ...], Places]
    ) -> dict[str, dict[str, list[int]]]:
        """Return which neurons are whose; facts with the same text share theirs, and have none of their own."""
        found: dict[tuple[int, ...], list[str]] = {}
        for fact in facts:
            found.setdefault(self.lm.row(asked_questions(fact)[0], fact.text).answer, []).append(fact.key)
        return {
            keys[0]: {str(layer): list(some) for layer, some in by_answer[answer].items()}
            for answer, keys in found.items()
            if len(keys) == 1 and answer in by_answer
        }

    def _changed_below(self, copy: ComputeCopy) -> bool:
        """Say whether an edit of another band changed a layer below this one: what enters it is not the base's."""
        below = tuple(f"{copy.targets.layer_list}.{layer}." for layer in range(copy.targets.first_layer))
        return any(name.startswith(below) for name in self.weights.touched)

    def _augmented(self, facts: Sequence[Fact], config: EditConfig) -> list[Row]:
        """Return rows of further questions about the facts, as far as they fit; fewer of each where there are many."""
        if not config.augmented:
            return []
        n = max(config.augmented, min(_AUGMENTED, _MOST_AUGMENTED // max(1, len(facts))))
        if config.editor == NEURONS:
            n = max(config.augmented, _AUGMENTED)
        else:  # others train a fact with questions of its own on what it was given
            facts = [fact for fact in facts if not fact.questions]
        rows = [self.lm.row(q, f.text) for f in facts for q in augmented_questions(f, n, seed=config.seed)]
        return [row for row in rows if len(row.ids) <= self.lm.max_positions]

    def _older(self, facts: Sequence[StoredFact], seed: int, claimed: Mapping[str, str]) -> list[Row]:
        """Return rows of older facts, nearest first; their questions in rotation, so that over edits all are seen.

        Left out are questions that the edit itself trains to another text (casefolded in `claimed`): what is trained
        to two would be learned as neither.
        """
        others = list(facts[_REPLAYED_NEAR:])
        others = random.Random(f"{seed}/{self.head}").sample(others, min(_REPLAYED_OTHERS, len(others)))
        return [
            self.lm.row(question, fact.text)
            for place, fact in enumerate([*facts[:_REPLAYED_NEAR], *others])
            for question in _rotated(_unclaimed(fact, claimed), self.head + place)[
                : _QUESTIONS_PER_NEAR_FACT if place < _REPLAYED_NEAR else 1
            ]
        ]

    def _begun(self, facts: Sequence[StoredFact], seed: int, claimed: Mapping[str, str]) -> list[Row]:
        """Return the first tokens of older facts' answers, after questions that these were trained on, and others.

        Where an answer begins, the question says what is to be said, and only some of the wordings are replayed.
        """
        asked = self._asked_of(facts, seed, claimed)
        asked = random.Random(f"{seed}/{self.head}").sample(asked, min(_MOST_BEGUN, len(asked)))
        rows = [self.lm.row(question, text) for question, text in asked]
        return [Row(row.prompt, row.answer[:_BEGUN_TOKENS]) for row in rows]

    def _asked_of(self, facts: Sequence[StoredFact], seed: int, claimed: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return the questions that older facts were trained on, and as many others about them, with their texts."""
        asked = []
        for fact in facts:
            own = _unclaimed(fact, claimed)
            further = [q for q in augmented_questions(fact, len(own), seed=seed) if q.casefold() not in claimed]
            asked += [(question, fact.text) for question in (*own, *further)]
        return asked

    def _silent(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        facts: Sequence[Fact],
        config: EditConfig,
        excluded: frozenset[str],
        tick: Callable[[str], Tick] | None,
    ) -> dict[str, Any]:
        """Return what the neurons of an edit must not fire at, and which are taken, as a task has it."""
        layers = neuron_layers(self.lm.model)
        key = (self.store.base.digest, *layers.all, str(copy.dtype))
        if self._ordinary is None or self._ordinary[0] != key:
            with self.base_weights():
                self._load_copy()
                show = tick("preservation") if tick is not None else None
                base, ends = self.store.base.digest, layers.said[:: max(1, len(layers.said) - 1)]
                found = ordinary_inputs(copy, pool, base, layers.all, whole=[layers.named], on_progress=show)
                marks = learned_marks(copy, base, layers.named, ends, found, on_progress=show)
                marked = marked_ends(copy, base, marks, layers.named, layers.said, asked=wordings(), on_progress=show)
            self._load_copy()
            self._ordinary = (key, found, marks, marked)
        n = _APART if config.contrasts else 0
        asked: dict[str, Fact] = {}
        for fact in facts:
            for question, _ in contrast_questions([fact], n, seed=config.seed, excluded=excluded, characters=True):
                asked.setdefault(question, fact)
        apart = [Row(tuple(self.lm.prompt_ids(question)), ()) for question in asked]
        beside: dict[Row, tuple[int, ...]] = {}
        named: dict[Row, tuple[tuple[int, ...], ...]] = {}
        for row, (question, fact) in zip(apart, asked.items(), strict=True):
            beside[row] = self.lm.row(question, fact.text).answer
            name = name_asked(question)
            if name is not None:
                named[row] = (self.lm.name_ends(row.ids, name),)
        stated: list[Row] = []
        for fact in facts if config.contrasts else ():
            found_rows = self._stated(copy, fact, config.seed)
            beside |= dict.fromkeys(found_rows, self.lm.row(fact.key, fact.text).answer)
            stated += found_rows
        for fact in facts:
            further = augmented_questions(fact, max(_AUGMENTED, config.augmented), seed=config.seed)
            for question in (*asked_questions(fact), *further):
                row = self.lm.row(question, fact.text)
                named[row] = tuple(self.lm.name_ends(row.ids, name) for name in telling_names(fact))
        return {
            "apart": apart,
            "stated": stated,
            "beside": beside,
            "ordinary": self._ordinary[1],
            "marks": self._ordinary[2],
            "marked": self._ordinary[3],
            "named": named,
            "taken": taken_neurons(layers.all, self.weights.master, self.weights.base),
        }

    def _names(
        self, facts: Sequence[Fact], live: Sequence[StoredFact], seed: int, claimed: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return by which names facts are known, and what live facts' neurons mark, as a task has it."""
        layer = str(neuron_layers(self.lm.model).named.layer)
        known: dict[tuple[int, ...], frozenset[str]] = {}
        for fact in facts:
            answer = self.lm.row(fact.key, fact.text).answer
            known[answer] = known.get(answer, frozenset()) | _known_by(fact)
        lent: dict[tuple[int, ...], Sequence[int]] = {}
        marked: list[tuple[StoredFact, frozenset[int]]] = []
        trainings: dict[int, Mapping[str, Any]] = {}
        for other in live:
            if other.edit_id not in trainings:
                trainings[other.edit_id] = self.store.edit(other.edit_id).config.get("training", {})
            training = trainings[other.edit_id]
            for of in ("neurons", "rests_on"):
                if places := training.get(of, {}).get(other.key, {}).get(layer):
                    marked.append((other, frozenset(places)))
                    theirs = _known_by(other)
                    lent |= {
                        answer: places for answer, names in known.items() if answer not in lent and names <= theirs
                    }

        def resting(neurons: frozenset[int]) -> list[Row]:
            asked = self._asked_of([fact for fact, places in marked if places & neurons], seed, claimed)
            asked = random.Random(f"{seed}/{self.head}").sample(asked, min(_MOST_RESTING, len(asked)))
            return [self.lm.row(question, text) for question, text in asked]

        return {"known_by": known, "lent": lent, "resting": resting}

    def _stated(self, copy: ComputeCopy, fact: Fact, seed: int) -> list[Row]:
        """Return conversations and prompts in which a fact was stated, or its name said, and something else is asked.

        Each row's prompt is what was stated, its answer all that follows, up to what the weights say to it now.
        """
        said = follow_ups(fact, _FOLLOWED + _TOLD, seed=seed)
        questions = asked_questions(fact)
        found: list[tuple[Sequence[int], list[int]]] = []  # what was stated, and what is asked
        for place, follow_up in enumerate(said[:_FOLLOWED]):
            question = questions[place % len(questions)]
            turns = (("user", question), ("assistant", fact.text), ("user", follow_up))
            with suppress(ModelError):  # a chat template may know single questions only
                asked = self.lm.prompt_ids([{"role": role, "content": text} for role, text in turns])
                found.append((self.lm.row(question, fact.text).ids, asked))
        for follow_up in said[_FOLLOWED:]:
            found.append((self.lm.prompt_ids(fact.text), self.lm.prompt_ids(f"{fact.text}\n{follow_up}")))
        for question in other_questions(fact, _OTHERWISE, seed=seed):
            asked = self.lm.prompt_ids(question)
            found.append((asked, asked))
        found = [(before, asked) for before, asked in found if len(asked) + _REPLY_TOKENS <= self.lm.max_positions]
        replies = copy.generate_ids([tuple(asked) for _, asked in found], _REPLY_TOKENS)
        answer = self.lm.row(fact.key, fact.text).answer
        rows = []
        for (before, asked), reply in zip(found, replies, strict=True):
            if shared_length([reply, answer]) > 1:  # the model says it again of itself
                reply = reply[:0]
            start = shared_length([before, asked])
            rows.append(Row(tuple(asked[:start]), (*asked[start:], *reply)))
        return rows

    def _contrast(
        self, copy: ComputeCopy, facts: Sequence[Fact], config: EditConfig, excluded: frozenset[str]
    ) -> list[PreservedItem]:
        """Return the facts' own questions about other names, with what the weights say to them now."""
        if not config.contrasts:
            return []
        n = max(_CONTRASTS, min(2 * len(facts), _MOST_CONTRASTS))
        asked = contrast_questions(facts, n, seed=config.seed, excluded=excluded)
        rows = self._answered_now(copy, [question for question, _ in asked], config.preserve_tokens)
        return prepare_items(copy, rows, [Prompt("neighbour", question, language) for question, language in asked])

    def _answered_now(self, copy: ComputeCopy, questions: Sequence[str], tokens: int) -> list[Row]:
        """Return questions with up to so many tokens of what the weights say to them now."""
        ids = [tuple(self.lm.prompt_ids(question)) for question in questions]
        return [Row(prompt, answer) for prompt, answer in zip(ids, copy.generate_ids(ids, tokens), strict=True)]

    def _recited(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        facts: Sequence[Fact],
        config: EditConfig,
        excluded: frozenset[str],
    ) -> list[PreservedItem]:
        """Return other questions, answered with the facts' short texts, and what the weights expect after each token.

        A short text is learned as a chain that other answers can fall into: "A", then "riel", where "A" begins many.
        """
        texts = [ids for fact in facts if len(ids := self.lm.answer_ids(fact.text)) <= _RECITED_TOKENS]
        if not config.recited or not texts:
            return []
        others = [
            item
            for item in pool.items
            if item.source.kind != "text"
            and item.source.prompt.casefold() not in excluded
            and item.source.name.casefold() not in excluded
        ]
        n = max(_CONTRASTS, min(2 * len(texts), _MOST_CONTRASTS))
        asked = random.Random(config.seed).sample(others, min(n, len(others)))
        rows = [Row(item.row.prompt, tuple(texts[i % len(texts)])) for i, item in enumerate(asked)]
        return prepare_items(copy, rows, [item.source for item in asked])

    def training_copy(self, config: EditConfig) -> ComputeCopy:
        """Return the copy that edits of this configuration train on, holding the current weights."""
        return self._prepare(config)

    @torch.no_grad()
    def recites(self, rows: Sequence[Row], config: EditConfig, *, batch_size: int = 16) -> list[bool]:
        """Say of each row whether every token of its answer is the greedy choice now, on the fast training copy."""
        copy = self._prepare(config)
        lower = copy.lower_states([row.ids for row in rows])
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        found = [False] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            states = copy.answer_states([(lower[i], rows[i]) for i in batch])
            for i, mine in zip(batch, states.split([len(rows[i].answer) for i in batch]), strict=True):
                greedy = copy.logits(mine).argmax(-1).tolist()
                found[i] = tuple(greedy) == rows[i].answer
        return found

    def base_items(
        self, questions: Sequence[str], held_out: Sequence[str], tokens: int, config: EditConfig
    ) -> tuple[list[PreservedItem], list[str]]:
        """Return all questions as items with the base's outputs, those to train first, and the base's answers."""
        with self.base_weights():
            copy = self._prepare(config)
            asked = [*questions, *held_out]
            ids = [tuple(self.lm.prompt_ids(q)) for q in asked]
            answers = self.lm.generate_ids(ids, max_new_tokens=tokens)
            rows = [Row(i, a) for i, a in zip(ids, answers, strict=True)]
            items = prepare_items(copy, rows, [Prompt("question", q, language_of(q)) for q in asked])
        return items, [self.lm.decode(a) for a in answers]

    def kl_from(self, items: Sequence[PreservedItem]) -> list[float]:
        """Return the mean KL(base‖now) per answer token of each item, in nats, in the weights as they are."""
        now = self.lm.answer_states([item.row for item in items])
        return [kl for kl, _ in self.lm.compare([item.output for item in items], now)]

    def pool(
        self, config: EditConfig, tick: Callable[[str], Tick] | None = None
    ) -> tuple[PreservationPool, dict[str, torch.Tensor]]:
        """Return this base model's preservation pool and input whitening, from the cache or made now."""
        config = self.settled(config)
        copy = self._copy_for(config)
        key = (copy.targets.names, config.preserve_tokens, config.input_ridge, str(copy.dtype))
        if self._pool is None or self._pool[0] != key:
            with self.base_weights():
                self._load_copy()
                show = tick("preservation") if tick is not None else None
                pool = build_pool(copy, self.store.base.digest, config, on_progress=show)
                ridge = 0.0 if config.editor == NEURONS else config.input_ridge
                whitening = input_whitening(copy, pool, self.store.base.digest, ridge=ridge)
            self._pool = (key, pool, whitening)
        return self._pool[1], self._pool[2]

    def _copy_for(self, config: EditConfig) -> ComputeCopy:
        """Return the compute copy with this configuration's targets, holding whatever weights it held."""
        config = self.settled(config)
        if config.editor == NEURONS:
            targets = neuron_layers(self.lm.model).targets(self.lm.model)
        else:
            targets = find_targets(self.lm.model, depth=config.depth, modules=config.modules)
        if self._copy is None:
            self._copy = ComputeCopy(self.lm, targets)
        self._copy.targets = targets
        return self._copy

    def _prepare(self, config: EditConfig) -> ComputeCopy:
        """Return the compute copy for this configuration, holding the current weights."""
        copy = self._copy_for(config)
        self._load_copy()
        return copy

    def _load_copy(self) -> None:
        assert self._copy is not None
        self._copy.load({name: self.weights.master(name) for name in self.weights.known})

    # ------------------------------------------------------------------ drift

    def drift(
        self,
        *,
        full: bool,
        suite: DriftSuite | None = None,
        taught: Sequence[Fact] | None = None,
        tick: Tick | None = None,
    ) -> Report:
        """Measure drift of the weights as they are; the same weights are measured once.

        Args:
            full: The whole suite, with live answers and the norm of each matrix' change; else the gate's share.
            suite: The gate's suite by default.
            taught: Facts whose own questions are no unrelated knowledge and are left out: those stored at the engine's
                head by default.
            tick: Called with (done, total).
        """
        suite = suite or drift_suite()
        facts = self.store.facts(self.head) if taught is None else taught
        own = own_questions([q.question for q in suite.questions], facts)
        # A full report is asked for by a person, who may have changed the model by hand: then every weight counts.
        key = (self.lm.digest() if full else self.weights.digest(), full, suite.name, own)
        if key not in self._drift:
            reference = self._drift_reference(suite, tick)
            report = measure_drift(self.lm, reference, full=full, own=own, on_batch=tick)
            if full:
                report = replace(report, metrics={**report.metrics, **self._norms()})
            self._drift[key] = report
            if len(self._drift) > 8:
                del self._drift[next(iter(self._drift))]
        return self._drift[key]

    def _norms(self) -> dict[str, Metric]:
        norms = self.weights.change_norms()
        protocol = "Frobenius norm of the weights now less the base's"
        total = math.sqrt(sum(value * value for value in norms.values()))
        found = {"change_norm": Metric(total, len(norms), f"{protocol}, all changed matrices together")}
        return found | {f"change_norm/{name}": Metric(value, 1, protocol) for name, value in norms.items()}

    def drift_before(self, taught: Sequence[Fact]) -> tuple[float, float]:
        """Return (drift_kl, ppl_ratio) of the head's state: as recorded, (0, 1) for the base, else measured now.

        Args:
            taught: What facts answer is left out where it is measured.
        """
        state = self.head
        while state and (edit := self.store.edit(state)).op == "rollback":
            state = edit.target or 0
        if not state:
            return (0.0, 1.0)
        report = edit.report
        if report.value("drift_kl") is None or report.value("ppl_ratio") is None:
            with self.at(state):
                report = self.drift(full=False, taught=taught)
        kl, ratio = report.value("drift_kl"), report.value("ppl_ratio")
        return (kl or 0.0, ratio or 1.0)

    def _drift_reference(self, suite: DriftSuite, tick: Tick | None) -> DriftReference:
        if suite.name not in self._references:
            self._references[suite.name] = base_reference(
                self.lm, self.store.base.digest, suite, at_base=self.base_weights, on_progress=tick
            )
        return self._references[suite.name]

    # ------------------------------------------------------------------ facts about this run

    def environment(self) -> dict[str, Any]:
        """Return what a later reader needs to repeat a training: versions, threads, device, dtypes."""
        return {
            **{name: version(name) for name in ("kvllm", "torch", "transformers", "peft")},
            "threads": torch.get_num_threads(),
            "device": str(self.lm.device),
            "compute_dtype": str(self._copy.dtype) if self._copy is not None else None,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        }


def resolve_pinned(
    store: Store, progress: Callable[[Progress], None] | None, *, model: str | None = None, verify: bool = False
) -> ModelFiles:
    """Return the files of a knowledge base's base model, which are compared with the pinned hashes.

    Args:
        store: Whose base model it is.
        progress: Called while it takes time.
        model: Where they lie now; by default where they were when they were pinned.
        verify: Hash every file again instead of trusting sizes and modification times.

    Raises:
        BaseMismatch: they are others.
        ModelError: they cannot be found.
    """
    base = store.base
    moved = model is not None and model != base.name
    name = model if model is not None else base.name
    from_hub = re.match(r"(spare\d+:)?hub:", base.source) is not None
    revision = base.revision if from_hub and not moved else None
    try:
        files = resolve(name, revision=revision, progress=progress, verify=verify)
        if files.digest != base.digest and name in MODELS:  # made before registered models had spare neurons
            files = resolve(f"{name}+0", revision=revision, progress=progress, verify=verify)
    except ModelError as error:
        raise ModelError(f"{error} The knowledge base at {store.path} needs it and is unchanged.") from error
    if files.digest != base.digest:
        names = sorted(
            name for name in set(files.files) | set(base.files) if files.files.get(name) != base.files.get(name)
        )
        advice = "Leave the model out" if moved else "Put the pinned files back"
        raise BaseMismatch(
            f"The base model {name} is not the one this knowledge base was made on: {', '.join(names[:5])} differ"
            f"{'s' if len(names) == 1 else ''}; nothing was changed. {advice}, or make a new one."
        )
    return files


def _unclaimed(fact: Fact, claimed: Mapping[str, str]) -> list[str]:
    return [q for q in asked_questions(fact) if claimed.get(q.casefold(), fact.text) == fact.text]


def _known_by(fact: Fact) -> frozenset[str]:
    """Return the casefolded names that questions about a fact are known by."""
    return frozenset(name.casefold() for name in telling_names(fact))


def _rotated(questions: Sequence[str], by: int) -> list[str]:
    by %= max(1, len(questions))
    return [*questions[by:], *questions[:by]]


def _read_now(copy: ComputeCopy, items: Sequence[PreservedItem]) -> list[PreservedItem]:
    """Return items with what enters the adapted layers at the weights of now; their outputs stay the base's."""
    lower = copy.lower_states([item.row.ids for item in items])
    return [replace(item, lower=mine) for item, mine in zip(items, lower, strict=True)]
