"""Time limits use the monotonic clock. Each module that reads the wall clock is listed with a reason."""

import ast
from pathlib import Path

WALL_CLOCKS = {"time", "time_ns", "localtime", "gmtime", "ctime", "now", "utcnow", "today", "fromtimestamp"}
CLOCK_MODULES = {"time", "datetime", "date", "dt"}

WALL_CLOCK_READERS = {
    "bootstrap/clock.py": "the clock of server and runners",
    "access_tokens/token_file.py": "tokens expire at a date",
    "images/image_builder.py": "an image has a build date",
    "images/image_transfer.py": "time at which a host got its copy",
    "api/task_json.py": "the duration of a running task is measured until now",
    "dashboard/pages/server.py": "the last day is grouped by wall clock hours",
    "dashboard/pages/task_list.py": "a filter such as the last hour ends now",
    "server/task_services.py": "an artifact has a creation date",
    "server/start_conditions.py": "a drain has a start date",
    "bootstrap/data_dir_backup.py": "a backup has a creation date",
    "placements/cluster/hosts.py": "the last contact of a host is a date",
    "runtimes/limits/kernel_time.py": "the kernel stores the date of the last write to a terminal",
    "bootstrap/log.py": "log lines have a timestamp",
}
CLIENT_PACKAGES = ("cli", "client", "demo")


def test_only_listed_modules_read_the_wall_clock(root: Path, trees: dict[Path, ast.Module]):
    package = root / "src" / "sandbox"
    readers = {
        str(path.relative_to(package))
        for path, tree in trees.items()
        if path.is_relative_to(package) and path.relative_to(package).parts[0] not in CLIENT_PACKAGES
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in WALL_CLOCKS
        and isinstance(node.value, ast.Name)
        and node.value.id in CLOCK_MODULES
    }
    assert readers == set(WALL_CLOCK_READERS)
