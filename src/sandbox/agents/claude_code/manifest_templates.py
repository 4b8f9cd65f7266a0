"""Manifest templates for the dashboard's submit form."""

from sandbox.interfaces.agent import ManifestTemplate

_MINIMAL = """\
version: "1"
kind: Task
metadata:
  name: "My task"
repository:
  url: "https://github.com/org/repo.git"
  branch: "main"
claude:
  prompt: "Describe the work here"
"""

_BUG_FIX = """\
version: "1"
kind: Task
metadata:
  name: "Fix bug #42"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Fix the bug in GitHub issue #42"
  mcp_config:
    mcpServers:
      github:
        command: "npx"
        args: ["-y", "@modelcontextprotocol/server-github"]
        env:
          GITHUB_TOKEN: "${GITHUB_TOKEN}"
vm:
  network_mode: "outbound"
  allowed_hosts: ["api.github.com"]
secrets:
  - name: "GITHUB_TOKEN"
    source: "env"
    key: "GITHUB_TOKEN"
"""

_AUDIT = """\
version: "1"
kind: Task
metadata:
  name: "Security audit"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: |
    Audit this repository for security:
    1. Run a static analysis
    2. Check the dependencies
    3. Write security-report.md
  allowed_tools: ["Read", "Bash", "Grep", "Write"]
vm:
  network_mode: "isolated"
lifecycle:
  timeout: "8h"
  artifact_patterns: ["security-report.md"]
"""

_LARGE = """\
version: "1"
kind: Task
metadata:
  name: "Heavy processing"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Process the large data set"
vm:
  profile: "agentic-dev"
  cpus: 16
  memory: "32G"
  disk: "100G"
lifecycle:
  timeout: "24h"
"""

_BUDGET = """\
version: "1"
kind: Task
metadata:
  name: "Try it within a budget"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Describe the work here"
  max_turns: 30
lifecycle:
  budget_usd: 2.50
  timeout: "1h"
  failure_action: "preserve"
"""

MANIFEST_TEMPLATES = (
    ManifestTemplate("Minimal", "The required fields only: removes all other settings.", _MINIMAL),
    ManifestTemplate(
        "Bug fix with GitHub",
        "Adds GitHub's MCP server and the secret GITHUB_TOKEN; allows api.github.com only.",
        _BUG_FIX,
    ),
    ManifestTemplate("Security audit", "No network access, 8 hours, four tools; keeps security-report.md.", _AUDIT),
    ManifestTemplate(
        "Large machine", "16 CPUs, 32 GiB of memory, 100 GiB of disk, 24 hours, the profile agentic-dev.", _LARGE
    ),
    ManifestTemplate(
        "Within a budget", "Ends at $2.50, after 30 turns or after 1 hour; a failure preserves the sandbox.", _BUDGET
    ),
)
