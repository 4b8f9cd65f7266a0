"""A host of the internet, played over HTTPS: `python played_github.py --directory DIR --name NAME --address ADDRESS`.

Run inside a network namespace of a test's own; DIR has `cert.pem`, `key.pem` and `answers.json` (path to JSON value).
What it was asked is appended to `requests.ndjson`.
"""

import argparse
import json
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def prepare(directory, name, answers):
    """Write what the host needs; the certificate is one that nobody trusts who was not told to."""
    (directory / "answers.json").write_text(json.dumps(answers))
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
    given = parser.parse_args()
    answers = json.loads((given.directory / "answers.json").read_text())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = {"path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}}
            with (given.directory / "requests.ndjson").open("a") as file:
                file.write(json.dumps(asked) + "\n")
            body = json.dumps(answers.get(self.path, {"message": "Not Found"})).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer((given.address, 443), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given.directory / "cert.pem", given.directory / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print(json.dumps({"address": given.address}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
