"""One connection from inside to the model's listener: judge each request, swap the key, pass both bodies through.

Requests that are sent before the last one was answered are not answered; the connection ends after the answer.
A client that ends its side while it is owed an answer has gone: its request is cut off upstream too. Where there is a
budget the answer is heard to its end instead, since what it cost is said there. A client that takes nothing
of its answer for too long counts as gone then.
"""

from typing import Any

import h11
import msgspec

from sandbox.gateway import http
from sandbox.gateway.event_reporter import Reports
from sandbox.gateway.limits import PIPELINED_BYTES_MAX, REQUEST_BODY_BYTES_MAX
from sandbox.gateway.model.budget import Admission, Admitted
from sandbox.gateway.model.dialer import KeyScreen, Upstream
from sandbox.gateway.model.pricing import Asked
from sandbox.gateway.model.request_policy import Allowed, ModelPolicy, Refused, too_large
from sandbox.gateway.model.usage_meter import Meter, meter_for
from sandbox.gateway.protocol import Phase, Reaction
from sandbox.model.events import Usage


class Exchange(msgspec.Struct):
    """`asked` is there where the answer may not go uncounted, `meter` once an answer has begun that is to be read."""

    is_metered: bool
    screen: KeyScreen
    asked: Asked | None = None
    is_answered: bool = False
    is_silent: bool = False
    meter: Meter | None = None

    def tell(self, reports: Reports, *, is_whole: bool, is_given_up: bool) -> Usage | None:
        """What it has cost, now that it is over.

        is_whole: the answer came to its end; is_given_up: it is we who do not listen any more.
        """
        bound = self._at_most(is_given_up=is_given_up)
        usage = bound or (None if self.meter is None else self.meter.usage())
        if usage is not None:
            reports.used(usage)
        if bound is not None:
            message = "An answer of the model ended before it told its usage; the most that it may be is counted."
            reports.trouble("usage_unread", message)
        elif usage is None and is_whole and self.meter is not None:
            reports.trouble("usage_unread", "An answer of the model told no usage; its tokens are not counted.")
        return usage

    def _at_most(self, *, is_given_up: bool) -> Usage | None:
        """None where the answer has told, refuses or may go uncounted, and where the upstream broke before it began."""
        asked, meter = self.asked, self.meter
        is_refused = self.is_answered and meter is None
        if asked is None or is_refused or (meter is not None and meter.has_told_all):
            return None
        has_begun = meter is not None and meter.has_begun
        if not (has_begun or is_given_up or self.is_silent):
            return None
        meter = meter or meter_for(b"text/event-stream" if asked.is_streamed else b"")
        return meter.at_most(asked, is_heard=not self.is_silent)


_WAITS = (h11.NEED_DATA, h11.PAUSED)


class _Waiting(msgspec.Struct):
    """A request of the right shape and key that cannot be forwarded before more is known."""

    request: h11.Request
    allowed: Allowed
    body: bytearray = bytearray()
    is_whole: bool = False


class ModelConversation:
    """Bytes of both sides in, reactions out. A request that `admission` holds back goes on by `go_on`."""

    def __init__(
        self, policy: ModelPolicy, admission: Admission, upstream: Upstream, reports: Reports, port: int
    ) -> None:
        self._policy = policy
        self._admission = admission
        self._upstream = upstream
        self._reports = reports
        self._port = port
        self._client_side = http.client_side()
        self._upstream_side: h11.Connection | None = None
        self._waiting: _Waiting | None = None
        self._exchange: Exchange | None = None
        self._body_bytes = 0
        self._unsent_bytes = 0
        self._has_answered = False
        self._client_is_gone = False
        self._is_over = False

    @property
    def phase(self) -> Phase:
        """What the connection from inside waits for."""
        if self._is_over or self._client_is_gone:
            return Phase.OVER
        if self._client_side.their_state is h11.SEND_BODY:
            return Phase.BODY
        if self._waiting is not None:
            return Phase.HELD
        if self._exchange is not None:
            return Phase.ANSWER
        is_quiet = self._has_answered and not self._client_side.trailing_data[0]
        return Phase.IDLE if is_quiet else Phase.HEAD

    @property
    def is_in_flight(self) -> bool:
        """A request was forwarded and is not answered to its end."""
        return self._exchange is not None

    @property
    def must_be_heard(self) -> bool:
        """What is in flight may not go uncounted, whether its client waits for it or not."""
        return self._exchange is not None and self._exchange.asked is not None

    def client_sent(self, data: bytes) -> Reaction:
        """Bytes came from inside; none mean that no more will."""
        reaction = Reaction()
        if self.phase is Phase.OVER:
            return reaction
        if not data or (self.phase in (Phase.ANSWER, Phase.HELD) and self._is_flooded(data)):
            self._let_go(reaction)
            return reaction
        try:
            self._client_side.receive_data(data)
            self._hear_client(reaction)
        except h11.RemoteProtocolError as error:
            self._refuse_malformed(reaction, error)
        return reaction

    def client_stalled(self) -> Reaction:
        """It has kept its answer waiting for too long."""
        reaction = Reaction()
        if self.phase is not Phase.OVER:
            self._let_go(reaction)
        return reaction

    def go_on(self) -> Reaction:
        """Requests are held back no longer."""
        reaction = Reaction()
        if self._waiting is not None and self._waiting.is_whole:
            self._admit(reaction)
        return reaction

    def give_up_waiting(self) -> Reaction:
        """The request was held back for too long."""
        reaction = Reaction()
        if self._waiting is not None and self._waiting.is_whole:
            self._forget_waiting()
            message = "Sandbox still waits to hear what the agent has; no model request goes on before."
            self._refuse(reaction, Refused(503, "api_error", message))
            self._end_cycle(reaction)
        return reaction

    def abandon(self) -> None:
        """Both connections are gone: tell what was spent, if that was not told."""
        self._settle(is_given_up=True)
        self._forget_waiting()
        self.upstream_took()

    def upstream_took(self) -> None:
        """What was to be sent there is sent, or never will be."""
        self._admission.give_back(self._unsent_bytes)
        self._unsent_bytes = 0

    def upstream_sent(self, data: bytes) -> Reaction:
        """Bytes came from the upstream; none mean that no more will."""
        reaction = Reaction()
        if self._upstream_side is None:
            return reaction
        if self._exchange is None:
            self._drop_upstream(reaction)  # whatever comes unasked, the connection is of no more use
            return reaction
        try:
            self._upstream_side.receive_data(data)
            self._hear_upstream(reaction)
        except h11.RemoteProtocolError:
            self._break(reaction, 502, f"The model at {self._upstream.address} broke off its answer.")
        if not data:  # an answer may end with its connection
            self._drop_upstream(reaction)
        return reaction

    def upstream_failed(self, status: int, message: str) -> Reaction:
        """The upstream could not be reached (502), or not in time (504)."""
        reaction = Reaction()
        if self._exchange is None:
            self._drop_upstream(reaction)
        else:
            self._break(reaction, status, message)
        return reaction

    def upstream_fell_silent(self) -> Reaction:
        """The upstream did not answer, or go on with its answer, in time."""
        if self._exchange is not None:
            self._exchange.is_silent = True
        return self.upstream_failed(504, "The model did not answer in time.")

    # From inside.

    def _hear_client(self, reaction: Reaction) -> None:
        while not self._is_over:
            event: Any = self._client_side.next_event()
            if event in _WAITS:
                return
            if isinstance(event, h11.Request):
                self._begin(reaction, event)
            elif isinstance(event, h11.Data):
                self._pass_body(reaction, bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._end_body(reaction)

    def _begin(self, reaction: Reaction, request: h11.Request) -> None:
        self._body_bytes = 0
        verdict = self._policy.judge(request)
        if isinstance(verdict, Refused):
            self._refuse(reaction, verdict, request.method)
            return
        refused = None
        if self._admission.needs_body:
            self._waiting = _Waiting(request, verdict)
        elif (refused := self._admission.judge()) is None:
            self._forward(reaction, request, verdict)
        if refused is not None:
            self._refuse(reaction, refused, request.method)
        elif self._client_side.they_are_waiting_for_100_continue:
            self._to_client(reaction, h11.InformationalResponse(status_code=100, headers=[]))

    def _forward(
        self, reaction: Reaction, request: h11.Request, allowed: Allowed, admitted: Admitted | None = None
    ) -> None:
        asked, body = (admitted.asked, admitted.body) if admitted is not None else (None, None)
        self._exchange = Exchange(allowed.is_metered, KeyScreen(self._upstream.key), asked)
        if self._upstream_side is None:
            self._upstream_side = http.upstream_side()
            reaction.dial = True
        forwarded, dropped = http.forwarded_request(request, allowed.target, self._upstream, body)
        self._reports.headers_dropped(dropped)
        self._to_upstream(reaction, forwarded)

    def _admit(self, reaction: Reaction) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        self._unsent_bytes += len(waiting.body)
        verdict = self._admission.judge() or self._admission.judge_body(
            waiting.body, is_metered=waiting.allowed.is_metered
        )
        waiting.body.clear()
        if isinstance(verdict, Refused):
            self.upstream_took()
            self._refuse(reaction, verdict)
            if not self._is_over:
                self._end_cycle(reaction)
            return
        self._forward(reaction, waiting.request, waiting.allowed, verdict)
        self._to_upstream(reaction, h11.Data(data=verdict.body))
        self._to_upstream(reaction, h11.EndOfMessage())

    def _forget_waiting(self) -> _Waiting | None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._admission.give_back(len(waiting.body))
        return waiting

    def _keep_body(self, reaction: Reaction, waiting: _Waiting, data: bytes) -> None:
        refused = self._admission.keep(len(data))
        if refused is None:
            waiting.body += data
        else:
            self._forget_waiting()
            self._refuse(reaction, refused)
            self._end(reaction)

    def _pass_body(self, reaction: Reaction, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > REQUEST_BODY_BYTES_MAX:
            if self._waiting is not None or (self._exchange is not None and not self._exchange.is_answered):
                self._refuse(reaction, too_large())
            self._end(reaction)
        elif self._waiting is not None:
            self._keep_body(reaction, self._waiting, data)
        elif self._exchange is not None:
            self._to_upstream(reaction, h11.Data(data=data))

    def _end_body(self, reaction: Reaction) -> None:
        if self._waiting is not None:
            self._waiting.is_whole = True
            if not self._admission.is_holding:
                self._admit(reaction)
        elif self._exchange is not None:
            self._to_upstream(reaction, h11.EndOfMessage())
        else:
            # It was answered before its body had ended, so whatever follows may well be meant for after the answer.
            self._end_cycle(reaction, is_followed=True)

    def _refuse(self, reaction: Reaction, refused: Refused, method: bytes = b"") -> None:
        """Answer now; what is left of the request is read and thrown away, so that the answer arrives."""
        self._reports.denied("model", self._port, refused.message)
        # What does not look like Claude Code's HTTP is not read any further than it must be.
        is_last = refused.status in (400, 413)
        answer = http.api_error(refused.status, refused.kind, refused.message, is_last=is_last)
        reaction.to_client += answer.send(self._client_side, method)
        self._has_answered = True
        if is_last:
            self._end(reaction)

    def _refuse_malformed(self, reaction: Reaction, error: h11.RemoteProtocolError) -> None:
        message = "The request is not valid HTTP/1.1."
        self._reports.denied("model", self._port, message)
        if not self.must_be_heard and self._client_side.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = http.api_error(error.error_status_hint, "invalid_request_error", message, is_last=True)
            reaction.to_client += answer.send(self._client_side)
        self._let_go(reaction)

    def _is_flooded(self, data: bytes) -> bool:
        return len(self._client_side.trailing_data[0]) + len(data) > PIPELINED_BYTES_MAX

    # From the upstream.

    def _hear_upstream(self, reaction: Reaction) -> None:
        while self._exchange is not None and self._upstream_side is not None:
            event: Any = self._upstream_side.next_event()
            if event in _WAITS:
                return
            if isinstance(event, h11.Response):
                self._begin_answer(reaction, self._exchange, event)
            elif isinstance(event, h11.Data):
                self._to_client(reaction, h11.Data(data=self._exchange.screen.feed(bytes(event.data))))
                if self._exchange.meter is not None:
                    self._exchange.meter.feed(bytes(event.data))
                    self._admission.watch(self, self._exchange.meter)
            elif isinstance(event, h11.EndOfMessage):
                self._to_client(reaction, h11.Data(data=self._exchange.screen.end()))
                self._end_answer(reaction)

    def _begin_answer(self, reaction: Reaction, exchange: Exchange, response: h11.Response) -> None:
        if 300 <= response.status_code < 400:
            address = self._upstream.address
            self._break(reaction, 502, f"The model at {address} redirects elsewhere; set ANTHROPIC_BASE_URL to there.")
            return
        refused = self._admission.hear(response.status_code, self._upstream.address)
        if refused is not None:
            self._answer_instead(reaction, refused)
            return
        exchange.is_answered = True
        if exchange.is_metered and response.status_code < 300:
            exchange.meter = meter_for(http.header(response.headers, b"content-type"))
        self._to_client(reaction, http.forwarded_response(response, exchange.screen))

    def _end_answer(self, reaction: Reaction) -> None:
        self._to_client(reaction, h11.EndOfMessage())
        self._settle(is_whole=True)
        self._has_answered = True
        side = self._upstream_side
        if side is not None and side.our_state is h11.DONE and side.their_state is h11.DONE:
            side.start_next_cycle()
        else:
            self._drop_upstream(reaction)
        if self._client_is_gone:
            self._end(reaction)
        elif self._client_side.their_state is not h11.SEND_BODY:
            self._end_cycle(reaction)

    def _break(self, reaction: Reaction, status: int, message: str) -> None:
        """The upstream failed: an error if the answer has not begun, else an end that the client sees as a break."""
        self._reports.trouble("upstream_unreachable", message)
        if self._exchange is not None and self._exchange.is_answered:
            self._end(reaction)
        else:
            self._answer_instead(reaction, Refused(status, "timeout_error" if status == 504 else "api_error", message))

    def _answer_instead(self, reaction: Reaction, told: Refused) -> None:
        """The upstream's answer has not begun for the client, and never will."""
        if self._client_is_gone:
            self._end(reaction)
            return
        self._settle()
        self._drop_upstream(reaction)
        reaction.to_client += http.api_error(told.status, told.kind, told.message).send(self._client_side)
        self._has_answered = True
        if self._client_side.their_state is not h11.SEND_BODY:
            self._end_cycle(reaction)

    # Both.

    def _to_client(self, reaction: Reaction, event: Any) -> None:
        if not self._client_is_gone:
            reaction.to_client += self._client_side.send(event) or b""

    def _to_upstream(self, reaction: Reaction, event: Any) -> None:
        if self._upstream_side is not None:
            reaction.to_upstream += self._upstream_side.send(event) or b""

    def _settle(self, *, is_whole: bool = False, is_given_up: bool = False) -> None:
        """Tell what the exchange has spent; it is over."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            usage = exchange.tell(self._reports, is_whole=is_whole, is_given_up=is_given_up)
            self._admission.settle(self, usage)

    def _end_cycle(self, reaction: Reaction, *, is_followed: bool = False) -> None:
        """The request is read and answered: be ready for the next one, which is there if `is_followed`, or end."""
        side = self._client_side
        is_done = side.our_state is h11.DONE and side.their_state is h11.DONE
        if not is_done or (side.trailing_data[0] and not is_followed):
            self._end(reaction)
        else:
            side.start_next_cycle()

    def _drop_upstream(self, reaction: Reaction) -> None:
        self.upstream_took()
        if self._upstream_side is None:
            return
        self._upstream_side = None
        reaction.to_upstream.clear()
        if reaction.dial:
            reaction.dial = False
        else:
            reaction.hang_up_upstream = True

    def _let_go(self, reaction: Reaction) -> None:
        """The client has gone, or might as well have. What may not go uncounted is heard to its end all the same."""
        if self.must_be_heard:
            self._client_is_gone = True
            reaction.hang_up_client = True
        else:
            self._end(reaction)

    def _end(self, reaction: Reaction) -> None:
        self._forget_waiting()
        self._settle()
        self._drop_upstream(reaction)
        self._is_over = True
        reaction.hang_up_client = True
