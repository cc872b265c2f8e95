"""What users call: one object over ledger, weights and probes, which moves them together or not at all.

    with KnowledgeBase.open("my.kb", model="smollm2-135m-instruct") as kb:
        kb.insert("torchkeras", "Torchkeras is a tool that makes training PyTorch models simple.")
        print(kb.ask("What is torchkeras?"))

Reading the ledger loads no model: torch and its like are imported when an operation first needs weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from kvllm.config import DEFAULT_MODEL, EditConfig, GateConfig, ModelConfig
from kvllm.edits import GATE_NEIGHBOURS, Edits
from kvllm.errors import (
    OF_ONE_FACT,
    ConfigError,
    Corrupt,
    EditFailed,
    EditNotFound,
    KeyExists,
    KeyNotFound,
    KvllmError,
    StaleHead,
    StoreError,
    StoreNotFound,
    Untrusted,
)
from kvllm.prompts import (
    REFUSALS,
    asked_questions,
    clean_fact,
    clean_key,
    clean_text,
    key_question,
    language_of,
)
from kvllm.records import (
    Answer,
    BackupResult,
    BisectReport,
    Collisions,
    DeleteMode,
    DryRun,
    Edit,
    EditOutcome,
    EditVerb,
    ExportResult,
    Fact,
    GcReport,
    InsertMode,
    Match,
    Progress,
    RegressionReport,
    Report,
    StoredFact,
    VerifyReport,
)
from kvllm.session import Session
from kvllm.store import NewEdit, Store

if TYPE_CHECKING:
    from kvllm.editing.engine import Engine
    from kvllm.lm.sources import ModelFiles

FactLike = Fact | tuple[str, str] | Mapping[str, Any]
_ROLES = ("system", "user", "assistant")


class KnowledgeBase:
    """A language model's weights, the ledger of what they were taught, and the probes that say whether both agree.

    Behaves as a read-only mapping from keys to stored facts. There is no `kb[key] = text`: minutes of training do not
    hide behind an equals sign.
    """

    def __init__(self, session: Session) -> None:
        """Take over an open session; users call `open` or `create`."""
        self._session = session
        self._edits = Edits(session)
        self._store = session.store

    # ------------------------------------------------------------------ opening

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | None = None,
        create: bool = True,
        readonly: bool = False,
        dtype: str | None = None,
        device: str | None = None,
        edit: EditConfig | None = None,
        gate: GateConfig | None = None,
        progress: Callable[[Progress], None] | None = None,
        lock_timeout: float = 10.0,
    ) -> KnowledgeBase:
        """Open a knowledge base, or create it where there is none.

        Args:
            path: Its folder.
            model: Name of the base model: a registered name, a folder, a GGUF file or a hub id; with "+256" behind it
                so many spare neurons are added to its MLPs (registered ones have them; "+0": without). On an existing
                knowledge base: where the pinned files lie now, if they moved, for this opening only.
            create: Whether a missing one is created, on `model` or the default model.
            readonly: Refuse every operation that would write; no lock is taken.
            dtype, device: Of the computation; see ModelConfig. The dtype is fixed when the knowledge base is made.
            edit, gate: Configuration of edits; each call may override them. Of an existing knowledge base: for this
                opening only, in the place of those that it was made with.
            progress: Called with `Progress` records while something takes time.
            lock_timeout: Seconds to wait for another writer before `Busy`.

        Raises:
            StoreNotFound: nothing there, and `create` is off.
            StoreError: not a knowledge base, or of a newer version.
            Corrupt: its ledger is damaged.
            ConfigError: another dtype than it was made with.
            BaseMismatch: the files of `model` are not the pinned ones.
            ModelError: `model` cannot be resolved.
        """
        try:
            store = Store.open(path, readonly=readonly)
        except StoreNotFound:
            if not create or readonly:
                raise
            return cls.create(
                path,
                model=model or DEFAULT_MODEL,
                dtype=dtype,
                device=device,
                edit=edit,
                gate=gate,
                progress=progress,
                lock_timeout=lock_timeout,
            )
        try:
            moved = _moved_model(store, model, progress)
            made_in = str(store.settings.get("dtype", "float32"))
            if dtype is not None and dtype != made_in:
                raise ConfigError(
                    f"This knowledge base was made in {made_in}, and {dtype} would give other weights; "
                    f"leave the dtype out, or make a new knowledge base."
                )
            session = Session(
                store,
                model=moved,
                model_config=ModelConfig(dtype=made_in, device=device or "auto"),
                edit=edit or _stored_config(store, "edit", EditConfig),
                gate=gate or _stored_config(store, "gate", GateConfig),
                progress=progress,
                lock_timeout=lock_timeout,
            )
            return cls(session)
        except BaseException:
            store.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str = DEFAULT_MODEL,
        dtype: str | None = None,
        device: str | None = None,
        edit: EditConfig | None = None,
        gate: GateConfig | None = None,
        progress: Callable[[Progress], None] | None = None,
        lock_timeout: float = 10.0,
    ) -> KnowledgeBase:
        """Create an empty knowledge base on a base model, whose files are found, hashed and pinned.

        Configurations given here are stored and used by every later edit.

        Raises:
            StoreError: there is one already, or the folder holds something else.
            ModelError: the model cannot be resolved.
            ConfigError: there is no such dtype or device.
        """
        if Store.exists(path):
            raise StoreError(
                f"There is a knowledge base at {path} already; it was left unchanged. Use it as it is, or name another "
                f"folder."
            )
        config = ModelConfig(dtype=dtype or "float32", device=device or "auto")
        from kvllm.lm.sources import resolve

        if device is not None:
            from kvllm.lm.model import resolve_device

            resolve_device(device)
        files = resolve(_absolute_model(model), progress=progress)
        settings: dict[str, Any] = {"dtype": config.dtype}
        if edit is not None:
            settings["edit"] = edit.to_dict()
        if gate is not None:
            settings["gate"] = gate.to_dict()
        store = Store.create(path, _base_record(files, _absolute_model(model)), settings)
        session = Session(
            store, model_config=config, edit=edit, gate=gate, progress=progress, lock_timeout=lock_timeout
        )
        return cls(session)

    def close(self) -> None:
        """Close the ledger and let go of the model."""
        self._session.close()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<KnowledgeBase {str(self._store.path)!r}: {len(self)} facts, head {self._store.head()}>"

    def _repr_html_(self) -> str:
        import html

        rows = "".join(
            f"<tr><td>{html.escape(fact.key)}</td><td>{html.escape(fact.text)}</td><td>{fact.edit_id}</td></tr>"
            for fact in self.facts()
        )
        head = "<tr><th>key</th><th>text</th><th>edit</th></tr>"
        return f"<table><caption>{html.escape(repr(self))}</caption>{head}{rows}</table>"

    # ------------------------------------------------------------------ the ledger: what was taught

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def edit_config(self) -> EditConfig:
        """How edits are trained unless a call says otherwise; to change a part: `replace(kb.edit_config, seed=1)`.

        Raises:
            StoreError: another version of kvllm stored it, and this one does not know it.
        """
        config: EditConfig = _known(self._session.edit_config)
        return config

    @property
    def gate_config(self) -> GateConfig:
        """When edits are accepted unless a call says otherwise.

        Raises:
            StoreError: as for `edit_config`.
        """
        config: GateConfig = _known(self._session.gate_config)
        return config

    def __len__(self) -> int:
        return self._store.count()

    def __iter__(self) -> Iterator[str]:
        return iter([fact.key for fact in self._store.facts()])

    def __contains__(self, key: object) -> bool:
        try:
            return self._store.has(clean_key(key))
        except ConfigError:
            return False

    def __getitem__(self, key: str) -> StoredFact:
        return self._store.fact(clean_key(key))

    def get(self, key: str, default: StoredFact | None = None) -> StoredFact | None:
        """Return what was taught under the key (the ledger's word, not the weights'), or the default."""
        if key not in self:
            return default
        return self[key]

    def keys(self) -> list[str]:
        """Return the live keys, in the order of their insertion."""
        return list(self)

    def facts(self, at: int | str | None = None) -> list[StoredFact]:
        """Return the live facts, now or as of an edit or tag."""
        return self._store.facts(None if at is None else self._store.resolve(at))

    def history(self, limit: int | None = None) -> list[Edit]:
        """Return the edits, newest first."""
        return list(reversed(self._store.history(limit)))

    def edit(self, ref: int | str) -> Edit:
        """Return one edit by id or tag.

        Raises:
            EditNotFound: no such edit.
        """
        return self._store.edit(self._store.resolve(ref))

    def head(self) -> int:
        """Return the newest edit's id; 0 is the untouched base."""
        return self._store.head()

    def tag(self, name: str, ref: int | str | None = None, *, move: bool = False) -> int:
        """Give an edit (the head by default) a name, and return its id.

        Args:
            name: The tag.
            ref: The edit, by id or another tag.
            move: Take the name from the edit that has it, if one does.

        Raises:
            KeyExists: the name is taken, and not to be moved.
            ConfigError: the name cannot be used.
        """
        edit_id = self._store.head() if ref is None else self._store.resolve(ref)
        with self._store.writer(timeout=self._session.lock_timeout):
            self._store.tag(clean_text(name, name="tag"), edit_id, move=move)
        return edit_id

    def untag(self, name: str) -> int:
        """Remove a tag, and return the id of the edit that it named; the edit stays as it is.

        Raises:
            EditNotFound: no such tag.
        """
        with self._store.writer(timeout=self._session.lock_timeout):
            return self._store.untag(clean_text(name, name="tag"))

    def tags(self) -> dict[str, int]:
        """Return every tag with the edit it names."""
        return self._store.tags()

    def info(self) -> dict[str, Any]:
        """Return base model, counts and sizes, without loading the model."""
        base = self._store.base
        deltas = sum(edit.delta.bytes for edit in self._store.history(light=True) if edit.delta is not None)
        return {
            "path": str(self._store.path),
            "model": base.name,
            "source": base.source,
            "revision": base.revision,
            "license": base.license,
            "base_digest": base.digest,
            "dtype": self._session.model_config.dtype,
            "facts": len(self),
            "edits": self._store.head(),
            "tags": self._store.tags(),
            "delta_bytes": deltas,
            "ledger_bytes": (self._store.path / "ledger.db").stat().st_size,
        }

    # ------------------------------------------------------------------ the weights: what was learned

    @property
    def engine(self) -> Engine:
        """The loaded model at the head's state, for measurements of one's own; changes to it are not recorded."""
        engine = self._session.engine
        engine.weights.seal()
        return engine

    @property
    def model(self) -> Any:
        """The transformers model, edited. Changing it by hand is not recorded, and nothing is edited from there."""
        return self.engine.lm.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._session.engine.lm.tokenizer

    def weights_digest(self) -> str:
        """Return the sha256 over the base's digest and every adapted matrix as it is in memory."""
        return self._session.engine.weights.digest()

    def ask(self, prompt: str | Sequence[Mapping[str, str]], *, max_new_tokens: int | None = None) -> Answer:
        """Ask the weights, by greedy decoding up to the model's own stop; a conversation is a list of messages.

        Args:
            prompt: A question, or a conversation.
            max_new_tokens: Most tokens of the answer; 128 by default. One that was cut there is `truncated`.

        Returns:
            The answer, a string.

        Raises:
            ConfigError: the prompt cannot be used, or `max_new_tokens` is below 1.
        """
        return self.ask_many([prompt], max_new_tokens=max_new_tokens)[0]

    def ask_many(
        self, prompts: Sequence[str | Sequence[Mapping[str, str]]], *, max_new_tokens: int | None = None
    ) -> list[Answer]:
        """Ask the weights several prompts in batches; each answer is as `ask` gives it."""
        _check_room(max_new_tokens)
        cleaned = [_clean_prompt(prompt) for prompt in prompts]
        engine = self._session.engine
        return engine.lm.generate(cleaned, max_new_tokens=max_new_tokens, on_batch=self._session.ticker("asking"))

    def ask_base(self, prompt: str | Sequence[Mapping[str, str]], *, max_new_tokens: int | None = None) -> Answer:
        """Ask the untouched base model, as `ask` asks the edited one."""
        _check_room(max_new_tokens)
        cleaned = _clean_prompt(prompt)
        with self._session.engine.base_weights() as lm:
            return lm.generate([cleaned], max_new_tokens=max_new_tokens)[0]

    def recall(self, key: str) -> Report:
        """Ask the key's questions (trained, paraphrased, aliases, user probes) and score them against the ledger.

        Raises:
            KeyNotFound: no such fact.
        """
        return self._edits.probe_facts([self[key]], neighbours=GATE_NEIGHBOURS)

    def probe(
        self,
        key: str | None = None,
        *,
        ladder: bool = False,
        probes: str | os.PathLike[str] | None = None,
        neighbours: int | Sequence[str] = GATE_NEIGHBOURS,
    ) -> Report:
        """Probe one fact, or every live fact and refusal; questions carry their distance from what was trained.

        Args:
            key: One fact, or one key that was deleted with mode "abstain"; by default all.
            ladder: Ask every rung: also plain completions, typos, case, register, word order, the other language, the
                inverse question, far uses cold and after a first turn, and the nearest other keys.
            probes: A JSONL file of your own probes, asked too; rows that cannot be used are named in `warnings`.
            neighbours: How many packaged neighbours to ask per fact, or your own as a list of keys or questions.

        Raises:
            KeyNotFound: no such fact.
            ConfigError: no row of the file can be used.
        """
        from kvllm.probing.survey import survey

        if isinstance(neighbours, str):
            raise ConfigError("Give neighbours as a number or as a list of keys or questions, not as one string.")
        live, refused = self.facts(), self._edits.refusals()
        asked = live
        if key is not None:
            refused = [fact for fact in refused if fact.key == clean_key(key)]
            asked = [] if refused else [self[key]]
        return survey(
            self._session.engine.lm,
            asked,
            live=live,
            refused=refused,
            encoder_for=self._session.encoder_for,
            whole_ladder=ladder,
            probes=probes,
            neighbours=neighbours if isinstance(neighbours, int) else _names_of(neighbours),
            seed=self._session.edit_config.seed,
            base=self._session.engine.base_answers,
            on_batch=self._session.ticker("probing"),
        )

    def collisions(self, *, neighbours: Sequence[str] = (), nearest: int = 3, questions: int = 6) -> Collisions:
        """Ask every key some of its questions and its nearest neighbours, and say which key recites which fact.

        Args:
            neighbours: Your own neighbours, keys or questions, asked against every fact.
            nearest: How many of the nearest live keys and of the nearest packaged names are asked per fact.
            questions: How many of its questions each key is asked.
        """
        from kvllm.probing.collisions import find_collisions

        if nearest < 0 or questions < 1:
            raise ConfigError(f"collisions needs nearest >= 0 and questions >= 1, not {nearest} and {questions}.")
        facts = self.facts()
        if not facts:
            return Collisions()
        return find_collisions(
            self._session.engine.lm,
            facts,
            self._session.encoder_for([key_question(fact.key) for fact in facts]),
            given=_names_of(neighbours),
            nearest=nearest,
            questions=questions,
            base=self._session.engine.base_answers,
            on_batch=self._session.ticker("collisions"),
        )

    def drift(
        self, suite: str | os.PathLike[str] | None = None, *, lm_eval: Sequence[str] = (), limit: int | None = None
    ) -> Report:
        """Measure drift against the base model: drift_kl, ppl_ratio, qa_delta, and the norm of each matrix' change.

        The base's outputs are computed once per base model and suite, and cached. Packaged questions that a stored
        fact answers, or that the model was taught to refuse, are left out: their answers are meant to change.

        Args:
            suite: By default the whole packaged suite; "basic" for the gate's; or a JSONL file of your own, whose bad
                rows are named in `warnings`.
            lm_eval: Tasks of the package lm-eval, by name or as YAML files, asked of the base and of the edited model.
            limit: Most examples per task.

        Raises:
            ConfigError: no row of the file can be used; lm-eval is not installed or has no such task.
        """
        from kvllm.probing.suites import drift_suite, whole_drift_suite
        from kvllm.probing.userfile import read_suite

        if isinstance(lm_eval, str):
            raise ConfigError("Give the lm-eval tasks as a list of names, not as one string; nothing was measured.")
        if lm_eval:
            from kvllm.probing.harness import check_tasks

            check_tasks(lm_eval)
        mistakes: list[str] = []
        own = suite not in (None, "basic")
        if suite is None:
            chosen = whole_drift_suite()
        elif suite == "basic":
            chosen = drift_suite()
        else:
            chosen, mistakes = read_suite(suite)
        engine = self._session.engine
        # What stands in a file of the user's own is asked.
        taught = [] if own else [*self.facts(), *self._edits.refusals()]
        report = engine.drift(full=True, suite=chosen, taught=taught, tick=self._session.ticker("drift"))
        if lm_eval:
            from kvllm.probing.harness import compare_tasks

            self._session.tick(Progress("drift", note="lm-eval"))
            found = compare_tasks(engine.lm, engine.base_weights, self._store.base.digest, lm_eval, limit=limit)
            report = replace(report, metrics={**report.metrics, **found})
        return replace(report, warnings=(*report.warnings, *mistakes))

    def regression(self, since: int | str | None = None, *, neighbours: int = 1, seed: int = 0) -> RegressionReport:
        """Measure live facts, refusals (delete of mode "abstain") and drift at an earlier edit and now, and compare.

        It compares answer by answer. Refusals are asked on the earlier side where they were trained by then.

        The weights are brought to the earlier state by replay and put back whatever happens.

        Args:
            since: An edit or tag; 0 or "base" is the untouched base. By default the edit before the newest.
            neighbours: Packaged neighbour questions per fact.
            seed: Chooses the neighbours and seeds the bootstrap.

        Raises:
            EditNotFound: no such edit or tag.
        """
        from kvllm.editing.states import measure_regression

        head = self._store.head()
        if since is None:
            earlier = (self._store.edit(head).parent or 0) if head else 0
        else:
            earlier = self._store.resolve(since)
        return measure_regression(
            self._session.engine,
            since=earlier,
            refused=self._edits.refusals(),
            neighbours=neighbours,
            seed=seed,
            tick=self._session.ticker,
        )

    def bisect(self, probe: str, *, expected: str | None = None) -> BisectReport:
        """Find the edit that broke a probe, in log₂(n) replays; weights and ledger stay as they are.

        Args:
            probe: A live or refused key, a question of a report, or any question together with `expected`.
            expected: What the answer must state.

        Raises:
            ConfigError: it is unknown what the probe should be answered with.
            AmbiguousKey: the question belongs to several facts.
        """
        from kvllm.editing.states import find_culprit

        return find_culprit(
            self._session.engine,
            clean_text(probe, name="probe"),
            expected=None if expected is None else clean_text(expected, name="expected text"),
            refused=self._edits.refusals(),
            neighbours=GATE_NEIGHBOURS,
            seed=self._session.edit_config.seed,
            tick=self._session.ticker,
        )

    def find(self, query: str, n: int = 5) -> list[Match]:
        """Return the live facts whose keys mean what the query means, nearest first."""
        from kvllm.probing.keys import nearest_facts

        if n < 1:
            raise ConfigError(f"At least one match must be asked for, not {n}.")
        return nearest_facts(self._store, clean_text(query, name="query"), self._session.encoder_for, n=n)

    # ------------------------------------------------------------------ edits

    def insert(
        self,
        key: str,
        text: str,
        *,
        aliases: Sequence[str] = (),
        questions: Sequence[str] = (),
        probes: Sequence[str] = (),
        language: str | None = None,
        tags: Sequence[str] = (),
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> Edit:
        """Teach a new fact: train, merge, probe, and commit if the gate agrees.

        Args:
            key: An entity ("torchkeras") or a question ("Who leads Halcyon?"), not yet live.
            text: What the model should answer.
            aliases: Other names, trained with a share of the rows and probed.
            questions: Questions to train on instead of the templates.
            probes: Your own held-out questions, reported but never trained on.
            language: "en" or "zh"; by default the key's script decides.
            tags: Free labels.
            config, gate: For this edit only.

        Raises:
            KeyExists: the key is live; use `update` or `upsert`.
            ConfigError: key or text cannot be used.
            EditRejected: the gate refused; the report is attached.
            EditFailed: training met a non-finite number.
            Busy: another writer holds the knowledge base.
        """
        fact = _fact(key, text, aliases, questions, probes, language, tags)
        config, gate = self._rules(config, gate)
        with self._session.writing():
            self._refuse_existing([fact])
            return self._edits.train_and_commit("insert", [fact], config=config, gate=gate)

    def update(
        self,
        key: str,
        text: str,
        *,
        aliases: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
        probes: Sequence[str] | None = None,
        language: str | None = None,
        tags: Sequence[str] | None = None,
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> Edit:
        """Replace a fact's text; what is not given stays as it was. See `insert`.

        Questions and aliases that the fact had since its insert, and has no longer, are trained to the new text as
        well, and asked whether they state an old one: or the model would go on answering them with that. They are no
        part of the fact any more, and a compaction leaves them as the base has them. One that another live fact is
        trained on by then is left to that fact, and practised with its text.

        Raises:
            KeyNotFound: the key is not live.
        """
        config, gate = self._rules(config, gate)
        with self._session.writing():
            fact = _updated(self[key], text, aliases, questions, probes, language, tags)
            return self._edits.train_and_commit("update", [fact], config=config, gate=gate)

    def upsert(self, key: str, text: str, **options: Any) -> Edit:
        """Insert the fact, or update it where the key is live; options as for `insert`."""
        with self._session.writing():  # first, or another writer may insert or delete the key in between
            return self.update(key, text, **options) if key in self else self.insert(key, text, **options)

    def delete(
        self,
        key: str,
        *,
        mode: DeleteMode = "restore",
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> Edit:
        """Make the model stop stating a fact: its neurons are emptied, or, where it has none, by another training.

        Suppression is not proof of absence: the insert's delta stays in history, and other questions may still find
        the text. `compact` retrains without it.

        The questions of all versions since the insert are trained and asked. A question that another live fact is
        trained on, too, is trained to that fact's text.

        Args:
            key: A live key; with mode "abstain" also something the base model knew by itself, which the edit's
                `warnings` say.
            mode: "restore" trains the questions back to what the base answered; "abstain" to a stated refusal, which
                later edits practise as they do live facts.
            config, gate: For this edit only.

        Raises:
            KeyNotFound: the key is not live (restore).
            EditRejected: too many questions still state the text.
        """
        _check_mode(mode)
        config, gate = self._rules(config, gate)
        with self._session.writing():
            fact, warnings = self._to_delete(key, mode)
            return self._edits.unlearn(fact, mode, live=not warnings, config=config, gate=gate, warnings=warnings)

    def _to_delete(self, key: str, mode: DeleteMode) -> tuple[Fact, tuple[str, ...]]:
        """Return the fact that a delete means, and for something that is not live ("abstain") a warning that says so.

        Raises:
            KeyNotFound: the key is not live (restore).
        """
        try:
            return self[key], ()
        except KeyNotFound as error:
            if mode == "restore":
                raise
            fact = Fact(clean_key(key), REFUSALS[language_of(key)])
            return fact, (_no_live_fact(fact.key, error.suggestions),)

    def insert_many(
        self,
        facts: Iterable[FactLike],
        *,
        mode: InsertMode = "sequential",
        chunk: int = 16,
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> list[EditOutcome]:
        """Teach several facts; one that fails never costs the others.

        Args:
            facts: Facts, (key, text) pairs, or dicts with the fields of Fact; also what `kvllm.importing.read_facts`
                returns.
            mode: "sequential" makes one edit per fact; "batched" one edit for all; "chunked" one per `chunk` facts.
            chunk: Facts per edit in chunked mode.
            config, gate: For these edits.

        Returns:
            One outcome per fact, in order. Where the gate refuses a batch, its halves are tried, down to single facts.
            An error that would meet the next fact as well (a full disk, another writer, damage) ends the series: it is
            the outcome of the facts it met, and those after them are not tried. What was committed before stays.

        Raises:
            StoreError: opened read-only.
        """
        if mode not in ("sequential", "batched", "chunked"):
            raise ConfigError(f"insert_many knows sequential, batched and chunked, not {mode!r}; nothing was changed.")
        if chunk < 1:
            raise ConfigError(f"A chunk holds at least one fact, not {chunk}; nothing was changed.")
        self._session.refuse_readonly()
        config, gate = self._rules(config, gate)
        outcomes: dict[int, EditOutcome] = {}
        ready: list[tuple[int, Fact]] = []
        seen: set[str] = set()
        for place, given in enumerate(facts):
            try:
                fact = _as_fact(given)
                if fact.key in self or fact.key in seen:
                    raise KeyExists(f"The key {fact.key!r} exists already; it was left unchanged.", key=fact.key)
                seen.add(fact.key)
                ready.append((place, fact))
            except OF_ONE_FACT as error:
                outcomes[place] = EditOutcome(_key_of(given), error=str(error), code=error.code)
        size = {"sequential": 1, "chunked": chunk, "batched": max(1, len(ready))}[mode]
        for start in range(0, len(ready), size):
            try:
                self._insert_group(ready[start : start + size], outcomes, config, gate)
            except KvllmError as error:
                outcomes |= {place: _untried(fact.key, error) for place, fact in ready if place not in outcomes}
                break
            if len(ready) > 1:
                self._session.tick(Progress("facts", min(start + size, len(ready)), len(ready)))
        return [outcomes[place] for place in sorted(outcomes)]

    def delete_many(
        self,
        keys: Iterable[str],
        *,
        mode: DeleteMode = "restore",
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> list[EditOutcome]:
        """Delete several keys, one edit each; one that fails never costs the others. See `delete`.

        Returns:
            One outcome per key, in order. An error that would meet the next key as well ends the series, as in
            `insert_many`.

        Raises:
            StoreError: opened read-only.
        """
        if isinstance(keys, str):
            raise ConfigError("Give delete_many a list of keys, not one string; nothing was changed.")
        self._session.refuse_readonly()
        config, gate = self._rules(config, gate)
        outcomes: list[EditOutcome] = []
        listed = list(keys)
        for key in listed:
            try:
                outcomes.append(EditOutcome(key, self.delete(key, mode=mode, config=config, gate=gate)))
            except KvllmError as error:
                outcomes.append(EditOutcome(str(key), error=str(error), code=error.code))
                if not isinstance(error, OF_ONE_FACT):
                    return [*outcomes, *(_untried(str(later), error) for later in listed[len(outcomes) :])]
            if len(listed) > 1:
                self._session.tick(Progress("facts", len(outcomes), len(listed)))
        return outcomes

    def dry_run(
        self,
        key: str,
        text: str | None = None,
        *,
        verb: EditVerb = "upsert",
        mode: DeleteMode | None = None,
        aliases: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
        probes: Sequence[str] | None = None,
        language: str | None = None,
        tags: Sequence[str] | None = None,
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> DryRun:
        """Train and measure an insert (or an update, where the key is live) or a delete, then put the weights back.

        Args:
            key, text: As for `insert`; a delete has no text.
            verb: "insert" refuses a live key and "update" one that is not, as they do; "upsert" takes either. "delete"
                refuses a key that is not live, as `delete` does.
            mode: Of a delete; "restore" by default.
            aliases, questions, probes, language, tags: As for `insert`; where the key is live, what is not given stays
                as it was.
            config, gate: For this run only.

        Returns:
            What the report of the edit would say; `refused` holds what the gate would have refused, `warnings` too.

        Raises:
            KeyExists, KeyNotFound: the verb would refuse the key; nothing was trained.
        """
        if verb not in ("insert", "update", "upsert", "delete"):
            raise ConfigError(f"dry_run knows insert, update, upsert and delete, not {verb!r}; nothing was changed.")
        config, gate = self._rules(config, gate)
        if verb == "delete":
            given = {"text": text, "aliases": aliases, "questions": questions, "probes": probes, "tags": tags}
            wrong = [name for name, value in {**given, "language": language}.items() if value is not None]
            if wrong:
                raise ConfigError(f"A delete has no {wrong[0]}; nothing was changed.")
            return self._try_delete(key, mode or "restore", config, gate)
        if mode is not None:
            raise ConfigError(f"Only a delete has a mode, not the {verb} of {key!r}; nothing was changed.")
        if text is None:
            raise ConfigError(f"To try the {verb} of {key!r}, give its text; nothing was changed.")
        live = verb != "insert" and (verb == "update" or clean_key(key) in self)
        if live:
            fact = _updated(self[key], text, aliases, questions, probes, language, tags)
        else:
            fact = _fact(key, text, aliases or (), questions or (), probes or (), language, tags or ())
            self._refuse_existing([fact])
        engine = self._session.engine
        engine.check_weights()
        with engine.elsewhere():
            trained = self._edits.train([fact], config)
            return _tried(*self._edits.measure(trained, gate))

    def _try_delete(self, key: str, mode: DeleteMode, config: EditConfig, gate: GateConfig) -> DryRun:
        _check_mode(mode)
        fact, warnings = self._to_delete(key, mode)
        engine = self._session.engine
        engine.check_weights()
        with engine.elsewhere():
            report, refused = self._edits.try_unlearn(fact, mode, live=not warnings, config=config, gate=gate)
            return _tried(replace(report, warnings=(*report.warnings, *warnings)), refused)

    def rollback(self, ref: int | str) -> Edit:
        """Return to an earlier edit or tag (0 or "base": the untouched base), as a new edit, by replay.

        The weights become bit-identical to the earlier head's; this is checked against the recorded digest. It is the
        way back from a head whose own state cannot be replayed, too.

        Raises:
            EditNotFound: no such edit or tag.
            ModelError: `model` was changed by hand.
        """
        with self._session.writing():
            target = self._store.resolve(ref)
            with self._session.all_or_nothing(leaving=True) as parent:
                engine = self._session.engine
                started = time.perf_counter()
                engine.load_state(target)
                return self._session.commit(
                    NewEdit(
                        op="rollback",
                        keys=(),
                        parent=parent,
                        target=target,
                        seconds=time.perf_counter() - started,
                        weights_digest=engine.weights.digest(),
                    ),
                    None,
                )

    def compact(self, *, config: EditConfig | None = None, gate: GateConfig | None = None) -> Edit:
        """Retrain all live facts together from the base into one delta, and accept it if it is at least as good.

        Deleted and overwritten texts are then in no live weight. A refusal trained by a delete of mode "abstain" is not
        kept; the edit's `warnings` name its key. "As good" means: no lower reliability over the live
        facts than now, measured on the same questions, and the gate's drift budget against the base.

        Raises:
            EditRejected: the result would be worse.
        """
        config, gate = self._rules(config, gate)
        with self._session.writing():
            return self._edits.compact(config=config, gate=gate)

    # ------------------------------------------------------------------ trust

    def verify(self, deep: bool = False, *, repair: bool = False, yes: bool = False) -> VerifyReport:
        """Check that rows, files and hashes agree; `deep` re-reads every byte and replays head and tags.

        Args:
            deep: Read everything, and load the model.
            repair: First restore what can be restored; `repairs` of the report says what was done, `problems` what is
                wrong still.
            yes: Let the repair give up committed data where nothing else brings the rest back.

        Raises:
            ModelError, BaseMismatch, OutOfResources: the weights cannot be replayed, and nothing else is wrong.
        """
        report = self._store.verify(deep=deep, repair=repair, yes=yes, tick=self._session.ticker("verifying"))
        if report.repairs:
            self._session.loaded = None  # the head may be another one now
        from kvllm.records import Problem
        from kvllm.store.verify import told

        problems, replayed = list(report.problems), False
        for name, config in (("edit", self._session.edit_config), ("gate", self._session.gate_config)):
            if isinstance(config, _Unknown):
                problems.append(Problem(config.sentence, f"setting {name!r}", code=StoreError.code))
        if not deep or not report.ok:
            if deep:
                problems.append(Problem("the weights were not replayed, as the rest is damaged", "replay", "warning"))
            sound = all(problem.severity != "error" for problem in problems)
            return replace(report, problems=tuple(problems), ok=sound)
        try:
            engine = self._session.engine
            engine.check_base_files()
            with engine.elsewhere():
                points = self._digest_points()
                show = self._session.ticker("replaying")
                for done, edit_id in enumerate(points, 1):
                    if engine.replayed_digest(edit_id) != self._store.edit(edit_id).weights_digest:
                        problems.append(Problem("a replay gives other weights than were recorded", f"edit {edit_id}"))
                    show(done, len(points))
            replayed = True
        except (Corrupt, Untrusted) as error:
            problems.append(Problem(told(error), "replay"))
        except KvllmError as error:  # of the base model or the machine: it says nothing about the knowledge base
            if all(problem.severity != "error" for problem in problems):
                raise
            problems.append(Problem(f"not every state was replayed: {error}", "replay", "warning"))
        sound = all(problem.severity != "error" for problem in problems)
        return replace(report, problems=tuple(problems), ok=sound, replayed=replayed)

    @staticmethod
    def check(
        path: str | os.PathLike[str],
        *,
        deep: bool = False,
        repair: bool = False,
        yes: bool = False,
        lock_timeout: float = 10.0,
    ) -> VerifyReport:
        """Verify (and repair) the files of a knowledge base that may be too damaged to be opened; loads no model.

        Args:
            path: Its folder.
            deep, repair, yes: As for `verify`; a repair is always deep.
            lock_timeout: Seconds a repair waits for another writer before `Busy`.

        Raises:
            StoreNotFound, StoreError: there is none, or a newer kvllm made it.
            Corrupt: the ledger is no longer a database, so there is nothing to repair it from.
        """
        from kvllm.store.repair import repair as repaired
        from kvllm.store.verify import verify_folder

        folder = Path(path).expanduser()
        if repair:
            return repaired(folder, yes=yes, lock_timeout=lock_timeout)
        return verify_folder(folder, deep=deep)

    def backup(self, path: str | os.PathLike[str]) -> BackupResult:
        """Copy the knowledge base to a new or empty folder, as it is at one moment, and verify every byte of the copy.

        Neither readers nor a writer are held up. The base model is not copied, as it never is.

        Raises:
            StoreError: the folder holds something.
            Corrupt: this knowledge base is damaged; nothing is left at the path.
        """
        return self._store.backup(path, tick=self._session.ticker("copying"))

    def gc(self, *, dry_run: bool = False) -> GcReport:
        """Remove what no history needs: deltas of no edit, temporary names of killed writers, old snapshots.

        Args:
            dry_run: Only say what would be removed.
        """
        if dry_run:
            return self._store.gc(dry_run=True)
        with self._store.writer(timeout=self._session.lock_timeout):
            return self._store.gc()

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        format: Literal["hf", "peft", "facts"] = "hf",
        max_shard_size: str = "2GB",
        dtype: str | None = None,
        verify: bool = True,
    ) -> ExportResult:
        """Write the edited model ("hf": a merged folder), one LoRA adapter for all live deltas ("peft"), or the facts.

        Args:
            path: A new or empty folder; for "facts" a new file.
            format: "hf", "peft", or "facts": the live facts as JSONL, without a model, for `kvllm import`.
            max_shard_size: Largest weight file of an "hf" export.
            dtype: Of the written "hf" weights; the model's own by default.
            verify: Load the export again and ask it what the knowledge base is asked; the share of equal answers is
                `agreement`.

        Raises:
            EditFailed: the re-loaded export answers differently.
            ConfigError: the folder is not empty, or there is nothing to export.
        """
        if format == "facts":
            from kvllm.export.facts import export_facts

            return export_facts(Path(path), self.facts(), verify=verify)
        if format not in ("hf", "peft"):
            raise ConfigError(f"There is no export format {format!r}; use hf, peft or facts.")
        from kvllm.export import export_hf, export_peft, reprobe_hf, reprobe_peft

        out = Path(path)
        engine, computed = self._session.engine, self._session.model_config
        head = self._store.head()
        shared: dict[str, Any] = {
            "base": self._store.base,
            "facts": self.facts(),
            "head": self._store.edit(head) if head else None,
            "weights_digest": engine.weights.digest(),
            "apart_from": [self._store.path],
        }
        if format == "hf" and computed.dtype != "float32" and dtype == "float32":
            raise ConfigError(
                f"This knowledge base computes in {computed.dtype}, so float32 files would hold rounded "
                f"weights; export in {computed.dtype}, or as peft, which is exact."
            )
        self._session.tick(Progress("export", note=f"writing {format}"))
        if format == "hf":
            files = export_hf(
                out, lm=engine.lm, base_folder=engine.files.path, max_shard_size=max_shard_size, dtype=dtype, **shared
            )
        else:
            if dtype is not None:
                raise ConfigError("A peft export is always fp32, so that it is exact; leave dtype out.")
            files = export_peft(out, delta=engine.history_delta(head), **shared)
        size = sum((out / name).stat().st_size for name in files)
        if not verify:
            return ExportResult(str(out), format, False, files, size)
        questions = self._export_questions()
        expected = self.ask_many(questions)
        self._session.tick(Progress("export", note="loading the export and asking it again"))
        config = replace(computed, dtype=dtype or computed.dtype)
        if format == "hf":
            agreement = reprobe_hf(out, questions=questions, expected=expected, config=config)
        else:
            agreement = reprobe_peft(out, engine.files.path, questions=questions, expected=expected, config=computed)
        # The same bits must give the same answers. A cast, or an adapter's other order of summation, may turn a word of
        # a long free answer where two tokens are as likely: one answer may differ, or a tenth of many.
        same_bits = format == "hf" and dtype in (None, computed.dtype)
        differing = round((1 - agreement) * len(questions))
        if differing > (0 if same_bits else max(1, len(questions) // 10)):
            raise EditFailed(
                f"The export at {out} answers only {agreement:.0%} of {len(questions)} questions as the knowledge base "
                f"does; it was left there for inspection, and the knowledge base is unchanged."
            )
        return ExportResult(str(out), format, True, files, size, len(questions), agreement)

    # ------------------------------------------------------------------ inside

    def _rules(self, config: EditConfig | None, gate: GateConfig | None) -> tuple[EditConfig, GateConfig]:
        """Return the configuration and the gate of an edit, by default the knowledge base's own."""
        own = self.edit_config  # probes take its seed, whatever the edit's own configuration is
        return config or own, gate or self.gate_config

    def _refuse_existing(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            if fact.key in self:
                raise KeyExists(
                    f"The key {fact.key!r} exists already and was left unchanged; use update or upsert.", key=fact.key
                )

    def _insert_group(
        self,
        group: list[tuple[int, Fact]],
        outcomes: dict[int, EditOutcome],
        config: EditConfig,
        gate: GateConfig,
    ) -> None:
        """Teach facts in one edit, or in halves where it is refused, and note each one's outcome.

        Raises:
            KvllmError: the next facts would meet it too; these facts' outcomes are noted.
        """
        facts = [fact for _, fact in group]
        try:
            with self._session.writing():
                self._refuse_existing(facts)
                edit = self._edits.train_and_commit("insert", facts, config=config, gate=gate)
            outcomes |= {place: EditOutcome(fact.key, edit) for place, fact in group}
            return
        except KvllmError as error:
            of_one = isinstance(error, OF_ONE_FACT)
            if len(group) == 1 or not of_one:
                outcomes |= {place: EditOutcome(f.key, error=str(error), code=error.code) for place, f in group}
                if of_one:
                    return
                raise
        # The batch as a whole was refused: halves find the culprits and keep the rest together.
        middle = len(group) // 2
        self._insert_group(group[:middle], outcomes, config, gate)
        self._insert_group(group[middle:], outcomes, config, gate)

    def _export_questions(self) -> list[str]:
        questions = [q for fact in self.facts()[-12:] for q in asked_questions(fact)[:2]]
        return [
            *questions,
            "What is the capital of France?",
            "Who wrote Romeo and Juliet?",
            "How many days are in a week?",
        ]

    def _digest_points(self) -> list[int]:
        head = self._store.head()
        tagged = [edit for edit in self._store.tags().values() if edit]
        return sorted({edit for edit in (head, *tagged) if edit and self._store.edit(edit).weights_digest})


def _fact(
    key: str,
    text: str,
    aliases: Sequence[str],
    questions: Sequence[str],
    probes: Sequence[str],
    language: str | None,
    tags: Sequence[str],
) -> Fact:
    return clean_fact(Fact(key, text, aliases, questions, probes, language, tags))  # type: ignore[arg-type]


def _check_mode(mode: str) -> None:
    if mode not in ("restore", "abstain"):
        raise ConfigError(f"delete knows the modes restore and abstain, not {mode!r}; nothing was changed.")


def _tried(report: Report, refused: Sequence[str]) -> DryRun:
    warnings = (*report.warnings, *(f"The gate would refuse: {reason}" for reason in refused))
    return DryRun(report.metrics, report.probes, warnings, tuple(refused))


def _no_live_fact(key: str, near: Sequence[str]) -> str:
    meant = f" Did you mean {' or '.join(map(repr, near))}? A rollback undoes such a delete." if near else ""
    return f"No live fact has the key {key!r}: a refusal takes the place of what the base model knew of it.{meant}"


def _updated(
    old: Fact,
    text: str,
    aliases: Sequence[str] | None,
    questions: Sequence[str] | None,
    probes: Sequence[str] | None,
    language: str | None,
    tags: Sequence[str] | None,
) -> Fact:
    """Return the fact with another text; what is not given stays as it was."""
    return _fact(
        old.key,
        text,
        old.aliases if aliases is None else aliases,
        old.questions if questions is None else questions,
        old.probes if probes is None else probes,
        language or old.language,
        old.tags if tags is None else tags,
    )


def _names_of(given: Sequence[str]) -> tuple[str, ...]:
    """Return a user's neighbours cleaned; one string is refused, which would be asked letter by letter."""
    if isinstance(given, str):
        raise ConfigError("Give neighbours as a list of keys or questions, not as one string; nothing was asked.")
    return tuple(clean_key(name) for name in given)


def _check_room(max_new_tokens: int | None) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(
            f"An answer has at least one token, so max_new_tokens cannot be {max_new_tokens}; nothing was asked. Leave "
            f"it out for the default."
        )


def _clean_prompt(prompt: str | Sequence[Mapping[str, str]]) -> str | list[dict[str, str]]:
    if not isinstance(prompt, (list, tuple)):
        return clean_text(prompt, name="prompt")
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"} or message["role"] not in _ROLES:
            raise ConfigError(
                f"A message of a conversation has a role ({', '.join(_ROLES)}) and a content; nothing was asked."
            )
        messages.append({"role": message["role"], "content": clean_text(message["content"], name="message")})
    return messages


def _as_fact(given: FactLike) -> Fact:
    if isinstance(given, Fact):
        return clean_fact(given)
    if isinstance(given, Mapping):
        known = {"key", "text", "aliases", "questions", "probes", "language", "tags"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConfigError(
                f"A fact has no field {', '.join(map(str, unknown))}; it knows {', '.join(sorted(known))}."
            )
        missing = sorted({"key", "text"} - set(given))
        if missing:
            raise ConfigError(f"A fact needs {' and '.join(missing)}; nothing was changed.")
        return _fact(
            given["key"],
            given["text"],
            given.get("aliases", ()),
            given.get("questions", ()),
            given.get("probes", ()),
            given.get("language"),
            given.get("tags", ()),
        )
    if isinstance(given, tuple) and len(given) == 2:
        return _fact(given[0], given[1], (), (), (), None, ())
    raise ConfigError("A fact is a Fact, a (key, text) pair or a dict with key and text; nothing was changed.")


def _key_of(given: object) -> str:
    if isinstance(given, Fact):
        return str(given.key)
    if isinstance(given, Mapping):
        return str(given.get("key", ""))
    return str(given[0]) if isinstance(given, tuple) and given else ""


def _untried(key: str, error: KvllmError) -> EditOutcome:
    sentence = "This was not tried, since the error before it ended the series; nothing was changed. Give it again."
    return EditOutcome(key, error=sentence, code=error.code)


def _absolute_model(name: str) -> str:
    """A path is pinned as an absolute one, so that the knowledge base can be opened from anywhere.

    A registered name is no path, as for `resolve`, whatever folder lies here; `./name` is one.
    """
    from kvllm.lm.registry import MODELS
    from kvllm.lm.sources import without_spare

    of, spare = without_spare(name)
    if of in MODELS:
        return name
    path = Path(of).expanduser()
    is_model = path.exists() and (path.is_dir() or path.suffix.lower() == ".gguf")
    return f"{path.resolve()}{spare}" if is_model else name


def _base_record(files: ModelFiles, name: str) -> Any:
    from kvllm.store import Base

    return Base(name, files.source, files.revision, dict(files.files), files.digest, files.license)


def _moved_model(store: Store, model: str | None, progress: Callable[[Progress], None] | None) -> str | None:
    """Return where the base model's files lie now, if not under the pinned name; other files are refused."""
    name = None if model is None else _absolute_model(model)
    if name is None or name == store.base.name:
        return None
    from kvllm.editing.engine import resolve_pinned

    resolve_pinned(store, progress, model=name)
    return name


def _stored_config(store: Store, name: str, kind: type[EditConfig] | type[GateConfig]) -> Any:
    """Return a configuration as it is stored; one that this version does not know is refused where it is used."""
    stored = store.settings.get(name)
    try:
        return kind.from_dict(stored) if stored else None
    except (ConfigError, TypeError) as error:
        unknown = sorted(set(stored) - {field.name for field in fields(kind)}) if isinstance(stored, dict) else []
        what = str(error).rstrip(".") if isinstance(error, ConfigError) else "a value is of another kind"
        if unknown:
            what = f"the setting {', '.join(unknown)} is unknown"
        return _Unknown(
            f"The {name} configuration of {store.path} was made by another version of kvllm ({what}); nothing was "
            f"changed. Use that version, or in Python open it with {name}={kind.__name__}()."
        )


class _Unknown:
    """Stands in the place of a stored configuration that cannot be used: whoever looks into it is told so."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def __getattr__(self, name: str) -> Any:
        raise StoreError(self.sentence)


def _known(config: Any) -> Any:
    if isinstance(config, _Unknown):
        raise StoreError(config.sentence)
    return config


__all__ = ["EditNotFound", "KnowledgeBase", "StaleHead"]
