"""A small MCP server over stdin and stdout: run `python3 mcp_token_server.py WORD`. It tells what it was given."""

import json
import os
import sys

TOOLS = [{"name": name, "description": name, "inputSchema": {"type": "object"}} for name in ("tell", "other")]


def answer(request):
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
            told = f"TOKEN={os.environ.get('TOKEN')} WORDS={' '.join(sys.argv[1:])}"
            return {"content": [{"type": "text", "text": told}]}
        case _:
            return {}


def main():
    for line in sys.stdin:
        request = json.loads(line)
        if "id" in request:
            print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": answer(request)}), flush=True)


if __name__ == "__main__":
    main()
