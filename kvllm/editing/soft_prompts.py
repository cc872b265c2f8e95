"""Prompt tuning, prefix tuning and P-tuning on peft: editors whose outcome cannot be merged into the weights.

What they train stands in front of the question, so it acts only where it is put: `SoftPrompts` keeps one adapter per
key and answers each question with the adapter that the caller chose for it (by the semantic key). Sources: Lester and
others (EMNLP 2021), Li and Liang (ACL 2021), Liu et al., "GPT understands, too" (2021).

    training = SoftPromptEditor("prompt-tuning").train(copy, pool, task, config)
    shelf.put("torchkeras", training.kept); shelf.answer(asked)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from kvllm.config import EditConfig
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.editor import EditTask, StepRecord, Training, leads
from kvllm.editing.preservation import PreservationPool
from kvllm.errors import ConfigError, EditFailed
from kvllm.lm.model import LanguageModel, Row

METHODS = ("prompt-tuning", "prefix-tuning", "p-tuning")
VIRTUAL_TOKENS = 16
ADAPTER = "default"
_ROWS = 4
# Steps of Adam. Prompts live in the embedding space, whose entries are small; prefixes are keys and values of every
# layer; P-tuning trains a small network that makes the prompt.
_RATES = {"prompt-tuning": 0.02, "prefix-tuning": 0.02, "p-tuning": 0.003}
_STEPS_PER_EDIT_STEP = 2  # half the rows a step, nothing preserved, and more steps to learn anything


class SoftPromptEditor:
    """Trains one adapter per call; the weights, and what is asked without it, stay as they are.

    Nothing is preserved and no older fact is replayed: the adapter is there for its own key only.
    """

    def __init__(self, method: str) -> None:
        if method not in METHODS:
            raise ConfigError(f"There is no soft prompt {method!r}; use one of {', '.join(METHODS)}.")
        self.method = method

    def train(
        self,
        copy: ComputeCopy,
        pool: PreservationPool | None,
        task: EditTask,
        config: EditConfig,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> Training:
        """Train on the compute copy, which is as before when this returns or raises.

        Raises:
            EditFailed: a loss was not finite.
        """
        if task.restore:
            raise ConfigError("A soft prompt has nothing to restore: leave it away instead; nothing was changed.")
        torch.manual_seed(task.seed)
        rng = random.Random(task.seed)
        rows = list(task.rows)
        most = config.max_steps * _STEPS_PER_EDIT_STEP
        with torch.enable_grad():
            wrapped = _wrapped(copy.model, self.method)
            for parameter in wrapped.prompt_encoder.parameters():
                parameter.data = parameter.data.float()
            trained = [p for p in wrapped.prompt_encoder.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=_RATES[self.method])
            records: list[StepRecord] = []
            pending = list(range(len(rows)))
            for step in range(1, most + 1):
                # Rows not yet recalled first; when all are, every row is looked at again before training ends.
                batch = rng.sample(pending, min(_ROWS, len(pending))) if pending else list(range(len(rows)))
                optimizer.zero_grad(set_to_none=True)
                loss, led = _loss(copy, wrapped, [rows[i] for i in batch])
                if not torch.isfinite(loss):
                    raise EditFailed(f"The loss was not finite at step {step}; nothing was changed. Try lower rates.")
                ok = {i for i, lead in zip(batch, led, strict=True) if bool((lead >= config.margin).all())}
                final = len(batch) == len(rows)
                done = final and len(ok) == len(rows)
                pending = [i for i in (range(len(rows)) if final else pending) if i not in ok]
                recall = 1 - len(pending) / len(rows)
                records.append(StepRecord(step, float(loss.detach()), recall, None, 0.0, VIRTUAL_TOKENS))
                if on_step is not None:
                    on_step(records[-1])
                if done:
                    break
                loss.backward()
                optimizer.step()
            kept = _kept(wrapped)
        copy.model.requires_grad_(False)
        return Training({}, len(records), done, records=tuple(records), kept=kept)


class SoftPrompts:
    """The adapters of one method, by key, in front of a language model."""

    def __init__(self, lm: LanguageModel, method: str) -> None:
        self._lm = lm
        self._wrapped = _wrapped(lm.model, method, inference=True)
        self._adapters: dict[str, Mapping[str, torch.Tensor]] = {}

    def put(self, key: str, kept: Mapping[str, torch.Tensor]) -> None:
        """Keep a key's adapter."""
        self._adapters[key] = kept

    def bytes(self, key: str) -> int:
        """Return the size of a key's adapter."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._adapters[key].values())

    def answer(
        self, key: str, prompts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]], room: int
    ) -> list[str]:
        """Answer prompts greedily with one key's adapter in front of each, up to the model's own stop.

        Args:
            key: Whose adapter.
            prompts: Token ids of each prompt.
            drafts: A guess at each answer: what of it is greedy is taken at once, only the rest is decoded.
            room: Most tokens of an answer.
        """
        self._load(key)
        lm = self._lm
        found = []
        with torch.inference_mode():
            for prompt, draft in zip(prompts, drafts, strict=True):
                answer: list[int] = []
                guess = list(draft)[:room]
                if guess:
                    greedy = self._greedy([*prompt, *guess])[len(prompt) - 1 : -1]
                    right = next((i for i, (g, d) in enumerate(zip(greedy, guess, strict=True)) if g != d), len(guess))
                    answer = guess[:right]
                while len(answer) < room and not (answer and answer[-1] in lm.stop_ids):
                    answer.append(self._greedy([*prompt, *answer])[-1])
                found.append(lm.decode(answer))
        return found

    def _greedy(self, ids: Sequence[int]) -> list[int]:
        """Return the greedy choice after each position of one sequence."""
        tensor = torch.tensor([list(ids)], device=self._lm.device)
        logits = self._wrapped(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits
        choices: list[int] = logits[0, -len(ids) :].argmax(-1).tolist()
        return choices

    def _load(self, key: str) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._wrapped, dict(self._adapters[key]))


def _wrapped(model: Any, method: str, *, inference: bool = False) -> Any:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": VIRTUAL_TOKENS,
        "inference_mode": inference,
    }
    config: Any
    if method == "prompt-tuning":
        config = PromptTuningConfig(**shared)
    elif method == "prefix-tuning":
        config = PrefixTuningConfig(**shared)
    else:
        config = PromptEncoderConfig(**shared, encoder_hidden_size=128)
    wrapped = get_peft_model(model, config)
    wrapped.eval()
    return wrapped


def _loss(copy: ComputeCopy, wrapped: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the mean over rows of the answer's cross-entropy, and by how much each answer token leads."""
    ids, mask = copy.lm.pad([row.ids for row in rows])
    with copy.precision():
        logits = wrapped(input_ids=ids, attention_mask=mask).logits.float()
    logits = logits[:, -ids.shape[1] :]  # prompts of virtual tokens stand in front
    losses, led = [], []
    for place, row in enumerate(rows):
        start = len(row.prompt) - 1
        mine = logits[place, start : start + len(row.answer)]
        targets = torch.tensor(row.answer, device=mine.device)
        losses.append(F.cross_entropy(mine, targets))
        led.append(leads(mine.detach(), targets))
    return torch.stack(losses).mean(), led


def _kept(wrapped: Any) -> dict[str, torch.Tensor]:
    """Return what answers need: the prompt itself, not the network that made it."""
    from peft import get_peft_model_state_dict

    return {name: t.detach().float().cpu().clone() for name, t in get_peft_model_state_dict(wrapped).items()}
