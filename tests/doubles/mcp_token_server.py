"""A small MCP server that returns its token and arguments, over stdio as a program or over HTTP in a test's process."""

import json
import os
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOOLS = [{"name": name, "description": name, "inputSchema": {"type": "object"}} for name in ("tell", "other")]


def result_of(request, text):
    match request["method"]:
        case "initialize":
            return {
                "protocolVersion": request["params"]["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "token", "version": "1"},
            }
        case "tools/list":
            return {"tools": TOOLS}
        case "tools/call":
            return {"content": [{"type": "text", "text": text}]}
        case _:
            return {}


def respond(message, text):
    """Return the response to a message as JSON; empty for a notification."""
    request = json.loads(message)
    if "id" not in request:
        return ""
    return json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result_of(request, text)})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        response = respond(body, f"PATH={self.path} AUTHORIZATION={self.headers['authorization']}").encode()
        self.send_response(200 if response else 202)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    def do_GET(self):
        self.send_error(405)

    def log_message(self, *_):
        pass


@contextmanager
def served_over_http():
    """Serve on loopback until the block ends; yield the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def main():
    text = f"TOKEN={os.environ.get('TOKEN')} WORDS={' '.join(sys.argv[1:])}"
    for line in sys.stdin:
        if response := respond(line, text):
            print(response, flush=True)


if __name__ == "__main__":
    main()
