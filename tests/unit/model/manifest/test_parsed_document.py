"""Manifest text is untrusted: the parser enforces limits, reports where errors are, and raises one exception type."""

import json
import resource
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.manifests import parse_manifest
from sandbox.model import fixed_limits
from sandbox.model.manifest.parser import FieldError, InvalidManifestError
from sandbox.model.manifest.schema import Manifest

MINIMAL = """\
version: "1"
kind: Task
metadata:
  name: "My Task"
repository:
  url: "https://github.com/org/repo.git"
  branch: "main"
claude:
  prompt: "Your instructions here"
"""
MIB = 1024 * 1024


def errors_of(body: str | bytes, *, is_json: bool = False) -> tuple[FieldError, ...]:
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(body if isinstance(body, bytes) else body.encode(), is_json=is_json)
    return caught.value.errors


def single_error(body: str | bytes, *, is_json: bool = False) -> FieldError:
    (error,) = errors_of(body, is_json=is_json)
    return error


@pytest.mark.parametrize(
    ("old", "new", "field", "rule", "line", "column"),
    [
        ('"My Task"', "5", "metadata.name", "type", 4, 9),
        ('  prompt: "Your', '  promt: x\n  prompt: "Your', "claude.promt", "unknown_field", 9, 3),
        ('  branch: "main"\n', "", "repository.branch", "required", 6, 3),
        ("kind: Task\n", "", "kind", "required", 1, 1),
        ("kind: Task", "kind:", "kind", "required", 2, 6),
        ("kind: Task", "kind: Task\nkind: Task", "kind", "format", 3, 1),
        ('"My Task"', "x\n  labels: {team: a, team: b}", "metadata.labels.team", "format", 5, 21),
        ('"My Task"', "x\n  labels: {1: a}", "metadata.labels.1", "format", 5, 12),
        ('"My Task"', "x\n  labels: {true: a}", "metadata.labels.true", "format", 5, 12),
        ('"My Task"', "!!python/object/apply:os.system [id]", "metadata.name", "format", 4, 9),
        ('"My Task"', "!mine x", "metadata.name", "format", 4, 9),
        ('"My Task"', "!!int x", "metadata.name", "format", 4, 9),
        ('"My Task"', "!!binary eA==", "metadata.name", "format", 4, 9),
        ('"My Task"', "!!set {x}", "metadata.name", "format", 4, 9),
        ('"My Task"', ".inf", "metadata.name", "range", 4, 9),
        ('"My Task"', "9" * 30, "metadata.name", "range", 4, 9),
        ('"My Task"', "1e999", "metadata.name", "range", 4, 9),
        ('"My Task"', '"a\\0b"', "metadata.name", "format", 4, 9),
        ("claude:", "lifecycle: {retrys: 2}\nclaude:", "lifecycle.retrys", "unknown_field", 8, 13),
        ("claude:", "vm:\n  memory: 8Q\nclaude:", "vm.memory", "format", 9, 11),
        ("claude:", "<<: {a: 1}\nclaude:", "<<", "unknown_field", 8, 1),
    ],
)
def test_yaml_error_has_field_and_rule_and_position(old, new, field, rule, line, column):
    assert old in MINIMAL
    error = single_error(MINIMAL.replace(old, new))
    assert (error.field, error.rule, error.line, error.column) == (field, rule, line, column)


def test_errors_are_ordered_by_position():
    errors = errors_of(MINIMAL.replace("Task\n", "task\n").replace("main", "a b") + "zzz: 1\nvm: {cpus: x}\n")
    assert [error.field for error in errors] == ["kind", "repository.branch", "zzz", "vm.cpus"]
    assert [error.line for error in errors] == sorted(error.line or 0 for error in errors)


def test_error_of_an_anchored_value_has_the_position_of_the_value():
    error = single_error(
        MINIMAL.replace('"My Task"', "&x 5\n  labels: {a: b}").replace("name: &x 5", "name: x\n  id: &x 5")
    )
    assert (error.field, error.line, error.column) == ("metadata.id", 5, 7)


@pytest.mark.parametrize(
    ("body", "line", "column", "words"),
    [
        (b"a: [1\n", 2, 1, "valid YAML"),
        (b"a: b: c", 1, 5, "valid YAML"),
        (b"a: 1\n\tb: 2", 2, 1, "valid YAML"),
        (b"a: 'x", 1, 4, "valid YAML: this quote is not closed"),
        (b'a: 1\nb:\n  c: "x\nd: 2\ne: 3\n', 3, 6, "this quote is not closed"),
        (b"a: 'x\n---\nb: 1\n", 1, 4, "this quote is not closed"),
        (b'a: "x\nb: 1\nc: "y"\n', 1, 4, "this quote is not closed; the next quote is in line 3, and text follows it"),
        (b"a: {b: 'x}\nc: 'y'\n", 1, 8, "this quote is not closed; the next quote is in line 2"),
        (b'a: "x\n  y"\nb: "z" w\n', 3, 8, "not valid YAML: did not"),
        (b'a: "x\n  y"\nb: c: d\n', 3, 5, "not valid YAML: mapping values"),
        (b"a: *nope", 1, 4, "alias without an anchor"),
        (b"a: &a [*a]", 1, 8, "alias without an anchor"),
        (b"a: 1\n---\nb: 2\n", 2, 1, "one YAML document"),
        (b"a: 1\n--- \n", 2, 1, "one YAML document"),
        (b"[a]: 1", 1, 1, "name is not text"),
        (b"? {a: b}\n: 1", 1, 3, "name is not text"),
        (b"a: &x y\n*x : 1", 2, 1, "name is not text"),
        (b"a: \x07", 1, 4, "U+0007"),
        (b"a: b\x00", 1, 5, "NUL"),
        (b"\xef\xbb\xbf\xef\xbb\xbfa: 1", 1, 1, "at most one byte order mark"),
        (b"a: 1\n\xef\xbb\xbfb: 1", 2, 2, "not valid YAML"),
        (b"\xef\xbb\xbfa: \xff", 1, 4, "must be UTF-8 text"),
        (b"\xef\xbb\xbfa: \x00", 1, 4, "NUL"),
        (b"a: \xff", 1, 4, "UTF-8"),
        ("a: 1".encode("utf-16"), 1, 1, "UTF-8"),
        (b"a: \xed\xa0\x80", 1, 4, "UTF-8"),
        (b'a: "\\ud800"', 1, 7, "valid YAML"),
    ],
)
def test_unreadable_yaml_is_reported_as_one_error_with_a_position(body, line, column, words):
    error = single_error(body)
    assert (error.field, error.rule, error.line, error.column) == ("", "format", line, column)
    assert words in error.message


@pytest.mark.parametrize(
    ("body", "line", "column", "words"),
    [
        ('{"a": 1 2}', 1, 9, "valid JSON"),
        ('{"a": 1}\n{', 2, 1, "valid JSON"),
        ("{'a': 1}", 1, 2, "valid JSON"),
        ('{"a": "', 1, 7, "valid JSON"),
        ('{"a": "\t"}', 1, 8, "valid JSON"),
        ("a: 1", 1, 1, "valid JSON"),
    ],
)
def test_unreadable_json_is_reported_as_one_error_with_a_position(body, line, column, words):
    error = single_error(body, is_json=True)
    assert (error.field, error.rule, error.line, error.column) == ("", "format", line, column)
    assert words in error.message


@pytest.mark.parametrize("body", ["", " \n", "# comment\n", "null", "[]", "text", "5", "--- \n", "{}x"])
@pytest.mark.parametrize("is_json", [True, False])
def test_body_without_fields_is_one_error(body, is_json):
    assert single_error(body, is_json=is_json).field == ""


@pytest.mark.parametrize("wrapper", [{"manifest": 1}, {"manifest": None}, {"manifest_yaml": 5}, {"manifest_yaml": ""}])
def test_wrapper_without_a_manifest_is_one_error(wrapper):
    assert single_error(json.dumps(wrapper), is_json=True).field == ""


def test_wrappers_can_be_neither_nested_nor_combined():
    assert ("manifest", "unknown_field") in [
        (error.field, error.rule) for error in errors_of('{"manifest": {"manifest": {}}}', is_json=True)
    ]
    both = errors_of('{"manifest": {}, "manifest_yaml": ""}', is_json=True)
    assert {"manifest", "manifest_yaml"} <= {error.field for error in both}


@pytest.mark.parametrize(
    ("token", "rule"), [("NaN", "range"), ("-Infinity", "range"), ("1e999", "range"), ("9" * 40, "range")]
)
def test_unrepresentable_json_number_is_a_field_error(token, rule):
    errors = errors_of('{"vm": {"cpus": TOKEN}}'.replace("TOKEN", token), is_json=True)
    assert ("vm.cpus", rule) in [(error.field, error.rule) for error in errors]


def test_duplicate_json_key_and_lone_surrogate_are_field_errors():
    errors = errors_of('{"kind": "Task", "kind": "Task", "metadata": {"name": "\\ud800"}}', is_json=True)
    rules = [(error.field, error.rule) for error in errors]
    assert rules.count(("kind", "format")) == 1
    assert rules.count(("metadata.name", "format")) == 1


def test_body_size_is_limited_to_one_mebibyte():
    largest = MINIMAL + "#" * (fixed_limits.BODY_BYTES_MAX - len(MINIMAL))
    assert parse_manifest(largest.encode(), is_json=False).agent.kind == "claude"
    assert single_error(largest + "#").rule == "range"


def test_nesting_is_limited_in_yaml_and_json():
    for is_json in (False, True):
        inner = fixed_limits.MANIFEST_DEPTH_MAX - 1
        largest = '{"x": ' + "[" * inner + "]" * inner + "}"
        assert "x" in [error.field for error in errors_of(largest, is_json=is_json)]
        too_deep = single_error('{"x": [' + "[" * inner + "]" * inner + "]}", is_json=is_json)
        assert (too_deep.field, too_deep.rule) == ("", "range")


def test_nesting_through_aliases_is_limited():
    half = "[" * 40 + "*{}" + "]" * 40
    error = single_error(f"a: &a {half.replace('*{}', '1')}\nb: {half.format('a')}\n")
    assert "nested" in error.message


def test_aliases_and_anchors_are_limited():
    limit = fixed_limits.MANIFEST_ALIASES_MAX
    labels = ", ".join(f"k{number}: *x" for number in range(limit))
    valid = MINIMAL.replace('"My Task"', f"&x y\n  labels: {{{labels}}}")
    assert len(parse_manifest(valid.encode(), is_json=False).metadata.labels) == limit
    assert "aliases" in single_error(valid.replace("{k0", "{k: *x, k0")).message
    anchors = "".join(f"a{number}: &a{number} x\n" for number in range(limit + 1))
    assert "anchors" in single_error(anchors).message


@pytest.mark.parametrize("is_json", [True, False])
def test_leading_byte_order_mark_is_ignored(is_json):
    plain = json.dumps({"manifest_yaml": MINIMAL}) if is_json else MINIMAL
    assert parse_manifest(f"\ufeff{plain}".encode(), is_json=is_json) == parse_manifest(MINIMAL.encode(), is_json=False)


def test_byte_order_mark_does_not_shift_positions():
    for invalid in (MINIMAL.replace("version: ", "version: [] #"), "[1", "kind: 1\n" + MINIMAL):
        assert errors_of(f"\ufeff{invalid}") == errors_of(invalid)
    assert single_error('\ufeff{"a" 1}', is_json=True) == single_error('{"a" 1}', is_json=True)


BOMBS = {
    "aliases of aliases": 'a0: &a0 ["xxxxxxxx"]\n'
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
    "a large list, doubled repeatedly": "a0: &a0 ["
    + "1," * 9000
    + "]\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 8)),
    "a large text, doubled repeatedly": "a0: &a0 "
    + "x" * 900_000
    + "\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 8)),
    "unclosed lists": "[" * 500_000,
    "lists nested as deeply as a recursive parser allows": "[" * 5_000 + "]" * 5_000,
    "unclosed mappings": '{"a":' * 170_000,
    "closing brackets, then unclosed lists": "]" * 500_000 + "[" * 500_000,
    "lists in block style": "- " * 500_000,
    "empty lists": "[" + "[]," * 300_000 + "[]]",
    "empty mappings": "[" + "{}," * 300_000 + "{}]",
    "numbers": "[" + "1," * 500_000 + "1]",
    "one key repeated": "a: \n" * 260_000,
    "many unknown keys": "".join(f"{'k' * 60}{n}: 1\n" for n in range(9_900)),
    "many empty secrets": "secrets: [" + "{}," * 9_000 + "]",
    "one long key": "k" * 1_000_000 + ": 1",
    "one long number": "vm: {cpus: " + "1" * 1_000_000 + "}",
    "one long fraction": "vm: {cpus: 1." + "1" * 1_000_000 + "}",
    "one long exponent": "vm: {cpus: 1e" + "1" * 1_000_000 + "}",
    "one long host": "vm: {allowed_hosts: ['" + "a." * 500_000 + "!']}",
    "one long URL": "repository: {url: 'https://" + "a-" * 500_000 + "!'}",
    "one long branch": "repository: {branch: '" + "a/" * 500_000 + "'}",
    "unclosed placeholders": "claude: {mcp_config: {mcpServers: {a: {url: '" + "${" * 500_000 + "'}}}}",
    "many placeholders": "claude: {mcp_config: {mcpServers: {a: {url: '"
    + "".join(f"${{A{n}}}" for n in range(100_000))
    + "'}}}}",
    "an unterminated string": '"' + '\\"' * 500_000,
    "quotes": '"' * MIB,
    "blanks": " " * MIB,
    "directives": "".join(f"%TAG !a{n}! x\n" for n in range(60_000)) + "---\na: 1",
    "documents": "---\n" * 200_000,
    "wrapped YAML": '{"manifest_yaml":"' + "a: \\n" * 150_000 + '"}',
    "wrapped wrappers": '{"manifest":' * 80_000,
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("is_json", [True, False])
def test_hostile_body_has_bounded_time_and_memory(name, is_json):
    body = BOMBS[name].encode()[:MIB]
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    assert errors_of(body, is_json=is_json)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 200 * 1024


def test_json_with_too_many_values_is_rejected_before_allocation():
    body = BOMBS["empty mappings"].encode()[: MIB - 1] + b"]"
    tracemalloc.start()
    try:
        assert "values" in single_error(body, is_json=True).message
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * MIB


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
FIELD_NAMES = """
    version kind metadata name id labels repository url branch commit subpath claude prompt headless model vm cpus
    memory allowed_tools mcp_config mcpServers x env args secrets key source lifecycle timeout artifact_patterns
    allowed_hosts network_mode profile budget_usd
"""
FIELDS = st.sampled_from(FIELD_NAMES.split())
NEAR_MANIFESTS = st.recursive(
    JSON_VALUES | st.sampled_from(["1", "Task", "main", "https://a/b", "8G", "24h", "outbound"]),
    lambda inner: st.dictionaries(FIELDS, inner, max_size=6) | st.lists(inner, max_size=3),
    max_leaves=30,
)
YAML_PIECES = st.lists(
    st.sampled_from(
        [*"{}[],:?-&*!|>%@`'\"#\n \t~", "a", "1", "&a ", "*a", "!!str ", "- ", ": ", "? ", "<<: ", "---\n", "...\n",
         "version: 1\n", "vm:\n  cpus: ", "claude: ", "|\n  ", ".nan", "0x", "\\u0000", "é", "\ufeff", "\x85"]
    ),
    max_size=40,
).map("".join)  # fmt: skip


def parse_or_reject(body: bytes, *, is_json: bool) -> None:
    """Parse the body. Any exception other than InvalidManifestError fails the test."""
    try:
        manifest = parse_manifest(body, is_json=is_json)
    except InvalidManifestError as error:
        rejection = error
    else:
        assert isinstance(manifest, Manifest)
        return
    assert rejection.errors
    assert all(error.rule and error.message for error in rejection.errors)


@given(NEAR_MANIFESTS | st.dictionaries(FIELDS, NEAR_MANIFESTS), st.booleans())
def test_arbitrary_json_is_parsed_or_rejected(value, is_json):
    parse_or_reject(json.dumps(value).encode(), is_json=is_json)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")), st.booleans())
def test_arbitrary_bytes_are_parsed_or_rejected(body, is_json):
    parse_or_reject(body, is_json=is_json)


@given(YAML_PIECES)
def test_arbitrary_yaml_is_parsed_or_rejected(text):
    parse_or_reject(text.encode(), is_json=False)


@given(st.integers(0, len(MINIMAL)), YAML_PIECES)
def test_manifest_with_noise_is_parsed_or_rejected(position, noise):
    parse_or_reject((MINIMAL[:position] + noise + MINIMAL[position:]).encode(), is_json=False)
