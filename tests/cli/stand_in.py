"""A knowledge base without a model, so that the command line can be tested on its own: parsing, streams, exit codes.

`test_stand_in_api.py` checks that every method and parameter used here exists on the real `KnowledgeBase`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvllm.config import EditConfig, GateConfig
from kvllm.errors import EditNotFound, KeyExists, KeyNotFound, StoreNotFound
from kvllm.prompts import training_questions
from kvllm.records import (
    Answer,
    BackupResult,
    BisectReport,
    BisectStep,
    DeltaInfo,
    DryRun,
    Edit,
    EditOutcome,
    ExportResult,
    Fact,
    FactChange,
    Garbage,
    GcReport,
    Match,
    Metric,
    ProbeResult,
    Progress,
    RegressionReport,
    Repair,
    Report,
    StoredFact,
    VerifyReport,
)


def report(*probes: ProbeResult) -> Report:
    return Report(
        {"reliability": Metric(1.0, 8, "live greedy decoding", "contains"), "drift_kl": Metric(0.01, 40)}, probes
    )


class StandIn:
    """The API of `KnowledgeBase`, answering from the ledger instead of a model. Stores live in a class attribute."""

    stores: ClassVar[dict[str, StandIn]] = {}
    opened: ClassVar[list[dict[str, Any]]] = []
    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    raises: ClassVar[dict[str, BaseException]] = {}
    edit_config = EditConfig()
    gate_config = GateConfig()

    def __init__(self) -> None:
        self._facts: dict[str, StoredFact] = {}
        self._edits: list[Edit] = []
        self._tags: dict[str, int] = {}
        self._progress: Callable[[Progress], None] | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
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
    ) -> StandIn:
        cls.opened.append({"path": str(path), "create": create, "readonly": readonly, "model": model})
        cls._meet("open")
        if str(path) not in cls.stores:
            raise StoreNotFound(f"There is no knowledge base at {path}; nothing was changed.")
        base = cls.stores[str(path)]
        base._progress = progress
        return base

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> StandIn:
        cls._meet("create")
        base = cls.stores[str(path)] = StandIn()
        base._progress = progress
        return base

    @classmethod
    def _meet(cls, name: str, **arguments: Any) -> None:
        cls.calls.append((name, arguments))
        if name in cls.raises:
            raise cls.raises[name]

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def insert(
        self,
        key: str,
        text: str,
        *,
        aliases: tuple[str, ...] = (),
        questions: tuple[str, ...] = (),
        probes: tuple[str, ...] = (),
        language: str | None = None,
        tags: tuple[str, ...] = (),
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> Edit:
        self._meet("insert", key=key, text=text, aliases=aliases, tags=tags, config=config, gate=gate)
        if key in self._facts:
            raise KeyExists(f"The key {key!r} exists; nothing was changed.", key=key)
        print("a library that prints")
        if self._progress is not None:
            self._progress(Progress("training", 1, 2, loss=1.0, recall=0.5, drift=0.1))
        questions = training_questions(Fact(key, text, tuple(aliases)))
        edit = self._commit("insert", key, report(*(ProbeResult("trained", q, text, True, 1.0) for q in questions)))
        self._facts[key] = StoredFact(key, text, tuple(aliases), tags=tuple(tags), edit_id=edit.id)
        return edit

    update = upsert = insert

    def delete(
        self, key: str, *, mode: str | None = None, config: EditConfig | None = None, gate: GateConfig | None = None
    ) -> Edit:
        self._meet("delete", key=key, mode=mode, config=config, gate=gate)
        self[key]
        del self._facts[key]
        return self._commit("delete", key, report(), mode=mode)

    def insert_many(
        self,
        facts: list[Fact],
        *,
        mode: str = "sequential",
        chunk: int = 16,
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> list[EditOutcome]:
        self._meet("insert_many", mode=mode, chunk=chunk)
        outcomes = []
        for fact in facts:
            try:
                outcomes.append(EditOutcome(fact.key, self.insert(fact.key, fact.text)))
            except KeyExists as error:
                outcomes.append(EditOutcome(fact.key, error=str(error), code=error.code))
        return outcomes

    def delete_many(
        self,
        keys: list[str],
        *,
        mode: str = "restore",
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> list[EditOutcome]:
        self._meet("delete_many", keys=keys, mode=mode)
        outcomes = []
        for key in keys:
            try:
                outcomes.append(EditOutcome(key, self.delete(key, mode=mode)))
            except KeyNotFound as error:
                outcomes.append(EditOutcome(key, error=str(error), code=error.code))
        return outcomes

    def dry_run(
        self,
        key: str,
        text: str | None = None,
        *,
        verb: str = "upsert",
        mode: str = "restore",
        aliases: tuple[str, ...] | None = None,
        config: EditConfig | None = None,
        gate: GateConfig | None = None,
    ) -> DryRun:
        self._meet("dry_run", key=key, verb=verb, **({"mode": mode} if verb == "delete" else {"aliases": aliases}))
        measured = report(ProbeResult("trained", f"What is {key}?", text or "It is a library.", True, 1.0))
        return DryRun(measured.metrics, measured.probes)

    def get(self, key: str, default: Any = None) -> StoredFact | None:
        return self._facts.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._facts

    def __getitem__(self, key: str) -> StoredFact:
        self._meet("getitem", key=key)
        if key not in self._facts:
            raise KeyNotFound(f"No fact has the key {key!r}.", key=key, suggestions=tuple(self._facts))
        return self._facts[key]

    def facts(self, at: int | str | None = None) -> list[StoredFact]:
        self._meet("facts", at=at)
        return list(self._facts.values())

    def history(self, limit: int | None = None) -> list[Edit]:
        return self._edits[::-1][:limit]

    def edit(self, ref: int | str) -> Edit:
        self._meet("edit", ref=ref)
        number = self._tags.get(ref, 0) if isinstance(ref, str) else ref
        if not 0 < number <= len(self._edits):
            raise EditNotFound(f"No edit or tag {ref!r}.")
        return self._edits[number - 1]

    def ask(self, prompt: str, *, max_new_tokens: int | None = None) -> Answer:
        self._meet("ask", prompt=prompt, max_new_tokens=max_new_tokens)
        words = self.ask_many([prompt])[0].split(" ")
        room = max_new_tokens or len(words)
        return Answer(" ".join(words[:room]), truncated=len(words) > room)

    def ask_base(self, prompt: str, *, max_new_tokens: int | None = None) -> Answer:
        self._meet("ask_base", prompt=prompt)
        return Answer("I do not know.")

    def ask_many(self, prompts: list[str], *, max_new_tokens: int | None = None) -> list[Answer]:
        answers = []
        for prompt in prompts:
            # Of a conversation the last message is the question.
            prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            found = [fact.text for fact in self._facts.values() if fact.key in prompt]
            answers.append(Answer(found[0] if found else "I do not know."))
        return answers

    def recall(self, key: str) -> Report:
        return report()

    def find(self, query: str, n: int = 5) -> list[Match]:
        self._meet("find", query=query, n=n)
        return [Match(fact.key, fact.text, 0.9) for fact in self._facts.values()][:n]

    def rollback(self, ref: int | str) -> Edit:
        self._meet("rollback", ref=ref)
        target = self.edit(ref)
        return self._commit("rollback", None, report(), target=target.id)

    def tag(self, name: str, ref: int | str | None = None, *, move: bool = False) -> int:
        self._meet("tag", tag=name, ref=ref, move=move)
        self._tags[name] = len(self._edits) if ref is None else self.edit(ref).id
        return self._tags[name]

    def untag(self, name: str) -> int:
        self._meet("untag", tag=name)
        return self._tags.pop(name)

    def tags(self) -> dict[str, int]:
        return self._tags

    def compact(self, *, config: EditConfig | None = None, gate: GateConfig | None = None) -> Edit:
        self._meet("compact", config=config, gate=gate)
        return self._commit("compact", None, report())

    def verify(self, deep: bool = False) -> VerifyReport:
        self._meet("verify", deep=deep)
        return VerifyReport(True, edits=len(self._edits), facts=len(self._facts), deep=deep)

    @classmethod
    def check(
        cls, path: Any, *, deep: bool = False, repair: bool = False, yes: bool = False, lock_timeout: float = 10.0
    ) -> VerifyReport:
        cls._meet("check", deep=deep, repair=repair, yes=yes)
        return VerifyReport(True, deep=True, repairs=(Repair("removed it", "deltas/x"),) if repair else ())

    def backup(self, path: str | Path) -> BackupResult:
        self._meet("backup", path=path)
        return BackupResult(str(path), 1, 1, 1, 1, 1000)

    def gc(self, *, dry_run: bool = False) -> GcReport:
        self._meet("gc", dry_run=dry_run)
        return GcReport(dry_run, (Garbage("a delta of no edit", "deltas/x", 1000),), 1000)

    def probe(self, key: str | None = None) -> Report:
        self._meet("probe", key=key)
        if key == "refused":
            told = ProbeResult("refusal", "What is refused?", "I do not know.", True, 1.0, "I do not know.", key)
            return Report({"refusal": Metric(1.0, 1, "live", "auto")}, (told,))
        facts = [self[key]] if key is not None else list(self._facts.values())
        probes = [
            ProbeResult(
                "trained", f"{n}: what is {fact.key}?", fact.text if n else "no", bool(n), 1.0, fact.text, fact.key
            )
            for fact in facts
            for n in range(4)
        ]
        return Report({"reliability": Metric(0.75, len(probes), "live", "auto")}, tuple(probes))

    def drift(self, suite: str | None = None) -> Report:
        self._meet("drift")
        return Report({"drift_kl": Metric(0.02, 40, "teacher-forced"), "qa_delta": Metric(0.0, 30)})

    def regression(self, since: int | str | None = None) -> RegressionReport:
        self._meet("regression", since=since)
        return RegressionReport(
            1,
            2,
            facts=(FactChange("torchkeras", 1, 1, "lost", 0.0, 1.0, 8),),
            after=report(),
            drift_before=Report({"drift_kl": Metric(0.01, 40)}),
            drift=self.drift(),
        )

    def bisect(self, probe: str, *, expected: str | None = None) -> BisectReport:
        self._meet("bisect", probe=probe, expected=expected)
        return BisectReport(probe, "text", None, "auto", "still passes", 0, 1, steps=(BisectStep(1, True, "text"),))

    def weights_digest(self) -> str:
        return "d1" * 32

    def export(
        self,
        path: str | Path,
        *,
        format: str,
        max_shard_size: str = "2GB",
        dtype: str | None = None,
        verify: bool = True,
    ) -> ExportResult:
        self._meet("export", format=format, max_shard_size=max_shard_size, dtype=dtype, verify=verify)
        return ExportResult(str(path), "hf", verify, ("model.safetensors",), 1000, 4, 1.0)

    def info(self) -> dict[str, Any]:
        return {"model": "tiny", "edits": len(self._edits), "facts": len(self._facts), "disk_bytes": 12_345}

    def _commit(self, op: Any, key: str | None, measured: Report, **more: Any) -> Edit:
        edit = Edit(
            len(self._edits) + 1, op, key, (key,) if key else (), len(self._edits) or None, steps=12, seconds=3.5,
            delta=DeltaInfo("ab" * 32, 1000, 1.5, 8, 4), report=measured, created_at="2026-01-01T00:00:00Z", **more,
        )  # fmt: skip
        self._edits.append(edit)
        return edit


@dataclass(frozen=True)
class Ran:
    """One finished command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The only JSON document on stdout; anything else there fails the test."""
        return json.loads(self.out)
