"""Limits for images and archives. `docs/limits.md` lists them."""

IMAGE_BYTES_MAX = 16 * 1024**3
"""Maximum total size of an image's files, where each hard link counts, and of its uncompressed layers."""

IMAGE_ENTRIES_MAX = 1_000_000
"""Maximum number of files, directories, links and whiteouts in all layers.

This includes directories that occur only in the path of another entry. The number of names that opaque whiteouts cover
has the same limit.
"""

IMAGE_LAYERS_MAX = 128
"""Maximum number of layers in an archive."""

IMAGE_PATH_BYTES_MAX = 3500
"""Maximum length of a path in the image, as written in an archive."""

IMAGE_DEPTH_MAX = 128
"""Maximum nesting depth of directories. A deeper tree could not be measured or removed."""

IMAGE_METADATA_BYTES_MAX = 4 * 1024**2
"""Maximum size of an index, manifest or configuration in an archive, and of a tar header with its extensions."""

IMAGE_PACKAGES_BYTES_MAX = 2 * 1024**2
"""Maximum size of the names and versions of an image's packages, which are read each time a task is submitted."""

FOLLOWED_LINKS_MAX = 40
"""Maximum number of symbolic links that are followed to resolve one path, as in the kernel."""

ARCHIVE_MEMBERS_MAX = 10_000
"""Maximum number of members in an OCI archive."""

BUILD_TIMEOUT_SECONDS = 1800.0
"""Time limit for mmdebstrap, after which it is killed."""

SYNC_TIMEOUT_SECONDS = 300.0
"""Time limit for flushing an image to disk before it becomes current."""
