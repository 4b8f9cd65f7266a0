"""A fake internet host with HTTPS: `python fake_github.py --directory DIR --address ADDRESS`.

Runs inside a test's network namespace; DIR has `cert.pem`, `key.pem` and `responses.json` (path to JSON value).
Requests are appended to `requests.ndjson`.
"""

import argparse
import json
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def prepare(directory, name, responses):
    """Write the host's files; the certificate is self-signed."""
    (directory / "responses.json").write_text(json.dumps(responses))
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
         "-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    responses = json.loads((arguments.directory / "responses.json").read_text())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            request = {"path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}}
            with (arguments.directory / "requests.ndjson").open("a") as file:
                file.write(json.dumps(request) + "\n")
            body = json.dumps(responses.get(self.path, {"message": "Not Found"})).encode()
            self.send_response(200 if self.path in responses else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer((arguments.address, 443), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(arguments.directory / "cert.pem", arguments.directory / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print(json.dumps({"address": arguments.address}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
