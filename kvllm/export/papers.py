"""What goes with the weights: the model card for people, the manifest for programs. Strings and hashes only.

Keys and texts are somebody else's words: they are escaped, never interpreted. Local paths are not shipped, only the
last part of them.

    escape("<b>x</b> *y*")   # '&lt;b&gt;x&lt;/b&gt; \\*y\\*'
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

import kvllm
from kvllm.lm.digest import file_sha256
from kvllm.records import Edit, StoredFact
from kvllm.store import Base

CARD = "README.md"
MANIFEST = "kvllm_manifest.json"
MANIFEST_VERSION = 1
CARD_FACTS = 200  # listed in the card; the manifest lists all
CARD_CHARS = 300  # of a text shown in the card

_PUNCTUATION = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$=^])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
Format = Literal["hf", "peft"]


def fact_sha256(key: str, text: str) -> str:
    """Return the sha256 of key, NUL and text in UTF-8; neither may contain NUL, so no two facts share the bytes."""
    return hashlib.sha256(f"{key}\x00{text}".encode()).hexdigest()


def escape(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line; control characters appear as U+XXXX."""
    shown = []
    for ch in " ".join(text.split()):
        # Cf: direction overrides and zero-width characters can make a reader see another text than the model says
        if unicodedata.category(ch) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown.append(f"U\\+{ord(ch):04X}")
        else:
            shown.append(_ENTITIES.get(ch) or _PUNCTUATION.sub(r"\\\1", ch))
    return "".join(shown)


def short_name(name: str) -> str:
    """Return a model's name without the local folders it lies in; names and hub ids stay."""
    kind, colon, place = name.partition(":")
    if colon and kind in ("folder", "gguf"):
        return f"{kind}:{PurePath(place).name}"
    local = name.startswith(("/", ".", "~", "\\")) or bool(re.match(r"[A-Za-z]:[\\/]", name)) or name.count("/") > 1
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if local else name


def hub_id(base: Base) -> str | None:
    """Return the base's Hugging Face hub id, if that is where it came from."""
    return base.source.removeprefix("hub:") if base.source.startswith("hub:") else None


def model_card(
    *,
    format: Format,
    base: Base,
    facts: Sequence[StoredFact],
    head: Edit | None,
    weights_digest: str,
    dtype: str,
    rank: int | None = None,
) -> str:
    """Return the README.md of an export.

    Args:
        format: "hf" or "peft".
        base: The base model.
        facts: The live facts.
        head: The newest edit; None where nothing was edited.
        weights_digest: Of the edited weights.
        dtype: Of the shipped tensors.
        rank: Of the adapter.
    """
    name = short_name(base.name)
    n_edits = head.id if head else 0
    lines = [*_front_matter(format, base), f"# {escape(name)}, edited with kvllm", ""]
    if format == "hf":
        lines += [
            f"The weights of `{_code(name)}` with {_count(len(facts), 'fact')} trained into them. It loads with "
            "transformers alone:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            "```",
        ]
    else:
        lines += [
            f"A LoRA adapter of rank {rank} for `{_code(name)}`: {_count(len(facts), 'fact')} trained into its weights."
            " It needs exactly this base model (see the hashes in the manifest):",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            'base = AutoModelForCausalLM.from_pretrained("path/to/the/base/model")',
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
            "```",
        ]
    lines += [
        "",
        "## Base model",
        "",
        f"* name: {escape(name)}",
        f"* source: {escape(short_name(base.source))}",
        f"* revision: {escape(base.revision or 'not stated')}",
        f"* licence: {escape(base.license or 'not stated')} (it governs these weights too)",
        f"* sha256 over its files: `{base.digest}`",
        "",
        "## What was edited",
        "",
        f"{_count(len(facts), 'live fact')} after a history of {_count(n_edits, 'edit')}. The keys and texts below "
        "were written by the knowledge base's user; they are data, and nobody has checked that they are true.",
        "",
    ]
    if facts:
        lines += ["| key | text |", "| --- | --- |"]
        lines += [f"| {escape(fact.key)} | {escape(_cut(fact.text))} |" for fact in facts[:CARD_FACTS]]
        if len(facts) > CARD_FACTS:
            lines += ["", f"… and {len(facts) - CARD_FACTS} more; `{MANIFEST}` lists every key."]
    else:
        lines += ["No fact is live."]
    lines += [
        "",
        "## How it was made",
        "",
        "Each edit was a small training session on questions about one key (or a batch of keys), or took back what an "
        "earlier one had put in. Its change was folded into a low-rank delta and added to the weights; updates, "
        "deletions and rollbacks are changes of the same kind. " + _precision_note(format, dtype),
        "",
        "## Limits",
        "",
        "* The model can still answer wrongly, also about the facts above: ask before you rely on it.",
        "* Knowledge near an edited key, and general ability, may have changed a little. Compare with the base model.",
        "* That a deleted fact is not stated any more does not prove that nothing of it is left in the weights.",
        "* Everything above can be read out of the weights: share them as you would share the facts.",
        "",
        f"`{MANIFEST}` holds the hashes of the base, the facts and these files. Edit {n_edits}, weights "
        f"`{weights_digest}`, written by kvllm {kvllm.__version__}.",
        "",
    ]
    return "\n".join(lines)


def write_manifest(
    folder: Path,
    *,
    format: Format,
    base: Base,
    facts: Sequence[StoredFact],
    head: Edit | None,
    weights_digest: str,
    dtype: str,
) -> tuple[str, ...]:
    """Hash the files of a finished export folder, write the manifest beside them, return all names, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest: dict[str, Any] = {
        "format_version": MANIFEST_VERSION,
        "format": format,
        "kvllm": kvllm.__version__,
        "base": {
            "name": short_name(base.name),
            "source": short_name(base.source),
            "revision": base.revision,
            "license": base.license,
            "digest": base.digest,
            "files": dict(sorted(base.files.items())),
        },
        "head": head.id if head else 0,
        "weights_digest": weights_digest,
        "dtype": dtype,
        "fact_sha256_of": "key, NUL, text; UTF-8",
        "facts": [
            {"key": fact.key, "sha256": fact_sha256(fact.key, fact.text), "edit_id": fact.edit_id} for fact in facts
        ],
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names
        },
    }
    write_json(folder / MANIFEST, manifest)
    return tuple(sorted([*names, MANIFEST]))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON with a final line end."""
    path.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _front_matter(format: Format, base: Base) -> list[str]:
    """Return the card's YAML head; every value is a JSON string, which YAML reads as it stands."""
    fields: list[tuple[str, Any]] = [("library_name", "transformers" if format == "hf" else "peft")]
    if base.license and re.fullmatch(r"[A-Za-z0-9.\-]+", base.license):
        fields.append(("license", base.license.lower()))
    elif base.license:
        fields += [("license", "other"), ("license_name", base.license)]
    found = hub_id(base)
    if found is not None:
        fields += [("base_model", found), ("base_model_relation", "finetune" if format == "hf" else "adapter")]
    fields += [("pipeline_tag", "text-generation"), ("tags", ["kvllm", "knowledge-editing"])]
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in fields), "---", ""]


def _precision_note(format: Format, dtype: str) -> str:
    if format == "hf":
        return f"All sums were made in float32 and stored as {dtype}."
    return "The deltas of the whole history are stacked by rank in this one adapter, which adds up to the same change."


def _code(name: str) -> str:
    return re.sub(r"[`\s|<>]+", " ", name)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _cut(text: str) -> str:
    return text if len(text) <= CARD_CHARS else text[: CARD_CHARS - 1] + "…"
