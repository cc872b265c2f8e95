"""The columns: how each of them brings a fact into one model, and back out. Knows items and models, no scores.

All start from the same base weights and train the same questions. kvllm's column is a KnowledgeBase with its gate; the
peers train a second copy of the base without gate; retrieval leaves the weights alone and puts a note into the prompt.
The peers stop by kvllm's rule of recall: every target token leads every other by `margin` nats on every trained
question, as the step's own forward pass saw it. (kvllm asks four times that where an answer turns away from what the
model would have said, and that preserved answers hold, so the peers may stop sooner.)

    world = World(folder, given)
    world.column("article").edit(item, item.text)
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from edit_bench.items import Item
from kvllm import EditConfig, EditFailed, EditRejected, GateConfig, KnowledgeBase, Progress
from kvllm.config import ModelConfig
from kvllm.edits import Edits
from kvllm.errors import ending_error
from kvllm.lm.model import LanguageModel, Row
from kvllm.lm.sources import resolve
from kvllm.lm.targets import decoder_layers, find_targets
from kvllm.session import Session

NAMES = ("kvllm", "article", "down_proj", "context", "unedited")
# The article's recipe, as its notebook passes it. peft reads init_r 12 and target_r 8 (its defaults) instead of r, and
# without update_and_allocate no rank is ever pruned: so it was there, so it is here.
ARTICLE = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
ARTICLE_MODULES = ("q_proj", "v_proj")
ARTICLE_LR = 5e-3
# Plain fine-tuning: the one matrix that lies at this share of the depth.
DOWN_PROJ_DEPTH = 0.8
DOWN_PROJ_LR = 1e-3
PEER_STEPS = 60
# A note goes into the prompt where its key is at least this near to the question: without such a line every unrelated
# question would carry a note. A guess, not tuned.
NEAR_ENOUGH = 0.5
OPEN_GATE = GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=None, min_erasure=None)
NOTE = {"en": "Note on “{key}”: {text}\n\n{question}", "zh": "关于“{key}”的说明：{text}\n\n{question}"}


class TimedEdits(Edits):
    """Edits that know how long the last training and merge took, without probes and gate.

    Attributes:
        train_seconds: Of the last edit; None before it was trained.
        around: A context in which trainings run: a counter of operations, say.
    """

    train_seconds: float | None = None
    around: Any = None

    def train(self, *arguments: Any, **options: Any) -> Any:
        with nullcontext() if self.around is None else self.around:
            started = time.perf_counter()
            trained = super().train(*arguments, **options)
            self.train_seconds = time.perf_counter() - started
            return trained


class TimedBase(KnowledgeBase):
    """A KnowledgeBase whose edits are timed."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._edits = self.edits = TimedEdits(session)


class World:
    """One run's models, loaded when they are first needed."""

    def __init__(
        self,
        folder: Path,
        *,
        model: str | None = None,
        seed: int = 0,
        edit: Mapping[str, Any] | None = None,
        variants: Mapping[str, Mapping[str, Any]] | None = None,
        items: Sequence[Item] = (),
        near: float = NEAR_ENOUGH,
        open_gate: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.folder = folder
        self.config = EditConfig.from_dict({"seed": seed, **(edit or {})})
        self.variants = {
            name: EditConfig.from_dict({**self.config.to_dict(), **changes})
            for name, changes in (variants or {}).items()
        }
        self.items = list(items)
        self.near = near
        self._model = {} if model is None else {"model": model}
        self.gate = OPEN_GATE if open_gate else GateConfig()
        self._progress = progress
        self._columns: dict[str, Column] = {}
        self._kb: TimedBase | None = None

    @property
    def kb(self) -> TimedBase:
        """The knowledge base that kvllm's column edits; what an earlier run left in the folder is gone on with."""
        if self._kb is None:
            path = self.folder / "quality.kb"
            options: dict[str, Any] = {"edit": self.config, "gate": self.gate, "progress": self._progress}
            if path.exists():
                self._kb = TimedBase.open(path, **options)  # type: ignore[assignment]
            else:
                self._kb = TimedBase.create(path, **options, **self._model)  # type: ignore[assignment]
        assert self._kb is not None
        return self._kb

    @cached_property
    def peer(self) -> LanguageModel:
        """A second copy of the base, in fp32, which the other columns share."""
        return LanguageModel.load(resolve(str(self.kb.info()["model"])).path, ModelConfig())

    def column(self, name: str) -> Column:
        """Return a column; a variant is kvllm's own with other settings, in the same knowledge base."""
        if name not in self._columns:
            variant = self.variants.get(name)
            self._columns[name] = COLUMNS[name](self) if variant is None else Kvllm(self, variant)
        return self._columns[name]

    def close(self) -> None:
        if self._kb is not None:
            self._kb.close()
            self._kb = None


class Column:
    """One way to bring facts into a model. The base class does nothing: the unedited model."""

    ops: tuple[str, ...] = ("insert",)

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def lm(self) -> LanguageModel:
        return self.world.peer

    def edit(self, item: Item, text: str) -> dict[str, Any]:
        """Bring a text in under the item's key, and return how that went."""
        return {}

    def delete(self, item: Item) -> dict[str, Any]:
        """Take the item's fact out again by the column's own means."""
        raise NotImplementedError

    def reset(self) -> None:
        """Return to the base."""

    def prompts(self, questions: Sequence[str]) -> list[str]:
        """Return what is really asked for each question."""
        return list(questions)

    def keep(self, folder: Path, done: int, row: Mapping[str, Any]) -> None:
        """Keep the state after the edit that `row` tells of, so that a killed sequence can go on."""

    def take_up(self, folder: Path | None, items: Sequence[Item], done: int) -> dict[str, Any] | None:
        """Take up the kept state of a sequence, or start at the base.

        Args:
            folder: Where it was kept, if anywhere.
            items: The sequence up to the item after the last one that is known to be done.
            done: How many edits are known to be done.

        Returns:
            What is told of one more edit, if its state was kept and the caller does not know.
        """
        self.reset()
        for item in items[:done]:
            self.edit(item, item.text)
        return None


class Kvllm(Column):
    """kvllm's defaults, gate included: an edit that it refuses leaves the model as it was, and is measured so."""

    ops = ("insert", "update", "delete", "batched")

    def __init__(self, world: World, config: EditConfig | None = None) -> None:
        super().__init__(world)
        self._config = config or world.config

    @property
    def lm(self) -> LanguageModel:
        return self.world.kb._session.engine.lm  # after `kb.engine` every edit looks for changes by hand

    def edit(self, item: Item, text: str) -> dict[str, Any]:
        kb = self.world.kb
        kb.edits.train_seconds = None
        known = item.key in kb
        arguments: dict[str, Any] = {} if known else {"questions": item.questions, "language": item.language}
        change = kb.update if known else kb.insert
        return self._timed(lambda: change(item.key, text, config=self._config, **arguments))

    def delete(self, item: Item) -> dict[str, Any]:
        self.world.kb.edits.train_seconds = None
        return self._timed(lambda: self.world.kb.delete(item.key, config=self._config))

    def many(self, items: Sequence[Item]) -> dict[str, Any]:
        """Bring all items in by one batched call."""
        kb = self.world.kb
        started = time.perf_counter()
        outcomes = kb.insert_many([item.fact() for item in items], mode="batched", config=self._config)
        for outcome in outcomes:
            if (kind := ending_error(outcome.code)) is not None:  # the machine's fault, no refusal
                raise kind(outcome.error or "")
        return {
            "seconds": time.perf_counter() - started,
            "edits": len({o.edit.id for o in outcomes if o.edit is not None}),
            "rejected": [item.name for item, o in zip(items, outcomes, strict=True) if not o.ok],
        }

    def take_up(self, folder: Path | None, items: Sequence[Item], done: int) -> dict[str, Any] | None:
        # The knowledge base is the state. A refused edit leaves none, and is tried again.
        kb = self.world.kb
        if not done and items[0].key not in kb:
            self.reset()
        if len(items) > done and items[done].key in kb:
            edit = kb.edit(kb.head())
            stopped = bool(edit.config["training"]["recalled"])
            return {"steps": edit.steps, "stopped": stopped, "seconds": edit.seconds, "train_seconds": None}
        return None

    def reset(self) -> None:
        head = self.world.kb.head()
        newest = self.world.kb.edit(head) if head else None
        if newest is not None and (newest.op, newest.target) != ("rollback", 0):
            self.world.kb.rollback(0)

    def _timed(self, call: Any) -> dict[str, Any]:
        started = time.perf_counter()
        found: dict[str, Any]
        try:
            edit = call()
            found = {"steps": edit.steps, "stopped": bool(edit.config["training"]["recalled"])}
        except EditRejected as error:
            found = {"rejected": "; ".join(error.reasons)}  # the sentence itself would name a public record's key
        except EditFailed as error:
            found = {"rejected": str(error)}
        found["seconds"] = time.perf_counter() - started
        found["train_seconds"] = self.world.kb.edits.train_seconds
        return found


class Tuned(Column):
    """Training of some of the peer's matrices, which are the base's again after `reset`."""

    ops = ("insert", "update")
    lr = 0.0

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._base: dict[str, torch.Tensor] = {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def edit(self, item: Item, text: str) -> dict[str, Any]:
        lm = self.lm
        self._own()
        rows = [lm.row(question, text) for question in item.trained()]
        torch.manual_seed(self.world.config.seed)
        started = time.perf_counter()
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                found = self.train(rows)
        finally:
            lm.model.eval()
            lm.model.requires_grad_(False)
        seconds = time.perf_counter() - started
        return {**found, "seconds": seconds, "train_seconds": seconds}

    def train(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Train, merge, and leave the model with plain matrices."""
        raise NotImplementedError

    def fit(self, model: Any, rows: Sequence[Row], parameters: Sequence[Any]) -> dict[str, Any]:
        """Optimise until every target token of every row leads, all rows in one batch, with the model's own loss."""
        lm, margin = self.lm, self.world.config.margin
        optimizer = torch.optim.AdamW(list(parameters), lr=self.lr)
        ids, mask = lm.pad([row.ids for row in rows])  # (rows, seq)
        labels = torch.full_like(ids, -100)  # by position: a pad token may be the end token, too
        for place, row in enumerate(rows):
            labels[place, len(row.prompt) : len(row.ids)] = ids[place, len(row.prompt) : len(row.ids)]
        stopped, steps, loss = False, 0, float("nan")
        while not stopped and steps < PEER_STEPS:
            steps += 1
            output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
            loss = float(output.loss.detach())
            stopped = _leads_everywhere(output.logits.detach(), labels, margin)
            if stopped or not torch.isfinite(output.loss):
                break
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            optimizer.step()
            del output
        return {"steps": steps, "stopped": stopped, "loss": loss}

    @torch.no_grad()
    def reset(self) -> None:
        for name, weight in self._base.items():
            self._weight(name).copy_(weight)

    def keep(self, folder: Path, done: int, row: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / "state.new"
        state = {name: self._weight(name).detach().contiguous() for name in self._base}
        save_file(state, fresh, metadata={"done": str(done), "row": json.dumps(row)})
        os.replace(fresh, folder / "state.safetensors")

    @torch.no_grad()
    def take_up(self, folder: Path | None, items: Sequence[Item], done: int) -> dict[str, Any] | None:
        from safetensors import safe_open

        self.reset()
        path = None if folder is None else folder / "state.safetensors"
        if path is None or not path.exists():
            return None
        self._own()
        with safe_open(path, framework="pt") as kept:
            for name in kept.keys():  # noqa: SIM118 (not a mapping)
                self._weight(name).copy_(kept.get_tensor(name))
            told = kept.metadata()
        return dict(json.loads(told["row"])) if int(told["done"]) == done + 1 else None

    def _own(self) -> None:
        if not self._base:
            self._base = {name: self._weight(name).detach().clone() for name in self.names}

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.lm.model.get_submodule(name).weight
        return weight


class Article(Tuned):
    """The article's recipe on peft directly: AdaLoRA on the queries and values of all layers, then a merge."""

    lr = ARTICLE_LR

    @cached_property
    def names(self) -> tuple[str, ...]:
        return find_targets(self.lm.model, depth=(0.0, 1.0), modules=",".join(ARTICLE_MODULES)).names

    def train(self, rows: Sequence[Row]) -> dict[str, Any]:
        from peft import AdaLoraConfig, TaskType, get_peft_model

        config = AdaLoraConfig(
            task_type=TaskType.CAUSAL_LM, target_modules=list(self.names), total_step=10 * PEER_STEPS, **ARTICLE
        )
        adapted = get_peft_model(self.lm.model, config)
        try:
            adapted.train()
            found = self.fit(adapted, rows, [p for p in adapted.parameters() if p.requires_grad])
            adapted.merge_and_unload()
        except BaseException:
            adapted.unload()
            raise
        finally:
            # peft leaves its configuration on the model, and would warn of it the next time.
            if hasattr(self.lm.model, "peft_config"):
                del self.lm.model.peft_config
        return found


class DownProj(Tuned):
    """Plain fine-tuning of one late down_proj on the target and the end token."""

    lr = DOWN_PROJ_LR

    @cached_property
    def names(self) -> tuple[str, ...]:
        model = self.lm.model
        n_layers = len(decoder_layers(model)[1])
        place = min(n_layers - 1, int(DOWN_PROJ_DEPTH * n_layers))
        return find_targets(model, depth=(place / n_layers, (place + 1) / n_layers), modules="mlp-out").names[-1:]

    def train(self, rows: Sequence[Row]) -> dict[str, Any]:
        weight = self._weight(self.names[0])
        weight.requires_grad_(True)
        return self.fit(self.lm.model, rows, [weight])


class Context(Column):
    """No edit: the text of the nearest key, found by kvllm's encoder among the run's items, goes into the prompt."""

    ops = ("insert", "update")

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._new: dict[str, str] = {}
        self._vectors: dict[tuple[str, str], Any] = {}

    def edit(self, item: Item, text: str) -> dict[str, Any]:
        self._new[item.key] = text
        return {"steps": 0, "seconds": 0.0, "train_seconds": 0.0}

    def reset(self) -> None:
        self._new = {}

    def prompts(self, questions: Sequence[str]) -> list[str]:
        found = []
        for question, item in zip(questions, self._nearest(questions), strict=True):
            if item is None:
                found.append(question)
                continue
            words = {"key": item.key, "text": self._new.get(item.key, item.text), "question": question}
            found.append(NOTE[item.language].format_map(words))
        return found

    def _nearest(self, questions: Sequence[str]) -> list[Item | None]:
        """Return the item whose key is nearest to each question, if one is near enough."""
        from kvllm.probing.encoder import nearest
        from kvllm.prompts import key_question

        keys = [item.questions[0] if item.questions else key_question(item.key) for item in self.world.items]
        found: list[Item | None] = []
        for question in questions:
            encoder = self.world.kb._session.encoder_for([question])
            # Keys that the question's encoder does not speak have no distance to it.
            spoken = [place for place, key in enumerate(keys) if encoder.speaks(key)]
            best = None
            if spoken:
                vectors = self._encoded(encoder, [question, *(keys[place] for place in spoken)])
                place, cosine = nearest(vectors[0], vectors[1:], 1)[0]
                best = self.world.items[spoken[place]] if cosine >= self.world.near else None
            found.append(best)
        return found

    def _encoded(self, encoder: Any, texts: Sequence[str]) -> Any:
        import numpy as np

        missing = [text for text in dict.fromkeys(texts) if (encoder.name, text) not in self._vectors]
        if missing:
            for text, vector in zip(missing, encoder.encode(missing), strict=True):
                self._vectors[encoder.name, text] = vector
        return np.stack([self._vectors[encoder.name, text] for text in texts])


COLUMNS: dict[str, type[Column]] = {
    "kvllm": Kvllm,
    "article": Article,
    "down_proj": DownProj,
    "context": Context,
    "unedited": Column,
}


def _leads_everywhere(logits: torch.Tensor, labels: torch.Tensor, margin: float) -> bool:
    """Say whether each label leads every other token by the margin; logits (rows, seq, vocab), labels (rows, seq)."""
    from kvllm.editing.editor import leads

    wanted = labels[:, 1:] != -100
    return bool((leads(logits[:, :-1][wanted].float(), labels[:, 1:][wanted]) >= margin).all())


@contextmanager
def world_in(folder: Path | None, **options: Any) -> Iterator[World]:
    """Give a world in a folder of its own: a temporary one, or one beside the result that a later run goes on with."""
    from common import working_folder

    with working_folder(folder) as place:
        world = World(place, **options)
        try:
            yield world
        finally:
            world.close()


def discard(folder: Path) -> None:
    """Remove a run's working folder once its result is stored."""
    shutil.rmtree(folder, ignore_errors=True)


def described(name: str, world: World) -> dict[str, Any]:
    """Return what a reader needs to repeat a column."""
    settings: dict[str, dict[str, Any]] = {
        **{
            mine: {"edit": config.to_dict(), "gate": world.gate.to_dict()}
            for mine, config in {"kvllm": world.config, **world.variants}.items()
        },
        "article": {
            "peft": {**ARTICLE, "init_r": 12, "target_r": 8, "target_modules": list(ARTICLE_MODULES)},
            "optimizer": f"AdamW, lr {ARTICLE_LR}",
            "most_steps": PEER_STEPS,
            "loss": "the model's own over the answer and the end token, with peft's penalty; fp32, all layers",
        },
        "down_proj": {
            "matrix": f"the MLP's output at {DOWN_PROJ_DEPTH} of the depth",
            "optimizer": f"AdamW, lr {DOWN_PROJ_LR}",
            "most_steps": PEER_STEPS,
            "loss": "the model's own over the answer and the end token; fp32",
        },
        "context": {"note": NOTE["en"], "near_enough": world.near, "searched": "the keys of all items of the run"},
        "unedited": {},
    }
    return json.loads(json.dumps(settings[name]))  # type: ignore[no-any-return]
