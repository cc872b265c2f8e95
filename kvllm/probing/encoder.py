"""Semantic keys: texts to unit vectors whose cosine says how near two keys are in meaning.

Two encoders: MiniLM through sentence-transformers, and the language model's own hidden states where MiniLM does not
speak the language. It knows nothing of ledgers or training. Keys are always compared in their question form.

    encoder = choose_encoder(["torchkeras"], hidden=lambda: HiddenStateEncoder(lm))
    nearest(encoder.encode([key_question("torch-keras")])[0], encoder.encode(questions), 5)   # [(place, cosine), …]

Measured (SmolLM2-135M and MiniLM-L6, key pairs in our own words; pairs at or above the threshold):

    encoder            threshold  near-duplicates  same category  unrelated  297 English + 95 Chinese names, all pairs
    minilm-l6          0.70       en 18/20         en 3/21        0/20       en 4/43,956
    hidden-states/2    0.60       en 18/20         en 7/21        0/20       en 6/43,956
                                  zh 11/14         zh 0/14        0/14       zh 8/4,465

The bare key separates worse than its question: with hidden states near-duplicates outrank same-category keys in 70 % of
the pairs, as questions in 89 %. MiniLM gives unrelated Chinese names a cosine of 1.0: their characters are all unknown
to it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvllm.config import DEFAULT_ENCODER
from kvllm.errors import Corrupt, ModelError
from kvllm.prompts import key_question
from kvllm.records import Progress

if TYPE_CHECKING:
    from kvllm.lm.model import LanguageModel

Vectors = NDArray[np.float32]

# What the hidden states of every short question share is measured on these and taken out. Part of the recipe: another
# list gives other vectors, and needs another encoder name.
_REFERENCE_KEYS = (
    "photosynthesis",
    "Mount Everest",
    "William Shakespeare",
    "the French Revolution",
    "football",
    "the Amazon river",
    "penicillin",
    "a black hole",
    "chocolate",
    "the Great Wall of China",
    "Python programming",
    "inflation",
    "a violin",
    "Napoleon",
    "electric cars",
    "the solar system",
    "yoga",
    "the United Nations",
    "a volcano",
    "diabetes",
    "Google",
    "origami",
    "the Silk Road",
    "jazz",
    "the human heart",
    "a kangaroo",
    "the opening hours of the library",
    "the price of the annual ticket",
    "the rules for guests",
    "the delivery address",
    "the next board meeting",
    "Who wrote Hamlet?",
    "Where is the main office?",
    "When was the bridge built?",
    "How many people live in Norway?",
    "How do I cancel my order?",
    "Which colour has the new logo?",
    "Who invented the telephone?",
    "Why is the sky blue?",
    "What does the abbreviation CPU mean?",
    "光合作用",
    "珠穆朗玛峰",
    "鲁迅",
    "法国大革命",
    "足球",
    "亚马逊河",
    "青霉素",
    "黑洞",
    "巧克力",
    "长城",
    "编程",
    "通货膨胀",
    "小提琴",
    "拿破仑",
    "电动汽车",
    "太阳系",
    "瑜伽",
    "联合国",
    "火山",
    "糖尿病",
    "微软公司",
    "剪纸",
    "丝绸之路",
    "京剧",
    "心脏",
    "大熊猫",
    "图书馆的开放时间",
    "年票的价格",
    "访客须知",
    "收货地址",
    "下一次董事会",
    "谁写了《红楼梦》？",
    "总部在哪里？",
    "这座桥是什么时候建的？",
    "上海有多少人口？",
    "怎样取消订单？",
    "新标志是什么颜色？",
    "电话是谁发明的？",
    "天空为什么是蓝色的？",
    "水的沸点是多少度？",
)
_COMMON_DIRECTIONS = 5


class Encoder(Protocol):
    """Turns texts into unit vectors.

    Attributes:
        name: Identifies the vectors: two vectors may be compared if they come from encoders of one name and one model.
        collision_similarity: The cosine of two keys' questions from which a collision is likely.
    """

    name: str
    collision_similarity: float

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors (n, d), float32."""
        ...

    def speaks(self, text: str) -> bool:
        """Say whether vectors of this text mean something."""
        ...


class SentenceEncoder:
    """MiniLM (or another sentence-transformers model) on the CPU; resolved and loaded on first use.

    Args:
        model: As `kvllm.lm.sources.resolve` takes it.
        progress: Called while the model is being fetched.
    """

    collision_similarity = 0.70

    def __init__(self, model: str = DEFAULT_ENCODER, *, progress: Callable[[Progress], None] | None = None) -> None:
        self.name = model
        self._progress = progress
        self._model: Any = None

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors (n, 384 for MiniLM).

        Raises:
            ModelError: the encoder cannot be resolved or loaded.
        """
        found = self._loaded().encode(
            list(texts) or [""], normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(found, dtype=np.float32)[: len(texts)]

    def speaks(self, text: str) -> bool:
        """Return False where a fifth of the letters or more are not Latin: MiniLM's vocabulary is English."""
        return _non_latin_share(text) < 0.2

    def _loaded(self) -> Any:
        if self._model is None:
            from kvllm.lm.sources import no_progress_bars, resolve

            folder = resolve(self.name, progress=self._progress).path
            from sentence_transformers import SentenceTransformer

            try:
                with no_progress_bars():
                    # local_files_only instead of HF_HUB_OFFLINE: the environment belongs to the user
                    self._model = SentenceTransformer(
                        str(folder), device="cpu", local_files_only=True, trust_remote_code=False
                    )
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise ModelError(f"The encoder {self.name} in {folder} cannot be loaded: {reason}") from error
        return self._model


class HiddenStateEncoder:
    """The language model's own mean hidden states at a quarter of its depth, freed from what all questions share.

    Raw hidden states are useless: at two thirds of SmolLM2's depth the cosine of *any* two texts is 1.00, because one
    enormous activation on the first token is all that the mean sees. After subtracting the mean of eighty reference
    questions and their five leading directions ("all but the top", Mu and Viswanath 2018), unrelated keys lie at
    0.0 ± 0.2 and near-duplicates at 0.8. A quarter of the depth separated near-duplicates from same-category keys
    better than deeper layers and costs a quarter of a forward pass. The states are the base model's, so that cached
    vectors stay true as the model is edited.

    Args:
        lm: The language model.
        at_base: Holds its weights at the base's while it is read; needed wherever they are edited.
    """

    name = "hidden-states/2"
    collision_similarity = 0.60

    def __init__(self, lm: LanguageModel, at_base: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self._lm = lm
        self._at_base = at_base
        self._common: tuple[Vectors, Vectors] | None = None  # mean (d), directions (k, d)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors (n, hidden)."""
        if self._common is None:
            reference = self._mean_states([key_question(key) for key in _REFERENCE_KEYS])
            mean = reference.mean(0)
            directions = np.linalg.svd(reference - mean, full_matrices=False)[2][:_COMMON_DIRECTIONS]
            self._common = mean, directions
        mean, directions = self._common
        if not texts:
            return np.zeros((0, mean.shape[0]), dtype=np.float32)
        vectors = self._mean_states(texts) - mean
        vectors -= (vectors @ directions.T) @ directions
        return _unit(vectors)

    def speaks(self, text: str) -> bool:
        """Return True: what the model reads, it has states for."""
        return True

    def _mean_states(self, texts: Sequence[str], batch_size: int = 32) -> Vectors:
        """Return the mean hidden state of each text (n, hidden), fp32; layers above the wanted one do not run."""
        import torch

        from kvllm.lm.targets import decoder_layers

        lm = self._lm
        _, layers = decoder_layers(lm.model)
        encoded = [lm.completion_ids(text) or [lm.pad_id] for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        found: list[Any] = [None] * len(texts)
        caught: list[torch.Tensor] = []

        def catch(module: Any, args: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)
            raise _Caught

        handle = layers[len(layers) // 4].register_forward_hook(catch)
        try:
            with self._at_base(), torch.inference_mode():
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    ids, mask = lm.pad([encoded[i] for i in batch])
                    caught.clear()
                    try:
                        lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
                    except _Caught:
                        pass
                    for place, i in enumerate(batch):
                        found[i] = caught[0][place, : len(encoded[i])].float().mean(0).cpu().numpy()
        finally:
            handle.remove()
        return np.stack(found).astype(np.float32)


class _Caught(Exception):
    """Ends a forward pass at the layer that was wanted."""


def choose_encoder(
    texts: Sequence[str],
    *,
    hidden: Callable[[], HiddenStateEncoder],
    progress: Callable[[Progress], None] | None = None,
) -> Encoder:
    """Return MiniLM where it speaks all the texts, else the model's own hidden states.

    Args:
        texts: All the keys to be compared with each other: one encoder for all, or their vectors do not compare.
        hidden: Makes the encoder of the model's own states; called only if it is needed.
        progress: Called while MiniLM is being fetched, on its first use.
    """
    encoder = SentenceEncoder(progress=progress)
    if all(encoder.speaks(text) for text in texts):
        return encoder
    return hidden()


def nearest(query: Vectors, matrix: Vectors, n: int) -> list[tuple[int, float]]:
    """Return the n rows nearest to a unit vector, nearest first: (row, cosine); equal ones in row order.

    Args:
        query: Unit vector (d,).
        matrix: Unit vectors (rows, d).
        n: How many; fewer are returned where there are fewer rows.
    """
    if not len(matrix):
        return []
    cosines = matrix @ query  # (rows,)
    order = np.argsort(-cosines, kind="stable")[: max(n, 0)]
    return [(int(row), float(min(1.0, max(-1.0, cosines[row])))) for row in order]


def pack(vector: Vectors) -> bytes:
    """Return a vector as the store keeps it: little-endian float32."""
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def unpack(blob: bytes) -> Vectors:
    """Return a packed vector.

    Raises:
        Corrupt: the bytes are no vector, or a number in it is not finite.
    """
    vector = np.frombuffer(blob, dtype="<f4").astype(np.float32) if blob and len(blob) % 4 == 0 else np.zeros(0)
    if not vector.size or not bool(np.isfinite(vector).all()):
        raise Corrupt("A cached key vector is damaged; it was not used. Embed the keys again.")
    return np.asarray(vector, dtype=np.float32)


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def _non_latin_share(text: str) -> float:
    letters = [ch for ch in text if ch.isalpha()]
    foreign = sum(not ch.isascii() and not unicodedata.name(ch, "").startswith("LATIN") for ch in letters)
    return foreign / len(letters) if letters else 0.0
