"""A fake agent that follows the instructions in its prompt (JSON), and logs everything it prints to a file.

The fake agent is installed at the path of the Claude Code copy that sandboxes run. Sandboxes can execute the file at
this path but not read it, so the fake agent must be a native program: a few instructions that execute Python with a
script from the repository.
"""

import struct
from pathlib import Path

from sandbox.agents.claude_code.agent import binary_version, find_binary

SCRIPT = "logging_fake_agent.py"
WRITTEN_LINES_FILE = "written.txt"

_PYTHON = b"/usr/bin/python3\0"
_CODE_AT = 64 + 56
_BASE = 0x400000

AGENT = '''\
import http.client, json, os, sys, time, urllib.parse

instructions = json.load(sys.stdin)
session = sys.argv[sys.argv.index("--session-id") + 1]
log_fd = os.open("/workspace/written.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def write_all(fd, data):
    while data:
        data = data[os.write(fd, data):]


def emit(**event):
    line = json.dumps({**event, "session_id": session}).encode() + b"\\n"
    write_all(log_fd, line)
    write_all(1, line)


def request_model(question):
    """Send a request, and repeat it for at most `patience_seconds` if it fails."""
    deadline = time.monotonic() + instructions["patience_seconds"]
    while (failure := request_once(question)) is not None:
        if time.monotonic() > deadline:
            sys.exit("the model responded with " + failure)
        time.sleep(0.5)


def request_once(question):
    """Return why the request failed, or None."""
    address = urllib.parse.urlsplit(os.environ["ANTHROPIC_BASE_URL"])
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    body = {"model": "claude-sonnet-4-5", "max_tokens": 1, "messages": [{"role": "user", "content": question}]}
    headers = {"x-api-key": os.environ["ANTHROPIC_API_KEY"], "content-type": "application/json"}
    try:
        connection.request("POST", "/v1/messages", json.dumps({**body, "metadata": {"user_id": session}}), headers)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    return None if response.status == 200 else str(response.status)


# At the start, at the end, and after every `request_interval` lines.
request_model("begin " + instructions["task"])
emit(type="system", subtype="init", tools=[], mcp_servers=[])
for number in range(instructions["lines"]):
    content = [{"type": "text", "text": "line " + str(number)}]
    emit(type="assistant", message={"id": "msg_1", "model": "claude", "content": content})
    time.sleep(instructions["pause_seconds"])
    if instructions["request_interval"] and number % instructions["request_interval"] == 0:
        request_model("continue " + instructions["task"])
for number in range(instructions["files"]):
    os.makedirs("/workspace/made", exist_ok=True)
    with open("/workspace/made/made-" + str(number), "w") as file:
        file.write(str(number) + "\\n")
request_model("end " + instructions["task"])
emit(type="result", subtype="success", is_error=False, result="Done.")
'''


def program(script=f"/workspace/{SCRIPT}"):
    """Return an ELF file for x86-64 that executes `/usr/bin/python3 SCRIPT` and passes on its arguments."""
    code = b"".join(
        (
            b"\x48\x8b\x14\x24",  # mov rdx, [rsp]: the argument count
            b"\x48\x8d\x54\xd4\x10",  # lea rdx, [rsp+rdx*8+16]: the environment
            b"\x48\x8d\x3d%b",  # lea rdi, [rip+…]: the path of Python
            b"\x48\x89\x3c\x24",  # mov [rsp], rdi: replaces the count, as argument 0
            b"\x48\x8d\x05%b",  # lea rax, [rip+…]: the path of the script
            b"\x48\x89\x44\x24\x08",  # mov [rsp+8], rax: replaces argument 0
            b"\x48\x89\xe6",  # mov rsi, rsp
            b"\xb8\x3b\x00\x00\x00\x0f\x05",  # execve
            b"\xbf\x7f\x00\x00\x00\xb8\x3c\x00\x00\x00\x0f\x05",  # exit(127)
        )
    )
    size = len(code) + 2 * (4 - len("%b"))
    code %= (struct.pack("<i", size - 16), struct.pack("<i", size + len(_PYTHON) - 27))
    content = code + _PYTHON + script.encode() + b"\0"
    size_total = _CODE_AT + len(content)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _BASE + _CODE_AT, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size_total, size_total, 0x1000)
    return identity + header + segment + content


def install(data_dir):
    """Install the program at the path to which the server would copy Claude Code."""
    directory = Path(data_dir) / "agent"
    directory.mkdir(mode=0o755, parents=True)
    Path(data_dir).chmod(0o700)
    binary = find_binary()
    path = directory / f"claude-{binary_version(binary)}-{binary.stat().st_size}"
    path.write_bytes(program())
    path.chmod(0o111)
