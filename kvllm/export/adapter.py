"""One LoRA adapter for the whole live history, to be loaded onto the base model by peft.

export_peft(Path("out"), delta=concatenate(deltas), base=base, facts=facts, head=head, weights_digest=digest)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvllm.editing.delta import Delta, to_files
from kvllm.errors import ConfigError
from kvllm.export.folder import new_folder
from kvllm.export.papers import CARD, hub_id, model_card, short_name, write_manifest
from kvllm.records import Edit, StoredFact
from kvllm.store import Base, check_delta
from kvllm.store.artefacts import MAX_RANK


def export_peft(
    out: Path,
    *,
    delta: Delta,
    base: Base,
    facts: Sequence[StoredFact],
    head: Edit | None,
    weights_digest: str,
    apart_from: Sequence[Path] = (),
) -> tuple[str, ...]:
    """Write one adapter that adds exactly the sum of the history's deltas.

    Args:
        out: A folder that does not exist, or is empty.
        delta: The history's deltas, concatenated by rank (deletions and updates included: all of them are summed).
        base: The pinned base model.
        facts: The live facts.
        head: The newest edit.
        weights_digest: Of the edited weights.
        apart_from: Folders that `out` must not lie in.

    Returns:
        The names of the files written, sorted.

    Raises:
        ConfigError: There is no edit to ship, the ranks add up to more than a LoRA may have, or `out` cannot be used.
        OutOfResources: The disk or the memory is full. In every case nothing is left behind.
    """
    if not delta:
        raise ConfigError(
            "The knowledge base is at its untouched base, so there is no adapter to export; insert a fact first."
        )
    rank = max(a.shape[0] for a, _ in delta.values())
    if rank > MAX_RANK:
        raise ConfigError(
            f"The history adds up to an adapter of rank {rank:,}, and {MAX_RANK:,} is the limit; nothing was exported. "
            "Run compact first, or export the merged model (format hf)."
        )
    files = to_files(delta, base_name=hub_id(base) or short_name(base.name))
    check_delta(files, max_norm=None)  # what the loader will refuse is not written in the first place
    with new_folder(out, apart_from=apart_from, needed=sum(len(content) for content in files.values())) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        card = model_card(
            format="peft",
            base=base,
            facts=facts,
            head=head,
            weights_digest=weights_digest,
            dtype="float32",
            rank=rank,
        )
        (folder / CARD).write_bytes(card.encode())
        names = write_manifest(
            folder, format="peft", base=base, facts=facts, head=head, weights_digest=weights_digest, dtype="float32"
        )
    return names
