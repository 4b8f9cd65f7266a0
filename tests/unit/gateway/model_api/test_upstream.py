"""The operator's base URL and key are parsed once."""

import pytest

from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.interfaces.gateway import ModelUpstream


def test_api_key_is_sent_to_the_public_api():
    upstream = parse_upstream(ModelUpstream("https://api.example.com", api_key="sk-1"), MessagesApi())
    assert (upstream.host, upstream.port, upstream.is_tls) == ("api.example.com", 443, True)
    assert (upstream.path_prefix, upstream.authority) == (b"", b"api.example.com")
    assert upstream.credential == (b"x-api-key", b"sk-1")


def test_auth_token_is_sent_to_a_proxy_with_a_path_prefix():
    upstream = parse_upstream(ModelUpstream("http://10.0.0.7:8080/anthropic/", auth_token="t"), MessagesApi())
    assert (upstream.host, upstream.port, upstream.is_tls) == ("10.0.0.7", 8080, False)
    assert (upstream.path_prefix, upstream.authority) == (b"/anthropic", b"10.0.0.7:8080")
    assert upstream.credential == (b"authorization", b"Bearer t")


def test_ipv6_authority_keeps_its_brackets():
    upstream = parse_upstream(ModelUpstream("http://[::1]:9000", api_key="k"), MessagesApi())
    assert (upstream.host, upstream.authority) == ("::1", b"[::1]:9000")


def test_internationalized_host_is_encoded_for_dns():
    assert (
        parse_upstream(ModelUpstream("https://bücher.example", api_key="k"), MessagesApi()).host
        == "xn--bcher-kva.example"
    )


@pytest.mark.parametrize(
    ("base_url", "api_key", "auth_token"),
    [
        ("ftp://x", "k", ""),
        ("api.example.com", "k", ""),
        ("https://", "k", ""),
        ("https://u:p@x", "k", ""),
        ("https://x/?a=b", "k", ""),
        ("https://x/#a", "k", ""),
        ("https://x:99999", "k", ""),
        ("https://x:many", "k", ""),
        ("https://x:0", "k", ""),
        ("https://[::1", "k", ""),
        ("https://[no-address]", "k", ""),
        ("https://x\u2100y", "k", ""),
        ("https://x/a b", "k", ""),
        (f"https://{'a' * 64}.example", "k", ""),
        ("https://x", "", ""),
        ("https://x", "k", "t"),
        ("https://x", "sk-secret\r\nX: 1", ""),
        ("https://x", "sk-secret\udce9", ""),
    ],
)
def test_invalid_upstream_error_does_not_contain_the_key(base_url, api_key, auth_token):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        parse_upstream(ModelUpstream(base_url, api_key, auth_token), MessagesApi())
    assert "sk-secret" not in str(error.value)
    assert "ANTHROPIC_" in str(error.value)


def test_repr_of_a_parsed_upstream_does_not_contain_the_key():
    assert "sk-1" not in repr(parse_upstream(ModelUpstream("https://x", api_key="sk-1"), MessagesApi()))


@pytest.mark.parametrize("credential", ["api_key", "auth_token"])
def test_repr_of_a_model_upstream_does_not_contain_the_credential(credential: str):
    upstream = ModelUpstream("https://model.example", **{credential: "sk-secret"})
    assert "sk-secret" not in f"{upstream!r} {upstream}"
    assert "model.example" in repr(upstream)
