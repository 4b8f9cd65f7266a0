"""Programs inside make the gateway work as hard as they can; its runner has other things to do all the same."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

from doubles.served_gateway import run, served_gateway, until_true
from sandbox.gateway import transport
from sandbox.gateway.model.protocol import ModelProtocol
from sandbox.gateway.protocol import Phase
from sandbox.interfaces.gateway import GatewayRules

CLIENTS = 8
CHUNKS = b"1\r\nx\r\n" * 10_000


@asynccontextmanager
async def others_at_work():
    """Everything else that the runner does; gives the number of its turn."""
    turn = [0]

    async def others():
        while True:
            turn[0] += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(others())
    try:
        yield turn
    finally:
        working.cancel()


def test_many_who_send_tiny_chunks_never_keep_the_loop_from_others(monkeypatch):
    turns: Counter[int] = Counter()
    turn, judged, longest = [0], 0, 0
    judge = ModelProtocol.client_data_received

    def client_sent(self, data):
        nonlocal judged, longest
        turns[turn[0]] += 1
        judged, longest = judged + len(data), max(longest, len(data))
        return judge(self, data)

    monkeypatch.setattr(ModelProtocol, "client_data_received", client_sent)

    async def story():
        nonlocal turn
        async with served_gateway("http://127.0.0.1:9") as served, others_at_work() as turn:
            clients = [await served.connect() for _ in range(CLIENTS)]
            head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
            for client in clients:
                client.writer.write(head.encode() + CHUNKS)
            await until_true(lambda: judged == CLIENTS * len(head.encode() + CHUNKS), seconds=20)

    run(story)
    assert max(turns.values()) == 1
    assert longest <= transport.READ_BYTES < len(CHUNKS)


def test_many_who_were_held_back_are_judged_in_turns_when_they_are_released(monkeypatch):
    turns: Counter[int] = Counter()
    turn = [0]
    judge = ModelProtocol.resume

    def go_on(self):
        turns[turn[0]] += 1
        return judge(self)

    monkeypatch.setattr(ModelProtocol, "resume", go_on)

    async def story():
        nonlocal turn
        async with (
            served_gateway("http://127.0.0.1:9", GatewayRules(hold_model_requests=True)) as served,
            others_at_work() as turn,
        ):
            for _ in range(CLIENTS):
                (await served.connect()).ask()
            held = served.gateway._model_protocols
            await until_true(lambda: sum(one.phase is Phase.HELD for one in held) == CLIENTS)
            served.gateway.release_model_requests()
            await until_true(lambda: sum(turns.values()) == CLIENTS)

    run(story)
    assert max(turns.values()) == 1
