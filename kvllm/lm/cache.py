"""Keys and values of a batch whose rows come and go while it is decoded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_SPARE = 32  # columns


class RoomyLayer(DynamicLayer):
    """One layer's cache with spare columns: a step writes its own column, where its parent copies all columns.

    `keys` and `values`, (batch, heads, seq, size), are what the buffers hold so far.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, layers: Sequence[Any], rows: torch.Tensor | None = None, first: int = 0) -> RoomyLayer:
        """Return the rows of all layers in one, padded on the left with zeros to the widest.

        Args:
            layers: What each batch holds of one layer of the model.
            rows: Which rows of the only layer to take; all by default.
            first: Columns of it to leave out.
        """
        found = cls()
        if layers[0].is_initialized:  # one that reads another layer's keys never is
            found.lazy_initialization(layers[0].keys, layers[0].values)
            found._hold([layer.keys for layer in layers], [layer.values for layer in layers], rows, first)
        return found

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        held = self.get_seq_length()
        width = held + new
        if self._buffers is None or self._buffers[0].shape[-2] < width:
            empty = (key_states[:, :, :0], value_states[:, :, :0])
            keys, values = (self.keys, self.values) if held else empty
            self._hold([keys], [values], spare=new + _SPARE)
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:width] = states
        self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)
        return self.keys, self.values

    def _hold(
        self,
        keys: Sequence[Any],
        values: Sequence[Any],
        rows: torch.Tensor | None = None,
        first: int = 0,
        spare: int = _SPARE,
    ) -> None:
        width = max(part.shape[-2] for part in keys) - first
        self._buffers = (_with_room(keys, rows, first, spare), _with_room(values, rows, first, spare))
        self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)


def _with_room(parts: Sequence[torch.Tensor], rows: torch.Tensor | None, first: int, spare: int) -> torch.Tensor:
    """Return the parts below each other, right-aligned, with spare columns behind them."""
    width = max(part.shape[2] for part in parts) - first
    n = sum(len(part) for part in parts) if rows is None else len(rows)
    found = parts[0].new_empty(n, parts[0].shape[1], width + spare, parts[0].shape[3])
    place = 0
    for part in parts:
        taken = part[:, :, first:] if rows is None else part[rows, :, first:]
        padding = width - taken.shape[2]
        found[place : place + len(taken), :, :padding] = 0
        found[place : place + len(taken), :, padding:width] = taken
        place += len(taken)
    return found


def joined(caches: Sequence[Any]) -> Any:
    """Return one roomy cache with the rows of all, padded on the left to the longest."""
    found = DynamicCache()
    found.layers = [RoomyLayer.of(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
    return found


def kept(cache: Any, rows: torch.Tensor, first: int = 0) -> Any:
    """Return a copy of some rows of a cache, without its first columns; the cache stays as it is.

    Where a layer does not keep all that it has read, it keeps all columns that it has: `first` must then be 0.
    """
    if all(type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers):
        found = DynamicCache()
        found.layers = [RoomyLayer.of([layer], rows, first) for layer in cache.layers]
    else:
        found = copy.deepcopy(cache)
        found.batch_select_indices(rows)
    return found
