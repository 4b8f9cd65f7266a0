"""A fake public host that echoes HTTP requests on ports 80, 443, 8080 and 8443.

Run as a program: `fake_public_host.py ADDRESS CERTIFICATE RECORD`; prints a JSON line once it listens. Request lines
and Host headers are appended to RECORD. Ports 443 and 8443 use TLS. WebSocket messages are echoed; port 22 sends a
greeting, then echoes. `…/info/refs` serves a git repository, `/away/HOST?PATH` redirects.
"""

import hashlib
import http.server
import json
import socketserver
import ssl
import sys
import threading
from pathlib import Path

COMMIT = "1234567890123456789012345678901234567890"
SERVER_BANNER = b"SSH-2.0-played\r\n"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with Path(sys.argv[3]).open("a") as record:
            record.write(json.dumps([self.server.server_port, self.requestline, self.headers["Host"]]) + "\n")
        if self.headers.get("Upgrade") == "websocket":
            self._echo()
        elif self.path.startswith("/away/"):
            host, _, path = self.path.removeprefix("/away/").partition("?")
            self._respond(302, b"", Location=f"http://{host}/{path or 'x'}")
        elif self.path.endswith("/info/refs?service=git-upload-pack"):
            self._respond(200, f"{COMMIT}\trefs/heads/main\n".encode(), **{"Content-Type": "text/plain"})
        elif self.path.endswith("/HEAD"):
            self._respond(200, b"ref: refs/heads/main\n")
        else:
            echo = {"path": self.path, "sha256": hashlib.sha256(body).hexdigest()}
            self._respond(200, json.dumps(echo).encode())

    do_POST = do_GET  # noqa: N815

    def _respond(self, status, body, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _echo(self):
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.end_headers()
        while data := self.connection.recv(1000):
            self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *_):
        pass


class _BannerHandler(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(SERVER_BANNER)
        while data := self.request.recv(1000):
            self.request.sendall(data)


def main():
    address, certificate = sys.argv[1:3]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    socketserver.ThreadingTCPServer.daemon_threads = True
    servers = [socketserver.ThreadingTCPServer((address, 22), _BannerHandler)]
    for port in (80, 8080, 443, 8443):
        server = http.server.ThreadingHTTPServer((address, port), _Handler)
        if port in (443, 8443):
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        servers.append(server)
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"address": address}), flush=True)
    servers[0].serve_forever()


if __name__ == "__main__":
    main()
