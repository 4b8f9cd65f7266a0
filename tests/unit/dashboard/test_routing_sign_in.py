"""The sign-in page."""

import pytest


@pytest.mark.parametrize(
    ("target", "back"),
    [
        ("%2Ftasks%2Fa%3Fb%3Dc", "/tasks/a?b=c"),
        ("https://elsewhere.example", "/"),
        ("//elsewhere.example", "/"),
        ("/%5Celsewhere.example", "/"),
        ("javascript:alert(1)", "/"),
    ],
)
def test_sign_in_redirects_to_this_server_only(pages, target, back):
    assert f'data-back="{back}"' in pages.get(f"/sign-in?to={target}").text
