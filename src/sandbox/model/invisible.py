"""Characters that do not show, by their Unicode properties: the one decision for redaction, names and terminals.

A character is invisible if its general category is Cc, Cf, Cs, Zl or Zp, if it has the property
Default_Ignorable_Code_Point or Noncharacter_Code_Point, or if its glyph is blank by definition although it is a letter
or a symbol. Spaces (Zs) have a width and are visible here. The table is the same on every Python, whose `unicodedata`
has other versions and not these properties; the tests compare it with `unicodedata` and with another implementation.
"""

import re

_BLANK_GLYPHS = (
    (0x2800, 0x2800),  # BRAILLE PATTERN BLANK
    (0x13441, 0x13442),  # EGYPTIAN HIEROGLYPH FULL BLANK, HALF BLANK
    (0x16FE4, 0x16FE4),  # KHITAN SMALL SCRIPT FILLER
    (0x1D159, 0x1D159),  # MUSICAL SYMBOL NULL NOTEHEAD
)

_NONCHARACTERS = (
    (0xFDD0, 0xFDEF),
    *((plane * 0x10000 + 0xFFFE, plane * 0x10000 + 0xFFFF) for plane in range(17)),
)

INVISIBLE_RANGES = (
    *((0x0000, 0x001F), (0x007F, 0x009F), (0x00AD, 0x00AD), (0x034F, 0x034F), (0x0600, 0x0605), (0x061C, 0x061C)),
    *((0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x115F, 0x1160), (0x17B4, 0x17B5)),
    *((0x180B, 0x180F), (0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xD800, 0xDFFF)),
    *((0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0x110BD, 0x110BD)),
    *((0x110CD, 0x110CD), (0x13430, 0x1343F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
    *_BLANK_GLYPHS,
    *_NONCHARACTERS,
)
"""First and last code point of every range."""

INVISIBLE = re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in INVISIBLE_RANGES) + "]")
"""Matches one invisible character."""
