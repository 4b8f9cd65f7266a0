"""Limits of the gateway: each with its unit and what happens when it is exceeded."""

HEAD_BYTES_MAX = 32 * 1024
"""Request line and headers; above it: 431 and the connection ends."""

REQUEST_BODY_BYTES_MAX = 32 * 1024 * 1024
"""Request body, equal to the Messages API's limit; above it: 413 and the connection ends."""

PIPELINED_BYTES_MAX = 64 * 1024
"""Bytes that a client may send while it waits for a response; above it the connection ends."""

UPSTREAM_RECEIVE_BYTES_MAX = 1024 * 1024
"""Receive buffer of one connection to a host or to the model; the kernel allocates the same amount for itself."""

UNSENT_BYTES_MAX = 128 * 1024
"""Unsent bytes in the kernel per connection; above it the gateway stops reading from the other side."""

FULL_BUFFER_CONNECTIONS_MAX = 16
"""Connections with full-size buffers at once, counted separately for hosts, the model and the sandbox."""

REDUCED_BUFFER_BYTES = 128 * 1024
"""Receive and send buffer of each additional connection; the kernel allocates the same amount for itself."""

CONNECTIONS_MAX = 128
"""Open connections, counted separately for the model listener, hosts and DNS; additional ones wait."""

HOST_CONNECTIONS_AT_ONCE = 1024
"""Maximum burst of new connections to hosts. Each occupies a local port for a minute after it is closed."""

HOST_CONNECTIONS_PER_SECOND = 10
"""Rate of new connections to hosts after that burst; additional ones wait."""

MODEL_CONNECTIONS_AT_ONCE = 256
"""Maximum burst of new connections to the model's address. All tasks share the local ports for this address."""

MODEL_CONNECTIONS_PER_SECOND = 4
"""Rate of new connections to the model's address after that burst; additional ones wait."""

NEW_MODEL_DEBT_SECONDS = 1.0
"""CPU debt in seconds up to which new model connections are served; other traffic waits until the debt is paid."""

MODEL_DEBT_SECONDS = 3.0
"""CPU debt in seconds for model connections whose last request was forwarded."""

MODEL_PRIORITY_CPU_SECONDS = 0.02
"""CPU time of a model connection without a forwarded request; above it the connection waits with other traffic."""

HEAD_SECONDS = 10.0
"""Time from a request's first byte (or the connection's start) to the end of its head; above it the connection ends."""

BODY_SECONDS = 60.0
"""Time between two reads of a request body; above it the connection ends."""

KEEP_ALIVE_SECONDS = 300.0
"""Time between a response and the next request; above it the connection ends."""

RESPONSE_SECONDS = 900.0
"""Time without data sent to a client that waits for its response; above it the connection ends."""

CLIENT_STALL_SECONDS = 60.0
"""Total time a client may stall a budgeted response; after that the response is read to its end without the client."""

LINGER_SECONDS = 1.0
"""Time between the gateway's EOF and the client's, to deliver the last response; then the connection is aborted."""

CONNECT_SECONDS = 10.0
"""Time to reach the upstream, including DNS and TLS; above it: 504."""

UPSTREAM_SECONDS = 600.0
"""Time between two reads from an upstream whose response is incomplete; above it: 504, or a truncated response."""

UPSTREAM_IDLE_SECONDS = 30.0
"""How long an idle upstream connection is kept for the same client's next request."""

HOLD_SECONDS = 120.0
"""How long a model request waits for the check of `AgentReady`; above it: 503. The hang timeout keeps running."""

BUFFERED_BYTES_MAX = 64 * 1024 * 1024
"""Total size of all model request bodies that wait for a decision or for the upstream; above it: 429."""

CLIENT_HELLO_BYTES_MAX = 8 * 1024
"""Bytes to wait for until the server name of a TLS ClientHello is known; a longer hello is denied."""

UNKNOWN_PROTOCOL_BYTES_MAX = 16 * 1024
"""Bytes of a protocol other than TLS and HTTP that are searched for both; the rest passes unread."""

PARTIAL_HELLOS_MAX = 16
"""Incomplete ClientHello candidates at once in a protocol other than TLS and HTTP; above it the connection ends."""

TUNNEL_IDLE_SECONDS = 300.0
"""Time without data in either direction between the sandbox and a host; above it the connection ends."""

HALF_CLOSED_SECONDS = 60.0
"""Time without data on a half-closed connection between the sandbox and a host; above it the connection ends."""

LOOKUP_SECONDS = 5.0
"""Time to resolve the name of a host; above it: 504."""

LOOKUPS_MAX = 8
"""Concurrent name lookups; additional ones wait within LOOKUP_SECONDS."""

ADDRESSES_MAX = 4
"""Addresses of one host that are tried, within CONNECT_SECONDS in total."""

MODEL_LOOKUP_SECONDS = 30.0
"""How often the model's addresses, which no other host may have, are looked up again."""

SYNTHETIC_IPS_MAX = 4096
"""Names with a synthetic address per sandbox; additional names do not resolve."""

DNS_DATAGRAM_BYTES_MAX = 2048
"""Maximum size of a DNS query over UDP; longer queries are truncated."""

DENIALS_REPORTED_MAX = 100_000
"""Denials of an attempt that are reported individually; additional ones are only counted, and one report says so."""

DENIALS_PER_SECOND_MAX = 20
"""Denials per second that are reported individually; one report contains the number of the others."""

DROPPED_HEADERS_REPORTED_MAX = 20
"""Dropped header names that are reported per attempt; additional ones are only counted."""

ERROR_REPORT_INTERVAL_SECONDS = 10.0
"""Minimum time between two reports of the same error."""

REPORTED_HOST_CHARACTERS_MAX = 255
"""Maximum length of a host name in a report; longer ones are truncated after redaction."""

REDACTED_NAME_CHARACTERS_MAX = 4096
"""Maximum length of a name to redact. A longer one is not reported, because truncation might leave part of a secret."""
