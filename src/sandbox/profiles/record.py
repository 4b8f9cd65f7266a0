"""What is written down of an image, beside its tree."""

from collections.abc import Mapping
from datetime import datetime

import msgspec

from sandbox.contracts.profiles import IMAGE_LAYOUT


class ImageRecord(msgspec.Struct, frozen=True):
    """digest: of the tree. source: what it was made from, in words. versions: of packages and parts, by name."""

    profile: str
    digest: str
    created_at: datetime
    source: str
    size_bytes: int
    entries: int
    versions: Mapping[str, str] = {}
    minimum_tier: str = ""
    layout: int = IMAGE_LAYOUT
    version: int = 1
