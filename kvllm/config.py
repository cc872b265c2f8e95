"""What a user can configure, as frozen dataclasses validated at the door. Standard library only.

Every default is a rule that carries to other models (shares of depth, norms relative to the matrix), not a constant
of the default model. The configuration asked for is stored with each edit, and what several facts made of it.

    EditConfig(max_steps=60)          # fine
    EditConfig(depth=(0.9, 0.2))      # ConfigError: ... must grow
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from kvllm.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_ENCODER = "minilm-l6"
DTYPES = ("float32", "bfloat16", "float16")
_FACTS_OF_MAX_STEPS = 4
_FACTS_OF_RANK = 8
# Editors: what the model allows; a few neurons of a fact's own; low-rank training.
AUTO, NEURONS, ADALORA = "auto", "neurons", "adalora"
_WIDTHS_PER_RANK = 4  # a matrix's smaller side is at least so many times the rank that many facts ask for


class _Validated:
    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict, tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Any:
        """Build from a plain dict; unknown names are refused with the known ones listed."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no setting {', '.join(unknown)}; it knows {', '.join(sorted(known))}."
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


@dataclass(frozen=True)
class ModelConfig(_Validated):
    """How the model is held in memory.

    Attributes:
        dtype: Of the computation; the adapted matrices' sums are kept in `masters` whatever it is.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device name.
        max_new_tokens: Upper bound of a generated answer; the model's own stop ends it earlier.
        masters: Of the sums of deltas. Anything but float32 loses a little with every edit; the experiments measure
            how much.
    """

    dtype: str = "float32"
    device: str = "auto"
    max_new_tokens: int = 128
    masters: str = "float32"

    def __post_init__(self) -> None:
        for name in ("dtype", "masters"):
            value = getattr(self, name)
            _need(value in DTYPES, f"{name} must be one of {', '.join(DTYPES)}, not {value!r}.")
        _need(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")


@dataclass(frozen=True)
class EditConfig(_Validated):
    """How one edit is trained.

    Attributes:
        editor: Name of the editor: "neurons" (a few neurons of the fact's own, in gated MLPs), "adalora", "lora", or
            "full" (fine-tuning of the adapted matrices). "auto" is "neurons" where the base model has spare neurons
            (`kvllm.lm.widening`), else "adalora"; an edit records which it was. "neurons" looks at `max_steps` (of each
            fact), `margin` (met with 1.5 nats to spare), `augmented`, `contrasts`, `replay` (each on or off; beyond 32
            `augmented` is a number), `max_text_tokens`, `preserve_tokens` and `seed` only. Where there is no spare
            neuron, it takes those that the model needs least. A delete that has to train is AdaLoRA's.
        depth: The adapted band of decoder layers, as shares of the depth.
        modules: Which matrices of those layers; see `kvllm.lm.targets.MODULE_KINDS`.
        init_rank, target_rank: AdaLoRA's rank per matrix before and (on average) after allocation; LoRA's is
            target_rank. For edits of up to eight facts; more have more in proportion, up to a quarter of the width.
        value_lr: Step of the singular values, as a share of the matrix's root-mean-square singular value; down to a
            quarter of it when the fact is nearly in. What a delete restores takes a third.
        factor_lr: Step of the singular vectors' entries, as a share of their own root-mean-square size; likewise.
        max_steps: Most optimizer steps of an edit of up to four facts; more facts may take more in proportion. Training
            stops earlier on recall.
        margin: By how many nats each target token must lead the runner-up before training stops.
        max_text_tokens: Longest text that is trained; longer ones are refused, never cut.
        preserve_weight: Weight of the preservation loss against the fact's own; of an edit of n facts, divided by the
            root of n.
        preserve_tokens: Preserved tokens of each base answer.
        neighbours, others, texts: Neighbour questions and other prompts of a step, and raw texts of every other step. A
            fact that has a contrast has the prompts in the steps between only.
        contrasts: How many of the neighbours are the fact's own questions about other names, where it has such; those
            are in every step.
        recited: Other questions of the steps with raw texts that are answered with a fact's own text, where that is
            short: what the model expects after each token stays as it was.
        augmented: Further questions about a fact per step, drawn from `kvllm.prompts.augmented_questions`: they are
            trained, and neither looked at before training ends nor kept.
        replay: Older facts' questions per step. An edit also keeps off what the nearest older facts' rows read; when
            its fact is in, those and some others are looked at, and what is broken is trained back within a few steps.
            0 leaves older facts alone.
        orthogonality: Weight of AdaLoRA's penalty on the singular vectors.
        energy_weight: Weight of what the change puts out on ordinary inputs, as a share of what the matrices do; the
            facts of one edit share it.
        input_ridge: Ridge of the input whitening, in units of the mean eigenvalue: smaller keeps the edit farther from
            directions that ordinary text uses; 0 trains in plain coordinates.
        preserve_stop: Training goes on (within max_steps) until the preserved answers' mean KL is below this, in nats.
        contrast_stop: And until that of the fact's own questions about other names is below this, in nats; of an edit
            of n facts, times the root of n.
        dropout: Share of the adapter's inputs that each step drops.
        seed: Of every random choice; recorded with the edit.
    """

    editor: str = AUTO
    depth: tuple[float, float] = (0.3, 0.55)
    modules: str = "mlp-out"
    init_rank: int = 12
    target_rank: int = 8
    value_lr: float = 0.15
    factor_lr: float = 0.3
    max_steps: int = 100
    margin: float = 0.5
    max_text_tokens: int = 400
    preserve_weight: float = 32.0
    preserve_tokens: int = 20
    neighbours: int = 3
    others: int = 1
    texts: int = 1
    contrasts: int = 2
    recited: int = 1
    augmented: int = 2
    replay: int = 4
    orthogonality: float = 0.1
    energy_weight: float = 300.0
    input_ridge: float = 0.1
    preserve_stop: float = 0.04
    contrast_stop: float = 0.006
    dropout: float = 0.0
    seed: int = 0

    def shared_among(self, facts: int, width: int | None = None) -> EditConfig:
        """Return the configuration of an edit of so many facts: more steps and directions, less that holds each back.

        The loss is a mean over facts, what they do elsewhere adds up: of the energy's weight each has a share. The
        preserved answers' weight falls with the root of their number, so that many facts may cost more than one, and
        each less than it would alone. Up to eight facts share the ranks, more have more in proportion: in too few
        directions facts get in each other's way, and are known by their trained questions only.

        Args:
            facts: Facts of the edit.
            width: Smaller side of the smallest adapted matrix; ranks do not grow beyond a quarter of it.
        """
        n = max(1, facts)
        grown = max(1.0, n / _FACTS_OF_RANK) if self.editor != "full" else 1.0  # which takes a rate from the rank
        if width is not None:
            grown = max(1.0, min(grown, width / _WIDTHS_PER_RANK / self.init_rank))
        return replace(
            self,
            init_rank=math.floor(self.init_rank * grown),
            target_rank=math.floor(self.target_rank * grown),
            max_steps=math.ceil(self.max_steps * max(1.0, n / _FACTS_OF_MAX_STEPS)),
            energy_weight=self.energy_weight / n,
            preserve_weight=self.preserve_weight / math.sqrt(n),
            contrast_stop=self.contrast_stop * math.sqrt(n),
        )

    def __post_init__(self) -> None:
        _need(len(self.depth) == 2, "depth is a pair of shares, e.g. (0.6, 0.9).")
        _need(-(2**63) <= self.seed < 2**63, f"seed must be a number of 64 bits, not {self.seed}.")
        _need(0 <= self.depth[0] < self.depth[1] <= 1, f"depth must grow within 0 and 1, not {self.depth}.")
        _need(0 <= self.dropout < 1, f"dropout is a share from 0 up to 1, not {self.dropout}.")
        _need(
            1 <= self.target_rank < self.init_rank,
            f"target_rank must be at least 1 and below init_rank, not {self.target_rank} and {self.init_rank}: "
            "AdaLoRA needs something to prune.",
        )
        for name in ("value_lr", "factor_lr", "margin", "preserve_stop", "contrast_stop"):
            _need(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        for name in ("max_steps", "max_text_tokens", "preserve_tokens"):
            _need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in (
            "preserve_weight",
            "neighbours",
            "others",
            "texts",
            "contrasts",
            "recited",
            "augmented",
            "replay",
            "orthogonality",
            "energy_weight",
            "input_ridge",
        ):
            _need(getattr(self, name) >= 0, f"{name} cannot be negative, not {getattr(self, name)}.")


@dataclass(frozen=True)
class GateConfig(_Validated):
    """When an edit is accepted. None switches a rule off, and the ledger says so.

    Attributes:
        min_reliability: Least share of the trained questions whose live answer states the text.
        max_drift_kl: Largest mean KL(base‖edited), nats per answer token, on the drift prompts, *added by this edit*
            (by a compaction: since the base).
        max_ppl_ratio: Largest perplexity ratio edited/before on the raw texts of the drift suite.
        min_erasure: For delete and update: least share of the questions that no longer state the old text.
        measure: False commits what was trained unmeasured, as long as its weights are finite: for whoever measures
            afterwards, as the experiments do.
    """

    min_reliability: float | None = 0.75
    max_drift_kl: float | None = 0.35
    max_ppl_ratio: float | None = 1.25
    min_erasure: float | None = 0.75
    measure: bool = True

    def __post_init__(self) -> None:
        for name in ("min_reliability", "min_erasure"):
            value = getattr(self, name)
            _need(value is None or 0 <= value <= 1, f"{name} is a share between 0 and 1, not {value}.")
        for name in ("max_drift_kl", "max_ppl_ratio"):
            value = getattr(self, name)
            _need(value is None or value >= 0, f"{name} must not be negative, but is {value}.")


def cache_folder() -> Path:
    """Return the folder for converted models and preservation targets: `$KVLLM_CACHE`, else the user's cache folder."""
    override = os.environ.get("KVLLM_CACHE")
    if override:
        return Path(override).expanduser()
    from platformdirs import user_cache_path  # not at import: the ledger commands do not need it

    return user_cache_path("kvllm")
