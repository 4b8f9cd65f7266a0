"""A task with `network_mode: outbound` reaches the hosts that it lists, by any program, and nothing else.

Server and internet live in two namespaces of the test's own. The host that is allowed has an address there which is
global by its number: no other would be dialled.
"""

import hashlib
import json

import pytest

from doubles.closed_internet import INTERNET_ADDRESS, METADATA_ADDRESS, PRIVATE_ADDRESS
from doubles.live import make_repository, python, says
from doubles.played_internet import make_certificate, played_internet, start_host

HOST, OTHER = "files.example.org", "other.example"
HOST_ADDRESS, SERVERS_OWN_ADDRESS = "8.8.4.4", "8.8.4.5"
NAMES = {
    HOST: HOST_ADDRESS,
    OTHER: HOST_ADDRESS,
    "inside.example": PRIVATE_ADDRESS,
    "metadata.example": METADATA_ADDRESS,
    "own.example": SERVERS_OWN_ADDRESS,
}
ALLOWED = [HOST, "inside.example", "metadata.example", "own.example", "nowhere.example"]
BIG = b"0123456789abcdef" * 65_536

PROBE = r"""
import json, os, socket, ssl, subprocess, urllib.request

CA = "/workspace/ca.pem"
told = {}

def attempt(name, call):
    try:
        told[name] = call()
    except BaseException as error:
        told[name] = f"{type(error).__name__}: {error}"

def run(*argv, **environment):
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=30, env={**os.environ, **environment})
    return ran.stdout or f"exit {ran.returncode}: {ran.stderr.strip()}"

def curl(*arguments):
    return run("curl", "-sS", "-m", "15", "--cacert", CA, *arguments)

def direct(*arguments):
    return curl("--noproxy", "*", *arguments)

def python_direct(url):
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=CA)))
    return opener.open(url, timeout=15).read().decode()

def python_by_proxy(url):
    return urllib.request.urlopen(url, timeout=15, context=ssl.create_default_context(cafile=CA)).read().decode()

def node(url):
    script = f"fetch({url!r}).then(a => a.text()).then(t => console.log(t), e => console.log('failed', e.cause.code))"
    return run("node", "-e", script, NODE_EXTRA_CA_CERTS=CA)

def tunnel(server_name):
    with socket.create_connection(("127.0.0.1", 3128), 15) as plain:
        plain.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n".encode())
        assert b" 200 " in plain.recv(1000)
        context = ssl.create_default_context(cafile=CA)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(plain, server_hostname=server_name) as secure:
            secure.sendall(f"GET /tunnel HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
            return secure.recv(1000).decode().splitlines()[0]

def two_requests_at_once():
    with socket.create_connection((HOST, 80), 15) as plain:
        ask = "GET /{} HTTP/1.1\r\nHost: {}\r\n\r\n"
        plain.sendall((ask.format("first", HOST) + ask.format("smuggled", "other.example")).encode())
        received = b""
        while data := plain.recv(1000):
            received += data
    return received.decode()

def big():
    with open("/tmp/big", "wb") as file:
        file.write(b"0123456789abcdef" * 65536)
    return direct("--data-binary", "@/tmp/big", f"https://{HOST}/big")

attempt("curl https by proxy", lambda: curl(f"https://{HOST}/a"))
attempt("curl http by proxy", lambda: curl(f"http://{HOST}/a"))
attempt("curl https direct", lambda: direct(f"https://{HOST}/a"))
attempt("curl http direct", lambda: direct(f"http://{HOST}/a"))
attempt("python https by proxy", lambda: python_by_proxy(f"https://{HOST}/a"))
attempt("python http by proxy", lambda: python_by_proxy(f"http://{HOST}/a"))
attempt("python https direct", lambda: python_direct(f"https://{HOST}/a"))
attempt("python http direct", lambda: python_direct(f"http://{HOST}/a"))
attempt("node https direct", lambda: node(f"https://{HOST}/a"))
attempt("node http direct", lambda: node(f"http://{HOST}/a"))
attempt("big", big)
attempt("first of two", two_requests_at_once)
attempt("right name in tunnel", lambda: tunnel(HOST))
attempt("address", lambda: socket.gethostbyname(HOST))

attempt("no other host by proxy", lambda: curl("https://other.example/x"))
attempt("no other host over http", lambda: curl("http://other.example/x"))
attempt("no other host direct", lambda: direct("https://other.example/x"))
attempt("no other name", lambda: socket.gethostbyname("other.example"))
attempt("no other port by proxy", lambda: curl(f"https://{HOST}:8443/x"))
attempt("no other port direct", lambda: direct(f"https://{HOST}:8443/x"))
attempt("no address by proxy", lambda: curl("-k", "https://8.8.4.4/x"))
attempt("no address direct", lambda: direct("-k", "https://8.8.4.4/x"))
attempt("no unknown address", lambda: direct("-H", f"Host: {HOST}", "http://198.18.77.7/x"))
attempt("no other server name", lambda: direct("-k", "--connect-to", f"other.example:443:{HOST}:443", "https://other.example/x"))
attempt("no other server name in tunnel", lambda: tunnel("other.example"))
attempt("no other Host", lambda: direct("-H", "Host: other.example", f"http://{HOST}/x"))
attempt("no other Host by proxy", lambda: curl("-H", "Host: other.example", f"http://{HOST}/x"))
attempt("no private address", lambda: curl("http://inside.example/x"))
attempt("no metadata", lambda: direct("http://metadata.example/x"))
attempt("nothing of the host's own", lambda: curl("http://own.example/x"))
attempt("nowhere", lambda: curl("http://nowhere.example/x"))
print(json.dumps(told))
"""

LET_THROUGH = [
    f"{program} {way}"
    for program, ways in {
        "curl": ("https by proxy", "http by proxy", "https direct", "http direct"),
        "python": ("https by proxy", "http by proxy", "https direct", "http direct"),
        "node": ("https direct", "http direct"),
    }.items()
    for way in ways
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What an agent saw that tried everything, what the host saw, what was on the wire and what was told."""
    directory = tmp_path_factory.mktemp("egress")
    with played_internet(directory, NAMES, addresses=[HOST_ADDRESS], own_addresses=[SERVERS_OWN_ADDRESS]) as (
        world,
        internet,
    ):
        yield play(world, internet, directory)


def play(world, internet, directory):
    certificate, record = directory / "host.pem", directory / "host.ndjson"
    public = make_certificate(certificate, HOST)
    make_repository(world.repositories / "repo.git", {"README.md": "# Hi\n", "ca.pem": public})
    world.start_git(prefix=internet.internet_prefix)
    world.start_model(python(f"HOST = {HOST!r}\n{PROBE}"), says(), prefix=internet.internet_prefix)
    start_host(world, internet, HOST_ADDRESS, certificate, record)
    reachable = internet.reach(HOST_ADDRESS, 443)
    world.start_server()
    before = len(internet.packets)
    world.submit(vm={"network_mode": "outbound", "allowed_hosts": ALLOWED})
    status = world.wait(seconds=120)
    assert status["state"] == "completed", world.tell()
    answer = world.tool_results()[0]
    assert answer.startswith("{"), answer
    events = [json.loads(line.partition("[EVENT] ")[2]) for line in world.logs(stream="events").splitlines()]
    ports = {int(process.said["url"].rpartition(":")[2]) for process in world.processes if "url" in process.said}
    return {
        "told": json.loads(answer),
        "asked": [json.loads(line) for line in record.read_text().splitlines()],
        "denied": {(one["host"], one["port"]) for one in events if one["type"] == "egress_denied"},
        "reasons": [one["reason"] for one in events if one["type"] == "egress_denied"],
        "troubles": [one for one in events if one["type"] == "error"],
        "reachable": reachable,
        "sent": set(internet.packets[before:]),
        "services": {("tcp", INTERNET_ADDRESS, port) for port in ports},
    }


@pytest.mark.parametrize("name", LET_THROUGH)
def test_an_allowed_host_answers_every_program_whether_it_knows_of_the_proxy_or_not(outcome, name):
    assert '"path": "/a"' in outcome["told"][name], outcome["told"][name]


def test_what_is_sent_arrives_byte_for_byte(outcome):
    assert json.loads(outcome["told"]["big"])["sha256"] == hashlib.sha256(BIG).hexdigest()


def test_the_name_of_an_allowed_host_stands_for_an_address_inside_only(outcome):
    assert outcome["told"]["address"].startswith("198.18.")


def test_a_tunnel_works_for_the_host_it_was_asked_for(outcome):
    assert outcome["told"]["right name in tunnel"] == "HTTP/1.1 200 OK"


def test_nothing_else_answers(outcome):
    refused = {
        name: answer for name, answer in outcome["told"].items() if name.startswith(("no ", "nothing ", "nowhere"))
    }
    assert len(refused) == 17
    for name, answer in refused.items():
        assert '"path"' not in answer, (name, answer)
        told_so = answer.startswith(("exit ", "gaierror", "Sandbox refused ", "nowhere.example does not resolve"))
        assert told_so or "Error" in answer, (name, answer)


def test_a_second_request_behind_the_first_goes_nowhere(outcome):
    assert outcome["told"]["first of two"].count("HTTP/1.1 200 OK") == 1
    assert '"path": "/first"' in outcome["told"]["first of two"]


def test_the_host_was_asked_for_nothing_that_was_refused(outcome):
    lines = [line for _, line, _ in outcome["asked"]]
    assert any("/a " in line for line in lines)
    assert not any("/x " in line or "/smuggled" in line for line in lines)
    assert {host.removesuffix(":80").removesuffix(":443") for _, _, host in outcome["asked"]} == {HOST}


@pytest.mark.parametrize(
    "denied",
    [
        (OTHER, 443),
        (OTHER, 80),
        (OTHER, 53),
        (HOST, 8443),
        (HOST_ADDRESS, 443),
        (HOST, 80),
        ("inside.example", 80),
        ("metadata.example", 80),
        ("own.example", 80),
    ],
)
def test_each_refusal_is_told(outcome, denied):
    assert denied in outcome["denied"]


@pytest.mark.parametrize(
    ("reason", "times"),
    [
        ("its TLS asks for another server", 2),
        ("Host header asks for another", 2),
        ("is no address that its name resolved to", 1),
        ("resolves to no public address", 3),
    ],
)
def test_each_refusal_says_why(outcome, reason, times):
    assert sum(reason in told for told in outcome["reasons"]) == times, outcome["reasons"]


def test_a_host_that_does_not_resolve_is_told_as_trouble(outcome):
    assert [one["error"] for one in outcome["troubles"]] == ["host_unreachable"]


def test_nothing_else_was_on_the_wire(outcome):
    assert outcome["reachable"]
    to_host = {("tcp", HOST_ADDRESS, 80), ("tcp", HOST_ADDRESS, 443)}
    assert to_host <= outcome["sent"]
    assert outcome["sent"] <= outcome["services"] | to_host
