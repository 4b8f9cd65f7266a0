"""The gateway's bounds: each one's number, its unit and what happens at it."""

HEAD_BYTES_MAX = 32 * 1024
"""Request line and headers; over it: 431 and the connection ends."""

REQUEST_BODY_BYTES_MAX = 32 * 1024 * 1024
"""A request's body, the Messages API's own limit; over it: 413 and the connection ends."""

PIPELINED_BYTES_MAX = 64 * 1024
"""What a client may send while it still waits for an answer; over it the connection ends."""

UPSTREAM_RECEIVE_BYTES_MAX = 1024 * 1024
"""The receive buffer of one connection to a host or to the model; the kernel uses as much again for itself."""

UNSENT_BYTES_MAX = 128 * 1024
"""Unsent bytes in the kernel for any connection; the gateway stops reading from the other side when more wait."""

WIDE_CONNECTIONS_MAX = 16
"""Connections to hosts, as many to the model and as many from inside that have buffers of full size at once."""

NARROW_BUFFER_BYTES = 128 * 1024
"""The receive and the send buffer of a further connection; the kernel uses as much again for itself."""

CONNECTIONS_MAX = 128
"""Open connections to the model's listener, as many to hosts and as many for names; further ones wait."""

HOST_CONNECTIONS_AT_ONCE = 1024
"""New connections to hosts that do not wait. Each that is closed takes a port of the machine for a minute."""

HOST_CONNECTIONS_PER_SECOND = 10
"""New connections to hosts after those; further ones wait."""

MODEL_CONNECTIONS_AT_ONCE = 256
"""New connections to the model's address that do not wait. All tasks share its ports."""

MODEL_CONNECTIONS_PER_SECOND = 4
"""New connections to the model's address after those; further ones wait."""

NEW_MODEL_DEBT_SECONDS = 1.0
"""CPU seconds of debt up to which new connections to the model are served: other traffic waits meanwhile."""

MODEL_DEBT_SECONDS = 3.0
"""The same for connections whose last request was forwarded."""

MODEL_PRIORITY_CPU_SECONDS = 0.02
"""A connection to the model that has used so much without a request that was forwarded waits with other traffic."""

HEAD_SECONDS = 10.0
"""From the first byte of a request (or the connection's start) to the end of its head; over it the connection ends."""

BODY_SECONDS = 60.0
"""Between two pieces of a request's body; over it the connection ends."""

KEEP_ALIVE_SECONDS = 300.0
"""Between an answer and the next request; over it the connection ends."""

RESPONSE_SECONDS = 900.0
"""Without anything moving to the client while it waits for its answer; over it the connection ends."""

CLIENT_STALL_SECONDS = 60.0
"""A client may keep an answer under a budget waiting so long in all; then the answer is heard to its end without it."""

LINGER_SECONDS = 1.0
"""Between our end of a connection and the client's own, so that the last answer is not lost; then it is cut."""

CONNECT_SECONDS = 10.0
"""To reach the upstream, names and TLS included; over it: 504."""

UPSTREAM_SECONDS = 600.0
"""Between two signs of life of an upstream that owes an answer; over it: 504, or a broken answer."""

UPSTREAM_IDLE_SECONDS = 30.0
"""An unused connection to the upstream is kept this long for the next request of the same client."""

HOLD_SECONDS = 120.0
"""A model request waits so long for the agent to be judged; over it: 503. Silence counts as a hang meanwhile."""

REQUEST_JSON_VALUES_MAX = 500_000
"""Commas, colons and brackets in a model request that is read, so that reading takes little memory; over it: 413."""

MODEL_STRING_CHARACTERS_MAX = 256
"""A model's name, and the type of a tool or a source, in a request that is read; a longer one is refused, not told."""

BUFFERED_BYTES_MAX = 64 * 1024 * 1024
"""Bodies of all model requests that wait to be judged or for the model to take them, together; over it: 429."""

SSE_LINE_BYTES_MAX = 1024 * 1024
"""A line of an event stream that is looked at for usage; longer ones pass unread."""

JSON_BODY_BYTES_MAX = 4 * 1024 * 1024
"""An answer without streaming that is looked at for usage; longer ones pass unread."""

INPUT_TOKENS_MAX = 1_000_000
"""What a request counts as, whose answer broke before it told that; no model takes more."""

OUTPUT_TOKENS_MAX = 1_000_000
"""What an answer counts as that broke, where its request does not say how long it may be; no model says more."""

CLIENT_HELLO_BYTES_MAX = 8 * 1024
"""Bytes waited for to learn the name in a TLS ClientHello; a longer one is refused."""

UNKNOWN_PROTOCOL_BYTES_MAX = 16 * 1024
"""Bytes of a protocol that is neither TLS nor HTTP in which the two are looked for; what follows passes unread."""

PARTIAL_HELLOS_MAX = 16
"""Beginnings of a TLS ClientHello in such a protocol that may be unfinished at once; over it the connection ends."""

TUNNEL_IDLE_SECONDS = 300.0
"""Without a byte either way between the sandbox and a host; over it the connection ends."""

HALF_OPEN_SECONDS = 60.0
"""Without a byte between the sandbox and a host of which one has ended its side; over it the connection ends."""

LOOKUP_SECONDS = 5.0
"""To resolve the name of a host; over it: 504."""

LOOKUPS_MAX = 8
"""Names that are resolved at once; further ones wait within their time."""

ADDRESSES_MAX = 4
"""Addresses of one host that are tried, in the time of CONNECT_SECONDS together."""

MODEL_LOOKUP_SECONDS = 30.0
"""The model's addresses, which no other host may have, are looked up again after so long."""

SYNTHETIC_IPS_MAX = 4096
"""Names of one sandbox that addresses stand for; further ones do not resolve."""

DNS_DATAGRAM_BYTES_MAX = 2048
"""A name query over UDP; the rest of a longer one is cut off."""

DENIALS_REPORTED_MAX = 100_000
"""Refusals of an attempt that are told one by one; further ones are counted, which is told once."""

DENIALS_PER_SECOND_MAX = 20
"""Refusals reported one by one; the rest is counted in one report."""

DROPPED_HEADERS_REPORTED_MAX = 20
"""Names of headers that are reported as not forwarded to the model; further ones are only counted."""

TROUBLE_INTERVAL_SECONDS = 10.0
"""Least time between two reports of the same trouble."""

REPORTED_HOST_CHARACTERS_MAX = 255
"""A host's name in a report; longer ones are cut, once no secret is in them any more."""

REDACTED_NAME_CHARACTERS_MAX = 4096
"""A name from inside in which secrets are looked for; a longer one is not told, since a cut might leave part of one."""
