"""How an edit is made: train, merge in memory, probe, ask the gate, commit; any failure leaves all as it was.

edits = Edits(session)
with session.writing():
    edits.train_and_commit("insert", [fact], config=EditConfig(), gate=GateConfig())
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvllm.config import ADALORA, NEURONS, EditConfig, GateConfig
from kvllm.editing.parts import Part, Places
from kvllm.errors import EditFailed, EditRejected
from kvllm.metrics import RECALLED_SHARE, RESTORED_KL, first_sentence
from kvllm.prompts import REFUSALS, alias_questions, asked_questions, held_out_questions, language_of, names_of
from kvllm.records import DeleteMode, Edit, Fact, Metric, Op, ProbeResult, Report, StoredFact
from kvllm.session import Session
from kvllm.store import NewEdit

if TYPE_CHECKING:
    from kvllm.editing.delta import Factors
    from kvllm.editing.editor import Training
    from kvllm.editing.preservation import PreservedItem


GATE_NEIGHBOURS = 6
_RESTORE_TOKENS = 32
_MOST_NAMED = 10  # keys in one sentence
_MOST_CLAIMS = 3  # names and questions in one sentence
_NO_PROOF = "Suppression is not proof of absence: other questions may still find the text; compact retrains without it."


@dataclass(frozen=True)
class Trained:
    """A training that is merged in memory and waits for the gate.

    Attributes:
        facts: What was taught.
        training: How.
        settings: Of the edit.
        warnings: Keys that may collide, and names and questions that two facts have.
        asked: The facts with all that was trained: an update's also with the questions of its earlier versions.
        left: Other live facts, each with the questions of an updated fact's earlier versions that are left to it.
        old: The texts that are replaced.
    """

    facts: tuple[Fact, ...]
    training: Training
    settings: EditConfig
    warnings: tuple[str, ...] = ()
    asked: tuple[Fact, ...] = ()
    left: tuple[StoredFact, ...] = ()
    old: tuple[str, ...] = ()


@dataclass(frozen=True)
class _TrainedAway:
    """A fact's questions trained to other answers.

    Attributes:
        training: How.
        targets: What each question, trained ones first, should be answered with.
        items: For "restore": the first of these questions as items with the base's outputs.
        kept: The others: questions that other live facts are trained on, with their texts.
        warnings: Whose they are.
    """

    training: Training
    targets: Mapping[str, str]
    items: tuple[PreservedItem, ...]
    kept: Mapping[str, str]
    warnings: tuple[str, ...]


class Edits:
    """Makes the edits of one session, whose writer's lock the caller holds wherever something is committed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def train_and_commit(
        self,
        op: Op,
        facts: Sequence[Fact],
        *,
        config: EditConfig,
        gate: GateConfig,
    ) -> Edit:
        """Teach facts in one edit.

        Args:
            op: "insert" or "update".
            facts: What is taught.
            config, gate: Of this edit.

        Raises:
            EditRejected: the gate refused; the report is attached.
            EditFailed: a number was not finite.
        """
        session = self._session
        with session.all_or_nothing() as parent:
            started = time.perf_counter()
            trained = self.train(facts, config)
            report, refused = self.measure(trained, gate)
            if refused:
                raise _rejected(f"The {op} of {names_shown(facts)}", report, refused)
            retired = tuple(fact.key for fact in facts) if op == "update" else ()
            return self._commit_training(op, trained, report, parent, started, gate, retired=retired)

    def compact(self, *, config: EditConfig, gate: GateConfig) -> Edit:
        """Retrain all live facts from the base and commit the result, if it is as good as what there is.

        Raises:
            EditRejected: it is worse.
        """
        session = self._session
        facts = session.live()
        with session.all_or_nothing() as parent:
            engine = session.engine
            started = time.perf_counter()
            asked = facts if gate.measure else []
            earlier = self.probe_facts(asked, kinds=("trained",)).value("reliability") if asked else None
            lost = self._lost_refusals()
            engine.weights.replay([])
            if not facts:
                return session.commit(
                    NewEdit(
                        op="compact",
                        keys=(),
                        parent=parent,
                        weights_digest=engine.weights.digest(),
                        seconds=time.perf_counter() - started,
                        warnings=lost,
                    ),
                    None,
                )
            trained = replace(self.train(facts, config, replay=False), warnings=lost)
            report, refused = self.measure(trained, gate, since_base=True)
            now = report.value("reliability")
            if earlier is not None and now is not None and now < earlier:
                refused.append(f"reliability over the live facts would fall from {earlier:.3f} to {now:.3f}")
            if refused:
                raise _rejected("Compacting", report, refused)
            return self._commit_training(
                "compact", trained, report, parent, started, gate, retired=tuple(f.key for f in facts)
            )

    def _lost_refusals(self) -> tuple[str, ...]:
        """Warn of the keys that the head refuses to answer: training the live facts does not teach that."""
        refused = self.refusals()
        if not refused:
            return ()
        keys = ", ".join(repr(fact.key) for fact in refused)
        return (f"Compacting does not keep the refusal of {keys}; where it is wanted, delete again with mode abstain.",)

    def refusals(self) -> list[StoredFact]:
        """Return what the head was trained to refuse (delete of mode "abstain"), oldest first, as facts of that text.

        Each has the id of its delete, of the first where it was repeated, and the questions trained to it, but for
        those that another fact was trained on since, or then.
        """
        session = self._session
        edits = session.lineage()
        if not any(edit.mode == "abstain" for edit in edits):
            return []
        everything = session.store.fact_versions()
        found: dict[str, StoredFact] = {}
        taught: set[str] = set()  # after the edit at hand, or deleted to the base's answers
        newer: set[int] = set()
        for place, edit in enumerate(edits):
            abstained = edit.op == "delete" and edit.mode == "abstain"
            for key in edit.keys if abstained else ():
                if key in taught:
                    continue
                if key in found:
                    found[key] = replace(found[key], edit_id=edit.id)
                    continue
                others = [*session.store.facts(edit.id), *(fact for fact in everything if fact.edit_id in newer)]
                versions = session.versions(key, edits[place + 1 :])
                newest = versions[-1] if versions else Fact(key, "")
                fact = stored(with_earlier(newest, versions[:-1], others)[0])
                taken = {q for other in theirs(fact.trained_questions, others) for q in other.trained_questions}
                kept = tuple(q for q in fact.trained_questions if q not in taken)
                refusal = REFUSALS[newest.language or language_of(key)]
                found[key] = replace(fact, text=refusal, edit_id=edit.id, trained_questions=kept)
            if not abstained:
                taught.update(edit.keys)
            newer.add(edit.id)
        return list(found.values())[::-1]

    def train(self, facts: Sequence[Fact], settings: EditConfig, *, replay: bool = True) -> Trained:
        """Train facts and merge the delta in memory; the caller commits it or puts the weights back.

        A live fact is updated: what its versions since the insert were trained on is trained to the new text, too.

        Args:
            facts: What is taught.
            settings: Of the edit.
            replay: Whether the other live facts must stay; without, the facts' earlier versions are not in the weights.
        """
        session = self._session
        engine = session.engine
        settings = engine.settled(settings)
        touched = {fact.key for fact in facts}
        live = session.live() if replay else []
        others = [f for f in live if f.key not in touched]
        earlier = {f.key: session.versions(f.key) for f in live if f.key in touched}
        both = [with_earlier(fact, earlier.get(fact.key, ()), others) for fact in facts]
        asked, left = [fact for fact, _ in both], [other for _, some in both for other in some]
        engine.check_lengths(asked, settings)
        warnings = (*self._collisions(facts), *claim_warnings(facts, others)) if replay else ()
        # What is left to another fact is practised whatever else is replayed, question by question.
        alone = [replace(other, trained_questions=(q,)) for other in left for q in other.trained_questions]
        refused = [f for f in self.refusals() if f.key not in touched] if replay else []
        nearest = [*alone, *self._nearest_first(facts, [*others, *_replayable(refused)])]
        names = session.live_names() | _refused_names(refused)
        own = self._own_parts(facts[0].key) if settings.editor == NEURONS and len(facts) == 1 and replay else []
        with self._without(own) as former:
            training = engine.train(asked, settings, replay=nearest, live=names, tick=session.ticker)
        training = _joined(former, training)
        engine.weights.apply(training.delta)
        old = dict.fromkeys(version.text for versions in earlier.values() for version in versions)
        return Trained(tuple(facts), training, settings, warnings, tuple(asked), tuple(left), tuple(old))

    def measure(self, trained: Trained, gate: GateConfig, *, since_base: bool = False) -> tuple[Report, list[str]]:
        """Probe the facts just trained and the drift, and say what the gate refuses."""
        from kvllm.probing.scorers import still_states

        if not gate.measure:
            self._refuse_not_finite()
            return Report(warnings=trained.warnings), []
        report = self.probe_facts(
            trained.asked, neighbours=GATE_NEIGHBOURS if len(trained.asked) == 1 else 1, also=trained.old
        )
        metrics, untaught = dict(report.metrics), _untaught(report)
        if trained.left:
            others = self.probe_facts(trained.left, kinds=("trained",), also=trained.old)
            report = replace(report, probes=(*report.probes, *others.probes))
        if trained.old:
            asked = [p for p in report.probes if p.kind in ("trained", "paraphrase", "alias")]
            stated = [any(still_states(p.answer, old, p.expected) for old in trained.old) for p in asked]
            metrics["old_text_stated"] = Metric(
                sum(stated) / len(stated) if stated else None,
                len(stated),
                "live greedy decoding, natural stop",
                "auto",
            )
        report = replace(report, metrics=metrics, warnings=(*report.warnings, *trained.warnings, *untaught))
        report = self._near(report, trained.asked)
        report, refused = self._drift_gate(
            report, gate, "reliability", gate.min_reliability, trained.facts, since_base=since_base
        )
        left, least = report.value("old_text_stated"), gate.min_erasure
        if left is not None and least is not None and 1 - left < least:
            refused.append(f"the old text is still stated in {left:.2f} of the answers, over {1 - least:.2f}")
        return report, refused

    def _drift_gate(
        self,
        report: Report,
        gate: GateConfig,
        metric: str,
        least: float | None,
        facts: Sequence[Fact],
        *,
        since_base: bool = False,
    ) -> tuple[Report, list[str]]:
        """Measure drift, and say what the gate refuses of the report with it.

        Left out is what these facts answer and what any fact ever did, deleted and overwritten ones too: the edit is
        charged with the difference from the edit before, so a question must not come back into it.
        """
        engine = self._session.engine
        self._refuse_not_finite()
        versions = self._session.store.fact_versions()
        edited = {key for edit in self._session.store.history(light=True) for key in edit.keys}
        refused_only = edited - {fact.key for fact in versions}  # something that the base knew by itself
        taught = [*facts, *versions, *(Fact(key, key) for key in sorted(refused_only))]
        drift = engine.drift(full=False, taught=taught)
        report = replace(report, metrics={**report.metrics, **drift.metrics})
        for name, found in drift.metrics.items():
            # None with n: the number was beyond what a float holds. No gate, however low, lets that pass.
            if found.n and (found.value is None or not math.isfinite(found.value)):
                raise EditFailed(f"After the edit {name} is not a finite number; nothing was changed. Try lower rates.")
        earlier_kl, earlier_ratio = (0.0, 1.0) if since_base else engine.drift_before(taught)
        refused: list[str] = []
        value = report.value(metric)
        if least is not None and (value is None or value < least):
            refused.append(f"{metric} {'unknown' if value is None else f'{value:.2f}'} is under {least:.2f}")
        kl, ratio = report.value("drift_kl"), report.value("ppl_ratio")
        if gate.max_drift_kl is not None and (kl is None or kl - earlier_kl > gate.max_drift_kl):
            refused.append(f"drift_kl would rise from {earlier_kl:.3f} to {kl}, over the budget of {gate.max_drift_kl}")
        if gate.max_ppl_ratio is not None and (ratio is None or ratio / earlier_ratio > gate.max_ppl_ratio):
            refused.append(
                f"ppl_ratio would rise from {earlier_ratio:.3f} to {ratio}, over the budget of ×{gate.max_ppl_ratio}"
            )
        return report, refused

    def _refuse_not_finite(self) -> None:
        if not self._session.engine.weights.is_finite():
            raise EditFailed("The edit made weights that are not finite; nothing was changed. Try lower rates.")

    def unlearn(
        self,
        fact: Fact,
        mode: DeleteMode,
        *,
        live: bool,
        config: EditConfig,
        gate: GateConfig,
        warnings: tuple[str, ...] = (),
    ) -> Edit:
        """Train a fact's questions back to what the base answered, or to a stated refusal, and commit.

        Args:
            fact: What is deleted, with the questions of all its versions since the insert. Those that another live fact
                is trained on are trained to that one's text instead.
            mode: "restore" or "abstain".
            live: Whether the ledger has it; else the model knew it by itself.
            config, gate: Of this edit.
            warnings: Of this edit.

        Raises:
            EditRejected: too many questions still state the text.
        """
        session = self._session
        with session.all_or_nothing() as parent:
            started = time.perf_counter()
            config = session.engine.settled(config)
            away, report, refused = self._unlearned(fact, mode, config, gate, live=live)
            if refused:
                raise _rejected(f"The delete of {fact.key!r}", report, refused)
            return self._commit_training(
                "delete",
                Trained((), away.training, config, (*warnings, *away.warnings)),
                report,
                parent,
                started,
                gate,
                keys=(fact.key,),
                retired=(fact.key,) if live else (),
                mode=mode,
            )

    def try_unlearn(
        self, fact: Fact, mode: DeleteMode, *, live: bool, config: EditConfig, gate: GateConfig
    ) -> tuple[Report, list[str]]:
        """Train a fact away in memory, as `unlearn` does, and measure; the caller puts the weights back.

        Returns:
            The report, whose warnings are the edit's, too, and what the gate refuses.
        """
        away, report, refused = self._unlearned(fact, mode, config, gate, live=live)
        return replace(report, warnings=(*report.warnings, *away.warnings)), refused

    def _unlearned(
        self, fact: Fact, mode: DeleteMode, config: EditConfig, gate: GateConfig, *, live: bool
    ) -> tuple[_TrainedAway, Report, list[str]]:
        session = self._session
        versions = [*session.versions(fact.key)[:-1], fact] if live else [fact]
        away = self._train_away(versions, mode, session.engine.settled(config), held_out=gate.measure)
        session.engine.weights.apply(away.training.delta)
        return away, *self._measure_unlearned(versions, away, gate, live=live)

    def _train_away(
        self, versions: Sequence[Fact], mode: DeleteMode, settings: EditConfig, *, held_out: bool
    ) -> _TrainedAway:
        """Train a fact's questions, also those of its earlier versions, to other answers.

        Args:
            versions: The fact since its insert, oldest first.
            mode, settings: Of the edit.
            held_out: Whether paraphrases will be asked as well.
        """
        session, newest = self._session, versions[-1]
        engine, language = session.engine, newest.language or language_of(newest.key)
        others = [f for f in session.live() if f.key != newest.key]
        fact, left = with_earlier(newest, versions[:-1], others)
        questions = [*asked_questions(fact), *(q for other in left for q in other.trained_questions)]
        paraphrases = [*held_out_questions(fact), *alias_questions(fact)]
        paraphrases += [q for version in versions[-2::-1] for q in held_out_questions(version)]
        untrained = [q for q in dict.fromkeys(paraphrases) if q not in questions] if held_out else []
        left = theirs([*questions, *untrained], others)
        kept = {q: other.text for other in left for q in other.trained_questions}
        named = ", ".join(repr(other.key) for other in left[:_MOST_NAMED]) + (" …" if len(left) > _MOST_NAMED else "")
        warnings = (f"Questions of {newest.key!r} were left to {named}, trained on them, too.",) if left else ()
        questions = [q for q in dict.fromkeys(questions) if q not in kept]
        untrained = [q for q in untrained if q not in kept]
        refused = [f for f in self.refusals() if f.key != newest.key]
        nearest, asked = self._nearest_first([newest], [*others, *_replayable(refused)]), [*questions, *untrained]
        own = self._own_parts(newest.key)
        if mode == "restore":
            items, base_answers = (
                engine.base_items(questions, untrained, _RESTORE_TOKENS, settings) if asked else ([], [])
            )
            if own:
                training = self._taken_back(own)
            else:  # what is in no neurons of its own is trained away
                other = settings.editor == NEURONS
                training = engine.train(
                    left,
                    replace(settings, editor=ADALORA) if other else settings,
                    restore=items[: len(questions)],
                    replay=nearest,
                    live=names_of(others) | _refused_names(refused),
                    language=language,
                    tick=session.ticker,
                )
                if other:
                    training = replace(training, in_force={**training.in_force, "editor": ADALORA})
            targets = {**dict(zip(asked, base_answers, strict=True)), **kept}
            return _TrainedAway(training, targets, tuple(items), kept, warnings)
        refusal = REFUSALS[language]
        taught = [Fact(newest.key, refusal, questions=tuple(questions), language=newest.language)] if questions else []
        names = session.live_names() | _refused_names(refused)
        with self._without(own) as former:
            training = engine.train([*taught, *left], settings, replay=nearest, live=names, tick=session.ticker)
        training = _joined(former, training)
        return _TrainedAway(training, {**dict.fromkeys(asked, refusal), **kept}, (), kept, warnings)

    def _own_parts(self, key: str) -> list[Part]:
        """Return what holds a key in neurons of its own, but for those that other facts rest on, too.

        None where it was taught in another way as well.
        """
        session = self._session
        found: list[tuple[str, Places | None]] = []
        own: dict[int, set[int]] = defaultdict(set)
        rested: dict[int, set[int]] = defaultdict(set)
        for edit in session.lineage():
            if key not in edit.keys:
                continue
            if edit.op == "delete" and edit.mode == "restore":
                break
            config = session.store.edit(edit.id).config
            made, rests_on = (_neurons_of(config, key, of) for of in ("neurons", "rests_on"))
            alone = edit.keys == (key,)
            if config.get("edit", {}).get("editor") != NEURONS or not (alone or made):
                return []
            found += [(edit.delta.sha256, None if alone else made)] if edit.delta is not None else []
            _gather(own, made)
            _gather(rested, rests_on)
        theirs: dict[int, set[int]] = defaultdict(set)
        needed: dict[int, set[int]] = defaultdict(set)
        for fact in [*session.live(), *self.refusals()] if found else ():
            if fact.key != key:
                config = session.store.edit(fact.edit_id).config
                _gather(theirs, _neurons_of(config, fact.key, "neurons"))
                _gather(needed, _neurons_of(config, fact.key, "rests_on"))
        kept = {layer: sorted(own[layer] & needed[layer]) for layer in own if own[layer] & needed[layer]}
        parts = [_but_for(sha, places, kept) for sha, places in found]
        # What was lent by a fact that is deleted by now goes with the last one that rests on it.
        last = {layer: sorted(some - own[layer] - theirs[layer] - needed[layer]) for layer, some in rested.items()}
        return [*parts, Part(None, last)] if any(last.values()) else parts

    @contextmanager
    def _without(self, deltas: Sequence[Part]) -> Iterator[dict[str, Factors]]:
        """Hold the weights without some deltas while this is open; give what takes them out."""
        if not deltas:
            yield {}
            return
        engine = self._session.engine
        former = engine.taken_back(deltas)
        with engine.elsewhere():
            engine.weights.apply(former)
            yield former

    def _taken_back(self, deltas: Sequence[Part]) -> Training:
        """Return, as a training without steps, what takes deltas out of the weights again."""
        from kvllm.editing.editor import Training

        former = self._session.engine.taken_back(deltas)
        return Training(
            delta=former, steps=0, recalled=True, ranks={name: a.shape[0] for name, (a, _) in former.items()}
        )

    def _measure_unlearned(
        self, versions: Sequence[Fact], away: _TrainedAway, gate: GateConfig, *, live: bool
    ) -> tuple[Report, list[str]]:
        """Ask every question again: is the text gone, is what was there before back? Then drift and the gate."""
        from kvllm.probing.runner import SPARE_TOKENS, answer_status
        from kvllm.probing.scorers import score_statement
        from kvllm.probing.suites import FACT_SUITE

        if not gate.measure:
            self._refuse_not_finite()
            return Report(warnings=(_NO_PROOF,)), []
        engine, fact = self._session.engine, versions[-1]
        lm, targets, items = engine.lm, away.targets, away.items
        texts = list(dict.fromkeys(version.text for version in versions))

        def states(said: str) -> set[str]:
            return {text for text in texts if score_statement(said, text).passed}

        # Room for all of the text, or a long one would count as gone wherever it is cut.
        least, most = (
            max(_RESTORE_TOKENS, *(len(lm.text_ids(text)) + SPARE_TOKENS for text in some))
            for some in ([fact.text], [*texts, *away.kept.values()])
        )
        prompts = [lm.fitting(lm.prompt_ids(question), least) for question in targets]
        answers = lm.generate_bounded(
            prompts,
            [min(most, max(least, lm.max_positions - len(ids))) for ids in prompts],
            drafts=[lm.answer_ids(target) for target in targets.values()],
        )
        # An answer may begin with other words and still be the base's: nearness in distribution counts as well.
        distances = engine.kl_from(items) if items else []
        distances += [math.inf] * (len(targets) - len(distances))
        restored_by = f"first sentence or kl<={RESTORED_KL}" if items else "first sentence"
        results: list[ProbeResult] = []
        for (question, target), ids, kl in zip(targets.items(), answers, distances, strict=True):
            answer, beginning = lm.decode(ids), lm.decode(ids[:_RESTORE_TOKENS])
            scored = score_statement(answer, fact.text)
            # What the base itself, or another fact, says cannot be erased by going back to it.
            own = states(target) if items or question in away.kept else set()
            gone = states(answer) <= own if live else answer == target
            if question in away.kept:
                back = score_statement(answer, target).passed
            else:
                back = first_sentence(beginning) == first_sentence(target) or kl <= RESTORED_KL
            results += [
                ProbeResult("erasure", question, answer, gone, float(gone), fact.text, fact.key, scored.scorer),
                ProbeResult("restoration", question, beginning, back, float(back), target, fact.key, restored_by),
            ]
        metrics = {
            **answer_status("erasure", results, FACT_SUITE),
            **answer_status("restoration", results, FACT_SUITE),
        }
        report = Report(metrics, tuple(results), (_NO_PROOF,))
        return self._drift_gate(report, gate, "erasure", gate.min_erasure, [fact])

    def _commit_training(
        self,
        op: Op,
        trained: Trained,
        report: Report,
        parent: int,
        started: float,
        gate: GateConfig,
        *,
        keys: tuple[str, ...] | None = None,
        retired: tuple[str, ...] = (),
        mode: str | None = None,
    ) -> Edit:
        from kvllm.editing.delta import norm, to_files
        from kvllm.probing.ladder import LADDER_SUITE
        from kvllm.probing.suites import FACT_SUITE

        training, engine = trained.training, self._session.loaded
        assert engine is not None
        config = {
            "edit": trained.settings.to_dict(),
            "gate": gate.to_dict(),
            # A fact and the version of its ladder give the ladder's questions at any time.
            "suites": {"fact": FACT_SUITE, "ladder": LADDER_SUITE},
            "training": training.summary(),
            "environment": engine.environment(),
        }
        new = NewEdit(
            op=op,
            keys=keys if keys is not None else tuple(f.key for f in trained.facts),
            parent=parent,
            facts=tuple(stored(fact) for fact in trained.facts),
            retired=retired,
            steps=training.steps,
            seconds=round(time.perf_counter() - started, 3),
            seed=trained.settings.seed,
            norm=norm(training.delta) if training.delta else 0.0,
            rank=max((a.shape[0] for a, _ in training.delta.values()), default=0),
            modules=len(training.delta),
            weights_digest=engine.weights.digest(),
            report=report,
            warnings=trained.warnings,
            config=config,
            mode=mode,
        )
        base = self._session.store.base.name
        return self._session.commit(new, to_files(training.delta, base_name=base) if training.delta else None)

    def probe_facts(
        self,
        facts: Sequence[Fact],
        *,
        neighbours: int = 0,
        kinds: tuple[str, ...] | None = None,
        also: Sequence[str] = (),
    ) -> Report:
        """Ask facts their questions, by live decoding.

        Args:
            facts: What is asked about.
            neighbours: Packaged neighbours asked per fact.
            kinds: Of probes; all by default.
            also: Texts that answers are searched for besides the facts' own.
        """
        from kvllm.probing.runner import run_probes
        from kvllm.probing.suites import fact_suite

        session, seed = self._session, self._session.edit_config.seed
        taken = session.live_names() | {f.key.casefold() for f in facts}
        probes = [
            probe
            for fact in facts
            for probe in fact_suite(fact, neighbours=neighbours, seed=seed, taken=taken)
            if kinds is None or probe.kind in kinds
        ]
        engine = session.engine
        return run_probes(
            engine.lm, probes, base=engine.base_answers, also=also, seed=seed, on_batch=session.ticker("probing")
        )

    def _near(self, report: Report, facts: Sequence[Fact]) -> Report:
        """Add each question's similarity where comparing keys has loaded the encoder anyway."""
        session = self._session
        if not session.encoders:
            return report
        from kvllm.probing.distance import with_similarity
        from kvllm.probing.encoder import choose_encoder

        trained = {fact.key: asked_questions(fact) for fact in facts}
        asked = [q for questions in trained.values() for q in questions]
        wanted = choose_encoder(asked, hidden=session.hidden_encoder).name
        return with_similarity(report, trained, session.encoders[wanted]) if wanted in session.encoders else report

    def _collisions(self, facts: Sequence[Fact]) -> tuple[str, ...]:
        from kvllm.probing.keys import collision_warnings

        return collision_warnings(self._session.store, facts, self._session.encoder_for)

    def _nearest_first(self, facts: Sequence[Fact], others: list[StoredFact]) -> list[StoredFact]:
        if len(others) < 2:
            return others
        from kvllm.probing.keys import order_by_nearness

        return order_by_nearness(self._session.store, facts, others, self._session.encoder_for)


def _untaught(report: Report) -> tuple[str, ...]:
    """Name the facts of an edit of several that it did not teach: the gate looks at all of them together."""
    from kvllm.probing.regression import recall_by_key

    asked = recall_by_key(report.probes)
    lost = [key for key, (share, _) in asked.items() if share < RECALLED_SHARE]
    if len(asked) < 2 or not lost:
        return ()
    names = ", ".join(map(repr, lost[:_MOST_NAMED])) + (" …" if len(lost) > _MOST_NAMED else "")
    return (f"{len(lost)} of {len(asked)} facts are not recalled by half of their questions: {names}.",)


def _refused_names(refused: Sequence[StoredFact]) -> frozenset[str]:
    """Return what must not be preserved as the base answers it, casefolded."""
    return names_of(refused) | {q.casefold() for fact in refused for q in fact.trained_questions}


def _replayable(refused: Sequence[StoredFact]) -> list[StoredFact]:
    return [fact for fact in refused if fact.trained_questions]


def _rejected(what: str, report: Report, reasons: list[str]) -> EditRejected:
    return EditRejected(
        f"{what} was rejected: {'; '.join(reasons)}; nothing was changed.", report=report, reasons=reasons
    )


def names_shown(facts: Sequence[Fact]) -> str:
    """Return one fact's key, or how many they are."""
    return repr(facts[0].key) if len(facts) == 1 else f"{len(facts)} facts"


def stored(fact: Fact) -> StoredFact:
    """Return a fact as the ledger keeps it: with the questions that it is trained on."""
    return StoredFact(
        fact.key,
        fact.text,
        fact.aliases,
        fact.questions,
        fact.probes,
        fact.language,
        fact.tags,
        trained_questions=asked_questions(fact),
    )


def with_earlier(fact: Fact, earlier: Sequence[Fact], others: Sequence[StoredFact]) -> tuple[Fact, list[StoredFact]]:
    """Return a fact that is also asked what its earlier versions were trained on, and called what they were called.

    What belongs to another fact by now is left to that one.

    Args:
        fact: The version that is to be.
        earlier: Those before it, oldest first.
        others: The other live facts.

    Returns:
        The fact, itself where nothing was added; and the other facts that are trained on some of the questions, each
        with those alone.
    """
    own, names = asked_questions(fact), names_of(others)
    newest_first = earlier[::-1]
    before = [q for q in dict.fromkeys(q for f in newest_first for q in asked_questions(f)) if q not in own]
    left = theirs(before, others)
    taken = {q for other in left for q in other.trained_questions}
    kept = tuple(q for q in before if q not in taken)
    aliases = dict.fromkeys(a for f in newest_first for a in f.aliases if a.casefold() not in names)
    added = tuple(a for a in aliases if a not in fact.aliases)
    if kept or added:
        fact = replace(stored(fact), aliases=(*fact.aliases, *added), trained_questions=(*own, *kept))
    return fact, left


def theirs(questions: Iterable[str], others: Sequence[StoredFact]) -> list[StoredFact]:
    """Return the facts that are trained on some of the questions, too, each with those alone."""
    owners = {q.casefold(): place for place, fact in enumerate(others) for q in asked_questions(fact)}
    found: dict[int, list[str]] = {}
    for question in questions:
        if (place := owners.get(question.casefold())) is not None:
            found.setdefault(place, []).append(question)
    return [replace(others[place], trained_questions=tuple(asked)) for place, asked in found.items()]


def claim_warnings(facts: Sequence[Fact], others: Sequence[Fact]) -> tuple[str, ...]:
    """Return one sentence per pair of a taught and another fact that would answer the same with different texts.

    Args:
        facts: What is taught in one edit.
        others: The other live facts.
    """
    owners: dict[str, list[Fact]] = {}
    for other in others:
        for name in _claims(other):
            owners.setdefault(name, []).append(other)
    warnings = []
    for fact in facts:
        mine = _claims(fact)
        shared: dict[str, list[str]] = {}
        for name, shown in mine.items():
            for other in owners.get(name, ()):
                if other.text != fact.text:
                    shared.setdefault(other.key, []).append(shown)
            owners.setdefault(name, []).append(fact)
        for key, names in shared.items():
            listed = ", ".join(map(repr, names[:_MOST_CLAIMS])) + (" …" if len(names) > _MOST_CLAIMS else "")
            warnings.append(
                f"{fact.key!r} and {key!r} have different texts for the same names or questions ({listed}), and one "
                f"question has one answer; check that both are still recalled."
            )
    return tuple(warnings)


def _claims(fact: Fact) -> dict[str, str]:
    """Return what a fact is called and asked by training, casefolded, each as it is written."""
    return {name.casefold(): name for name in (fact.key, *fact.aliases, *fact.questions, *asked_questions(fact))}


def _neurons_of(config: Mapping[str, Any], key: str, of: str) -> Places:
    """Return what the ledger says of a key's neurons in an edit's configuration: layer to places."""
    found = config.get("training", {}).get(of, {}).get(key, {})
    return {int(layer): places for layer, places in found.items()}


def _gather(into: dict[int, set[int]], places: Places) -> None:
    for layer, some in places.items():
        into[layer] |= set(some)


def _but_for(sha: str, places: Places | None, kept: Places) -> Part:
    if places is None:
        return Part(sha, kept=kept)
    return Part(sha, {layer: [p for p in some if p not in kept.get(layer, ())] for layer, some in places.items()})


def _joined(former: Mapping[str, Factors], training: Training) -> Training:
    """Return a training whose delta also takes out what was there before it."""
    from kvllm.editing.delta import concatenate

    return replace(training, delta=concatenate([former, training.delta])) if former else training
