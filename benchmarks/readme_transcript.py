"""Put a real run of `kvllm demo` between the transcript markers of the README.

python benchmarks/readme_transcript.py             # runs the demo, rewrites README.md
python benchmarks/readme_transcript.py --print     # only shows what would stand there
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- transcript:start -->", "<!-- transcript:end -->"
WIDTH = 110
# The demo folds its tables to a width of its own where stdout is no terminal; only that number is set here.
DEMO = "import sys; from kvllm.cli import demo, main; demo.WIDTH = int(sys.argv[1]); sys.exit(main(sys.argv[2:]))"
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print it, and leave the README as it is")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="take a saved run instead of a new one"
    )
    given = parser.parse_args(argv)
    said = given.source.read_text(encoding="utf-8") if given.source else run_demo()
    if given.print:
        print(said)
        return 0
    readme = README.read_text(encoding="utf-8")
    README.write_text(placed(readme, said), encoding="utf-8")
    return 0


def run_demo() -> str:
    """Run the demo in an empty folder, so that the knowledge base has no path worth hiding, and return its words."""
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": str(WIDTH), "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory(prefix="kvllm-transcript-", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", DEMO, str(WIDTH), "demo", "demo.kb"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            check=True,
        )
        return cleaned(done.stdout, (folder, os.path.realpath(folder)))


def cleaned(said: str, folders: Sequence[str] = ()) -> str:
    """Return the output without terminal codes, trailing blanks and this machine's folders."""
    said = ANSI.sub("", said)
    home = str(Path.home())
    for folder in sorted({*folders, tempfile.gettempdir(), home}, key=len, reverse=True):
        if len(folder) > 1:
            said = said.replace(folder + os.sep, "").replace(folder, "")
    return "\n".join(line.rstrip() for line in said.strip("\n").splitlines())


def placed(readme: str, said: str) -> str:
    """Return the README with the transcript between its markers.

    Raises:
        ValueError: The markers are not there exactly once, in order.
    """
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ValueError(f"README.md must hold {START} and {END} once, in this order; it was left unchanged.")
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    # A fence longer than any run of backticks inside.
    longest = max((len(run) for run in re.findall(r"`+", said)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{before}{START}\n{fence}text\n$ kvllm demo demo.kb\n{said}\n{fence}\n{END}{after}"


if __name__ == "__main__":
    raise SystemExit(main())
