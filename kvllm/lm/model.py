"""One loaded language model: generate and score. The only place that knows tokenizers and chat templates.

It knows nothing of facts, edits or stores. Text that a user wrote never becomes a control token; a base model without
chat template is asked with plain prompts; answers end where the model's own stop token ends them.

    lm = LanguageModel.load("/path/to/hf-folder", ModelConfig())
    lm.generate(["What is the capital of France?"])   # ['The capital of France is Paris.']
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvllm.config import ModelConfig
from kvllm.errors import ConfigError, KvllmError, ModelError, OutOfResources, is_out_of_memory
from kvllm.lm.decoding import MIN_OPENING, Decoding, Judge, Opening
from kvllm.memory import give_back
from kvllm.prompts import name_place
from kvllm.records import Answer

Message = dict[str, str]
# A base model without chat template gets the question in this frame; the answer follows after a space.
PLAIN_FRAME = "Question: {content}\nAnswer:"
_SENTINEL = "\u27e6kvllm-slot-{index}\u27e7"
_MARKUP = re.compile(r"<.+>|\[.+\]|\{.+\}|⟨.+⟩|\uff1c.+\uff1e", re.DOTALL)
_GENERATION_BATCH = 32
_HEAD_TOKENS = 128  # positions per vocabulary projection when scoring
_SCALE_TOKENS = 8  # positions that a model's own logits are looked at
_SCALE_ROUNDING = 1e-3  # a factor no further from 1 is 1


@dataclass(frozen=True)
class Row:
    """A prompt with its answer, as token ids; the loss and the scores look at the answer only.

    Attributes:
        prompt: Token ids up to and including the generation prompt.
        answer: Token ids of the answer, end-of-turn token included where the answer is whole.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.answer


@dataclass(frozen=True)
class RowScore:
    """Teacher-forced score of one row: mean negative log-likelihood per answer token, and greedy agreement."""

    nll: float
    greedy: float


class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode, without gradients.

    A copy of another one in lower precision is given that one's `logit_scale`.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig, *, logit_scale: float | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self._frames: dict[tuple[str, ...], tuple[int, ...]] = {}
        if logit_scale is not None:
            self.logit_scale = logit_scale
        self.model.eval()
        self.model.requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig | None = None) -> LanguageModel:
        """Load a Hugging Face folder: safetensors only, no remote code, no network.

        Raises:
            ModelError: files missing or not loadable.
            OutOfResources: not enough memory.
        """
        config = config or ModelConfig()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        device = resolve_device(config.device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=getattr(torch, config.dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            model, report = loaded
            model = model.to(device)
        except Exception as error:  # files from outside: every kind of error means that they cannot be loaded
            if is_out_of_memory(error):
                raise OutOfResources(f"There is not enough memory to load the model {Path(folder).name}.") from error
            raise ModelError(f"The model folder {folder} cannot be loaded: {_reason(error)}.") from error
        missing = sorted(report["missing_keys"])
        if missing:  # transformers fills them with random numbers, others at every loading
            raise ModelError(
                f"The model folder {folder} lacks {len(missing)} weight{'s' if len(missing) > 1 else ''} "
                f"({', '.join(missing[:3])}); nothing was loaded, download it again."
            )
        found = cls(model, tokenizer, config)
        found._check_tokenizer(folder)
        found._check_logits(folder)
        return found

    def _check_tokenizer(self, folder: str | Path) -> None:
        """Refuse a tokenizer or a chat template that cannot carry a question to the model."""
        slot = _SENTINEL.format(index=0)
        if self.has_chat_template and slot not in self._render([{"role": "user", "content": slot}]):
            raise ModelError(f"The chat template in {folder} drops what the user says; nothing was loaded.")
        try:
            usable = bool(self.prompt_ids("?"))
        except KvllmError:
            raise
        except Exception as error:  # its files come from outside
            raise ModelError(f"The tokenizer in {folder} cannot be used: {_reason(error)}.") from error
        if not usable:
            raise ModelError(f"The tokenizer in {folder} makes an empty prompt; nothing was loaded.")

    def _check_logits(self, folder: str | Path) -> None:
        """Refuse a model that cannot be run, or whose logits kvllm would work out otherwise than the model does."""
        try:
            _ = self.logit_scale
        except KvllmError:
            raise
        except Exception as error:  # a model from outside
            if is_out_of_memory(error):
                raise OutOfResources(f"There is not enough memory to run the model {Path(folder).name}.") from error
            raise ModelError(f"The model in {folder} cannot be run: {_reason(error)}.") from error

    # ------------------------------------------------------------------ tokens

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the generation config's, the tokenizer's, and the template's end of turn."""
        found: list[int] = []
        declared = self.model.generation_config.eos_token_id
        for ids in (declared, self.tokenizer.eos_token_id, self.end_of_turn):
            found.extend([ids] if isinstance(ids, int) else list(ids or ()))
        if not all(isinstance(token, int) for token in found):
            raise ModelError(f"The model's generation_config.json names an impossible end token ({declared!r}).")
        return tuple(dict.fromkeys(found))

    @cached_property
    def end_of_turn(self) -> int:
        """The token that the chat template puts after an assistant's answer; without a template, end of text.

        Raises:
            ModelError: the tokenizer has neither.
        """
        if self.has_chat_template:
            slot = _SENTINEL.format(index=1)
            rendered = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": slot}])
            after = rendered.rpartition(slot)[2]
            ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
            control = set(self.tokenizer.all_special_ids) | set(self.tokenizer.get_added_vocab().values())
            for token in ids:
                if token in control:
                    return int(token)
        if self.tokenizer.eos_token_id is None:
            raise ModelError("The tokenizer has no end-of-turn token, so answers could not be made to stop.")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else int(self.stop_ids[0])

    @cached_property
    def max_positions(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        text_config = self.model.config.get_text_config() if hasattr(self.model.config, "get_text_config") else None
        limit = getattr(text_config or self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else 2048

    @cached_property
    def _control_strings(self) -> tuple[str, ...]:
        strings = set(self.tokenizer.all_special_tokens) | set(self.tokenizer.get_added_vocab())
        return tuple(s for s in strings if s.strip())

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that steer the model and that no user may write: special tokens, and added ones that are markup.

        Many models declare `<think>` or their role marks as added tokens that are not special, which
        `split_special_tokens` leaves whole. Added words and runs of spaces are ordinary text.
        """
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        added = {
            int(token)
            for string, token in self.tokenizer.get_added_vocab().items()
            if _MARKUP.fullmatch(string.strip()) or (string.strip() and string in template)
        }
        return frozenset(added | {int(i) for i in self.tokenizer.all_special_ids})

    def text_ids(self, text: str) -> list[int]:
        """Tokenize user text so that nothing in it becomes a control token.

        Raises:
            ConfigError: this tokenizer knows a part of the text as a control token only.
        """
        ids = [int(i) for i in self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
        if self.control_ids.isdisjoint(ids):
            return ids
        bare = self._bare_tokenizer
        ids = bare.encode(text, add_special_tokens=False).ids if bare is not None else ids
        if not self.control_ids.isdisjoint(ids):
            raise ConfigError(
                "The text contains a control token that this model's tokenizer cannot take as plain text; nothing was "
                "changed. Write it differently."
            )
        return [int(i) for i in ids]

    @cached_property
    def _bare_tokenizer(self) -> Any:
        """The tokenizer without any added token, so that their strings are spelt as text; None if it has no such."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        from tokenizers import Tokenizer

        return Tokenizer.from_str(
            json.dumps({**json.loads(backend.to_str()), "added_tokens": [], "post_processor": None})
        )

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Tokenize one prompt, or a conversation, up to the place where the answer starts.

        Where the text holds no control-token string, the ids are those of the tokenizer's own `apply_chat_template`,
        so that an exported model sees what training saw; otherwise the pieces are tokenized apart.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not messages:
            raise ConfigError("The conversation is empty; nothing was asked.")
        if not self.has_chat_template:
            return self._plain_ids(messages)
        if not any(s in m["content"] for m in messages for s in self._control_strings):
            rendered = self._render(messages, add_generation_prompt=True)
            whole = [int(i) for i in self.tokenizer(rendered, add_special_tokens=False)["input_ids"]]
            # A normalizer may make a control token of letters that only look like one (full-width brackets, say).
            if self._controls(whole) == self._frame_controls(tuple(m["role"] for m in messages)):
                return whole
        slots = [{**m, "content": _SENTINEL.format(index=i)} for i, m in enumerate(messages)]
        rest = self._render(slots, add_generation_prompt=True)
        ids: list[int] = []
        for index, message in enumerate(messages):
            before, found, rest = rest.partition(_SENTINEL.format(index=index))
            if not found:
                raise ModelError("The chat template drops a message, so user text cannot be kept apart from it.")
            ids += [int(i) for i in self.tokenizer(before, add_special_tokens=False)["input_ids"]]
            ids += self.text_ids(message["content"])
        ids += [int(i) for i in self.tokenizer(rest, add_special_tokens=False)["input_ids"]]
        return ids

    def _controls(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i in self.control_ids)

    def _frame_controls(self, roles: tuple[str, ...]) -> tuple[int, ...]:
        """Return the control tokens that the template itself writes around messages of these roles."""
        if roles not in self._frames:
            rendered = self._render([{"role": role, "content": "x"} for role in roles], add_generation_prompt=True)
            self._frames[roles] = self._controls(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return self._frames[roles]

    def completion_ids(self, text: str) -> list[int]:
        """Tokenize a text to be gone on with as it stands: no chat template, no frame."""
        return [*self._begin_ids(), *self.text_ids(text)]

    def answer_ids(self, text: str, *, end: bool = True) -> list[int]:
        """Tokenize an answer as it would follow the prompt, with the end-of-turn token unless told otherwise."""
        ids = self.text_ids(text if self.has_chat_template else f" {text}")
        return [*ids, self.end_of_turn] if end else ids

    def row(self, prompt: str | Sequence[Message], answer: str) -> Row:
        """Return prompt and answer as one row."""
        return Row(tuple(self.prompt_ids(prompt)), tuple(self.answer_ids(answer)))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn answer ids into text, without the stop token, control tokens and outer white space."""
        kept = ids[:-1] if ids and ids[-1] in self.stop_ids else ids  # an end of turn need not be a special token
        return str(self.tokenizer.decode(list(kept), skip_special_tokens=True)).strip()

    def name_ends(self, ids: Sequence[int], name: str) -> tuple[int, ...]:
        """Return the places in ids at which the name has just been said as a word of its own, in capitals or not."""

        def until(place: int) -> str:
            return str(self.tokenizer.decode(list(ids[: place + 1])))

        whole, found = until(len(ids)), []
        for match in re.compile(name_place(name).pattern, re.IGNORECASE).finditer(whole):
            said = whole[: match.end()]
            place = bisect_left(range(len(ids)), len(said), key=lambda place: len(until(place)))
            while place + 1 < len(ids) and not until(place).startswith(said):  # in the middle of a character
                place += 1
            found.append(place)
        return tuple(dict.fromkeys(found))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except KvllmError:
            raise
        except Exception as error:  # a program from outside, run in jinja's sandbox: it can fail in any way
            raise ModelError(
                f"The model's chat template cannot be used: {_reason(error)}; nothing was asked."
            ) from error

    def _begin_ids(self) -> list[int]:
        """Return the token that the tokenizer puts before every text, if it does."""
        bos = self.tokenizer.bos_token_id
        return [int(bos)] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []

    def _plain_ids(self, messages: Sequence[Message]) -> list[int]:
        ids = self._begin_ids()
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                ids += self.text_ids(f" {message['content']}\n")
            elif message["role"] == "system":
                ids += self.text_ids(f"{message['content']}\n")
            else:
                ids += self.text_ids(("" if index == 0 else "\n") + PLAIN_FRAME.format(content=message["content"]))
        return ids

    # ------------------------------------------------------------------ generation and scores

    @torch.inference_mode()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = _GENERATION_BATCH,
        on_batch: Callable[[int, int], None] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[tuple[int, ...]]:
        """Answer prompts greedily, in batches of like length; answers keep the stop token if it came.

        Args:
            prompts: Token ids of each prompt.
            max_new_tokens: Bound on each answer's length; the configuration's by default.
            batch_size: Prompts per forward pass.
            on_batch: Called with (done, total) after each batch.
            drafts: A guess at each answer. One forward pass accepts each guess as far as every token of it is the
                greedy choice, and decoding goes on from there: the same answers, sooner where the guesses are good
                (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023).

        Returns:
            The new ids of each prompt, in the order given.
        """
        rooms = [max_new_tokens or self.config.max_new_tokens] * len(prompts)
        return self.generate_bounded(prompts, rooms, batch_size=batch_size, on_batch=on_batch, drafts=drafts)

    @torch.inference_mode()
    def generate_bounded(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        *,
        batch_size: int = _GENERATION_BATCH,
        on_batch: Callable[[int, int], None] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[tuple[int, ...]]:
        """Answer prompts greedily, each with its own bound; an answer that has ended leaves its batch.

        The answers are those of `generate_ids`; where many short answers and a few long ones are asked together, the
        long ones do not keep the others in the batch.

        Args:
            prompts: Token ids of each prompt.
            rooms: Most new tokens of each answer.
            batch_size: Prompts per forward pass.
            on_batch: Called with (done, total) after each batch.
            drafts: A guess at each answer, empty where there is none; see `generate_ids`.

        Returns:
            The new ids of each prompt, in the order given; the stop token is kept if it came.
        """
        decoding = Decoding(self, prompts, rooms, batch_size=batch_size, drafts=drafts, on_batch=on_batch)
        return decoding.run()

    @torch.inference_mode()
    def follow(
        self,
        rows: Sequence[Row],
        rooms: Sequence[int],
        judge: Judge,
        *,
        batch_size: int = 64,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[tuple[int, ...]]:
        """Read every row's answer as it stands, and answer anew from where it is not the greedy choice.

        Args:
            rows: Prompts with answers of at least one token.
            rooms: Most tokens of each new answer; 1 where only the judge wants to see the old one.
            judge: Called with places in `rows` and, for each, the states that predict its answer's tokens,
                (answer, hidden); returns the greedy choice at each place, as `compare` does.
            batch_size, on_batch: As in `generate_bounded`.

        Returns:
            The new ids of each row, as of `generate_bounded`.
        """
        prompts, drafts = [row.prompt for row in rows], [row.answer for row in rows]
        decoding = Decoding(self, prompts, rooms, batch_size=batch_size, drafts=drafts, judge=judge, on_batch=on_batch)
        return decoding.run()

    @torch.inference_mode()
    def shared_opening(self, prompts: Sequence[Sequence[int]]) -> Opening:
        """Run once what all prompts begin with: for a chat model its preamble, most of a short question's tokens."""
        n = min(shared_length(prompts), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
        return self.opening(prompts[0][:n] if n >= MIN_OPENING else ())

    @torch.no_grad()
    def opening(self, ids: Sequence[int]) -> Opening:
        """Run what several prompts begin with; nothing for no tokens."""
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        if ids:
            read = torch.tensor([list(ids)], device=self.device)
            self.last_states(read, torch.ones_like(read), cache)
        return Opening(tuple(ids), cache)

    @cached_property
    def caches_join(self) -> bool:
        """Rows of other lengths can be put into one cache where every layer keeps all that it has read."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.model.config).layers)

    @cached_property
    def _takes_positions(self) -> bool:
        """BLOOM works its positions out from the mask and takes none."""
        return "position_ids" in inspect.signature(self._backbone.forward).parameters

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        drafts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answer prompts or conversations greedily; see `generate_ids`, here with drafts as text.

        At most `max_new_tokens` tokens an answer, `ModelConfig.max_new_tokens` (128) by default; one that was cut there
        is `truncated`.
        """
        ids = [self.fitting(self.prompt_ids(p), max_new_tokens) for p in prompts]
        guessed = None if drafts is None else [self.answer_ids(text) if text else [] for text in drafts]
        answers = self.generate_ids(ids, max_new_tokens=max_new_tokens, on_batch=on_batch, drafts=guessed)
        return [Answer(self.decode(a), truncated=not a or a[-1] not in self.stop_ids) for a in answers]

    @torch.inference_mode()
    def answer_states(self, rows: Sequence[Row], *, batch_size: int = 16) -> list[torch.Tensor]:
        """Return the last hidden states that predict each answer token: one (answer, hidden) tensor a row, fp32."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for batch, states, _, owner in self._answer_states(rows, batch_size):
            for place, i in enumerate(batch):
                found[i] = states[owner == place].float().cpu()
        return found

    @torch.inference_mode()
    def compare(
        self, before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]
    ) -> list[tuple[float, tuple[int, ...]]]:
        """Return each pair's mean KL(before‖now) per token, in nats, and the greedy choice at each place now.

        Args:
            before, now: Pairs of last hidden states, each (n, hidden) with its own n ≥ 1.
        """
        if not now:
            return []
        dtype = next(self.model.parameters()).dtype
        pairs = zip(*(torch.cat(list(side)).split(_HEAD_TOKENS) for side in (before, now)), strict=True)
        kl, greedy = [], []
        for old, new in pairs:
            p = torch.log_softmax(self.logits(old.to(self.device, dtype)).float(), -1)
            q = torch.log_softmax(self.logits(new.to(self.device, dtype)).float(), -1)
            kl.append((p.exp() * (p - q)).sum(-1).cpu())
            greedy.append(q.argmax(-1).cpu())
        sizes = [len(states) for states in now]
        return [
            (float(each.mean().clamp(min=0.0)), tuple(tokens.tolist()))  # what is not a number stays none
            for each, tokens in zip(torch.cat(kl).split(sizes), torch.cat(greedy).split(sizes), strict=True)
        ]

    @torch.inference_mode()
    def score(self, rows: Sequence[Row], *, batch_size: int = 16) -> list[RowScore]:
        """Score answers teacher-forced: never a substitute for live decoding, only a companion."""
        scores: list[RowScore | None] = [None] * len(rows)
        for batch, states, targets, owner in self._answer_states(rows, batch_size):
            nll, correct = [], []
            for part, ids in zip(states.split(_HEAD_TOKENS), targets.split(_HEAD_TOKENS), strict=True):
                logits = self.logits(part).float()
                nll.append(torch.nn.functional.cross_entropy(logits, ids, reduction="none"))
                correct.append(logits.argmax(-1) == ids)
            losses, hits = torch.cat(nll), torch.cat(correct)
            for place, i in enumerate(batch):
                mine = owner == place
                scores[i] = RowScore(float(losses[mine].mean()), float(hits[mine].float().mean()))
        return [s for s in scores if s is not None]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-pad id lists to ids and mask, both (batch, seq) on the model's device."""
        width = max(len(r) for r in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(list(row))
            mask[place, : len(row)] = 1
        return ids.to(self.device), mask.to(self.device)

    def _answer_states(
        self, rows: Sequence[Row], batch_size: int
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (row indices, states (answers, hidden), targets (answers,), owner (answers,)) per batch."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        opening = self.shared_opening([row.prompt for row in rows])
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = self.pad([rows[i].ids[len(opening) :] for i in batch])
            mask = torch.cat([mask.new_ones(len(batch), len(opening)), mask], dim=-1)
            hidden = self.last_states(ids, mask, opening.for_rows(len(batch)) if opening else None)
            states, targets, owner = [], [], []
            for place, i in enumerate(batch):
                prompt, answer = len(rows[i].prompt) - len(opening), len(rows[i].answer)
                states.append(hidden[place, prompt - 1 : prompt - 1 + answer])
                targets.append(ids[place, prompt : prompt + answer])
                owner += [place] * answer
            stacked = torch.cat(states)
            yield batch, stacked, torch.cat(targets), torch.tensor(owner, device=stacked.device)
            give_back()

    def placed(self, starts: Sequence[int], past: int, width: int) -> dict[str, torch.Tensor]:
        """Return mask and positions for a batch of `width` columns behind `past` cached ones, as the model takes them.

        Args:
            starts: First position of each row: `past`, or 0 for a row that begins anew and must not see the cache.
            past: Cached columns.
            width: New columns, right-padded.
        """
        first = torch.tensor(starts, device=self.device)[:, None]
        seen = torch.cat([(first > 0).expand(-1, past), first.new_ones(len(starts), width).bool()], dim=-1).long()
        positions = (first + torch.arange(width, device=self.device)).clamp(max=self.max_positions - 1)  # of padding
        return {"attention_mask": seen} | ({"position_ids": positions} if self._takes_positions else {})

    def last_states(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None, *, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what enters the vocabulary projection, (batch, seq, hidden).

        The projection itself is a fifth of a small model's work; `logits` applies it where it is wanted.
        """
        placed = {"position_ids": positions} if positions is not None and self._takes_positions else {}
        output = self._backbone(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None, **placed
        )
        states: torch.Tensor = output.last_hidden_state
        return states

    @cached_property
    def _backbone(self) -> Any:
        """The model without its vocabulary projection.

        Raises:
            ModelError: it has no such parts.
        """
        backbone = self.model.get_decoder() if hasattr(self.model, "get_decoder") else None
        if self.model.get_output_embeddings() is None or backbone is None or backbone is self.model:
            raise ModelError("The model has no separate vocabulary projection; kvllm cannot use it.")
        return backbone

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Project last hidden states (n, hidden) onto the vocabulary (n, vocab), as the model does."""
        return self.finished(self.model.get_output_embeddings()(states))

    def finished(self, projected: torch.Tensor) -> torch.Tensor:
        """Return a vocabulary projection (n, vocab) as logits: with the model's own factor and soft cap."""
        return self._capped(projected if self.logit_scale == 1.0 else projected * self.logit_scale)

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self._cap
        return torch.tanh(logits / cap) * cap if cap else logits

    @cached_property
    def _cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @cached_property
    @torch.inference_mode()
    def logit_scale(self) -> float:
        """What the model multiplies its vocabulary projection with, before a soft cap; 1 for most families.

        Granite divides, Cohere and Falcon-H1 multiply, MiniCPM3 scales what is projected, each under a name of its own:
        so the factor is read off the model's own logits for a few tokens.

        Raises:
            ModelError: no constant factor gives the model's own logits.
        """
        states: list[torch.Tensor] = []
        handle = self._backbone.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state)
        )
        try:
            ids, mask = self.pad([self.prompt_ids("?")[:_SCALE_TOKENS]])
            own = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.cpu().double()
        finally:
            handle.remove()
        refusal = ModelError("The model works its logits out in a way that kvllm does not know; it cannot be used.")
        if not states:
            raise refusal
        projected = self.model.get_output_embeddings()(states[-1]).cpu().double()
        if own.shape != projected.shape:
            raise refusal
        if not (own.isfinite().all() and projected.isfinite().all()):
            return 1.0  # weights that are no numbers are refused where they are measured
        raw, of = own, projected
        if self._cap:
            below = own.abs() < 0.9 * self._cap
            raw, of = torch.atanh(own[below] / self._cap) * self._cap, projected[below]
        scale = float((raw * of).sum() / of.square().sum().clamp(min=1e-300)) if of.any() else 1.0
        # Six digits: the same number on every machine.
        scale = 1.0 if abs(scale - 1) < _SCALE_ROUNDING else float(f"{scale:.6g}")
        tolerance = 1e-3 if states[-1].dtype == torch.float32 else 3e-2  # of the largest logit
        if float((self._capped(projected * scale) - own).abs().max()) > tolerance * float(own.abs().max()):
            raise refusal
        return scale

    def greedy(self, states: torch.Tensor) -> torch.Tensor:
        """Return the likeliest token (n,) after each of the last hidden states (n, hidden)."""
        # The vocabulary is wide: a few hundred positions at a time keep the memory flat.
        return torch.cat([self.logits(part).argmax(-1) for part in states.split(_HEAD_TOKENS)])

    def fitting(self, ids: list[int], max_new_tokens: int | None) -> list[int]:
        """Return the prompt's ids where they leave room for the answer.

        Raises:
            ConfigError: they do not.
        """
        answer = max_new_tokens or self.config.max_new_tokens
        if len(ids) > max(self.max_positions - answer, 1):
            raise ConfigError(
                f"A prompt of {len(ids):,} tokens and an answer of up to {answer:,} are more than the "
                f"{self.max_positions:,} that this model takes; nothing was asked. Shorten one of them."
            )
        return ids

    # ------------------------------------------------------------------ identity

    def digest(self) -> str:
        """Return the sha256 over every parameter: name, dtype, shape, bytes, in name order."""
        return tensors_digest(dict(self.model.named_parameters()))


def shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences (at least one) begin with alike."""
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))  # what these two share, all between do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def tensors_digest(tensors: dict[str, torch.Tensor], *, seed: str = "") -> str:
    """Return the sha256 over tensors in name order: name, dtype, shape and bytes, after an optional seed string."""
    digest = hashlib.sha256(seed.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200].rstrip(".")


def resolve_device(name: str) -> torch.device:
    """Return the torch device for a configured name; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: the device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"There is no device {name!r}; use auto, cpu, cuda or mps.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("The device cuda was asked for, and torch sees none here; use --device cpu.")
    return device
