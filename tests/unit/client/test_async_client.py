"""The synchronous client is generated from the asynchronous client."""

import re

from architecture.generated_client import GENERATED, ROOT, generated_client


def test_synchronous_client_is_current():
    assert (ROOT / GENERATED).read_text() == generated_client(), "run script/generate-client"


def test_synchronous_client_contains_nothing_asynchronous():
    _, _, code = generated_client().partition("\n")
    assert re.findall(r"(?i)\w*async\w*|await|aiter\w*|aclos\w+", code) == []
