"""Valid image archives as other tools write them, hostile archives, and a minimal root file system for both."""

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


CLAUDE_CODE_LIBRARIES = ("libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1")
"""Libraries required by Claude Code."""


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
    """Return a tar of these entries, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def zstd(data):
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True, timeout=60).stdout


COMPRESSORS = {"": lambda data: data, "+gzip": lambda data: gzip.compress(data, 1), "+zstd": zstd}


def configuration(layers, architecture=ARCHITECTURE):
    return json.dumps(
        {"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [*map(digest, layers)]}}
    ).encode()


def save(path, members):
    """Write a tar from members keyed by name; bytes become files, strings become links."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            tar_entry = symlink(name, content) if isinstance(content, str) else entry(name, content)
            tar.addfile(tar_entry[0], io.BytesIO(tar_entry[1]) if tar_entry[0].isreg() else None)
    return path


def oci_members(layers, *, compression="", architecture=ARCHITECTURE, platform=None):
    """Return the members of an archive as written by `skopeo copy … oci-archive:`."""
    blobs = [COMPRESSORS[compression](blob) for blob in layers]
    config = configuration(layers, architecture)
    kind = "application/vnd.oci.image"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "config": {"mediaType": f"{kind}.config.v1+json", "digest": digest(config), "size": len(config)},
            "layers": [
                {"mediaType": f"{kind}.layer.v1.tar{compression}", "digest": digest(blob), "size": len(blob)}
                for blob in blobs
            ],
        }
    ).encode()
    descriptor = {"mediaType": f"{kind}.manifest.v1+json", "digest": digest(manifest), "size": len(manifest)}
    index = {"schemaVersion": 2, "manifests": [{**descriptor, **({"platform": platform} if platform else {})}]}
    files = {f"blobs/sha256/{digest(blob)[7:]}": blob for blob in (*blobs, config, manifest)}
    return {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode(), **files}


def oci_archive(path, *layers, **options):
    return save(path, oci_members(layers, **options))


def docker_members(layers):
    """Return the members of a legacy `docker save` archive; a repeated layer is a link."""
    config = configuration(layers)
    members, names, names_by_layer = {f"{digest(config)[7:]}.json": config}, [], {}
    for index, blob in enumerate(layers):
        name = f"layer{index}/layer.tar"
        members[name] = f"../{names_by_layer[blob]}" if blob in names_by_layer else blob
        names_by_layer.setdefault(blob, name)
        names.append(name)
    saved = [{"Config": f"{digest(config)[7:]}.json", "RepoTags": ["tools:latest"], "Layers": names}]
    return {**members, "manifest.json": json.dumps(saved).encode()}


def docker_archive(path, *layers):
    return save(path, docker_members(layers))


def minimal_root(*, is_truncated=False):
    """Return a layer with some of the machine's programs and their libraries, sufficient for Claude Code.

    is_truncated: truncate the files, for an image that is never started.
    """
    links = {name: f"usr/{name}" for name in ("bin", "lib", "lib64", "sbin")}
    files = {}
    for program in PROGRAMS:
        program_path = Path("/usr/bin", program).resolve()
        files[f"usr/bin/{program}"] = program_path
        files.update(_libraries(program_path))
    core = Path("/usr/lib/git-core")
    files.update({f"usr/lib/git-core/{name}": core / name for name in ("git", "git-remote-http")})
    files.update(_libraries(core / "git-remote-http"))
    library_directory = next(path.parent for name, path in files.items() if name.endswith("/libc.so.6"))
    files.update(
        {
            f"usr{library_directory}/{name}".replace("usr/usr", "usr"): library_directory / name
            for name in CLAUDE_CODE_LIBRARIES
        }
    )
    layer_entries = [symlink(name, target) for name, target in links.items()]
    layer_entries += [directory(name) for name in ("etc", "tmp", "var/tmp", "root")]
    content_slice = slice(0, 16 if is_truncated else None)
    layer_entries += [entry(name, path.read_bytes()[content_slice], mode=0o755) for name, path in sorted(files.items())]
    return layer(
        *layer_entries, entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"), entry("etc/shadow", b"root:hash:1::\n")
    )


def _libraries(program):
    output = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True, timeout=30).stdout
    paths = re.findall(r"(/\S+) \(0x", output)
    return {f"usr{path.removeprefix('/usr')}": Path(path) for path in paths}
