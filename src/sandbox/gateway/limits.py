"""The gateway's limits, each with the effect of exceeding it."""

HEAD_BYTES_MAX = 32 * 1024
"""Maximum size of the request line and headers; above it: 431 (400 for other hosts), and the connection ends."""

REQUEST_BODY_BYTES_MAX = 32 * 1024 * 1024
"""Maximum size of a request body, equal to the Messages API's limit; above it: 413, and the connection ends."""

REQUEST_JSON_VALUES_MAX = 500_000
"""Maximum number of commas, colons and opening brackets in a decoded request body; above it: 413. This limits the
memory that decoding needs."""

LONG_INTEGER_DIGITS = 300
"""Minimum number of digits of a long integer in a request body. Converting a long integer takes quadratic time."""

LONG_INTEGERS_MAX = 100
"""Maximum number of long integers in a decoded request body; above it: 413."""

INTERIM_RESPONSES_MAX = 100
"""Maximum number of interim responses (1xx) to a model request. More of them end the request."""

ERROR_BODY_BYTES_MAX = 8 * 1024
"""Maximum size of a response that rejects the server's key; a larger one is reported without its message."""

QUOTE_CHARACTERS_MAX = 300
"""Maximum length of an upstream's message in a report; longer ones are truncated."""

PIPELINED_BYTES_MAX = 64 * 1024
"""Maximum number of bytes that a client may send while waiting for a response; above it, the connection ends."""

OUTBOUND_RECEIVE_BUFFER_BYTES = 1024 * 1024
"""Receive buffer size of one connection to a host or to the model; the kernel allocates the same amount for itself."""

UNSENT_BYTES_MAX = 128 * 1024
"""Maximum number of unsent bytes in the kernel per connection; above it, the gateway stops reading the other side."""

FULL_SIZE_BUFFER_CONNECTIONS_MAX = 16
"""Maximum number of connections with full-size buffers, counted separately for hosts, the model and the sandbox."""

REDUCED_BUFFER_BYTES = 128 * 1024
"""Receive and send buffer size of each connection above FULL_SIZE_BUFFER_CONNECTIONS_MAX; the kernel allocates as much
again for itself."""

CONNECTIONS_MAX = 128
"""Maximum number of open connections, separately for the model listener, hosts and DNS; additional ones wait."""

EGRESS_CONNECTIONS_BURST = 1024
"""Maximum burst of lookups of host names and new connections to hosts. Each connection occupies a local port for a
minute after it is closed."""

EGRESS_CONNECTIONS_PER_SECOND = 10
"""Rate of lookups of host names and new connections to hosts after the burst; additional ones wait."""

MODEL_CONNECTIONS_BURST = 256
"""Maximum burst of new connections to the model's address. All tasks share the local ports for this address."""

MODEL_CONNECTIONS_PER_SECOND = 4
"""Rate of new connections to the model's address after the burst; additional ones wait."""

NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX = 1.0
"""Maximum debt of the CPU budget, in seconds, at which new model connections are served.

Other traffic waits until there is no debt.
"""

MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX = 3.0
"""Maximum debt of the CPU budget, in seconds, at which a model connection is served after a forwarded request."""

WORK_SECONDS_WITHOUT_PAUSE = 0.05
"""Maximum duration of a piece of work after which the next piece starts at once. A longer one is followed by a pause of
the same duration, in which the runner does its other work."""

MODEL_PRIORITY_CPU_SECONDS_MAX = 0.02
"""Maximum CPU time of a model connection without a forwarded request; above it, the connection loses its priority."""

HEAD_TIMEOUT_SECONDS = 10.0
"""Maximum time from a request's first byte, or the connection's start, to the end of the request head.

Above it, the connection ends.
"""

BODY_TIMEOUT_SECONDS = 60.0
"""Maximum time between two reads of a request body; above it, the connection ends."""

KEEP_ALIVE_TIMEOUT_SECONDS = 300.0
"""Maximum time between a response and the next request; above it, the connection ends."""

RESPONSE_TIMEOUT_SECONDS = 900.0
"""Maximum time for which a client waiting for its response gets no data; above it, the connection ends."""

CLIENT_STALL_TIMEOUT_SECONDS = 60.0
"""Maximum total time that a client may stall a response if its task has a budget.

After that, the gateway reads the rest of the response without forwarding it.
"""

LINGER_TIMEOUT_SECONDS = 1.0
"""Maximum time to wait for the client's EOF after the last response; above it, the connection is aborted."""

CONNECT_TIMEOUT_SECONDS = 10.0
"""Time limit for connecting to the model, with DNS and TLS (above it: 504), or to a resolved host (above it: 502)."""

UPSTREAM_TIMEOUT_SECONDS = 600.0
"""Maximum time between two reads of an incomplete upstream response; above it: 504, or a truncated response."""

UPSTREAM_IDLE_TIMEOUT_SECONDS = 30.0
"""How long an idle upstream connection is kept open for the same client's next request."""

HOLD_TIMEOUT_SECONDS = 120.0
"""Maximum time that a model request waits for the `AgentReady` check, or for a valid lease; above it: 503.

The hang timeout keeps running during the check.
"""

BUFFERED_BYTES_MAX = 64 * 1024 * 1024
"""Maximum total size of model request bodies waiting for a decision or for the upstream; above it: 429."""

IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK = 16
"""Number of model requests in flight that a budget never limits. An agent sends about ten at the same time.

Above this number, a request is rejected (429) if it and the requests in flight might spend the rest of the budget.
"""

CLIENT_HELLO_BYTES_MAX = 8 * 1024
"""Maximum size of a TLS ClientHello; a longer one is denied."""

UNKNOWN_PROTOCOL_BYTES_MAX = 16 * 1024
"""Number of bytes of other protocols that are searched for TLS and HTTP; the rest is forwarded without inspection."""

PARTIAL_HELLOS_MAX = 16
"""Maximum number of simultaneous incomplete ClientHello candidates in a connection; above it, the connection ends."""

TUNNEL_IDLE_TIMEOUT_SECONDS = 300.0
"""Maximum time without data in either direction between the sandbox and a host; above it, the connection ends."""

HALF_CLOSED_TIMEOUT_SECONDS = 60.0
"""Maximum time without data on a half-closed connection to a host; above it, the connection ends."""

LOOKUP_TIMEOUT_SECONDS = 5.0
"""Time limit for resolving the name of a host; above it: 504."""

CONCURRENT_LOOKUPS_MAX = 8
"""Maximum number of concurrent name lookups; additional ones wait. LOOKUP_TIMEOUT_SECONDS includes this wait."""

RESOLVED_ADDRESSES_MAX = 64
"""Maximum number of addresses of one host that are checked; the system's order decides which ones."""

TRIED_ADDRESSES_MAX = 4
"""Maximum number of addresses of one host that are tried, within CONNECT_TIMEOUT_SECONDS in total."""

MODEL_LOOKUP_INTERVAL_SECONDS = 30.0
"""Minimum interval between lookups of the model's host name. Other hosts with its addresses are denied."""

SYNTHETIC_IPS_MAX = 4096
"""Maximum number of names with a synthetic address per sandbox; additional names do not resolve."""

DNS_DATAGRAM_BYTES_MAX = 2048
"""Maximum size of a DNS query over UDP; longer queries are truncated."""

DENIALS_REPORTED_MAX = 100_000
"""Maximum number of an attempt's denials that are reported individually.

Additional denials are only counted; one error report announces this.
"""

REPORTED_DENIALS_PER_SECOND_MAX = 20
"""Maximum number of denials per second that are reported individually; one report contains the number of the others."""

DROPPED_HEADERS_REPORTED_MAX = 20
"""Maximum number of dropped header names that are reported per attempt; additional ones are only counted."""

ERROR_REPORT_INTERVAL_SECONDS = 10.0
"""Minimum time between two reports of the same error."""

REPORTED_HOST_CHARACTERS_MAX = 255
"""Maximum length of a host name in a report; longer ones are truncated after redaction."""

REDACTED_NAME_CHARACTERS_MAX = 4096
"""Maximum length of a name to redact. A longer one is not reported, because truncation might leave part of a secret."""
