"""Runs inside a sandbox: every attack and its legitimate twin, each in a process of its own.

Usage: python3 battery.py ATTACKS RESULTS AT_ONCE. ATTACKS is JSON, `{prelude, attacks: [{name, attack, twin}]}`;
RESULTS gets `{name: {attack, twin}}`. A piece of code has its way when it prints the word of THROUGH as its last line.
"""

import concurrent.futures
import json
import pathlib
import subprocess
import sys
import threading

THROUGH = "THROUGH"
SECONDS = 25


def play(prelude, code):
    """What came of it: the word, or the last line that it said, or why it ended."""
    try:
        ran = subprocess.run(
            [sys.executable, "-I", "-c", f"{prelude}\n{code}"],
            capture_output=True,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
            cwd="/workspace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it hung"
    except OSError as error:
        return f"it could not be started: {error}"
    said = (ran.stdout + ran.stderr).decode(errors="replace").strip().splitlines() or [""]
    return THROUGH if THROUGH in ran.stdout.decode(errors="replace").split() else said[-1][-300:]


def keep(results, path):
    """What is known so far: an attack may take everything along."""
    part = pathlib.Path(path + ".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def main():
    attacks, path, at_once = sys.argv[1], sys.argv[2], int(sys.argv[3])
    given = json.loads(pathlib.Path(attacks).read_text())
    results, turn = {}, threading.Lock()

    def both(one):
        with turn:
            results[one["name"]] = {}
        for kind in ("twin", "attack"):
            came_of_it = play(given["prelude"], one[kind])
            with turn:
                results[one["name"]][kind] = came_of_it
                keep(results, path)

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        list(pool.map(both, given["attacks"]))
    print(len(results), "attacks played")


if __name__ == "__main__":
    main()
