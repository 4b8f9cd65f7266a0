"""A tunnel forwards nothing until an inspector has allowed its first bytes. A stream filter inspects later data."""

from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.protocol_sniffing import NestedConnectionFilter


class ScriptedInspector:
    """Acts as a connection inspector and as a stream filter, both with scripted outcomes."""

    def __init__(self, *outcomes: Tunnel | Denial | None) -> None:
        self.outcomes = list(outcomes)
        self.received: list[bytes] = []
        self.drops_rest = False
        self.is_passthrough = False
        self.may_end_in_denied_line = False

    def client_data_received(self, data: bytes) -> Tunnel | Denial | bytes | None:
        self.received.append(data)
        return self.outcomes.pop(0) if self.outcomes else data.upper()

    def start(self) -> bytes:
        return b"".join(self.received)


def test_tunnel_forwards_data_once_the_inspector_has_decided():
    stream_filter = ScriptedInspector()
    inspector = ScriptedInspector(None, Tunnel("h", 22, stream_filter))
    tunnel = NestedConnectionFilter(inspector, b"")
    assert (tunnel.start(), tunnel.drops_rest) == (b"", False)
    stream_filter.received.append(b"SSH-2.0")
    assert tunnel.client_data_received(b"SSH") == b""
    assert tunnel.drops_rest is False
    assert tunnel.client_data_received(b"-2.0") == b"SSH-2.0"
    assert inspector.received == [b"SSH", b"-2.0"]
    assert tunnel.client_data_received(b"more") == b"MORE"
    assert inspector.received == [b"SSH", b"-2.0"], "the inspector has decided"
    assert tunnel.drops_rest is False
    stream_filter.drops_rest = True
    assert tunnel.drops_rest is True


def test_tunnel_is_passthrough_only_after_inspection_ends():
    stream_filter = ScriptedInspector()
    tunnel = NestedConnectionFilter(ScriptedInspector(None, Tunnel("h", 22, stream_filter)), b"")
    stream_filter.is_passthrough = True
    tunnel.client_data_received(b"SSH")
    assert tunnel.is_passthrough is False, "the inspector has not decided"
    tunnel.client_data_received(b"-2.0")
    assert tunnel.is_passthrough is True
    stream_filter.is_passthrough = False
    assert tunnel.is_passthrough is False


def test_tunnel_may_end_in_a_denied_line_only_after_the_decision():
    stream_filter = ScriptedInspector()
    tunnel = NestedConnectionFilter(ScriptedInspector(None, Tunnel("h", 22, stream_filter)), b"")
    stream_filter.may_end_in_denied_line = True
    tunnel.client_data_received(b"SSH")
    assert tunnel.may_end_in_denied_line is False, "the inspector has not decided"
    tunnel.client_data_received(b"-2.0")
    assert tunnel.may_end_in_denied_line is True
    stream_filter.may_end_in_denied_line = False
    assert tunnel.may_end_in_denied_line is False


def test_data_after_the_connect_request_is_inspected_first():
    denial = Denial("h", 22, "no")
    inspector = ScriptedInspector(denial)
    assert NestedConnectionFilter(inspector, b"came").start() is denial
    assert inspector.received == [b"came"]


def test_denied_connection_remains_denied():
    denial = Denial("h", 22, "no")
    tunnel = NestedConnectionFilter(ScriptedInspector(denial, denial), b"")
    assert tunnel.client_data_received(b"a") is denial
    assert tunnel.client_data_received(b"b") is denial
    assert tunnel.drops_rest is False
