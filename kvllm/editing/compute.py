"""A second copy of the model that training may run on, so that the edited model itself is never touched.

On a CPU with bf16 matrix instructions the copy is bf16 and ten times as fast. Layers below the lowest adapted one never
change: their output for a sequence is computed once (`lower_states`) and fed back (`answer_states`). Knows nothing of
facts; peft adapters may be injected into `model`.

    copy = ComputeCopy(lm, targets)
    states = copy.lower_states([row.ids])            # [(seq, hidden)]
    copy.answer_states([(states[0], row)])           # (answer tokens, hidden), ready for `logits`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvllm.lm.decoding import MIN_OPENING, Opening
from kvllm.lm.model import LanguageModel, Row, shared_length
from kvllm.lm.targets import Targets, decoder_layers

# On a CPU each new shape of a bf16 product is compiled, which takes as long as a dozen products: few widths recur. And
# fp32 products of odd shapes come out otherwise with another number of threads.
WIDTHS = 8


class _StatesReady(Exception):
    """Stops a forward pass once the wanted states are caught."""


class _Passthrough(nn.Module):
    """Stands for a decoder layer whose work is cached: hands its input on, keeps the layer's plain attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, (str, int, bool, float, type(None))):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


@dataclass(frozen=True)
class Entered:
    """What enters a layer, computed before, so that nothing below it is run again.

    Attributes:
        layer: Its number.
        states: One (tokens, hidden) for each sequence, of what follows the opening.
    """

    layer: int
    states: Sequence[torch.Tensor]

    def of(self, places: Sequence[int], lengths: Iterable[int]) -> Entered:
        """Return that of some sequences, so many tokens of each."""
        some = zip(places, lengths, strict=True)
        return Entered(self.layer, [self.states[place][:length] for place, length in some])


def rounded_up(n: int, step: int) -> int:
    """Return the multiple of `step` that n fits into."""
    return -(-n // step) * step


def padded(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Return n rows: the given ones, (rows, ...), and zeros."""
    return torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])]) if n > len(rows) else rows


def decomposable(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix where torch can decompose it: not every torch has the decompositions for Metal."""
    return matrix.cpu() if matrix.device.type == "mps" else matrix


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that training computes in: bf16 where the hardware multiplies it, else the model's own."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else dtype
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if native and "AVX512" in capability else dtype
    return dtype


def _converted(model: Any, dtype: torch.dtype) -> Any:
    """Return a deep copy whose parameters are of another dtype, without ever holding a second one in the old dtype.

    Buffers keep theirs: rotary frequencies rounded to bf16 would shift every position.
    """
    done: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, done)


class ComputeCopy:
    """The copy of one model on which edits are trained."""

    def __init__(self, lm: LanguageModel, targets: Targets) -> None:
        self.lm = lm
        self.targets = targets
        self.dtype = compute_dtype(lm.device, next(lm.model.parameters()).dtype)
        self.model = _converted(lm.model, self.dtype)
        for module, original in zip(self.model.modules(), lm.model.modules(), strict=True):
            if isinstance(module, nn.LayerNorm):  # unlike RMSNorm it refuses fp32 states beside bf16 parameters
                module.float().load_state_dict(original.state_dict())
        self.model.requires_grad_(False)
        self.model.config.use_cache = False
        # Short sequences on a CPU: the fused kernel's backward is a quarter of a step, plain products are faster.
        if lm.device.type == "cpu":
            self.model.set_attn_implementation("eager")
        self._layers: nn.ModuleList = decoder_layers(self.model)[1]
        self._lm = LanguageModel(self.model, lm.tokenizer, lm.config, logit_scale=lm.logit_scale)

    @property
    def compiles(self) -> bool:
        """Say whether each new shape of a product is compiled, which costs more than some padding."""
        return self.lm.device.type == "cpu" and self.dtype == torch.bfloat16

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy the given matrices (module name to weight) into the copy, cast to its dtype."""
        for name, weight in weights.items():
            self.model.get_submodule(name).weight.data.copy_(weight)

    @torch.no_grad()
    def lower_states(
        self,
        sequences: Sequence[Sequence[int]],
        opening: Opening | None = None,
        entered: Entered | None = None,
        *,
        batch_size: int = 32,
    ) -> list[torch.Tensor]:
        """Return what enters the lowest adapted layer for each sequence: (seq, hidden), fp32.

        Args:
            sequences: All their ids.
            opening: What all of them begin with; what would be there is left at 0.
            entered: What enters a lower layer; else the sequences are run from the first on.
            batch_size: Sequences at a time, those together whose lengths are alike.
        """
        begin = len(opening or ())
        found: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        caught: list[torch.Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _StatesReady

        handle = self._layers[self.targets.first_layer].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                caught.clear()
                rest = [sequences[i][begin:] for i in batch]
                self._run(rest, opening, entered and entered.of(batch, map(len, rest)))
                for place, i in enumerate(batch):
                    states = caught[0][place, : len(sequences[i]) - begin].float()
                    found[i] = torch.cat([states.new_zeros(begin, states.shape[1]), states])
        finally:
            handle.remove()
        return found

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, on_batch: Callable[[int, int], None] | None = None
    ) -> list[tuple[int, ...]]:
        """Answer prompts greedily, as `LanguageModel.generate_ids`, in the copy's precision."""
        with self.precision():
            return self._lm.generate_ids(prompts, max_new_tokens=max_new_tokens, batch_size=64, on_batch=on_batch)

    def shared_opening(self, sequences: Sequence[Sequence[int]]) -> Opening:
        """Run once what all sequences begin with, for `read_inputs`."""
        with self.precision():
            return self._lm.shared_opening(sequences)

    @torch.inference_mode()
    def read_inputs(
        self,
        sequences: Sequence[Sequence[int]],
        names: Sequence[str],
        read: Callable[[str, torch.Tensor], None],
        opening: Opening | None = None,
        entered: Entered | None = None,
    ) -> None:
        """Hand what enters each of the named modules, (batch, seq, in), to `read`, for a right-padded batch.

        Runs up to the highest adapted layer only. With an opening, the sequences are what follows it; what enters one
        of the layers spares those below it.
        """

        def reader(name: str) -> Any:
            return lambda module, args: read(name, args[0])

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _StatesReady

        handles = [self.model.get_submodule(name).register_forward_pre_hook(reader(name)) for name in names]
        handles.append(self._layers[self._last_layer()].register_forward_hook(stop))
        try:
            self._run(sequences, opening, entered)
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, sequences: Sequence[Sequence[int]], opening: Opening | None, entered: Entered | None) -> None:
        """Run a right-padded batch of what follows an opening, until a hook has what it wanted."""
        more: dict[str, Any] = {"past_key_values": opening.for_rows(len(sequences))} if opening else {}
        try:
            if entered is not None:
                self._upper(self._stacked(entered.states, len(opening or ())), opening, entered.layer, more)
                return
            ids, _ = self.lm.pad(sequences)
            with self.precision():
                self.model.get_decoder()(input_ids=ids, use_cache=bool(opening), **more)
        except _StatesReady:
            pass

    def _stacked(self, states: Sequence[torch.Tensor], start: int) -> torch.Tensor:
        """Return states that begin at a position as one right-padded batch, (batch, seq, hidden).

        Causal attention keeps padding from every real position.
        """
        width = max(map(len, states))
        width = max(width, min(rounded_up(width, WIDTHS), self.lm.max_positions - start))  # padding has positions, too
        return torch.stack([padded(some.to(self.lm.device), width) for some in states])

    def _last_layer(self) -> int:
        """Return the highest adapted layer."""
        start = f"{self.targets.layer_list}."
        return max(int(name.removeprefix(start).split(".", 1)[0]) for name in self.targets.names)

    @contextmanager
    def caught(self, names: Sequence[str], into: dict[str, torch.Tensor]) -> Iterator[None]:
        """Catch what enters the named modules, (batch, seq, in), while this is open."""

        def reader(name: str) -> Callable[..., None]:
            return lambda module, args: into.__setitem__(name, args[0])

        handles = [self.model.get_submodule(name).register_forward_pre_hook(reader(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def opening(self, ids: Sequence[int]) -> Opening:
        """Run what several rows begin with through the weights as they are, for `answer_states`."""
        with self.precision():
            return self._lm.opening(ids)

    def common_opening(self, rows: Sequence[Row]) -> Opening | None:
        """Run what all rows' prompts begin with, none of them whole; None of a single row, or where that is short."""
        shared = shared_length([row.prompt for row in rows]) if len(rows) > 1 else 0
        shared = min(shared, min((len(row.prompt) for row in rows), default=0) - 1)
        return self.opening(rows[0].prompt[:shared]) if shared >= MIN_OPENING else None

    def answer_states(
        self,
        items: Sequence[tuple[torch.Tensor, Row]],
        opening: Opening | None = None,
        follows: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """Run the upper layers and return the last hidden states that predict each answer token.

        Args:
            items: Lower states (seq, hidden) and the row they belong to.
            opening: What rows begin with, at these weights: it is attended to and not run again, and no gradient flows
                through it.
            follows: Which rows begin with the opening: all by default. The others neither attend to it nor are moved
                by it.

        Returns:
            (answer tokens of all items in order, hidden), with gradient if enabled.
        """
        length = len(opening or ())
        starts = [length if follows is None or follows[place] else 0 for place in range(len(items))]
        rest = [states[start:] for (states, _), start in zip(items, starts, strict=True)]
        batch = self._stacked(rest, max(starts))
        more: dict[str, Any] = {"past_key_values": opening.for_rows(len(batch))} if opening else {}
        if opening and min(starts) < length:  # all else needs no mask
            more |= self._lm.placed(starts, length, batch.shape[1])
        hidden = self._upper(batch, opening, self.targets.first_layer, more)  # (batch, seq, hidden)
        picked = []
        for place, ((_, row), start) in enumerate(zip(items, starts, strict=True)):
            first = len(row.prompt) - 1 - start
            picked.append(hidden[place, first : first + len(row.answer)])
        return torch.cat(picked)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Project last hidden states (n, hidden) onto the vocabulary, fp32 (n, vocab)."""
        with self.precision():
            projected: torch.Tensor = self.model.get_output_embeddings()(states)
        return self.lm.finished(projected.float())

    def _upper(self, batch: torch.Tensor, opening: Opening | None, layer: int, more: Mapping[str, Any]) -> torch.Tensor:
        """Run the layers from one on, over a batch (batch, seq, hidden) that enters it.

        Args:
            batch: What enters it.
            opening: What comes before.
            layer: Its number.
            more: Of the decoder's arguments those that the opening asks for.
        """

        def inject(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Families that scale embeddings inside their forward would scale these too: put the exact states back.
            if args:
                return (batch, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": batch}

        with self._without_lower_layers(layer), self.precision():
            # Before all other hooks, which may read what enters.
            handle = self._layers[layer].register_forward_pre_hook(inject, with_kwargs=True, prepend=True)
            try:
                output = self.model.get_decoder()(inputs_embeds=batch, use_cache=bool(opening), **more)
            finally:
                handle.remove()
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def _without_lower_layers(self, first: int) -> Iterator[None]:
        originals = [self._layers[i] for i in range(first)]
        for i, layer in enumerate(originals):
            self._layers[i] = _Passthrough(layer)
        try:
            yield
        finally:
            for i, layer in enumerate(originals):
                self._layers[i] = layer

    def precision(self) -> Any:
        """Return the context in which the copy's model computes."""
        # Autocast keeps the residual stream in fp32 while every product runs in the copy's dtype.
        return torch.autocast(self.lm.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
