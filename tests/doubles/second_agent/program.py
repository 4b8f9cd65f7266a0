"""The agent's program, which runs in the sandbox and executes the model's function calls."""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path


def main():
    model, effort = sys.argv[1:]
    items = [{"role": "user", "content": sys.stdin.read()}]
    while True:
        report("turn")
        try:
            output = create_response({"model": model, "input": items, "reasoning": {"effort": effort}})
        except urllib.error.HTTPError as error:
            report("end", ok=False, text=json.loads(error.read())["error"]["message"])
            sys.exit(1)
        calls = [item for item in output if item["type"] == "function_call"]
        for call in calls:
            report("call", id=call["call_id"], tool=call["name"])
            arguments = json.loads(call["arguments"])
            Path(arguments["path"]).write_text(arguments["text"])
            report("called", id=call["call_id"], tool=call["name"])
            items += [call, {"type": "function_call_output", "call_id": call["call_id"], "output": "written"}]
        if not calls:
            report("end", ok=True, text=output[0]["text"])
            return


def create_response(body):
    headers = {"Authorization": f"Bearer {os.environ['RESPONSES_API_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["RESPONSES_URL"], json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["output"]


def report(step, **fields):
    print(json.dumps({"step": step, **fields}), flush=True)


main()
