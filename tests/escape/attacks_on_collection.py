"""Traps that an agent leaves in its workspace, each with the required behavior of the host.

The code runs in the sandbox at the end of the task; escape_tests.py checks the outcome. EXECUTION_MARKER is the path of
a host file that exists only if a host tool has executed code from the workspace.
"""

from typing import NamedTuple


class Trap(NamedTuple):
    """A trap. requirement: the host's required behavior; checked_text: the path or text to look for in its results."""

    name: str
    requirement: str
    checked_text: str = ""


NO_EXECUTION = "executes nothing"
PRESERVES_FILE_BYTES = "keeps the bytes unchanged in the patch"
READS_ONLY_OWN_REPOSITORY = "reads only its own repository"
ORDINARY_FILES = "treats it as ordinary files"
SKIPPED = "skips and reports it"
OUT_OF_PATCH = "omits it from the patch and reports it in the patch header"
NOT_DELIVERED = "does not deliver it"
"""No report is required. gVisor keeps special files in its own kernel, so they never reach the host."""

RENAMED = "delivers it under a printable name"

TRAPS = (
    *(
        Trap(f"{key} in .git/config", NO_EXECUTION)
        for key in (
            *("core.fsmonitor", "core.sshCommand", "core.pager", "core.editor", "sequence.editor", "credential.helper"),
            *("gpg.program", "uploadpack.packObjectsHook", "interactive.diffFilter", "diff.external"),
        )
    ),
    Trap("filter.*.clean, smudge and process in .git/config", NO_EXECUTION),
    Trap("diff.*.textconv and command in .git/config", NO_EXECUTION),
    Trap("alias.diff and alias.status in .git/config", NO_EXECUTION),
    Trap("hooks in .git/hooks", NO_EXECUTION),
    Trap("hooks in core.hooksPath", NO_EXECUTION),
    Trap("a submodule with ext:: and update = !", NO_EXECUTION),
    Trap("filters, eol, ident and export-subst in .gitattributes", PRESERVES_FILE_BYTES),
    Trap("attributes in core.attributesFile and .git/info", PRESERVES_FILE_BYTES),
    Trap("everything ignored in core.excludesFile and .git/info/exclude", PRESERVES_FILE_BYTES, "out/plain.txt"),
    Trap("include.path to a file of the host", READS_ONLY_OWN_REPOSITORY),
    Trap("core.worktree = /", READS_ONLY_OWN_REPOSITORY),
    Trap("alternates to a repository of the host", READS_ONLY_OWN_REPOSITORY),
    Trap("a nested repository with its own config", ORDINARY_FILES, "nested/file.txt"),
    Trap("a .gitmodules file", ORDINARY_FILES, ".gitmodules"),
    Trap("a file name with a backslash before .git", OUT_OF_PATCH, "odd\\.git"),
    Trap("a symlink with a short (8.3) name of .gitmodules", OUT_OF_PATCH, "~1234567"),
    Trap("a symlink to a file of the host", SKIPPED, "out/link-to-the-host.txt"),
    Trap("a symlink to /etc/shadow", SKIPPED, "out/shadow.txt"),
    Trap("a symlink to /proc/self/environ", SKIPPED, "out/environ.txt"),
    Trap("a symlink to its parent directory", SKIPPED, "out/up"),
    Trap("a symlink to /", SKIPPED, "out/root"),
    Trap("a FIFO", NOT_DELIVERED, "out/fifo.txt"),
    Trap("a socket", NOT_DELIVERED, "out/socket.txt"),
    Trap("a sparse file of 1 TB", SKIPPED, "out/sparse.txt"),
    Trap("400 nested directories", SKIPPED, "out/deep"),
    Trap("a name with a line break", RENAMED, "out/new%0Aline.txt"),
    Trap("a name that sets the terminal title", RENAMED, "out/%1B]0;title%07.txt"),
    Trap("a name that clears the screen", RENAMED, "out/%1B[2J.txt"),
    Trap("a name with a right-to-left override", RENAMED, "out/%E2%80%AEright-to-left.txt"),
    Trap("a name that is not UTF-8", RENAMED, "out/no-text-%FF.txt"),
    Trap("a name that looks like an option", RENAMED, "out/-rf.txt"),
    Trap("a name with quotes", RENAMED, "out/quote'\".txt"),
    Trap("a name with a backslash", RENAMED, "out/back\\slash.txt"),
)
"""The traps that TRAP_SCRIPT creates, for the table in docs/security.md."""

TRAP_SCRIPT = r"""
import os, pathlib, socket, subprocess
os.chdir("/workspace")
TOUCH_EXECUTION_MARKER = f"touch {EXECUTION_MARKER}; echo evil"

def git(*arguments): subprocess.run(["git", *arguments], capture_output=True, timeout=20)

# Commands that git on the host would run in this repository.
for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "diff.external", "core.editor", "gpg.program", "credential.helper",
            "filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "diff.evil.textconv", "diff.evil.command",
            "uploadpack.packObjectsHook", "alias.diff", "alias.status", "sequence.editor", "interactive.diffFilter"):
    git("config", key, TOUCH_EXECUTION_MARKER)
git("config", "core.attributesFile", "/workspace/evil-attributes")
git("config", "core.excludesFile", "/workspace/evil-excludes")
git("config", "core.hooksPath", "/workspace/hooks")
git("config", "include.path", "/etc/passwd")
git("config", "core.worktree", "/")
os.makedirs("hooks", exist_ok=True)
for name in ("post-checkout", "pre-commit", "post-index-change", "reference-transaction", "fsmonitor-watchman"):
    for directory in ("hooks", ".git/hooks"):
        os.makedirs(directory, exist_ok=True)
        path = pathlib.Path(directory, name)
        path.write_text(f"#!/bin/sh\n{TOUCH_EXECUTION_MARKER}\n"); path.chmod(0o755)
pathlib.Path(".gitattributes").write_text("* filter=evil diff=evil text eol=crlf ident export-subst\n")
pathlib.Path("evil-attributes").write_text("* filter=evil\n")
pathlib.Path("evil-excludes").write_text("*\n")
pathlib.Path(".git/info").mkdir(exist_ok=True)
pathlib.Path(".git/info/exclude").write_text("*\n")
pathlib.Path(".git/info/attributes").write_text("* filter=evil\n")
pathlib.Path(".git/objects/info").mkdir(exist_ok=True)
pathlib.Path(".git/objects/info/alternates").write_text(HOST_GIT + "\n")
pathlib.Path(".gitmodules").write_text(f'[submodule "x"]\n\tpath = x\n\turl = "ext::sh -c {TOUCH_EXECUTION_MARKER}"\n\tupdate = !{TOUCH_EXECUTION_MARKER}\n')
# A nested repository with its own configuration.
os.makedirs("nested/.git/hooks", exist_ok=True)
pathlib.Path("nested/.git/config").write_text(f"[core]\n\tfsmonitor = {TOUCH_EXECUTION_MARKER}\n\tworktree = /\n")
pathlib.Path("nested/file.txt").write_text("ordinary\n")
# Names that make git reject the whole patch.
pathlib.Path("odd\\.git").write_text("odd\n")
os.symlink("README.md", "~1234567")
# Artifacts that link outside, block, have misleading names or are huge.
os.makedirs("out", exist_ok=True)
os.chdir("out")
os.symlink(CANARY, "link-to-the-host.txt")
os.symlink("/etc/shadow", "shadow.txt")
os.symlink("/proc/self/environ", "environ.txt")
os.symlink("..", "up")
os.symlink("/", "root")
os.mkfifo("fifo.txt")
socket.socket(socket.AF_UNIX).bind("socket.txt")
with open("sparse.txt", "w") as file: file.truncate(10 ** 12)
pathlib.Path("plain.txt").write_text("plain\n")
for name in ("new\nline.txt", "\x1b]0;title\x07.txt", "\x1b[2J.txt", "back\\slash.txt", "\u202eright-to-left.txt", "-rf.txt", "quote'\".txt"):
    pathlib.Path(name).write_text("named\n")
with open(b"no-text-\xff.txt", "w") as file: file.write("named\n")
os.makedirs("/".join(["deep"] * 400), exist_ok=True)
# An ordinary change, for the patch.
os.chdir("/workspace")
pathlib.Path("README.md").write_text("# Hi\n\nchanged\n")
print("traps created")
"""
