"""What an experiment is before it runs: a TOML file, checked, and the runs that it stands for.

    name = "injection-small"
    kind = "injection"            # injection, capacity, factors or editors
    facts = ["../facts.jsonl"]    # beside the file; `$NAME/…` is looked up in the environment
    n = 4
    seeds = [0]

Everything else stands in the tables `[edit]` (of EditConfig), `[measure]` and `[settings]` (of the kind). A declaration
and its facts have one digest, under which results are kept. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from kvllm.config import DEFAULT_MODEL, DTYPES, EditConfig
from kvllm.errors import ConfigError
from kvllm.experiments.facts import Case, cases_digest, invented, read_cases, unique
from kvllm.records import Record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("injection", "capacity", "factors", "editors")
UNTRAINED = ("unedited", "in-context")  # what every table has beside the edited models
T = TypeVar("T")


@dataclass(frozen=True)
class Measure(Record):
    """How much is asked each time; what is cheap here makes the long forms affordable.

    Attributes:
        trained, paraphrases, neighbours: Questions per fact.
        questions, instructions, texts: Size of the drift suite.
        last_questions: General questions of the last state of a run, where it is larger.
        retrieved: The in-context column puts the texts of this many nearest facts into the prompt.
    """

    trained: int = 2
    paraphrases: int = 3
    neighbours: int = 2
    questions: int = 24
    instructions: int = 4
    texts: int = 8
    last_questions: int = 0
    retrieved: int = 1

    def __post_init__(self) -> None:
        for name in ("trained", "questions", "texts", "retrieved"):
            _need(getattr(self, name) >= 1, f"measure.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("paraphrases", "neighbours", "instructions", "last_questions"):
            _need(getattr(self, name) >= 0, f"measure.{name} cannot be negative, not {getattr(self, name)}")


@dataclass(frozen=True)
class Declared(Record):
    """A checked declaration.

    Attributes:
        name: Of the experiment.
        kind: One of KINDS.
        model: The base model.
        dtype, device: Of the computation.
        cases: The facts, in the file's order.
        n: How many of them each run uses.
        seeds: One run per seed and arm; a seed orders the facts and trains the edits.
        edit: Settings of EditConfig that differ from the default.
        measure: How much is asked.
        settings: Of the kind, as declared.
        digest: sha256 over all of this.
    """

    name: str
    kind: str
    model: str
    dtype: str
    device: str
    cases: tuple[Case, ...]
    n: int
    seeds: tuple[int, ...]
    edit: Mapping[str, Any] = field(default_factory=dict)
    measure: Measure = field(default_factory=Measure)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        told = self.to_dict()
        told["facts"] = told.pop("cases")
        return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def facts_digest(self) -> str:
        return cases_digest(self.cases)

    def configuration(self) -> dict[str, Any]:
        """Return the declaration without its facts, as results keep it; a model's folder is named by its last part."""
        told = self.to_dict()
        del told["cases"]
        told["model"] = Path(self.model).name if Path(self.model).is_absolute() else self.model
        return told | {"facts": len(self.cases), "facts_sha256": self.facts_digest}

    def edit_config(self, *, seed: int, **changes: Any) -> EditConfig:
        """Return the configuration of an edit: the declared one, with changes of an arm."""
        config: EditConfig = EditConfig.from_dict({**self.edit, **changes, "seed": seed})
        return config

    def ordered(self, seed: int) -> list[Case]:
        """Return the n facts of a seed's runs, in its order: seed 0 takes them as they stand."""
        if seed == 0:
            return list(self.cases[: self.n])
        return random.Random(f"order/{seed}").sample(self.cases, self.n)

    def setting(self, name: str, default: T) -> T:
        """Return one of the kind's settings, of the default's type.

        Raises:
            ConfigError: it is of another type.
        """
        value: Any = self.settings.get(name, default)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        _need(
            isinstance(value, type(default)) and isinstance(value, bool) is isinstance(default, bool),
            f"settings.{name} must be like {default!r}, not {value!r}",
        )
        return cast(T, value)


@dataclass(frozen=True)
class Run(Record):
    """One independent part of an experiment: an arm with a seed.

    Attributes:
        id: Unique within the experiment; names its folder and its rows.
        arm: What distinguishes it from the others, for tables.
        seed: Of order and training.
        steps: Its steps, in order.
        settings: Of the arm.
    """

    id: str
    arm: str
    seed: int
    steps: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def load(path: str | os.PathLike[str], **changes: Any) -> Declared:
    """Read and check a declaration.

    Args:
        path: The TOML file.
        changes: Top-level entries to replace, such as `model` or `n`.

    Raises:
        ConfigError: the file cannot be read, or an entry cannot be used.
    """
    file = Path(path)
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The declaration {file} cannot be read: {error}; nothing was run.") from error
    return declare({**given, **{k: v for k, v in changes.items() if v is not None}}, folder=file.parent)


def declare(given: Mapping[str, Any], *, folder: Path | None = None) -> Declared:
    """Check a declaration given as plain data; fact files are looked up from `folder`."""
    known = {f.name for f in fields(Declared)} - {"cases"} | {"facts", "invented"}
    unknown = sorted(set(given) - known)
    _need(not unknown, f"A declaration has no entry {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
    kind = given.get("kind")
    _need(kind in KINDS, f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    dtype = str(given.get("dtype", "float32"))
    _need(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    seeds = tuple(given.get("seeds", (0,)))
    _need(bool(seeds) and all(type(s) is int for s in seeds), "seeds must be a list of whole numbers")
    _need(len(set(seeds)) == len(seeds), "seeds must differ")
    cases = _cases(given, folder or Path.cwd())
    n = given.get("n", len(cases))
    _need(type(n) is int and 1 <= n <= len(cases), f"n must be between 1 and the {len(cases)} facts there are, not {n}")
    measure = given.get("measure", {})
    strange = sorted(set(measure) - {f.name for f in fields(Measure)})
    _need(not strange, f"[measure] has no entry {', '.join(strange)}")
    declared = Declared(
        name=str(given.get("name", kind)),
        kind=str(kind),
        model=str(given.get("model", DEFAULT_MODEL)),
        dtype=dtype,
        device=str(given.get("device", "auto")),
        cases=tuple(cases),
        n=n,
        seeds=seeds,
        edit={k: tuple(v) if isinstance(v, list) else v for k, v in dict(given.get("edit", {})).items()},
        measure=Measure(**measure),
        settings=dict(given.get("settings", {})),
    )
    declared.edit_config(seed=0)  # refuses unknown and impossible settings before anything runs
    return declared


def _cases(given: Mapping[str, Any], folder: Path) -> list[Case]:
    files = given.get("facts", [])
    _need(isinstance(files, list), "facts must be a list of files")
    cases: list[Case] = []
    for name in files:
        expanded = os.path.expandvars(str(name))
        _need("$" not in expanded, f"{name} names a variable that the environment does not have")
        cases += read_cases(folder / Path(expanded).expanduser())
    made = given.get("invented", 0)
    _need(type(made) is int and made >= 0, f"invented must be a whole number, not {made!r}")
    cases = unique([*cases, *invented(made, 0)])
    _need(bool(cases), 'a declaration needs facts: `facts = ["file.jsonl"]`, or `invented = 64`')
    return cases


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(f"{sentence}; nothing was run.")
