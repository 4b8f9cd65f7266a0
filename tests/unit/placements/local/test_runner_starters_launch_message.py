"""A runner reads launch messages from this version and from earlier versions, which sent one untagged record."""

import msgspec
import pytest

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunDebugSession
from sandbox.model.fixed_limits import OUTPUT_FREE_BYTES, OUTPUT_FREE_PERCENT
from sandbox.model.resources import Watermark
from sandbox.placements.local.runner_starters import LaunchMessage, RunnerSettings, decode_launch_message

IMAGE = Image("node", "sha256:" + "0" * 64, "/var/lib/sandbox/profiles/node/0")
UPSTREAM = ModelUpstream("https://api.anthropic.com", "key")
SECRETS = {"TOKEN": "value-of-token"}
IDS = ("task-1", "abcdefghijkl")
HOST = RunnerSettings(
    "/var/lib/sandbox",
    "/run/sandbox/0123456789ab",
    "bubblewrap",
    excludes_emulation=True,
    agent_programs={"": "/var/lib/sandbox/agent/claude"},
    disk_kind="loop",
    can_confine=True,
    output_watermark=Watermark(3.0, 2 * 1024**3),
)
OLD_MESSAGES = [
    (
        RunAttempt(
            *IDS, UPSTREAM, IMAGE, SECRETS, resumes=True, clone_follows_redirects=False, records_conversation=False
        ),
        (
            b'{"task_id":"task-1","attempt_id":"abcdefghijkl","data_dir":"/var/lib/sandbox",'
            b'"run_dir":"/run/sandbox/0123456789ab","runtime":"bubblewrap",'
            b'"upstream":{"base_url":"https://api.anthropic.com","api_key":"key"},"resumes":true,'
            b'"agent_program":"/var/lib/sandbox/agent/claude","disks":"loop","confines":true,"auto":true,'
            b'"image":{"profile":"node","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000",'
            b'"directory":"/var/lib/sandbox/profiles/node/0"},'
            b'"secrets":{"TOKEN":"value-of-token"},"follow_redirects":false,'
            b'"output_watermark":{"percent":3.0,"bytes_max":2147483648}}'
        ),
    ),
    (
        FinishAttempt(*IDS, SECRETS),
        (
            b'{"task_id":"task-1","attempt_id":"abcdefghijkl","data_dir":"/var/lib/sandbox",'
            b'"run_dir":"/run/sandbox/0123456789ab","runtime":"bubblewrap","finish":true,'
            b'"agent_program":"/var/lib/sandbox/agent/claude","disks":"loop","confines":true,"auto":true,'
            b'"secrets":{"TOKEN":"value-of-token"},"output_watermark":{"percent":3.0,"bytes_max":2147483648}}'
        ),
    ),
    (
        RunDebugSession(*IDS, IMAGE),
        (
            b'{"task_id":"task-1","attempt_id":"abcdefghijkl","data_dir":"/var/lib/sandbox",'
            b'"run_dir":"/run/sandbox/0123456789ab","runtime":"bubblewrap","visit":true,'
            b'"agent_program":"/var/lib/sandbox/agent/claude","disks":"loop","confines":true,"auto":true,'
            b'"image":{"profile":"node","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000",'
            b'"directory":"/var/lib/sandbox/profiles/node/0"},'
            b'"output_watermark":{"percent":3.0,"bytes_max":2147483648}}'
        ),
    ),
]


@pytest.mark.parametrize(("order", "message"), OLD_MESSAGES, ids=lambda value: type(value).__name__)
def test_message_of_an_earlier_version_is_read(order, message):
    assert decode_launch_message(message) == LaunchMessage(order, HOST)


@pytest.mark.parametrize(("order", "message"), OLD_MESSAGES, ids=lambda value: type(value).__name__)
def test_message_of_the_current_version_is_read(order, message):
    encoded = msgspec.json.encode(LaunchMessage(order, HOST))
    assert encoded != message
    assert decode_launch_message(encoded) == LaunchMessage(order, HOST)


def test_agent_program_is_found_by_kind():
    host = RunnerSettings("/d", "/r", "qemu", agent_programs={"one": "/one", "two": "/two"})
    assert [host.agent_program(kind) for kind in ("one", "two", "three")] == ["/one", "/two", ""]
    assert HOST.agent_program("one") == "/var/lib/sandbox/agent/claude"


def test_omitted_fields_in_a_message_of_an_earlier_version_have_their_defaults():
    """Earlier versions omitted every field that had its default value."""
    message = b'{"task_id":"task-1","attempt_id":"abcdefghijkl","data_dir":"/d","run_dir":"/r","runtime":"qemu"}'
    decoded = decode_launch_message(message)
    order = RunAttempt(*IDS, records_conversation=False)  # the server would reject a journal with such events
    assert decoded == LaunchMessage(order, RunnerSettings("/d", "/r", "qemu", agent_programs={"": ""}))
    assert decoded.settings.output_watermark == Watermark(OUTPUT_FREE_PERCENT, OUTPUT_FREE_BYTES)


@pytest.mark.parametrize("order", [b'{"type":"rest"}', b'{"type":"finish_attempt"}', b"{}", b"7"])
def test_invalid_order_is_rejected(order):
    host = msgspec.json.encode(HOST)
    with pytest.raises(msgspec.ValidationError):
        decode_launch_message(b'{"order":' + order + b',"host":' + host + b"}")


def test_incomplete_message_is_a_decode_error_but_not_a_validation_error():
    for message in (b"", b'{"order":{"type":"run_att', b'{"task_id":'):
        with pytest.raises(msgspec.DecodeError) as raised:
            decode_launch_message(message)
        assert not isinstance(raised.value, msgspec.ValidationError)


@pytest.mark.parametrize("order_type", [RunAttempt, FinishAttempt, RunDebugSession])
def test_repr_does_not_contain_secrets(order_type):
    order = order_type(*IDS, secrets=SECRETS)
    assert repr(order) == f"{order_type.__name__}('task-1', 'abcdefghijkl')"
    assert "value-of-token" not in repr(LaunchMessage(order, HOST))
