"""A redacted line of JSON remains valid, and its other content is unchanged."""

import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sandbox.secrets.redaction.redactor import SecretRedactor

KEY = "sk-live-0123456789abcdef"
QUOTED = [f'"{KEY}"', f"'{KEY}'", f' "{KEY}"\n', f'{KEY}"', f'"{KEY}', f'{KEY}"\\', f"{KEY}%22", f"%22{KEY}&quot;"]
SHORT = ['"abcdefg"', 'abcdefg"', 'abcdefg""', '"abcdefg', "'abcdefg\"", 'abcdefg\\"']
OBJECT = '{"user":"x","password":"hunter2hunter2"}'


def nested(text: str, depth: int) -> str:
    for _ in range(depth):
        text = json.dumps({"text": text, "list": [text, 1]})
    return text


@pytest.mark.parametrize("value", QUOTED)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_quoted_value_is_found_without_quotes_and_json_remains_valid(value: str, depth: int):
    line = nested(f"The key is {KEY}", depth)
    assert SecretRedactor({"S": value}).redact_text(line) == nested("The key is [REDACTED:S]", depth)


def test_quoted_value_is_found_without_quotes_in_hex():
    redactor = SecretRedactor({"S": f'"{KEY}"'})
    assert redactor.redact(KEY.encode().hex().encode()) == b"[REDACTED:S]"


@pytest.mark.parametrize("value", SHORT)
@pytest.mark.parametrize("text", ["abcdefg", '"abcdefg"', 'abcdefg"', "x abcdefg\\"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_json_remains_valid_after_redaction_of_a_value_that_is_short_unless_quoted(value: str, text: str, depth: int):
    redacted = SecretRedactor({"S": value}).redact_text(nested(text, depth))
    for _ in range(depth):
        redacted = json.loads(redacted)["text"]
    assert value not in redacted


def test_json_remains_valid_after_redaction_of_a_line_that_ends_in_a_quote():
    line = 'password = "hunter2-hunter2"'
    redactor = SecretRedactor({"S": f"[default]\n{line}\nregion = somewhere\n"})
    assert json.loads(redactor.redact_text(json.dumps([line[:-1], line]))) == ["[REDACTED:S]", '[REDACTED:S]"']


@pytest.mark.parametrize("value", [OBJECT, f"[{OBJECT}]", f" {OBJECT}\n"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_json_value_is_redacted_as_part_of_a_document(value: str, depth: int):
    document = nested(f'{{"type":"tool_use","input":{value}}}', depth)
    redacted = SecretRedactor({"S": value}).redact_text(document)
    for _ in range(depth):
        redacted = json.loads(redacted)["text"]
    assert json.loads(redacted) == {"type": "tool_use", "input": "[REDACTED:S]"}


def test_json_value_is_redacted_inside_a_string():
    redacted = SecretRedactor({"S": OBJECT}).redact_text(json.dumps({"text": f"It is {OBJECT}."}))
    assert json.loads(redacted) == {"text": 'It is "[REDACTED:S]".'}


@pytest.mark.parametrize("value", ["bf93c0de7a55e1d24f60", "1f93c0de7a55e1d24f60", "ef93c0de7a55e1d24f60"])
@pytest.mark.parametrize("code", range(0x20))
def test_json_remains_valid_if_a_value_starts_in_an_escape(value: str, code: int):
    """The first digit of the value is also the last digit of an escape such as `\\u001b`."""
    redactor = SecretRedactor({"S": value})
    line = json.dumps({"text": f"x {chr(code)}{value[1:]} y", "rest": 1})
    redacted = json.loads(redactor.redact_text(line))
    assert value[1:] not in redacted["text"]
    assert (redacted["text"][:2], redacted["text"][-2:], redacted["rest"]) == ("x ", " y", 1)
    for cut in range(1, len(line), 3):
        stream = redactor.stream()
        output = stream.feed(line[:cut].encode()) + stream.feed(line[cut:].encode()) + stream.flush()
        assert output.decode() == redactor.redact_text(line)


letters = st.sampled_from("\\\"'nu041ab%/&\n\té😀 x-")


@settings(max_examples=130, deadline=None)
@example(value="000014/-\\", before="", after="0")
@example(value="44'uu/-\\ \"", before="u", after="0éa")
@example(value='"0- 0\nb"x"', before="'", after="😀")
@given(
    st.text(letters, min_size=9, max_size=24),
    st.text(letters, max_size=5),
    st.text(letters, max_size=5),
)
def test_json_with_arbitrary_values_remains_valid(value: str, before: str, after: str):
    assume(len(set(value)) > 5)
    redactor = SecretRedactor({"S": value})
    for ascii_only in (True, False):
        text = before + value + after
        for _ in range(3):
            document = {"a": text, "b": [1, text[: len(text) // 2]], text: 2}
            redacted = redactor.redact_text(json.dumps(document, ensure_ascii=ascii_only))
            assert len(json.loads(redacted)) >= 2
            text = json.dumps(text, ensure_ascii=ascii_only)
