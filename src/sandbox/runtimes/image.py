"""The `host` image: the host's own /usr, and an /etc that tells nothing of the host."""

from collections.abc import Mapping

from sandbox.contracts.inside import HOME, UID, USER, WORKSPACE
from sandbox.runtimes import node

DIRECTORIES = ("/etc", "/etc/ssl", "/home", "/run", "/run/sandbox", "/var")
HOST_LINKS = {"/bin": "usr/bin", "/sbin": "usr/sbin", "/lib": "usr/lib", "/lib64": "usr/lib64", "/var/tmp": "../tmp"}  # noqa: S108
HOST_PATHS = ("/etc/ssl/certs", "/etc/alternatives", "/etc/ld.so.cache")
"""Of the host's /etc what programs need and what is no secret."""

_ETC_LINKS = {"/etc/localtime": "/usr/share/zoneinfo/Etc/UTC", "/etc/os-release": "../usr/lib/os-release"}
LINKS = {**HOST_LINKS, **_ETC_LINKS}


def etc_files(host_name: str) -> Mapping[str, bytes]:
    """The synthetic files of /etc, readable by everybody."""
    texts = {
        "/etc/passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\n{USER}:x:{UID}:{UID}:{USER}:{HOME}:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "/etc/group": f"root:x:0:\n{USER}:x:{UID}:\nnogroup:x:65534:\n",
        "/etc/hosts": f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {host_name}\n",
        "/etc/hostname": f"{host_name}\n",
        "/etc/resolv.conf": "nameserver 198.18.0.1\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "/etc/gitconfig": '[user]\n\tname = "Claude Code (Sandbox)"\n\temail = agent@sandbox.invalid\n'
        f"[safe]\n\tdirectory = {WORKSPACE}\n",
        node.NPM_CONFIGURATION: f"prefix={HOME}/.local\nupdate-notifier=false\n"
        "fetch-retry-mintimeout=500\nfetch-retry-maxtimeout=2000\n",
    }
    return {path: text.encode() for path, text in texts.items()}
