"""The requests of runners for git credentials, on the worker's side of the socket pair."""

import asyncio
import socket

import msgspec
import pytest

from doubles.sandbox_lifecycle import new_attempt_id
from sandbox.interfaces.workspace import CredentialAnswer, CredentialQuery, CredentialRequest, Credentials
from sandbox.worker import task_requests as module
from sandbox.worker.task_requests import RunnerCredentialRequests
from sandbox.workspace.clone.remote_access import ServerCredentials

FOUND = Credentials(b"me", b"let-me-in")
QUERY = CredentialQuery("https", "git.example")
REQUEST = CredentialRequest(1, new_attempt_id(), "https", "git.example")


@pytest.fixture
def worker_and_runner():
    worker, runner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with worker, runner:
        runner.setblocking(False)
        yield worker, runner


class FakeServer:
    """Answers requests, unless the connection to it is broken."""

    def __init__(self):
        self.requests, self.is_connected, self.asked = [], True, asyncio.Event()

    async def ask(self, request):
        self.requests.append(request)
        self.asked.set()
        if not self.is_connected:
            await asyncio.Event().wait()
        return CredentialAnswer(request.number, FOUND)


def send(runner, request):
    runner.send(msgspec.msgpack.encode(request))


async def read_answer(runner):
    async with asyncio.timeout(20):
        data = await asyncio.get_running_loop().sock_recv(runner, 65536)
    return msgspec.msgpack.decode(data, type=CredentialAnswer)


async def test_runner_gets_the_answer_of_the_server(worker_and_runner):
    server, requests = FakeServer(), RunnerCredentialRequests(worker_and_runner[0])
    serving = asyncio.create_task(requests.serve(server.ask))
    for _ in range(2):
        assert (
            await asyncio.wait_for(ServerCredentials(worker_and_runner[1], new_attempt_id()).find(QUERY), 20) == FOUND
        )
    serving.cancel()


async def test_next_session_continues_with_a_request_without_an_answer(worker_and_runner):
    broken, server, requests = FakeServer(), FakeServer(), RunnerCredentialRequests(worker_and_runner[0])
    broken.is_connected = False
    serving = asyncio.create_task(requests.serve(broken.ask))
    send(worker_and_runner[1], REQUEST)
    await asyncio.wait_for(broken.asked.wait(), 20)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)

    serving = asyncio.create_task(requests.serve(server.ask))
    assert await read_answer(worker_and_runner[1]) == CredentialAnswer(1, FOUND)
    assert server.requests == [REQUEST]
    serving.cancel()


async def test_request_that_arrives_as_a_session_ends_is_not_lost(worker_and_runner):
    server, requests = FakeServer(), RunnerCredentialRequests(worker_and_runner[0])
    for number in range(20):
        serving = asyncio.create_task(requests.serve(server.ask))
        for _ in range(number % 4):
            await asyncio.sleep(0)
        send(worker_and_runner[1], msgspec.structs.replace(REQUEST, number=number))
        for _ in range(number // 4):
            await asyncio.sleep(0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        serving = asyncio.create_task(requests.serve(server.ask))
        assert (await read_answer(worker_and_runner[1])).number == number
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_server_is_not_queried_for_a_runner_that_no_longer_waits(worker_and_runner, monkeypatch):
    monkeypatch.setattr(module, "CREDENTIAL_ANSWER_SECONDS", 0)
    server, requests = FakeServer(), RunnerCredentialRequests(worker_and_runner[0])
    serving = asyncio.create_task(requests.serve(server.ask))
    send(worker_and_runner[1], REQUEST)
    await asyncio.sleep(0.1)
    monkeypatch.setattr(module, "CREDENTIAL_ANSWER_SECONDS", 20)
    send(worker_and_runner[1], msgspec.structs.replace(REQUEST, number=2))
    assert (await read_answer(worker_and_runner[1])).number == 2
    assert [request.number for request in server.requests] == [2]
    serving.cancel()


@pytest.mark.parametrize("data", [b"\xc1", b"x" * 60_000, msgspec.msgpack.encode({"type": "credential_request"})])
async def test_invalid_request_is_ignored(worker_and_runner, data, caplog):
    server, requests = FakeServer(), RunnerCredentialRequests(worker_and_runner[0])
    serving = asyncio.create_task(requests.serve(server.ask))
    worker_and_runner[1].send(data)
    send(worker_and_runner[1], REQUEST)
    assert await read_answer(worker_and_runner[1]) == CredentialAnswer(1, FOUND)
    assert server.requests == [REQUEST]
    assert "is not valid" in caplog.text
    serving.cancel()


async def test_answers_that_no_runner_reads_do_not_stop_the_worker(worker_and_runner):
    worker_and_runner[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    server, requests = FakeServer(), RunnerCredentialRequests(worker_and_runner[0])
    serving = asyncio.create_task(requests.serve(server.ask))
    for number in range(200):
        send(worker_and_runner[1], msgspec.structs.replace(REQUEST, number=number))
        while worker_and_runner[1].fileno() and len(server.requests) <= number:
            await asyncio.sleep(0.001)
    assert not serving.done()
    serving.cancel()
