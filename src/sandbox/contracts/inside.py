"""What a sandbox is like from inside, whatever runtime makes it: its user, its places, its ports."""

UID = 1000
USER = "agent"
HOME = "/home/agent"
WORKSPACE = "/workspace"
NODE = "/opt/node"
"""Where Node.js is installed, its programs in `bin`."""

MODEL_PORT = 8123
"""Where the gateway plays the model's API, on 127.0.0.1."""

PROXY_PORT = 3128
"""Where the gateway is an HTTP proxy, on 127.0.0.1."""
