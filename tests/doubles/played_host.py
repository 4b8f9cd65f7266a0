"""A host of the public internet, played on ports 80 and 443: answers each request with what it was asked.

Run as a program: `played_host.py ADDRESS CERTIFICATE RECORD`, once it listens it prints a JSON line. Every request's
line and Host stand in RECORD.
"""

import hashlib
import http.server
import json
import ssl
import sys
import threading
from pathlib import Path


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with Path(sys.argv[3]).open("a") as record:
            record.write(json.dumps([self.server.server_port, self.requestline, self.headers["Host"]]) + "\n")
        told = json.dumps({"path": self.path, "sha256": hashlib.sha256(body).hexdigest()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def main():
    address, certificate = sys.argv[1:3]
    plain, secure = (http.server.ThreadingHTTPServer((address, port), _Handler) for port in (80, 443))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    secure.socket = context.wrap_socket(secure.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=secure.serve_forever, daemon=True).start()
    print(json.dumps({"address": address}), flush=True)
    plain.serve_forever()


if __name__ == "__main__":
    main()
