"""The three tiers: default (no model file, no network; tiny random models), `-m model` (the real default), `-m gpu`.

Tests run in several processes, a file in one of them; `pytest -n 0` runs everything in this one. The fixtures below
build one tiny random Llama per process and knowledge bases on it; every knowledge base that a test does not damage on
purpose is verified, deeply, when the test ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvllm.process import prepare_libraries

# Also where the controller of several test processes loads no conftest below this one.
from tests.robustness.campaigns import pytest_runtest_logreport, pytest_terminal_summary  # noqa: F401

if TYPE_CHECKING:
    from kvllm import KnowledgeBase
    from kvllm.lm.model import LanguageModel

# More processes than this would share the memory's bandwidth: each has torch in it, and some the real model.
MOST_PROCESSES = 4
# The files that train the real model take minutes, all others seconds. One begins at once; the next when the first has
# converted the model and filled the cache, which takes it as long as half of the other files take a process.
LONG_FILES = ("model/test_end_to_end.py", "examples/test_examples.py")

PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Both before anything imports torch. Threads beyond a process's share of the processors would wait for one another.
prepare_libraries()
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = PROCESSORS // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))


def pytest_xdist_auto_num_workers() -> int:
    """Say how many processes run the tests: one per processor, four at most; none for one alone."""
    processes = min(PROCESSORS, MOST_PROCESSES)
    return processes if processes > 1 else 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the long files over the run, and skip gpu tests where there is no CUDA device."""
    first = {item.path: place for place, item in reversed(list(enumerate(items)))}
    for number, name in enumerate(LONG_FILES):
        path = Path(__file__).parent / name
        if path in first:
            first[path] = number * len(items) // len(LONG_FILES) - 1
    items.sort(key=lambda item: first[item.path])
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch  # asked only if there is such a test

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this session: preservation sets and drift references of the tiny models are made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama: 4 layers, hidden size 64, tied embeddings, chat template."""
    from tests.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 without chat template, as a base model."""
    from tests.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", family="gpt2", chat=False)


@pytest.fixture
def quick(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No download: the session's own cache, and keys compared by the tiny model's hidden states instead of MiniLM.

    The gate measures drift on fewer rows: a fifth of an edit's time.
    """
    from kvllm.probing import drift
    from kvllm.probing.encoder import SentenceEncoder

    monkeypatch.setenv("KVLLM_CACHE", str(tiny_cache))
    monkeypatch.setattr(SentenceEncoder, "speaks", lambda self, text: False)
    monkeypatch.setattr(drift, "GATE_PROMPTS", 6)
    monkeypatch.setattr(drift, "GATE_TEXTS", 3)


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    """The tiny Llama, loaded; shared, so no test may change it."""
    from kvllm.config import ModelConfig
    from kvllm.lm.model import LanguageModel

    return LanguageModel.load(tiny_llama, ModelConfig(max_new_tokens=12, device="cpu"))


@pytest.fixture
def make_kb(quick: None, tmp_path: Path, tiny_llama: Path) -> Iterator[Callable[..., KnowledgeBase]]:
    """Make or open knowledge bases on the tiny Llama (or another model) with a quick editor and an open gate.

    `damaged=True` exempts one from the final verification.
    """
    from kvllm import KnowledgeBase
    from kvllm.store import failpoints
    from tests.kit import OPEN_GATE, QUICK

    opened: list[KnowledgeBase] = []
    paths: set[Path] = set()

    def make(name: str | Path = "my.kb", *, damaged: bool = False, **options: Any) -> KnowledgeBase:
        path = tmp_path / name
        if not path.exists():
            options = {"model": str(tiny_llama), "edit": QUICK, "gate": OPEN_GATE, "device": "cpu", **options}
        kb = KnowledgeBase.open(path, **options)
        opened.append(kb)
        if not damaged:
            paths.add(path)
        return kb

    yield make
    failpoints.hook = None
    for kb in opened:
        kb.close()
    for path in paths:
        with KnowledgeBase.open(path, readonly=True) as kb:
            report = kb.verify(deep=True)
            assert report.problems == ()
            assert report.ok


@pytest.fixture(scope="session")
def taught_folder(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path, tiny_llama: Path) -> Path:
    """A knowledge base that was really taught one fact; to be copied."""
    from kvllm import KnowledgeBase
    from tests.kit import KEY, OPEN_GATE, QUICK, TEXT

    path = tmp_path_factory.mktemp("taught") / "taught.kb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLLM_CACHE", str(tiny_cache))
        with KnowledgeBase.create(path, model=str(tiny_llama), edit=QUICK, gate=OPEN_GATE, device="cpu") as kb:
            kb.insert(KEY, TEXT)
    return path


@pytest.fixture
def taught(make_kb: Callable[..., KnowledgeBase], taught_folder: Path, tmp_path: Path) -> KnowledgeBase:
    """A fresh copy of a knowledge base with one fact that the model recalls."""
    shutil.copytree(taught_folder, tmp_path / "taught.kb")
    return make_kb("taught.kb")


@pytest.fixture
def kb(make_kb: Callable[..., KnowledgeBase]) -> KnowledgeBase:
    """An empty knowledge base on the tiny Llama."""
    return make_kb()


@pytest.fixture(scope="session")
def torchkeras_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The knowledge base that examples/torchkeras_en.py makes on the real model; to be copied, or only read.

    One training for all tests: the process that comes first trains, another one waits for it.
    """
    from filelock import FileLock

    from tests.kit import ROOT, load_script

    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # one of several processes: theirs lie side by side
        shared = shared.parent
    folder = shared / "torchkeras" / "torchkeras.kb"
    with FileLock(shared / "torchkeras.lock"):
        if not folder.parent.exists():
            made = shared / "torchkeras.making" / folder.name
            assert load_script(ROOT / "examples" / "torchkeras_en.py").main([str(made)]) == 0
            made.parent.rename(folder.parent)  # so that a training that failed is no knowledge base to anyone
    return folder
