"""The published JSON schema of the reports (`kvllm probe --json` and its like), as data.

Draft 2020-12. Its `$id` names the version that each document carries under `schema`; a change that a reader could trip
over raises that version.

    load()["$id"]     # 'kvllm-report/1'
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def load() -> dict[str, Any]:
    """Return the schema."""
    source = resources.files(__name__) / "report.schema.json"
    schema: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return schema
