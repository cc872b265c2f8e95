"""How an edit is made: train, merge in memory, probe, ask the gate, commit; any failure leaves all as it was.

edits = Edits(session)
with session.writing():
    edits.train_and_commit("insert", [fact], config=None, gate=None)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvllm.config import EditConfig, GateConfig
from kvllm.errors import EditFailed, EditRejected
from kvllm.metrics import RECALLED_SHARE, RESTORED_KL, first_sentence
from kvllm.prompts import REFUSALS, alias_questions, asked_questions, held_out_questions, language_of, names_of
from kvllm.records import DeleteMode, Edit, Fact, Metric, Op, ProbeResult, Report, StoredFact
from kvllm.session import Session
from kvllm.store import NewEdit

if TYPE_CHECKING:
    from kvllm.editing.editor import Training
    from kvllm.editing.preservation import PreservedItem

GATE_NEIGHBOURS = 6
_RESTORE_TOKENS = 32
_MOST_NAMED = 10  # keys in one sentence
_NO_PROOF = (
    "Suppression is not proof of absence: other questions may still find the text; compact retrains without it."
)


@dataclass(frozen=True)
class Trained:
    """A training that is merged in memory and waits for the gate.

    Attributes:
        facts: What was taught.
        training: How.
        settings: Of the edit.
        warnings: Keys that may collide.
        old: The texts that are replaced, by key.
    """

    facts: tuple[Fact, ...]
    training: Training
    settings: EditConfig
    warnings: tuple[str, ...] = ()
    old: Mapping[str, str] = field(default_factory=dict)


class Edits:
    """Makes the edits of one session, whose writer's lock the caller holds wherever something is committed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def train_and_commit(
        self,
        op: Op,
        facts: Sequence[Fact],
        *,
        config: EditConfig | None,
        gate: GateConfig | None,
        old: Mapping[str, str] | None = None,
    ) -> Edit:
        """Teach facts in one edit.

        Args:
            op: "insert" or "update".
            facts: What is taught.
            config, gate: Of this edit; the session's by default.
            old: The texts that are replaced, by key.

        Raises:
            EditRejected: the gate refused; the report is attached.
            EditFailed: a number was not finite.
        """
        session = self._session
        settings, rules = config or session.edit_config, gate or session.gate_config
        with session.all_or_nothing() as parent:
            started = time.perf_counter()
            trained = self.train(facts, settings, old)
            report, refused = self.measure(trained, rules)
            if refused:
                raise _rejected(f"The {op} of {names_shown(facts)}", report, refused)
            retired = tuple(old) if old else ()
            return self._commit_training(op, trained, report, parent, started, rules, retired=retired)

    def compact(self, *, config: EditConfig | None, gate: GateConfig | None) -> Edit:
        """Retrain all live facts from the base and commit the result, if it is as good as what there is.

        Raises:
            EditRejected: it is worse.
        """
        session = self._session
        facts = session.live()
        settings, rules = config or session.edit_config, gate or session.gate_config
        with session.all_or_nothing() as parent:
            engine = session.engine
            started = time.perf_counter()
            asked = facts if rules.measure else []
            earlier = self.probe_facts(asked, kinds=("trained",)).value("reliability") if asked else None
            lost = self._lost_refusals(parent)
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
            trained = replace(self.train(facts, settings, None, replay=False), warnings=lost)
            report, refused = self.measure(trained, rules, since_base=True)
            now = report.value("reliability")
            if earlier is not None and now is not None and now < earlier:
                refused.append(f"reliability over the live facts would fall from {earlier:.3f} to {now:.3f}")
            if refused:
                raise _rejected("Compacting", report, refused)
            return self._commit_training(
                "compact", trained, report, parent, started, rules, retired=tuple(f.key for f in facts)
            )

    def _lost_refusals(self, head: int) -> tuple[str, ...]:
        """Warn of the keys that the state of an edit refuses to answer: training the live facts does not teach that."""
        history = {edit.id: edit for edit in self._session.store.history(light=True)}
        newer: set[str] = set()
        refused: list[str] = []
        edit = history.get(head)
        while edit is not None and edit.op != "compact":
            if edit.op == "delete" and edit.mode == "abstain":
                refused += [key for key in edit.keys if key not in newer]
            newer.update(edit.keys)
            edit = history.get((edit.target if edit.op == "rollback" else edit.parent) or 0)
        if not refused:
            return ()
        keys = ", ".join(map(repr, reversed(refused)))
        return (f"Compacting does not keep the refusal of {keys}; where it is wanted, delete again with mode abstain.",)

    def train(
        self,
        facts: Sequence[Fact],
        settings: EditConfig,
        old: Mapping[str, str] | None,
        *,
        replay: bool = True,
    ) -> Trained:
        """Train facts and merge the delta in memory; the caller commits it or puts the weights back.

        Args:
            facts: What is taught.
            settings: Of the edit.
            old: The texts that are replaced, by key.
            replay: Whether the other live facts must stay.
        """
        session = self._session
        engine = session.engine
        engine.check_lengths(facts, settings)
        warnings = self._collisions(facts) if replay else ()
        touched = {fact.key for fact in facts}
        others = [f for f in session.live() if f.key not in touched] if replay else []
        nearest = self._nearest_first(facts, others)
        training = engine.train(facts, settings, replay=nearest, live=session.live_names(), tick=session.ticker)
        engine.weights.apply(training.delta)
        return Trained(tuple(facts), training, settings, warnings, dict(old or {}))

    def measure(self, trained: Trained, gate: GateConfig, *, since_base: bool = False) -> tuple[Report, list[str]]:
        """Probe the facts just trained and the drift, and say what the gate refuses."""
        from kvllm.probing.scorers import still_states

        if not gate.measure:
            self._refuse_not_finite()
            return Report(warnings=trained.warnings), []
        report = self.probe_facts(
            trained.facts,
            neighbours=GATE_NEIGHBOURS if len(trained.facts) == 1 else 1,
            also=tuple(trained.old.values()),
        )
        metrics = dict(report.metrics)
        if trained.old:
            asked = [p for p in report.probes if p.kind in ("trained", "paraphrase", "alias")]
            stated = [
                still_states(p.answer, old, p.expected)
                for p in asked
                if (old := trained.old.get(p.key or "")) is not None
            ]
            metrics["old_text_stated"] = Metric(
                sum(stated) / len(stated) if stated else None,
                len(stated),
                "live greedy decoding, natural stop",
                "auto",
            )
        report = replace(report, metrics=metrics, warnings=(*report.warnings, *trained.warnings, *_untaught(report)))
        report = self._near(report, trained.facts)
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
        config: EditConfig | None,
        gate: GateConfig | None,
        warnings: tuple[str, ...] = (),
    ) -> Edit:
        """Train a fact's questions back to what the base answered, or to a stated refusal, and commit.

        Args:
            fact: What is deleted.
            mode: "restore" or "abstain".
            live: Whether the ledger has it; else the model knew it by itself.
            config, gate: Of this edit; the session's by default.
            warnings: Of this edit.

        Raises:
            EditRejected: too many questions still state the text.
        """
        session = self._session
        settings, rules = config or session.edit_config, gate or session.gate_config
        with session.all_or_nothing() as parent:
            started = time.perf_counter()
            training, targets, items = self._train_away(fact, mode, settings, held_out=rules.measure)
            session.engine.weights.apply(training.delta)
            report, refused = self._measure_unlearned(fact, targets, items, rules, live=live)
            if refused:
                raise _rejected(f"The delete of {fact.key!r}", report, refused)
            return self._commit_training(
                "delete",
                Trained((), training, settings, warnings),
                report,
                parent,
                started,
                rules,
                keys=(fact.key,),
                retired=(fact.key,) if live else (),
                mode=mode,
            )

    def _train_away(
        self, fact: Fact, mode: DeleteMode, settings: EditConfig, *, held_out: bool
    ) -> tuple[Training, dict[str, str], list[PreservedItem]]:
        """Train a fact's questions to other answers.

        Args:
            fact, mode, settings: Of the edit.
            held_out: Whether paraphrases will be asked as well.

        Returns:
            The training; what each question, trained ones first, should be answered with; and, for "restore", the
            same questions as items with the base's outputs.
        """
        session = self._session
        engine = session.engine
        questions = list(dict.fromkeys(asked_questions(fact)))
        paraphrases = dict.fromkeys((*held_out_questions(fact), *alias_questions(fact)))
        untrained = [q for q in paraphrases if q not in questions] if held_out else []
        others = self._nearest_first([fact], [f for f in session.live() if f.key != fact.key])
        if mode == "restore":
            items, base_answers = engine.base_items(questions, untrained, _RESTORE_TOKENS, settings)
            training = engine.train(
                [],
                settings,
                restore=items[: len(questions)],
                replay=others,
                live=session.live_names() - names_of([fact]),
                language=fact.language or language_of(fact.key),
                tick=session.ticker,
            )
            return training, dict(zip([*questions, *untrained], base_answers, strict=True)), items
        refusal = REFUSALS[fact.language or language_of(fact.key)]
        taught = Fact(fact.key, refusal, questions=tuple(questions), language=fact.language)
        training = engine.train([taught], settings, replay=others, live=session.live_names(), tick=session.ticker)
        return training, dict.fromkeys([*questions, *untrained], refusal), []

    def _measure_unlearned(
        self,
        fact: Fact,
        targets: Mapping[str, str],
        items: Sequence[PreservedItem],
        gate: GateConfig,
        *,
        live: bool,
    ) -> tuple[Report, list[str]]:
        """Ask every question again: is the text gone, is what was there before back? Then drift and the gate."""
        from kvllm.probing.runner import SPARE_TOKENS, answer_status
        from kvllm.probing.scorers import score_statement
        from kvllm.probing.suites import FACT_SUITE

        if not gate.measure:
            self._refuse_not_finite()
            return Report(warnings=(_NO_PROOF,)), []
        engine = self._session.engine
        lm, asked = engine.lm, list(targets)
        # Room for all of the text, or a long one would count as gone wherever it is cut.
        room = max(_RESTORE_TOKENS, len(lm.text_ids(fact.text)) + SPARE_TOKENS)
        answers = lm.generate_ids(
            [lm.fitting(lm.prompt_ids(question), room) for question in asked],
            max_new_tokens=room,
            drafts=[lm.answer_ids(target) for target in targets.values()],
        )
        # An answer may begin with other words and still be the base's: nearness in distribution counts as well.
        distances = engine.kl_from(items) if items else [math.inf] * len(asked)
        restored_by = f"first sentence or kl<={RESTORED_KL}" if items else "first sentence"
        results: list[ProbeResult] = []
        for question, ids, kl in zip(asked, answers, distances, strict=True):
            target, answer, beginning = targets[question], lm.decode(ids), lm.decode(ids[:_RESTORE_TOKENS])
            scored = score_statement(answer, fact.text)
            # What the base itself says cannot be erased by going back to it.
            own = bool(items) and score_statement(target, fact.text).passed
            gone = not scored.passed or own if live else answer == target
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
