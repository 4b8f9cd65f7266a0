"""Bounds of images. `docs/limits.md` lists them."""

IMAGE_BYTES_MAX = 16 * 1024**3
"""All files of an image together, by each of their names, and all its layers uncompressed; over it it is refused."""

IMAGE_ENTRIES_MAX = 1_000_000
"""Files, directories, links and whiteouts in all layers together, also directories that only the path of another entry
asks for; and names that whiteouts of directories look at."""

IMAGE_LAYERS_MAX = 128
"""Layers of an archive."""

IMAGE_PATH_BYTES_MAX = 3500
"""A path inside, as an archive writes it."""

IMAGE_DEPTH_MAX = 128
"""Directories within each other: a deeper tree could not be measured, nor removed again."""

IMAGE_METADATA_BYTES_MAX = 4 * 1024**2
"""An index, a manifest or a configuration of an archive, and one header of a tar with all that belongs to it."""

IMAGE_LINKS_MAX = 40
"""Links that are followed on the way to one entry, as the kernel does."""

ARCHIVE_MEMBERS_MAX = 10_000
"""Members of an OCI archive."""

DECLARATION_BYTES_MAX = 64 * 1024
"""The declarative file of a profile."""

BUILD_SECONDS = 1800.0
"""For mmdebstrap; past it it is killed."""

SYNC_SECONDS = 300.0
"""For an image to be flushed to disk before it counts."""
