"""The command line: parse, call one method of the API, render.

`main` is the only entry; it turns every outcome into data on stdout, words on stderr and an exit code (DESIGN.md,
section 7). It imports the commands, and they the engine, only when they run: `kvllm --help` loads no torch.

    main(["ls", "my.kb", "--json"])   # 0
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    from kvllm.cli.run import run

    return run(argv)
