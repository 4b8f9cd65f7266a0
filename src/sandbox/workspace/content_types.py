"""Content types by suffix: a table of our own, so that no file of the machine changes an answer."""

_TYPES = {
    "bz2": "application/x-bzip2",
    "css": "text/css",
    "csv": "text/csv",
    "diff": "text/x-diff",
    "gif": "image/gif",
    "gz": "application/gzip",
    "htm": "text/html",
    "html": "text/html",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "js": "text/javascript",
    "json": "application/json",
    "jsonl": "application/x-ndjson",
    "log": "text/plain",
    "md": "text/markdown",
    "ndjson": "application/x-ndjson",
    "patch": "text/x-diff",
    "pdf": "application/pdf",
    "png": "image/png",
    "py": "text/x-python",
    "sarif": "application/sarif+json",
    "sh": "text/x-shellscript",
    "svg": "image/svg+xml",
    "tar": "application/x-tar",
    "tgz": "application/gzip",
    "toml": "application/toml",
    "tsv": "text/tab-separated-values",
    "txt": "text/plain",
    "webp": "image/webp",
    "xml": "application/xml",
    "xz": "application/x-xz",
    "yaml": "application/yaml",
    "yml": "application/yaml",
    "zip": "application/zip",
    "zst": "application/zstd",
}


def content_type(name: str) -> str:
    """The type of a file of that name; bytes when the suffix is not known."""
    stem, _, suffix = name.rpartition(".")
    return _TYPES.get(suffix.lower(), "application/octet-stream") if stem else "application/octet-stream"
