"""Resolving names to files: registered packages, local folders, GGUF files, the cache that must be whole or absent.

The downloads are real wheels and folders, only tiny and built here; the network is replaced at one function.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvllm.errors import ModelError, OutOfResources, Untrusted
from kvllm.lm import sources
from kvllm.lm.digest import file_sha256, files_digest
from kvllm.lm.registry import MODELS, Package, PinnedFile, PinnedModel
from kvllm.records import Progress

NAME = "tiny-folder"
PACKAGE = "tiny-model-package"


def safetensors_bytes(payload: bytes = b"\0" * 16) -> bytes:
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [len(payload) // 4], "data_offsets": [0, len(payload)]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + payload


CONTENT = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": safetensors_bytes(),
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b"{}",
    "modules.json": json.dumps(
        [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}, {"type": "sentence_transformers.x"}]
    ).encode(),
}


def pinned(content: dict[str, bytes] = CONTENT) -> PinnedModel:
    return PinnedModel(
        name=NAME,
        what="a tiny model",
        license="MIT",
        kind="folder",
        packages=(Package(PACKAGE, "1.0", 1000),),
        files=tuple(
            PinnedFile(name, ((PACKAGE, f"tiny/{name}"),), len(data), hashlib.sha256(data).hexdigest())
            for name, data in content.items()
        ),
        disk_bytes=1000,
    )


def fake_download(content: dict[str, bytes], calls: list[str]) -> Callable[..., Path]:
    """A wheel with the content, and code that must never run."""

    def download(package: Package, into: Path, tell: Callable[[int], None]) -> Path:
        calls.append(package.requirement)
        tell(500)
        wheel = into / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/__init__.py", "raise SystemExit('executed')")
            for name, data in content.items():
                archive.writestr(f"tiny/{name}", data)
        return wheel

    return download


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    if request.node.get_closest_marker("model"):
        return sources.cache_folder()
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Register the tiny model and count the downloads of its package."""
    calls: list[str] = []
    monkeypatch.setitem(sources.MODELS, NAME, pinned())
    monkeypatch.setattr(sources, "_download_package", fake_download(CONTENT, calls))
    return calls


def folder_of(path: Path, content: dict[str, bytes] = CONTENT) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digest_is_what_sha256sum_prints_and_ignores_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "a") == sha
    assert files_digest({"a": sha, "b": "0"}) == files_digest({"b": "0", "a": sha})
    assert files_digest({"a": sha}) == hashlib.sha256(f"{sha}  a\n".encode()).hexdigest()
    assert files_digest({"a": sha}) != files_digest({"b": sha})


# --- registered models ------------------------------------------------------------------------------------------------


def test_registered_model_is_downloaded_once_and_only_its_files_are_kept(calls: list[str], cache: Path) -> None:
    ticks: list[Progress] = []
    files = sources.resolve(NAME, progress=ticks.append)
    assert {file.relative_to(files.path).as_posix() for file in files.path.rglob("*") if file.is_file()} == {
        *CONTENT,
        "manifest.json",
    }
    assert dict(files.files) == {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}
    assert files.digest == files_digest(files.files)
    assert (files.source, files.revision, files.license) == (f"package:{PACKAGE}==1.0", "1.0", "MIT")
    assert {tick.stage for tick in ticks} == {"model"}
    assert any("downloading" in tick.note and tick.total == 1000 for tick in ticks)
    assert any("hashing" in tick.note for tick in ticks)
    assert sources.resolve(NAME) == files
    assert sources.resolve(NAME, offline=True, verify=True) == files
    assert calls == [f"{PACKAGE}==1.0"]
    assert sorted(entry.name for entry in (cache / "models").iterdir()) == [f"{NAME}-1.0", f"{NAME}-1.0.lock"]


def test_files_record_is_plain_json(calls: list[str]) -> None:
    assert json.loads(json.dumps(sources.resolve(NAME).to_dict()))["name"] == NAME


def test_models_lists_what_is_cached(calls: list[str]) -> None:
    def cached() -> dict[str, bool]:
        return {model.name: model.cached for model in sources.models()}

    assert cached() == dict.fromkeys(MODELS, False)
    files = sources.resolve(NAME)
    assert [name for name, is_cached in cached().items() if is_cached] == [NAME]
    assert next(model.path for model in sources.models() if model.name == NAME) == str(files.path)


def test_damaged_entry_is_rebuilt(calls: list[str]) -> None:
    path = sources.resolve(NAME).path / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])  # cut short
    sources.resolve(NAME)
    assert path.read_bytes() == good
    path.write_bytes(good[:-1] + b"\1")  # same size, another time
    sources.resolve(NAME)
    assert path.read_bytes() == good
    path.unlink()
    sources.resolve(NAME)
    assert path.read_bytes() == good
    (path.parent / "manifest.json").write_text("{")
    sources.resolve(NAME)
    assert len(calls) == 5


def test_flipped_bit_with_unchanged_times_is_found_by_verify(calls: list[str]) -> None:
    path = sources.resolve(NAME).path / "model.safetensors"
    stat, good = path.stat(), path.read_bytes()
    path.write_bytes(good[:-1] + b"\1")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    sources.resolve(NAME)
    assert path.read_bytes() != good  # the cheap check cannot see it
    sources.resolve(NAME, verify=True)
    assert path.read_bytes() == good


def test_copied_cache_is_hashed_and_then_used_offline(calls: list[str], cache: Path) -> None:
    path = sources.resolve(NAME).path
    os.utime(path / "model.safetensors")
    ticks: list[Progress] = []
    sources.resolve(NAME, offline=True, progress=ticks.append)
    assert any("hashing" in tick.note for tick in ticks)
    ticks.clear()
    sources.resolve(NAME, offline=True, progress=ticks.append)
    assert not ticks
    assert len(calls) == 1


def test_another_file_than_the_pinned_one_is_refused(
    calls: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {**CONTENT, "model.safetensors": safetensors_bytes(b"\1" * 16)}
    monkeypatch.setattr(sources, "_download_package", fake_download(changed, calls))
    with pytest.raises(ModelError, match="not the pinned file"):
        sources.resolve(NAME)
    missing = {name: data for name, data in CONTENT.items() if name != "tokenizer.json"}
    monkeypatch.setattr(sources, "_download_package", fake_download(missing, calls))
    with pytest.raises(ModelError, match=r"does not hold tiny/tokenizer\.json"):
        sources.resolve(NAME)
    bomb = {**CONTENT, "tokenizer.json": b"{}" * 10_000_000}
    monkeypatch.setattr(sources, "_download_package", fake_download(bomb, calls))
    with pytest.raises(ModelError, match="not the pinned file"):
        sources.resolve(NAME)
    assert [entry.name for entry in (cache / "models").iterdir()] == [f"{NAME}-1.0.lock"]


def test_parts_are_concatenated(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = CONTENT["model.safetensors"]
    content = {**CONTENT, "part0": weights[:10], "part1": weights[10:]}
    model = pinned()
    files = tuple(
        replace(file, members=((PACKAGE, "tiny/part0"), (PACKAGE, "tiny/part1")))
        if file.name == "model.safetensors"
        else file
        for file in model.files
    )
    monkeypatch.setitem(sources.MODELS, NAME, replace(model, files=files))
    monkeypatch.setattr(sources, "_download_package", fake_download(content, []))
    assert (sources.resolve(NAME).path / "model.safetensors").read_bytes() == weights


def test_interrupted_download_leaves_nothing_and_the_next_one_succeeds(
    calls: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(package: Package, into: Path, tell: Callable[[int], None]) -> Path:
        (into / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_download_package", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sources.resolve(NAME)
    assert [entry.name for entry in (cache / "models").iterdir()] == [f"{NAME}-1.0.lock"]
    (cache / "models" / f".{NAME}-1.0.dead.tmp").mkdir()  # of a process that was killed
    sources.resolve(NAME)
    assert sorted(entry.name for entry in (cache / "models").iterdir()) == [f"{NAME}-1.0", f"{NAME}-1.0.lock"]


def test_full_disk_is_out_of_resources(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.MODELS, NAME, replace(pinned(), disk_bytes=10**18))
    with pytest.raises(OutOfResources, match="MB are free; nothing was written"):
        sources.resolve(NAME)

    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sources.MODELS, NAME, pinned())
    monkeypatch.setattr(sources, "_download_package", full)
    with pytest.raises(OutOfResources, match="The disk is full"):
        sources.resolve(NAME)


def test_two_processes_at_once_download_once(tmp_path: Path, cache: Path) -> None:
    script = tmp_path / "resolve.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time
            from pathlib import Path
            sys.path[:0] = [sys.argv[1], sys.argv[2]]
            import test_sources as t
            from kvllm.lm import sources
            t.sources.MODELS[t.NAME] = t.pinned()
            plain = t.fake_download(t.CONTENT, [])
            def slow(package, into, tell):
                with open(sys.argv[3], "a") as log:
                    log.write("download\\n")
                Path(sys.argv[3] + ".started").touch()
                end = time.monotonic() + 60
                while not Path(sys.argv[3] + ".waiting").exists() and time.monotonic() < end:
                    time.sleep(0.05)
                return plain(package, into, tell)
            sources._download_package = slow
            def heard(tick):
                print(tick.note)
                if tick.note.startswith("waiting"):
                    Path(sys.argv[3] + ".waiting").touch()
            files = sources.resolve(t.NAME, progress=heard)
            print(files.digest)
            """
        )
    )
    here = Path(__file__).parent
    log = tmp_path / "log"
    command = [sys.executable, str(script), str(here), str(here.parent.parent), str(log)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not Path(f"{log}.started").exists():
        assert first.poll() is None
    second = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    out, _ = first.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0)
    assert log.read_text() == "download\n"
    assert "waiting: another process" in second.stdout
    assert out.splitlines()[-1] == second.stdout.splitlines()[-1]


def test_offline_without_cache_says_what_to_do(calls: list[str]) -> None:
    with pytest.raises(ModelError, match=r"offline was asked for.*KVLLM_CACHE.*model folder\."):
        sources.resolve(NAME, offline=True)
    assert not calls


def test_unreachable_package_index_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.MODELS, NAME, replace(pinned(), packages=(Package("kvllm-no-such-package", "0", 1),)))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"kvllm-no-such-package==0 could not be downloaded.*KVLLM_CACHE"):
        sources.resolve(NAME)


def test_environment_without_pip_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.MODELS, NAME, pinned())
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match="-m ensurepip"):
        sources.resolve(NAME)


def test_files_are_taken_from_an_unpacked_folder_too(tmp_path: Path) -> None:
    folder_of(tmp_path / "unpacked" / "tiny")
    for file in pinned().files:
        sources._extract(file, {PACKAGE: tmp_path / "unpacked"}, tmp_path / "out" / file.name)
        assert (tmp_path / "out" / file.name).read_bytes() == CONTENT[file.name]


def test_registered_model_has_only_its_pinned_version(calls: list[str]) -> None:
    assert sources.resolve(NAME, revision="1.0").revision == "1.0"
    with pytest.raises(ModelError, match=r"pinned to version 1\.0"):
        sources.resolve(NAME, revision="main")


@pytest.mark.parametrize("name", ["no-such-model", "", "a/b/c", "../x", "weights.gguf"])
def test_unknown_name_lists_the_registered_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="smollm2-135m-instruct, minilm-l6, gemma3-270m"):
        sources.resolve(name)


def test_registry_is_complete() -> None:
    for model in MODELS.values():
        packages = {package.name for package in model.packages}
        assert all(len(file.sha256) == 64 and file.bytes > 0 for file in model.files)
        assert {package for file in model.files for package, _ in file.members} == packages


def test_importing_sources_loads_nothing_heavy() -> None:
    code = (
        "import sys, kvllm.lm.sources as s; s.models(); "
        "print({'torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- local folders ----------------------------------------------------------------------------------------------------


def test_folder_is_used_in_place(tmp_path: Path, cache: Path) -> None:
    folder = folder_of(tmp_path / "model", {**CONTENT, "README.md": b"hello", "chat_template.jinja": b"{{ x }}"})
    before = sorted(folder.rglob("*"))
    files = sources.resolve(str(folder))
    assert files.path == folder.resolve()
    assert set(files.files) == {*CONTENT, "chat_template.jinja"}
    assert files.revision is None
    assert sorted(folder.rglob("*")) == before
    assert not list(cache.rglob("*.safetensors"))


def test_changed_folder_gets_another_digest(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    first = sources.resolve(str(folder))
    ticks: list[Progress] = []
    assert sources.resolve(str(folder), progress=ticks.append) == first
    assert not ticks  # hashes are remembered
    (folder / "model.safetensors").write_bytes(safetensors_bytes(b"\2" * 16))
    second = sources.resolve(str(folder))
    assert second.digest != first.digest
    assert {name for name in CONTENT if first.files[name] != second.files[name]} == {"model.safetensors"}


def test_sharded_folder(tmp_path: Path) -> None:
    content = {
        "config.json": b"{}",
        "model-1.safetensors": safetensors_bytes(),
        "model.safetensors.index.json": json.dumps({"weight_map": {"w": "model-1.safetensors"}}).encode(),
    }
    folder = folder_of(tmp_path / "model", content)
    assert set(sources.resolve(str(folder)).files) == set(content)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1\.safetensors, which is missing"):
        sources.resolve(str(folder))


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:\\x", 3, ""])
def test_index_that_points_outside_is_untrusted(tmp_path: Path, target: object) -> None:
    index = json.dumps({"weight_map": {"w": target}}).encode()
    folder = folder_of(tmp_path / "model", {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(Untrusted, match="points outside"):
        sources.resolve(str(folder))


@pytest.mark.parametrize(
    "extra",
    [
        {"config.json": b'{"auto_map": {"AutoModel": "modeling.X"}}'},
        {"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["t.X", null]}}'},
        {"config.json": b'{"transformers_weights": "../../x.safetensors"}'},
        {"adapter_config.json": b"{}"},
        {"modules.json": b'[{"type": "evil.Module", "path": ""}]'},
        {"modules.json": b'[{"type": "sentence_transformers.models.Dense", "path": "../x"}]'},
        {"1_Pooling/config.json": b'{"auto_map": {}}'},
    ],
)
def test_folder_with_code_or_adapter_is_untrusted(tmp_path: Path, extra: dict[str, bytes]) -> None:
    folder = folder_of(tmp_path / "model", {**CONTENT, **extra})
    with pytest.raises(Untrusted):
        sources.resolve(str(folder))


def test_pickle_only_folder_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, which can run code"):
        sources.resolve(str(folder))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"readme": b""}, "has no config.json"),
        ({"config.json": b"{}"}, "no weights"),
        ({"config.json": b"[]"}, "does not hold a JSON dict"),
        ({"config.json": b"{", "model.safetensors": safetensors_bytes()}, "cannot be read as JSON"),
        ({"config.json": b"{}", "model.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "Git LFS"),
        ({"config.json": b"{}", "model.safetensors": b""}, "not a whole safetensors"),
    ],
)
def test_unusable_folder_is_one_sentence(tmp_path: Path, content: dict[str, bytes], sentence: str) -> None:
    folder = folder_of(tmp_path / "model", content)
    with pytest.raises(ModelError, match=sentence):
        sources.resolve(str(folder))


def test_local_path_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no revisions"):
        sources.resolve(str(folder_of(tmp_path / "model")), revision="main")


# --- hub --------------------------------------------------------------------------------------------------------------


def test_hub_snapshot_follows_the_same_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = folder_of(tmp_path / "snapshots" / "abc123")
    asked: list[dict[str, object]] = []

    def download(name: str, **options: object) -> str:
        asked.append({"name": name, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = sources.resolve("org/model", revision="v1")
    assert (files.source, files.revision) == ("hub:org/model", "abc123")
    assert asked[0]["revision"] == "v1"
    assert not any(".bin" in pattern or ".py" in pattern for pattern in asked[0]["allow_patterns"])  # type: ignore[attr-defined]
    (snapshot / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(Untrusted):
        sources.resolve("org/model")


def test_hub_id_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, **options: object) -> str:
        assert options["local_files_only"] is True
        raise OSError("Cannot find an appropriate cached snapshot folder\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"org/model could not be obtained in the local.*smollm2-135m-instruct"):
        sources.resolve("org/model", offline=True)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, *, eos: int = 1) -> None:
    """A llama of 2 layers, width 32, a byte-level vocabulary of 259 tokens, tied embeddings; in Q8_0."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    rng = np.random.default_rng(0)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes-to-unicode table
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(rest)}}
    tokens = ["<|im_start|>", "<|im_end|>", *(symbols[byte] for byte in range(256)), "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.normal(size=(rows, columns)).astype(np.float32)
        packed = quants.quantize(values, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)

    matrix("token_embd.weight", len(tokens), 32)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for layer in range(2):
        matrix(f"blk.{layer}.attn_q.weight", 32, 32)
        matrix(f"blk.{layer}.attn_k.weight", 16, 32)
        matrix(f"blk.{layer}.attn_v.weight", 16, 32)
        matrix(f"blk.{layer}.attn_output.weight", 32, 32)
        matrix(f"blk.{layer}.ffn_gate.weight", 64, 32)
        matrix(f"blk.{layer}.ffn_up.weight", 64, 32)
        matrix(f"blk.{layer}.ffn_down.weight", 32, 64)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(32, np.float32))
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_converted_once_and_keyed_by_content(tmp_path: Path, cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "somewhere" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path)
    direct = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ticks: list[Progress] = []
    files = sources.resolve(str(path), progress=ticks.append)
    assert any("converting" in tick.note for tick in ticks)
    assert files.revision == f"sha256:{file_sha256(path)}"
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= set(files.files)
    assert not list(cache.rglob("*.gguf"))

    model = AutoModelForCausalLM.from_pretrained(files.path, local_files_only=True)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 1
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in direct.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(files.path, local_files_only=True)
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"
    assert b"lm_head" not in (files.path / "model.safetensors").read_bytes()  # tied: not stored twice
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert "transformers_version" not in json.loads((files.path / name).read_text())

    ticks.clear()
    assert sources.resolve(str(path), progress=ticks.append) == files
    assert not ticks
    moved = path.rename(tmp_path / "moved.gguf")
    assert sources.resolve(str(moved)).path == files.path
    again = sources.resolve(str(moved)).path
    (again / "manifest.json").unlink()
    assert sources.resolve(str(moved)).digest == files.digest  # converting is deterministic


def test_gguf_that_is_none_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match=r"bad\.gguf|model\.gguf cannot be converted"):
        sources.resolve(str(path))
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir() and entry.name != "hashes"]


def test_tokenizer_that_contradicts_the_gguf_is_repaired_or_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer.eos_token = "<|im_start|>"  # what transformers 5.8 to 5.13 make of SmolLM2
    sources._check_tokenizer(tokenizer, path)
    assert tokenizer.eos_token == "<|im_end|>"
    from tokenizers.decoders import Fuse

    tokenizer.backend_tokenizer.decoder = Fuse()
    with pytest.raises(ModelError, match=r"misreads the tokenizer of tiny\.gguf \(decoding\)"):
        sources._check_tokenizer(tokenizer, path)


# --- the real default -------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_default_model_resolves_to_a_chat_model() -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    files = sources.resolve("smollm2-135m-instruct")
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= set(files.files)
    assert files.files["model.safetensors"] == "599ccdec1144b710d621493dc6ce646461a7e5946b1dd4bc6a71e1eec0c6e2fa"
    plain = sources.resolve("smollm2-135m-instruct+0")
    assert plain.files["model.safetensors"] == "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
    assert sources.resolve("smollm2-135m-instruct", verify=True, offline=True) == files
    config = AutoConfig.from_pretrained(files.path)
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 30, True)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    assert tokenizer.is_fast
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(files.path).eos_token_id == 2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("In 1999, naïve").input_ids) == "In 1999, naïve"
