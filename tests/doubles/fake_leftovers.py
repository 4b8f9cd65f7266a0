"""Leftovers of attempts in memory."""


class FakeLeftoverSource:
    """A source of leftovers, keyed by attempt id; those in `stuck` cannot be removed."""

    def __init__(self, *, belongs_to_this_server=False):
        self.belongs_to_this_server, self.kind = (
            belongs_to_this_server,
            "socket" if belongs_to_this_server else "sandbox",
        )
        self.attempts, self.stuck = set(), set()

    def attempt_ids(self):
        return set(self.attempts)

    async def clean_up(self, attempt_id, layout):
        if attempt_id in self.stuck:
            raise OSError("It does not end")
        self.attempts.discard(attempt_id)
