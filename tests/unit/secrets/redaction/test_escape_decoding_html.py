"""HTML references are decoded as in browsers: by name or number, with leading zeros, and without a semicolon."""

import html
import json
from html.entities import html5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles.redaction_attacks import NAMED_CHARACTER_REFERENCES
from sandbox.secrets.redaction.escape_layers import decode_layers
from sandbox.secrets.redaction.redactor import SecretRedactor

VALUE = "gH7_p&ss#/w=rd."
WITHOUT_SEMICOLON = sorted(name for name in html5 if not name.endswith(";"))


@pytest.fixture(scope="module")
def redactor() -> SecretRedactor:
    return SecretRedactor({"S": VALUE})


@pytest.mark.parametrize("name", ["amp", "quot", "lt", "gt", "apos", "lowbar", "period", "num", "sol", "AMP", "Tab"])
def test_named_reference_is_decoded(name: str):
    value = f"gH7{html5[f'{name};']}pass-word"
    assert SecretRedactor({"S": value}).redact_text(f"<gH7&{name};pass-word>") == "<[REDACTED:S]>"


def test_every_html_name_is_decoded():
    names = list(html5)
    for chunk in (names[start : start + 25] for start in range(0, len(names), 25)):
        value = "-".join(html5[name] for name in chunk)
        redacted = SecretRedactor({"S": f"gH7_{value}_password"}).redact_text(f"<gH7_&{'-&'.join(chunk)}_password>")
        assert redacted == "<[REDACTED:S]>", chunk


@pytest.mark.parametrize("name", WITHOUT_SEMICOLON)
@pytest.mark.parametrize("after", ["pass", "it;", "=1", " ", "&", "1"])
def test_name_without_semicolon_is_decoded_where_html_allows_it(name: str, after: str):
    decoded = html.unescape(f"&{name}{after}")
    value = f"gH7_{decoded}_word"
    assert "[REDACTED:S]" in SecretRedactor({"S": value}).redact_text(f"gH7_&{name}{after}_word")


@pytest.mark.parametrize(
    "encoded",
    [
        "".join(f"&#{ord(letter)};" for letter in VALUE),
        "".join(f"&#{ord(letter)}" for letter in VALUE),
        "".join(f"&#{ord(letter):07};" for letter in VALUE),
        "".join(f"&#{ord(letter):020};" for letter in VALUE),
        "".join(f"&#x{ord(letter):04X};" for letter in VALUE),
        "".join(f"&#X{ord(letter):012x}" for letter in VALUE),
        f"&#{'0' * 1000}{ord(VALUE[0])};{html.escape(VALUE[1:])}",
        "gH7&lowbar;p&ampss&num;&sol;w&equals;rd&period;",
        "".join(
            f"&{NAMED_CHARACTER_REFERENCES[letter]};" if letter in NAMED_CHARACTER_REFERENCES else letter
            for letter in VALUE
        ),
        "&zwj;".join(html.escape(letter) for letter in VALUE),
        "&ZeroWidthSpace;&NoBreak;&shy;&#x202e;&Tab;".join(map(html.escape, VALUE)),
    ],
)
@pytest.mark.parametrize("wrap", ["{}", "json", "twice"])
def test_html_encoded_value_is_found(redactor: SecretRedactor, encoded: str, wrap: str):
    if wrap == "json":
        encoded = json.dumps(encoded)[1:-1]
    if wrap == "twice":
        encoded = html.escape(encoded)
    assert redactor.redact_text(f"<{encoded}>") == "<[REDACTED:S]>"


def test_numeric_references_in_the_windows_1252_range_are_decoded():
    redactor = SecretRedactor({"S": "gH7€_password"})
    assert redactor.redact_text("<gH7&#128;_password>") == "<[REDACTED:S]>"
    assert redactor.redact_text("<gH7&#x80;_password>") == "<[REDACTED:S]>"
    assert redactor.redact_text("<gH7_password>") == "<gH7_password>"


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.sampled_from([*html5, "amp", "#65", "#x41;", "#065", "x", "#", ";"]).map("&{}".format)
        | st.sampled_from(["", " ", "a", "z9", ";", "=", "1"]),
        max_size=6,
    ).map("".join)
)
def test_first_decoded_layer_matches_html_unescape(text: str):
    layers = decode_layers(text.encode())
    assert layers[min(1, len(layers) - 1)].data.decode() == html.unescape(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/?a=1&copy=2&region=eu&notify=no&lt=5&amp=x",
        "AT&T, R&D, a && b, &nosuchname; &#; &#x; &#xg; &#99999999; &",
        "fish &amp; chips &copy; 2026 &#8212; &quot;fine&quot;",
        "&" * 100,
    ],
)
def test_ordinary_text_with_ampersands_is_unchanged(redactor: SecretRedactor, text: str):
    data = text.encode()
    assert redactor.redact(data) is data


@pytest.mark.parametrize(
    "value", ["u=x&copy=region&lt=5", "&notasecret&amp", "copy&paste&order=1", "&#65&#x42password"]
)
def test_value_that_contains_references_is_found_in_every_encoding(value: str):
    redactor = SecretRedactor({"S": value})
    for encoded in (
        value,
        html.escape(value),
        json.dumps(value)[1:-1],
        value.replace("&", "%26"),
        html.escape(html.escape(value)),
    ):
        assert redactor.redact_text(f"< {encoded} >") == "< [REDACTED:S] >", encoded


def test_unterminated_reference_before_a_value_does_not_hide_the_value():
    for before in ("&", "&#", "&#x", "&#1", "&am"):
        for value in ("12345678ä0", "deadbeefdeädbeef", "amp;pässword"):
            redacted = SecretRedactor({"S": value}).redact_text(f"{before}{value} {before}{json.dumps(value)[1:-1]}")
            assert redacted.count("[REDACTED:S]") == 2, (before, value)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_references_split_over_chunks_are_decoded(redactor: SecretRedactor, size: int):
    data = b"?a=1&copy=2\n" + b"gH7&lowbar;p&ampss&#0035/w&equals;rd&period; &CounterClockwiseContourIntegral &lt"
    stream = redactor.stream()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    redacted = b"".join([*map(stream.feed, pieces), stream.flush()])
    assert redacted == redactor.redact(data)
    assert redacted == b"?a=1&copy=2\n[REDACTED:S] &CounterClockwiseContourIntegral &lt"
