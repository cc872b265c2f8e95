"""What an open knowledge base holds: the ledger, the loaded model, encoders, the writer's lock, one way to commit.

`KnowledgeBase` is what users call, `Edits` makes its edits; both work on one session.

    with session.writing(), session.all_or_nothing() as parent:
        ...
        session.commit(NewEdit(op="insert", parent=parent, ...), delta)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from kvllm.config import EditConfig, GateConfig, ModelConfig
from kvllm.errors import Corrupt, KvllmError, ModelError, OutOfResources, StoreError, Untrusted, is_out_of_memory
from kvllm.prompts import names_of
from kvllm.records import Edit, Progress, StoredFact, lineage
from kvllm.store import NewEdit, Store

if TYPE_CHECKING:
    from kvllm.editing.engine import Engine
    from kvllm.probing.encoder import Encoder, HiddenStateEncoder

# A snapshot of the changed matrices is written when opening would have to replay more deltas than this.
SNAPSHOT_EVERY = 5


class Session:
    """One open knowledge base.

    Attributes:
        store: The ledger and its files.
        model: Where the base model's files lie, if not where they were pinned.
        model_config, edit_config, gate_config: As it was opened; an edit may have its own configuration and gate.
        progress: Called with `Progress` records while something takes time.
        lock_timeout: Seconds to wait for another writer.
        loaded: The model, once something has needed it.
        encoders: By name, once something has needed them.
    """

    def __init__(
        self,
        store: Store,
        *,
        model: str | None = None,
        model_config: ModelConfig | None = None,
        edit: EditConfig | None = None,
        gate: GateConfig | None = None,
        progress: Callable[[Progress], None] | None = None,
        lock_timeout: float = 10.0,
    ) -> None:
        self.store = store
        self.model = model
        self.model_config = model_config or ModelConfig()
        self.edit_config = edit or EditConfig()
        self.gate_config = gate or GateConfig()
        self.progress = progress
        self.lock_timeout = lock_timeout
        self.loaded: Engine | None = None
        self.encoders: dict[str, Encoder] = {}

    def close(self) -> None:
        """Close the ledger and let go of the model."""
        self.loaded = None
        self.store.close()

    def live(self) -> list[StoredFact]:
        """Return the facts of the ledger's head."""
        return self.store.facts(None)

    def live_names(self) -> frozenset[str]:
        """Return what live facts are about, casefolded."""
        return names_of(self.live())

    def lineage(self) -> list[Edit]:
        """Return the edits whose deltas the head's weights hold, newest first: back to the base or to a compaction."""
        return lineage(self.store.history(light=True))

    def versions(self, key: str, edits: Sequence[Edit] | None = None) -> list[StoredFact]:
        """Return what the weights were taught of a key since its insert or a compaction, oldest first.

        Args:
            key: Live at the newest of the edits, or refused since (delete of mode "abstain").
            edits: A lineage; the head's by default.
        """
        stored = {fact.edit_id: fact for fact in self.store.fact_versions(key)}
        found: list[StoredFact] = []
        for edit in self.lineage() if edits is None else edits:
            if edit.id in stored:
                found.append(stored[edit.id])
            if key in edit.keys and edit.op != "update" and edit.mode != "abstain":
                break
        return found[::-1]

    @property
    def engine(self) -> Engine:
        """The loaded model at the head's state; follows a head that another process moved."""
        from kvllm.editing.engine import Engine

        if self.loaded is None:
            self.loaded = Engine.load(self.store, self.model_config, self.edit_config, self.progress, self.model)
        self.loaded.follow(self.store.head())
        return self.loaded

    def encoder_for(self, texts: Sequence[str]) -> Encoder:
        """Return the encoder that speaks all texts, loaded once; without MiniLM's files the model's own states do."""
        from kvllm.probing.encoder import choose_encoder

        chosen = choose_encoder(texts, hidden=self.hidden_encoder, progress=self.progress)
        wanted = chosen.name
        if wanted not in self.encoders:
            try:
                chosen.encode(texts[:1])
            except ModelError:
                chosen = self.hidden_encoder()
            self.encoders[wanted] = chosen
        return self.encoders[wanted]

    def hidden_encoder(self) -> HiddenStateEncoder:
        """Return the encoder of the base model's own hidden states."""
        return self.engine.hidden_encoder()

    def refuse_readonly(self) -> None:
        """Refuse to write where the knowledge base was opened read-only."""
        if self.store.readonly:
            raise StoreError("The knowledge base was opened read-only; nothing was changed.")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writer's lock.

        Raises:
            StoreError: opened read-only.
            Busy: another writer holds it.
            OutOfResources: memory ran out meanwhile.
        """
        self.refuse_readonly()
        try:
            with self.store.writer(timeout=self.lock_timeout):
                yield
        except Exception as error:
            if isinstance(error, KvllmError) or not is_out_of_memory(error):
                raise
            raise OutOfResources("There is not enough memory for this edit; nothing was changed.") from error

    def commit(self, new: NewEdit, delta: Mapping[str, bytes] | None) -> Edit:
        """Write an edit to the ledger, whose weights are the model's as they are now."""
        self.tick(Progress("commit"))
        edit = self.store.commit(new, delta)
        engine = self.loaded
        assert engine is not None
        engine.head = edit.id
        engine.settle()
        # A snapshot only makes opening faster: whatever keeps it from being written, the edit stands all the same.
        with suppress(Exception):
            engine.snapshot_if_due(SNAPSHOT_EVERY)
        return edit

    @contextmanager
    def all_or_nothing(self, *, leaving: bool = False) -> Iterator[int]:
        """Hold the model at the ledger's head, whose id is given, and hold the weights together with the ledger.

        After any exception in the block the weights are as they were, unless the ledger says that it was committed.

        Args:
            leaving: The head's state is left for another one: where it cannot be replayed, the base's is held instead.

        Raises:
            ModelError: the weights were changed by hand.
        """
        engine = self._engine_to_leave() if leaving else self.engine
        engine.check_weights()
        parent = self.store.head()
        before = engine.weights.state()
        with engine.away():
            try:
                yield parent
            except BaseException:
                self._put_back(before, parent)
                raise

    def _engine_to_leave(self) -> Engine:
        """Return the loaded model at the head's state, or at the base's where there is no way to that one."""
        try:
            return self.engine
        except (Corrupt, Untrusted):
            if self.loaded is None:
                raise
            self.loaded.leave()
            return self.loaded

    def _put_back(self, before: Mapping[str, Any], parent: int) -> None:
        """Set the weights to what they were; where the edit was committed, the next use replays the ledger's head."""
        engine = self.loaded
        if engine is None:
            return
        try:
            committed = self.store.head() != parent
        except KvllmError:
            committed = False
        if not committed:
            engine.weights.restore(before)
            engine.settle()
        elif engine.head == parent:
            engine.head = -1  # unknown: the next use replays the ledger's head

    def tick(self, progress: Progress) -> None:
        """Tell the user's progress function, if there is one."""
        if self.progress is not None:
            self.progress(progress)

    def ticker(self, stage: str) -> Callable[..., None]:
        """Return a progress function for one stage: called with (done, total)."""

        def tick(step: int, total: int | None = None, **numbers: Any) -> None:
            self.tick(Progress(stage, step, total, **numbers))

        return tick
