"""Archives of images, made by hand as other tools write them, honest and hostile; and a small root to put into them."""

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
PROGRAMS = (
    *("bash", "sh", "cat", "ls", "id", "mkdir", "rm", "touch", "env", "true", "sleep", "readlink", "dirname", "uname"),
    *("git", "head", "sed", "grep", "tr", "cut"),
)


CLAUDE_CODES = ("libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1")
"""Libraries that Claude Code asks for."""


def entry(name, content=b"", kind=tarfile.REGTYPE, *, link="", mode=0o644, mtime=1_700_000_000, size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, link, mode, mtime
    info.size = len(content) if size is None else size
    return info, content


def directory(name):
    return entry(name, kind=tarfile.DIRTYPE, mode=0o755)


def symlink(name, target):
    return entry(name, kind=tarfile.SYMTYPE, link=target)


def hardlink(name, target):
    return entry(name, kind=tarfile.LNKTYPE, link=target)


def layer(*entries):
    """A tar of these entries, in this order."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return written.getvalue()


def digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def zstd(data):
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True, timeout=60).stdout


PACKED = {"": lambda data: data, "+gzip": lambda data: gzip.compress(data, 1), "+zstd": zstd}


def configuration(layers, architecture=ARCHITECTURE):
    return json.dumps(
        {"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [*map(digest, layers)]}}
    ).encode()


def save(path, members):
    """A plain tar of members by name; bytes are files, texts are links."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            made = symlink(name, content) if isinstance(content, str) else entry(name, content)
            tar.addfile(made[0], io.BytesIO(made[1]) if made[0].isreg() else None)
    return path


def oci_members(layers, *, packing="", architecture=ARCHITECTURE, platform=None):
    """What `skopeo copy … oci-archive:` writes, by name."""
    blobs = [PACKED[packing](one) for one in layers]
    config = configuration(layers, architecture)
    kind = "application/vnd.oci.image"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "config": {"mediaType": f"{kind}.config.v1+json", "digest": digest(config), "size": len(config)},
            "layers": [
                {"mediaType": f"{kind}.layer.v1.tar{packing}", "digest": digest(one), "size": len(one)} for one in blobs
            ],
        }
    ).encode()
    described = {"mediaType": f"{kind}.manifest.v1+json", "digest": digest(manifest), "size": len(manifest)}
    index = {"schemaVersion": 2, "manifests": [{**described, **({"platform": platform} if platform else {})}]}
    files = {f"blobs/sha256/{digest(one)[7:]}": one for one in (*blobs, config, manifest)}
    return {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode(), **files}


def oci_archive(path, *layers, **parts):
    return save(path, oci_members(layers, **parts))


def docker_members(layers):
    """What `docker save` wrote before it wrote OCI archives; a layer that comes again is a link."""
    config = configuration(layers)
    members, names, places = {f"{digest(config)[7:]}.json": config}, [], {}
    for index, one in enumerate(layers):
        name = f"layer{index}/layer.tar"
        members[name] = f"../{places[one]}" if one in places else one
        places.setdefault(one, name)
        names.append(name)
    saved = [{"Config": f"{digest(config)[7:]}.json", "RepoTags": ["tools:latest"], "Layers": names}]
    return {**members, "manifest.json": json.dumps(saved).encode()}


def docker_archive(path, *layers):
    return save(path, docker_members(layers))


def small_root(*, is_hollow=False):
    """A layer with a few of the machine's own programs and their libraries: enough for Claude Code to work in.

    is_hollow: no more than their names are kept, for an image in which nothing is started.
    """
    links = {name: f"usr/{name}" for name in ("bin", "lib", "lib64", "sbin")}
    files = {}
    for program in PROGRAMS:
        found = Path("/usr/bin", program).resolve()
        files[f"usr/bin/{program}"] = found
        files.update(_libraries(found))
    core = Path("/usr/lib/git-core")
    files.update({f"usr/lib/git-core/{name}": core / name for name in ("git", "git-remote-http")})
    files.update(_libraries(core / "git-remote-http"))
    place = next(path.parent for name, path in files.items() if name.endswith("/libc.so.6"))
    files.update({f"usr{place}/{name}".replace("usr/usr", "usr"): place / name for name in CLAUDE_CODES})
    made = [symlink(name, target) for name, target in links.items()]
    made += [directory(name) for name in ("etc", "tmp", "var/tmp", "root")]
    kept = slice(0, 16 if is_hollow else None)
    made += [entry(name, path.read_bytes()[kept], mode=0o755) for name, path in sorted(files.items())]
    return layer(*made, entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"), entry("etc/shadow", b"root:hash:1::\n"))


def _libraries(program):
    said = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True, timeout=30).stdout
    paths = re.findall(r"(/\S+) \(0x", said)
    return {f"usr{path.removeprefix('/usr')}": Path(path) for path in paths}
