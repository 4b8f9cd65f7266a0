"""The manifest that a command is given: a file, or `-` for stdin."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from sandbox.model.manifest import Manifest


class ManifestFile:
    """The bytes of a manifest, and what they are."""

    def __init__(self, file: BinaryIO) -> None:
        from sandbox.model.limits import BODY_BYTES_MAX

        self.name = "<stdin>" if file.name in {"<stdin>", "-"} else str(file.name)
        self.body = file.read(BODY_BYTES_MAX + 1)  # one more than is accepted, so that too much is noticed
        self.is_json = self.name.endswith(".json") or _is_json(self.body)

    @property
    def content_type(self) -> str:
        """The media type to send it with."""
        return "application/json" if self.is_json else "application/yaml"

    def parse(self) -> Manifest:
        """Check it as the server does. Raises the model's InvalidManifestError."""
        from sandbox.model.manifest_parsing import parse_manifest

        return parse_manifest(self.body, is_json=self.is_json)

    def with_id(self, task_id: str) -> tuple[bytes, str]:
        """The manifest with another id, as bytes and media type. Raises the model's InvalidManifestError."""
        manifest = self.parse()
        metadata = replace(manifest.metadata, id=task_id)
        return json.dumps(asdict(replace(manifest, metadata=metadata))).encode(), "application/json"


def _is_json(body: bytes) -> bool:
    if not body.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True
