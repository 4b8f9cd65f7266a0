"""A directory that git treats as a bare repository, as a patch can add it to a working tree."""

from pathlib import Path


def make_bare_repository(directory: Path, configuration: str) -> Path:
    """Create the directory with only the files that git requires; return it."""
    for name in ("objects", "refs"):
        (directory / name).mkdir(parents=True)
        (directory / name / ".keep").touch()
    (directory / "HEAD").write_text("ref: refs/heads/main\n")
    (directory / "config").write_text(configuration)
    return directory
