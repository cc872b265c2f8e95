"""Other people's words made harmless for each format: terminal, Markdown, XML. Strings in, strings out.

Keys, texts and answers are untrusted: none of them may set a colour, open a link, mention a user or end a tag.

    markdown("a|b <i> [x](y)")       # 'a&#124;b &lt;i&gt; &#91;x&#93;(y)'
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# Invisible characters that reorder or hide what follows: as dangerous on a terminal as an escape sequence.
_UNSEEN = frozenset("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
# Everything that Markdown may read as more than itself: also `:` and `.` (bare links), `@` and `#` (mentions) ...
_MARKDOWN = re.compile(r"[!-/:-@\[-`{-~]")
_PLAIN = frozenset(",;?'\"%/(")
# ... but not where it means nothing to anybody, so that a report can be read as it lies in a repository, too.
_HARMLESS = re.compile(
    r"(?<=\d)[.-](?=\d)"  # 0.5, 2026-11-23
    r"|(?<=[\w)%])[.:](?=\s|$)"
    r"|(?<=\w)-(?=[^\W\d])|(?<=[a-z])(?<!gh)-(?=\d)|(?<=[^\W_])_(?=[^\W_])"  # within a word, but not the issue GH-1
    r"|\)|(?<=\S)\+|\+(?=\S)"
)
_NUMBERED = re.compile(r"\s*\d+[.)](?=\s|$)")  # begins a list


def neutral(text: str, *, keep: str = "\n\t") -> str:
    """Return the text with control characters, bidirectional overrides and lone surrogates written as `\\x1b`.

    `keep` lists the control characters that stay as they are.
    """
    return "".join(ch if ch in keep or not _unsafe(ch) else _escaped(ch) for ch in text)


def markdown(text: str) -> str:
    """Return the text so that Markdown shows it as it is, on one line, in a table cell and anywhere else.

    Character references instead of backslashes: no parser, and no extension of one, reads syntax into them.
    """
    return _MARKDOWN.sub(_reference, neutral(text.replace("\n", " ⏎ "), keep=""))


def _reference(match: re.Match[str]) -> str:
    ch = match.group()
    if ch in _PLAIN:
        return ch
    numbered = _NUMBERED.match(match.string)
    if _HARMLESS.match(match.string, match.start()) and (numbered is None or match.end() != numbered.end()):
        return ch
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(ch, f"&#{ord(ch)};")


def xml(text: str) -> str:
    """Return the text with every character that XML 1.0 cannot carry written out; markup is the writer's to escape.

    https://www.w3.org/TR/xml/#charsets: of the control characters only tab and line feed survive a reader unchanged
    (a carriage return is read as a line feed).
    """
    return "".join(f"\\u{ord(ch):04x}" if ch in "\ufffe\uffff" else ch for ch in neutral(text))


def finite(value: Any) -> Any:
    """Return plain data with every number that JSON does not have (NaN, infinity) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _unsafe(ch: str) -> bool:
    point = ord(ch)
    return point < 0x20 or 0x7F <= point <= 0x9F or 0xD800 <= point <= 0xDFFF or ch in _UNSEEN


def _escaped(ch: str) -> str:
    point = ord(ch)
    if ch in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[ch]
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}"
