"""One connection to the model listener: checks each request, replaces its key and forwards both bodies.

Pipelined requests get no response; the connection ends after the current response. A client that closes its side before
its response is complete is treated as gone, so its upstream request is aborted. With a budget, the response is read to
its end instead, because its cost is reported there. In that case, a client that does not read its response for too long
is also treated as gone.
"""

from typing import Any

import h11
import msgspec

from sandbox.gateway import http_messages
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import (
    ERROR_BODY_BYTES_MAX,
    INTERIM_RESPONSES_MAX,
    PIPELINED_BYTES_MAX,
    REQUEST_BODY_BYTES_MAX,
)
from sandbox.gateway.model_api.forwarded_request import (
    InflightRequest,
    forwarded_request,
    forwarded_response,
    is_uncompressed_event_stream,
)
from sandbox.gateway.model_api.request_gate import (
    AllowedHead,
    ApprovedRequest,
    KeyRejection,
    ModelPolicy,
    ModelRequestGate,
    too_large,
)
from sandbox.gateway.model_api.upstream import BodyRedactor, Upstream, account_redactors
from sandbox.gateway.sans_io import Effects, Phase
from sandbox.interfaces.gateway import ModelDialect, Rejected

_NEEDS_MORE = (h11.NEED_DATA, h11.PAUSED)


class _PendingRequest(msgspec.Struct):
    """A well-formed, authenticated request that is waiting for its body or for the end of a hold."""

    request: h11.Request
    allowed: AllowedHead
    body: bytearray = bytearray()
    is_complete: bool = False


class ModelProtocol:
    """The sans-I/O protocol of a model connection: processes the bytes of both sides and returns effects."""

    def __init__(
        self,
        dialect: ModelDialect,
        policy: ModelPolicy,
        request_gate: ModelRequestGate,
        upstream: Upstream,
        reporter: EventReporter,
        port: int,
    ) -> None:
        self._dialect = dialect
        self._policy = policy
        self._request_gate = request_gate
        self._upstream = upstream
        self._reporter = reporter
        self._port = port
        self._client_side = http_messages.create_server_state()
        self._upstream_side: h11.Connection | None = None
        self._pending: _PendingRequest | None = None
        self._inflight: InflightRequest | None = None
        self._body_bytes = 0
        self._unsent_bytes = 0
        self._has_responded = False
        self._is_client_gone = False
        self._is_closed = False

    @property
    def phase(self) -> Phase:
        """The event that the client connection is waiting for."""
        if self._is_closed or self._is_client_gone:
            return Phase.CLOSING
        if self._client_side.their_state is h11.SEND_BODY:
            return Phase.BODY
        if self._pending is not None:
            return Phase.HELD
        if self._inflight is not None:
            return Phase.RESPONSE
        is_idle = self._has_responded and not self._client_side.trailing_data[0]
        return Phase.IDLE if is_idle else Phase.HEAD

    @property
    def is_in_flight(self) -> bool:
        """Whether a request has been forwarded and its response is not yet complete."""
        return self._inflight is not None

    @property
    def should_read_full_response(self) -> bool:
        """Whether the response in flight must be metered to its end even if the client is gone."""
        return self._inflight is not None and self._inflight.cost_bound is not None

    def client_data_received(self, data: bytes) -> Effects:
        """Process data from the client; empty data means EOF."""
        effects = Effects()
        if self.phase is Phase.CLOSING:
            return effects
        if not data or (self.phase in (Phase.RESPONSE, Phase.HELD) and self._exceeds_pipeline_limit(data)):
            self._detach_client(effects)
            return effects
        try:
            self._client_side.receive_data(data)
            self._process_client_events(effects)
        except h11.RemoteProtocolError as error:
            self._reject_malformed(effects, error)
        return effects

    def client_stalled(self) -> Effects:
        """Handle a client that has not read its response for too long."""
        effects = Effects()
        if self.phase is not Phase.CLOSING:
            self._detach_client(effects)
        return effects

    def resume(self) -> Effects:
        """Forward the held request after the hold has ended."""
        effects = Effects()
        if self._pending is not None and self._pending.is_complete:
            self._forward_pending(effects)
        return effects

    def hold_timed_out(self) -> Effects:
        """Reject a request that was held for too long."""
        effects = Effects()
        if self._pending is not None and self._pending.is_complete:
            self._discard_pending()
            message = "The agent's capabilities are not known yet; no model request is forwarded until they are."
            self._reject(effects, Rejected(503, message))
            self._finish_cycle(effects)
        return effects

    def connection_lost(self) -> None:
        """Clean up after both connections are closed: report usage that was not reported yet."""
        self._charge_usage(is_abandoned=True)
        self._discard_pending()
        self.upstream_drained()

    def upstream_drained(self) -> None:
        """Free the bytes reserved for a body that was sent to the upstream or will never be sent."""
        self._request_gate.free_bytes(self._unsent_bytes)
        self._unsent_bytes = 0

    def upstream_data_received(self, data: bytes) -> Effects:
        """Process data from the upstream; empty data means EOF."""
        effects = Effects()
        if self._upstream_side is None:
            return effects
        if self._inflight is None:
            self._close_upstream(effects)  # unsolicited data: the connection cannot be reused
            return effects
        try:
            self._inflight.receive_head(data)
            self._upstream_side.receive_data(data)
            self._process_upstream_events(effects)
        except h11.RemoteProtocolError:
            if self._inflight is not None:
                self._inflight.fail_head(is_cut=not data)
            self._forward_body(effects)
            self._fail_upstream(effects, 502, f"The model at {self._upstream.address} ended its response early.")
        if not data:  # EOF may delimit a response
            self._close_upstream(effects)
        return effects

    def upstream_connected(self) -> Effects | None:
        """Return None if the request may be sent now, otherwise the effects of denying it.

        The budget may have been reached while the request waited for a connection.
        """
        denial = self._request_gate.check()
        if denial is None or self._inflight is None:
            self._mark_sent()
            return None
        self._reporter.report_denied("model", self._port, denial.message)
        effects = Effects()
        self._respond_instead(effects, denial)
        return effects

    def upstream_failed(self, status: int, message: str) -> Effects:
        """Handle an upstream that is unreachable (502) or too late (504), or a lease that has expired (503)."""
        effects = Effects()
        if self._inflight is None:
            self._close_upstream(effects)
        else:
            self._fail_upstream(effects, status, message)
        return effects

    def upstream_timed_out(self) -> Effects:
        """Handle an upstream that did not start its response, or did not continue it, in time."""
        if self._inflight is not None:
            self._inflight.has_timed_out = True
        return self.upstream_failed(504, "The model did not respond in time.")

    # Client side.

    def _process_client_events(self, effects: Effects) -> None:
        while not self._is_closed:
            event: Any = self._client_side.next_event()
            if event in _NEEDS_MORE:
                return
            if isinstance(event, h11.Request):
                self._start_request(effects, event)
            elif isinstance(event, h11.Data):
                self._handle_body(effects, bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._finish_body(effects)

    def _start_request(self, effects: Effects, request: h11.Request) -> None:
        self._body_bytes = 0
        decision = self._policy.check(request)
        if isinstance(decision, Rejected):
            self._reject(effects, decision, request.method)
            return
        denial = None
        if self._request_gate.needs_body:
            self._pending = _PendingRequest(request, decision)
        elif (denial := self._request_gate.check()) is None:
            self._forward(effects, request, decision)
        if denial is not None:
            self._reject(effects, denial, request.method)
        elif self._client_side.they_are_waiting_for_100_continue:
            self._send_to_client(effects, h11.InformationalResponse(status_code=100, headers=[]))

    def _forward(
        self, effects: Effects, request: h11.Request, allowed: AllowedHead, approved: ApprovedRequest | None = None
    ) -> None:
        cost_bound, body = (approved.cost_bound, approved.body) if approved is not None else (None, None)
        body_redactor = BodyRedactor([self._upstream.key_redactor])
        self._inflight = InflightRequest(self._dialect, allowed.is_metered, body_redactor, cost_bound)
        self._request_gate.record_start(self, cost_bound)
        if self._upstream_side is None:
            self._upstream_side = http_messages.create_client_state()
            effects.dial = True
        else:
            self._mark_sent()
        forwarded, dropped = forwarded_request(request, allowed.target, self._upstream, self._dialect, body)
        self._reporter.report_dropped_headers(dropped)
        self._send_to_upstream(effects, forwarded)

    def _forward_pending(self, effects: Effects) -> None:
        waiting, self._pending = self._pending, None
        if waiting is None:
            return
        self._unsent_bytes += len(waiting.body)
        decision = self._request_gate.check() or self._request_gate.check_body(
            waiting.body, is_metered=waiting.allowed.is_metered
        )
        waiting.body.clear()
        if isinstance(decision, Rejected):
            self.upstream_drained()
            self._reject(effects, decision)
            if not self._is_closed:
                self._finish_cycle(effects)
            return
        self._forward(effects, waiting.request, waiting.allowed, decision)
        self._send_to_upstream(effects, h11.Data(data=decision.body))
        self._send_to_upstream(effects, h11.EndOfMessage())

    def _discard_pending(self) -> _PendingRequest | None:
        waiting, self._pending = self._pending, None
        if waiting is not None:
            self._request_gate.free_bytes(len(waiting.body))
        return waiting

    def _buffer_body(self, effects: Effects, pending: _PendingRequest, data: bytes) -> None:
        refused = self._request_gate.reserve_bytes(len(data))
        if refused is None:
            pending.body += data
        else:
            self._discard_pending()
            self._reject(effects, refused)
            self._close(effects)

    def _handle_body(self, effects: Effects, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > REQUEST_BODY_BYTES_MAX:
            if self._pending is not None or (self._inflight is not None and not self._inflight.has_response):
                self._reject(effects, too_large())
            self._close(effects)
        elif self._pending is not None:
            self._buffer_body(effects, self._pending, data)
        elif self._inflight is not None:
            self._send_to_upstream(effects, h11.Data(data=data))

    def _finish_body(self, effects: Effects) -> None:
        if self._pending is not None:
            self._pending.is_complete = True
            if not self._request_gate.is_holding:
                self._forward_pending(effects)
        elif self._inflight is not None:
            self._send_to_upstream(effects, h11.EndOfMessage())
        else:
            # The response was sent before the request body was complete. The bytes after the body may be a valid
            # request.
            self._finish_cycle(effects, has_next_request=True)

    def _reject(self, effects: Effects, rejected: Rejected, method: bytes = b"") -> None:
        """Respond now; discard the rest of the request body. Closing earlier could lose the response."""
        self._reporter.report_denied("model", self._port, rejected.message)
        # Close the connection after a malformed or oversized request instead of reading the rest of it.
        is_last = rejected.status in (400, 413)
        response = http_messages.model_error(self._dialect, rejected.status, rejected.message, should_close=is_last)
        effects.to_client += response.encode(self._client_side, method)
        self._has_responded = True
        if is_last:
            self._close(effects)

    def _reject_malformed(self, effects: Effects, error: h11.RemoteProtocolError) -> None:
        message = "The request is not valid HTTP/1.1."
        self._reporter.report_denied("model", self._port, message)
        if not self.should_read_full_response and self._client_side.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = http_messages.model_error(self._dialect, error.error_status_hint, message, should_close=True)
            effects.to_client += response.encode(self._client_side)
        self._detach_client(effects)

    def _exceeds_pipeline_limit(self, data: bytes) -> bool:
        return len(self._client_side.trailing_data[0]) + len(data) > PIPELINED_BYTES_MAX

    # Upstream side.

    def _process_upstream_events(self, effects: Effects) -> None:
        while self._inflight is not None and self._upstream_side is not None:
            event: Any = self._upstream_side.next_event()
            if event in _NEEDS_MORE:
                self._forward_body(effects)
                return
            if isinstance(event, h11.InformationalResponse):
                self._inflight.interim_responses += 1
                self._inflight.finish_interim_head(self._upstream_side.trailing_data[0])
                if self._inflight.interim_responses > INTERIM_RESPONSES_MAX:
                    self._inflight.assume_started()  # the gateway ends a request that the model may be processing
                    self._fail_upstream(effects, 502, f"The model at {self._upstream.address} is not responding.")
            elif isinstance(event, h11.Response):
                self._start_response(effects, self._inflight, event)
            elif self._inflight.key_rejection is not None:
                self._collect_key_rejection(effects, self._inflight.key_rejection, event)
            elif isinstance(event, h11.Data):
                self._inflight.received.extend(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._forward_body(effects)
                if held_back := self._inflight.body_redactor.flush():
                    self._send_to_client(effects, h11.Data(data=held_back))
                self._finish_response(effects)

    def _forward_body(self, effects: Effects) -> None:
        """Forward the received part of the body in one piece, because a read may contain thousands of chunks."""
        inflight = self._inflight
        if inflight is None or not inflight.received:
            return
        data = bytes(inflight.received)
        inflight.received.clear()
        self._send_to_client(effects, h11.Data(data=inflight.body_redactor.feed(data)))
        if inflight.meter is not None:
            inflight.meter.feed(data)
            self._request_gate.record_progress(self, inflight.meter)

    def _start_response(self, effects: Effects, inflight: InflightRequest, response: h11.Response) -> None:
        if 300 <= response.status_code < 400:
            address, variable = self._upstream.address, self._dialect.base_url_variable
            message = f"The model at {address} redirects to another address; set {variable} to that address."
            self._fail_upstream(effects, 502, message)
            return
        if self._request_gate.observe_status(response.status_code):
            inflight.record_key_rejection(response.status_code)
            return
        is_metered = inflight.is_metered and response.status_code < 300
        if is_metered and not is_uncompressed_event_stream(response):
            inflight.assume_started()  # a document is sent only after the model has finished
        if http_messages.is_compressed(response):
            if is_metered:
                inflight.meter = inflight.dialect.create_meter(b"")
            address = self._upstream.address
            message = f"The model at {address} compressed its response although the gateway requested otherwise."
            self._fail_upstream(effects, 502, message)
            return
        inflight.has_response = True
        if is_metered:
            content_type = http_messages.header(response.headers, b"content-type")
            inflight.meter = inflight.dialect.create_meter(content_type)
        rules, redactors = self._dialect.response_headers, [self._upstream.key_redactor]
        if response.status_code >= 400:  # the model's own text may contain such names legitimately
            redactors += account_redactors(response.headers, rules.account_identifying)
        inflight.redact(redactors)
        self._send_to_client(effects, forwarded_response(response, rules, redactors))

    def _collect_key_rejection(self, effects: Effects, rejection: KeyRejection, event: Any) -> None:
        """Collect the upstream's message; send the gateway's response when it is complete or too long."""
        if isinstance(event, h11.Data):
            rejection.body += event.data
        if isinstance(event, h11.EndOfMessage) or len(rejection.body) > ERROR_BODY_BYTES_MAX:
            self._finish_key_rejection(effects, rejection)

    def _finish_key_rejection(self, effects: Effects, rejection: KeyRejection) -> None:
        body = bytes(rejection.body[:ERROR_BODY_BYTES_MAX])
        rejected = self._request_gate.report_key_rejection(rejection.status, self._upstream, body)
        self._respond_instead(effects, rejected)

    def _finish_response(self, effects: Effects) -> None:
        self._send_to_client(effects, h11.EndOfMessage())
        self._charge_usage(is_complete=True)
        self._has_responded = True
        side = self._upstream_side
        is_reusable = side is not None and side.our_state is h11.DONE and side.their_state is h11.DONE
        if side is not None and is_reusable and not side.trailing_data[0]:
            side.start_next_cycle()
        else:
            self._close_upstream(effects)
        if self._is_client_gone:
            self._close(effects)
        elif self._client_side.their_state is not h11.SEND_BODY:
            self._finish_cycle(effects)

    def _fail_upstream(self, effects: Effects, status: int, message: str) -> None:
        """Send an error if the response has not started; otherwise close the connection to truncate it."""
        if self._inflight is not None and self._inflight.key_rejection is not None:
            self._finish_key_rejection(effects, self._inflight.key_rejection)
            return
        self._reporter.report_error("upstream_unreachable", message)
        if self._inflight is not None and self._inflight.has_response:
            self._close(effects)
        else:
            self._respond_instead(effects, Rejected(status, message))

    def _respond_instead(self, effects: Effects, rejected: Rejected) -> None:
        """Send a local response instead of the upstream's response, which the client has not started to receive."""
        if self._is_client_gone:
            self._close(effects)
            return
        self._charge_usage()
        self._close_upstream(effects)
        effects.to_client += http_messages.model_error(self._dialect, rejected.status, rejected.message).encode(
            self._client_side
        )
        self._has_responded = True
        if self._client_side.their_state is not h11.SEND_BODY:
            self._finish_cycle(effects)

    # Both sides.

    def _send_to_client(self, effects: Effects, event: Any) -> None:
        if not self._is_client_gone:
            effects.to_client += self._client_side.send(event) or b""

    def _mark_sent(self) -> None:
        if self._inflight is not None:
            self._inflight.is_sent = True

    def _send_to_upstream(self, effects: Effects, event: Any) -> None:
        if self._upstream_side is not None:
            effects.to_upstream += self._upstream_side.send(event) or b""

    def _charge_usage(self, *, is_complete: bool = False, is_abandoned: bool = False) -> None:
        """End the request in flight and report its usage."""
        inflight, self._inflight = self._inflight, None
        if inflight is not None:
            usage = inflight.report_usage(self._reporter, is_complete=is_complete, is_abandoned=is_abandoned)
            self._request_gate.charge(self, usage)

    def _finish_cycle(self, effects: Effects, *, has_next_request: bool = False) -> None:
        """Start the next cycle if the request was read and its response was sent; otherwise close the connection.

        has_next_request: the bytes after this request may be the next request.
        """
        side = self._client_side
        is_done = side.our_state is h11.DONE and side.their_state is h11.DONE
        if not is_done or (side.trailing_data[0] and not has_next_request):
            self._close(effects)
        else:
            side.start_next_cycle()

    def _close_upstream(self, effects: Effects) -> None:
        self.upstream_drained()
        if self._upstream_side is None:
            return
        self._upstream_side = None
        effects.to_upstream.clear()
        if effects.dial:
            effects.dial = False
        else:
            effects.close_upstream = True

    def _detach_client(self, effects: Effects) -> None:
        """Handle a client that is gone or treated as gone. A response that must be metered is still read to its end."""
        if self.should_read_full_response:
            self._is_client_gone = True
            effects.close_client = True
        else:
            self._close(effects)

    def _close(self, effects: Effects) -> None:
        self._discard_pending()
        self._charge_usage()
        self._close_upstream(effects)
        self._is_closed = True
        effects.close_client = True
