"""Runs inside a sandbox: every attack and its legitimate twin, each in a process of its own.

A twin that several attacks have is played once, after the last of them.

Usage: python3 battery.py ATTACKS RESULTS AT_ONCE SECONDS. ATTACKS is JSON, `{prelude, attacks: [{name, attack,
twin}]}`; RESULTS gets `{name: {attack, twin}}`. A piece of code has its way when it prints the word of THROUGH; one
that is not done after SECONDS has hung, which proves nothing.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import sys
import time

THROUGH = "THROUGH"
HUNG = "it hung"


class Play:
    """One piece of code in a fork of this process, where all that it imports is there: to import it takes seconds in a
    microVM, for each.

    attacks: the names of those that it is the attack or the twin (kind) of · names: what the prelude left, by name.
    """

    def __init__(self, attacks, kind, code, names, seconds):
        self.attacks, self.kind = attacks, kind
        self.said = b""
        self.deadline = time.monotonic() + seconds
        self.fd, inside = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.fd)
            run(code, names, inside)
        os.close(inside)

    def read(self):
        """Whether more may come."""
        data = os.read(self.fd, 65536)
        self.said += data
        return bool(data)

    def came_of_it(self, *, hung):
        """The word, or the last line that it said, or that it hung."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self.fd)
        os.waitpid(self.pid, 0)
        text = self.said.decode(errors="replace").strip()
        if THROUGH in text.split():
            return THROUGH
        return HUNG if hung else (text.splitlines() or ["it ended without a word"])[-1][-300:]


def run(source, names, inside):
    """In the child; never returns."""
    os.setsid()
    for target in (1, 2):
        os.dup2(inside, target)
    os.close(inside)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        exec(compile(source, "attack", "exec"), names)
    except SystemExit:
        pass
    except BaseException as error:
        print(f"{type(error).__qualname__}: {error}")  # of a traceback only that is read
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def in_order(attacks):
    """What is played, as (names of attacks, kind, code)."""
    having = {}
    for one in attacks:
        having.setdefault(one["twin"], []).append(one["name"])
    for one in attacks:
        twin = (having[one["twin"]], "twin", one["twin"])
        is_shared = len(twin[0]) > 1
        if not is_shared:
            yield twin
        yield [one["name"]], "attack", one["attack"]
        if is_shared and twin[0][-1] == one["name"]:
            yield twin


def keep(results, path):
    """What is known so far: an attack that is played alone may take everything along."""
    part = pathlib.Path(path + ".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def main():
    attacks, path, at_once, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    given = json.loads(pathlib.Path(attacks).read_text())
    waiting = list(in_order(given["attacks"]))
    names = {"__name__": "attack"}
    exec(compile(given["prelude"], "prelude", "exec"), names)
    results, playing = {}, []
    while waiting or playing:
        while waiting and len(playing) < at_once:
            playing.append(Play(*waiting.pop(0), names, seconds))
        readable = select.select([one.fd for one in playing], [], [], 0.5)[0]
        for one in list(playing):
            hung = time.monotonic() > one.deadline
            if hung or (one.fd in readable and not one.read()):
                playing.remove(one)
                came_of_it = one.came_of_it(hung=hung)
                for name in one.attacks:
                    results.setdefault(name, {})[one.kind] = came_of_it
        if not playing:
            keep(results, path)
    print(len(results), "attacks played")


if __name__ == "__main__":
    main()
