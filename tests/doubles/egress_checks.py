"""The first part of a script that the agent runs: functions for network access with and without the proxy."""

ACCESS_CHECK_FUNCTIONS = r"""
import json, os, socket, ssl, subprocess, time

CA = "/workspace/ca.pem"
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
DIRECT = {name: value for name, value in os.environ.items() if name not in PROXIES}
results = {}

def attempt(name, call, *arguments):
    if name.startswith("no:"):
        time.sleep(0.06)  # faster denials are counted, but not reported individually
    try:
        results[name] = call(*arguments)
    except BaseException as error:
        results[name] = f"{type(error).__name__}: {error}"

def run(*argv, environment=os.environ, **more):
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=30, env={**environment, **more})
    return ran.stdout or f"exit {ran.returncode}: {ran.stderr.strip()}"

def curl(*arguments):
    return run("curl", "-sS", "-m", "15", "--cacert", CA, *arguments)

def direct(*arguments):
    return curl("--noproxy", "*", *arguments)

def git(url, environment=os.environ):
    return run("git", "ls-remote", url, environment=environment, GIT_SSL_CAINFO=CA)

def python(url, environment=os.environ):
    source = (
        "import ssl, sys, urllib.request as r; context = ssl.create_default_context(cafile=sys.argv[2]);"
        "print(r.urlopen(sys.argv[1], timeout=15, context=context).read().decode())"
    )
    return run("python3", "-c", source, url, CA, environment=environment)

def node(url, environment=os.environ, **more):
    script = f"fetch({url!r}).then(a => a.text()).then(t => console.log(t), e => console.log('failed', e.cause.code))"
    return run("node", "-e", script, environment=environment, NODE_EXTRA_CA_CERTS=CA, **more)

def connect(host, port):
    plain = socket.create_connection(("127.0.0.1", 3128), 15)
    plain.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        received = plain.recv(1)
        if not received:
            break
        head += received
    if b" 200 " not in head:
        raise OSError(head.split(b"\r\n")[0].decode() + " " + plain.recv(1000).decode().strip())
    return plain

def read_send_read(plain, message):
    with plain:
        plain.settimeout(15)
        greeting = plain.recv(1000)
        plain.sendall(message)
        return greeting.decode().strip() + ", " + plain.recv(1000).decode().strip()

def exchange(plain, message):
    with plain:
        plain.settimeout(15)
        plain.sendall(message)
        return plain.recv(1000).decode().strip()

def secure(plain, name, message, check=True):
    context = ssl.create_default_context(cafile=CA)
    if not check:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(plain, server_hostname=name) as tls:
        tls.sendall(message)
        return tls.recv(1000).decode().splitlines()[0]

def websocket(plain, host):
    context = ssl.create_default_context(cafile=CA)
    with context.wrap_socket(plain, server_hostname=host) as tls:
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        tls.sendall(f"GET /socket HTTP/1.1\r\nHost: {host}\r\n{upgrade}\r\n".encode())
        response = tls.recv(1000)
        tls.sendall(b"a frame")
        return response.split(b" ")[1].decode() + " " + tls.recv(1000).decode()

def datagram(address, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(1)
        sender.connect((address, port))
        sender.send(b"x")
        return "received " + sender.recv(100).decode(errors="replace")

def resolve(name):
    return socket.gethostbyname(name)

def query_dns(query):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(5)
        sender.connect(("198.18.0.1", 53))
        sender.send(query)
        return sender.recv(600)[3] & 15
"""

PRINT_RESULTS = "\nprint(json.dumps(results))\n"
