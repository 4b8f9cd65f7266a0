"""Programs inside make the gateway work as hard as they can; its runner has other things to do all the same."""

import asyncio
from collections import Counter

from doubles.served_gateway import run, served_gateway, until_true
from sandbox.gateway import line
from sandbox.gateway.model import ModelConversation

CLIENTS = 8
CHUNKS = b"1\r\nx\r\n" * 10_000


def test_many_who_send_tiny_chunks_never_keep_the_loop_from_others(monkeypatch):
    turns: Counter[int] = Counter()
    turn, judged, longest = 0, 0, 0
    judge = ModelConversation.client_sent

    def client_sent(self, data):
        nonlocal judged, longest
        turns[turn] += 1
        judged, longest = judged + len(data), max(longest, len(data))
        return judge(self, data)

    monkeypatch.setattr(ModelConversation, "client_sent", client_sent)

    async def others():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def story():
        async with served_gateway("http://127.0.0.1:9") as served:
            other = asyncio.create_task(others())
            clients = [await served.connect() for _ in range(CLIENTS)]
            head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
            for client in clients:
                client.writer.write(head.encode() + CHUNKS)
            await until_true(lambda: judged == CLIENTS * len(head.encode() + CHUNKS), seconds=20)
            other.cancel()

    run(story)
    assert max(turns.values()) == 1
    assert longest <= line.READ_BYTES < len(CHUNKS)
