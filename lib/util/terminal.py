"""Text from untrusted files on a terminal: one line, nothing that a terminal obeys or hides.

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import io
import sys
import unicodedata

# format characters that are seen, or that a script's spelling needs
_VISIBLE_FORMATS = {
    *range(0x0600, 0x0606),  # Arabic number signs
    0x06DD,
    0x070F,
    0x08E2,
    0x110BD,
    0x110CD,
    0x200C,  # zero-width non-joiner, of Persian
    0x200D,  # zero-width joiner, of emoji and Indic scripts
}
# letters and marks without a shape of their own
_INVISIBLE = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800}
_INVISIBLE |= {0x3164, 0xFFA0}
_TAGS_AND_SELECTORS = range(0xE0000, 0xE1000)  # all default ignorable, assigned or not


def one_line(text: str) -> str:
    """Any text on one line, without control, directional and invisible characters.

    What is left of a terminal's escape sequence are its printable characters.
    """
    return "".join(character for character in " ".join(text.split()) if _is_shown(character))


def _is_shown(character: str) -> bool:
    code = ord(character)
    if code in _INVISIBLE or code in _TAGS_AND_SELECTORS:
        return False
    category = unicodedata.category(character)
    return category not in ("Cc", "Cf", "Cs") or code in _VISIBLE_FORMATS


def replace_unencodable() -> None:
    """Have stdout and stderr write an escape, such as `\\u0443`, for what their encoding lacks.

    Without it, printing a name in Ukrainian on an ASCII terminal raises UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
