"""The credentials that a worker needs, and attacks with a join token but without the cluster's host key."""

import contextlib
import os

import msgspec
import pytest

from doubles.cluster_server import HOST, ClusterServer, wait_until
from sandbox import __version__
from sandbox.interfaces.cluster_engine import (
    IDENTITY_TOKEN_CHARACTERS_MAX,
    EngineUnavailableError,
    JobPhase,
    WorkerRejectedError,
)
from sandbox.interfaces.worker_messages import (
    NO_JOIN_TOKEN,
    PROTOCOL_VERSION,
    Claimed,
    Heartbeat,
    HeartbeatAnswer,
    HostProof,
    ProveHost,
    WorkerDismissed,
)
from sandbox.placements.cluster import jobs, worker_authorization
from sandbox.primitives.message_stream import encode_message
from sandbox.primitives.secret_digests import compute_host_proof

KEY = b"k" * 32
HEARTBEAT_WITH_FREE_LOCK = Heartbeat(1, "free", 0, 0, is_launching=False)


def prove(server, claim, challenge, /, **changes):
    """Return the proof of a worker that has the key, with changes."""
    fields = {
        "key": KEY,
        "challenge": challenge,
        "attempt_id": claim.attempt_id,
        "host": claim.host,
        "worker_nonce": claim.nonce,
        "certificate_fingerprint": server.certificate_fingerprint,
    }
    return HostProof(compute_host_proof(**fields | changes))


async def challenge_of(client):
    message = await client.read()
    assert isinstance(message, ProveHost)
    return message.challenge


@contextlib.asynccontextmanager
async def claimed(server, claim, **changes):
    """Claim a job with a proof."""
    async with server.connect(claim) as client:
        await client.send(prove(server, claim, await challenge_of(client), **changes))
        assert isinstance(await client.read(), Claimed)
        yield client


async def check_not_accepted(client, reason=None):
    """Check that the server closes the connection, and which reason it sends."""
    answer = await client.read()
    if reason is None:
        assert answer is None
    else:
        assert isinstance(answer, WorkerDismissed)
        assert reason in answer.reason
        assert await client.read() is None


class TestProofOfTheHost:
    @pytest.fixture
    async def server(self, tmp_path):
        server = ClusterServer(tmp_path)
        server.cluster_key = KEY
        await server.start()
        yield server
        await server.stop()

    async def test_worker_with_the_key_gets_the_task(self, server, job):
        async with claimed(server, server.claim(job)) as client:
            await client.send(HEARTBEAT_WITH_FREE_LOCK)
            assert await client.read() == HeartbeatAnswer(1)

    async def test_lost_answer_does_not_consume_the_token(self, server, job):
        """The server, even after a restart, identifies the worker by its nonce."""
        claim = server.claim(job)
        async with server.connect(claim) as client:
            await client.send(prove(server, claim, await challenge_of(client)))
            await wait_until(lambda: job.is_claimed)  # the answer is not read
        async with server.connect(claim) as again:
            assert isinstance(await again.read(), Claimed)
        await server.restart()
        async with server.connect(claim) as again:
            assert isinstance(await again.read(), Claimed)

    async def test_connection_that_breaks_before_the_proof_does_not_consume_the_token(self, server, job):
        claim = server.claim(job)
        for _ in range(2):
            async with server.connect(claim) as client:
                await challenge_of(client)
        await server.restart()
        async with claimed(server, claim):
            pass

    async def test_another_worker_with_the_key_is_rejected_after_the_claim(self, server, job):
        async with claimed(server, server.claim(job)) as client, server.connect(server.claim(job)) as other:
            await check_not_accepted(other, "Another worker has this attempt")
            await client.send(HEARTBEAT_WITH_FREE_LOCK)
            assert await client.read() == HeartbeatAnswer(1)

    async def test_two_workers_with_the_key_and_the_token_do_not_both_get_the_task(self, server, job):
        first, second = server.claim(job), server.claim(job)
        async with server.connect(first) as slow, server.connect(second) as fast:
            slow_challenge = await challenge_of(slow)
            await fast.send(prove(server, second, await challenge_of(fast)))
            assert isinstance(await fast.read(), Claimed)
            await slow.send(prove(server, first, slow_challenge))
            await check_not_accepted(slow, "Another worker has this attempt")

    async def test_token_is_checked_before_the_challenge(self, server, job):
        """A client without the token can neither cause computations nor learn what the server requires."""
        async with server.connect(server.claim(job, token=os.urandom(32))) as client:
            await check_not_accepted(client, "Another worker has this attempt")

    @pytest.mark.parametrize(
        "changes",
        [
            {"key": b"x" * 32},
            {"key": b""},
            {"host": "host-2"},
            {"attempt_id": "abcdefghijkl"},
            {"worker_nonce": bytes(32)},
            {"challenge": bytes(32)},
            {"certificate_fingerprint": "0" * 64},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    async def test_proof_with_a_different_field_is_rejected(self, server, job, changes):
        """A relaying server can get a proof from a worker, but the proof is valid only for the relaying server."""
        claim = server.claim(job)
        async with server.connect(claim) as client:
            await client.send(prove(server, claim, await challenge_of(client), **changes))
            await check_not_accepted(client, f"The host {HOST} has a different key than the server")
        assert not job.is_claimed
        async with claimed(server, server.claim(job)):
            pass

    async def test_proof_of_another_connection_is_rejected(self, server, job):
        claim = server.claim(job)
        async with server.connect(claim) as first, server.connect(claim) as second:
            proof = prove(server, claim, await challenge_of(first))
            await challenge_of(second)
            await second.send(proof)
            await check_not_accepted(second, "different key")
            await first.send(proof)
            assert isinstance(await first.read(), Claimed)

    async def test_proof_that_was_valid_once_is_rejected(self, server, job):
        """A proof is valid only for one attempt id and one challenge. The job of another task has different ones."""
        claim, other = server.claim(job), await server.submit("task-2")
        async with server.connect(claim) as client:
            proof = prove(server, claim, await challenge_of(client))
            await client.send(proof)
            assert isinstance(await client.read(), Claimed)
        async with server.connect(server.claim(other, nonce=claim.nonce)) as client:
            await challenge_of(client)
            await client.send(proof)
            await check_not_accepted(client, "different key")
        assert not other.is_claimed

    async def test_challenge_that_is_sent_back_is_rejected(self, server, job):
        async with server.connect(server.claim(job)) as client:
            await client.send(HostProof(await challenge_of(client)))
            await check_not_accepted(client, "different key")
        assert not job.is_claimed

    @pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
    async def test_proof_with_a_wrong_length_is_rejected(self, server, job, length):
        claim = server.claim(job)
        async with server.connect(claim) as client:
            proof = prove(server, claim, await challenge_of(client)).proof
            await client.send(HostProof((2 * proof)[:length]))
            await check_not_accepted(client)
        assert not job.is_claimed

    @pytest.mark.parametrize("message", ["nothing", "heartbeat", "claim", "garbage", "too large", "HTTP"])
    async def test_worker_cannot_skip_the_proof(self, server, job, message):
        claim = server.claim(job)
        messages = {
            "heartbeat": encode_message(HEARTBEAT_WITH_FREE_LOCK),
            "claim": encode_message(claim),
            "garbage": b"\x00\x00\x00\x05hello",
            "too large": b"\x00\x00\x20\x01" + bytes(0x2001),
            "HTTP": b"GET / HTTP/1.1\r\n\r\n",
        }
        async with server.connect(claim) as client:
            await challenge_of(client)
            if message == "nothing":
                client.writer.close()
            else:
                await client.send(messages[message])
            await check_not_accepted(client)
        assert not job.is_claimed
        is_malformed = message != "nothing"
        assert ("sent an invalid host proof" in server.jobs.status("task-1").reason) is is_malformed

    async def test_worker_without_the_key_is_rejected_with_a_reason(self, server, job):
        async with server.connect(server.claim(job)) as client:
            await challenge_of(client)
            await client.send(HostProof(None))
            await check_not_accepted(client, f"The worker on {HOST} cannot read the key of its host")
        assert "cluster.host_key_file" in server.jobs.status("task-1").reason

    async def test_silent_worker_is_disconnected(self, server, job, monkeypatch):
        monkeypatch.setattr(worker_authorization, "_PROOF_SECONDS", 0.2)
        async with server.connect(server.claim(job)) as client:
            await challenge_of(client)
            await check_not_accepted(client)
        assert "did not authenticate its host in time" in server.jobs.status("task-1").reason
        async with claimed(server, server.claim(job)):
            assert "did not prove" not in server.jobs.status("task-1").reason

    async def test_rejection_after_the_end_of_the_task_is_not_recorded(self, server, job):
        claim = server.claim(job)
        async with server.connect(claim) as client:
            proof = prove(server, claim, await challenge_of(client), key=b"x" * 32)
            server.jobs.notify_task_ended("task-1")
            await client.send(proof)
            await check_not_accepted(client, "different key")
        assert server.jobs.rejections.reason("task-1") == ""

    async def test_worker_with_a_valid_proof_is_rejected_unless_the_engine_confirms_its_host(
        self, server, job, monkeypatch
    ):
        monkeypatch.setattr(jobs, "_HOST_CONFIRMATION_TIMEOUT_SECONDS", 0.2)
        claim = server.claim(job, host="host-2")
        async with server.connect(claim) as client:
            await client.send(prove(server, claim, await challenge_of(client)))
            await check_not_accepted(client)
        assert not job.is_claimed

    async def test_running_worker_continues_after_the_key_is_set_or_replaced(self, server, job):
        claim = server.claim(job)
        async with claimed(server, claim):
            pass
        server.cluster_key = b"n" * 32
        await server.restart()
        async with server.connect(claim) as client:
            assert isinstance(await client.read(), Claimed)


async def test_server_without_a_key_requires_no_proof(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)


# Versions.


async def test_worker_of_another_version_is_rejected_with_both_versions_and_the_remedy(server, job):
    async with server.connect(server.claim(job, version="0.0.9")) as client:
        await check_not_accepted(
            client,
            f"The host {HOST} has Sandbox 0.0.9, and the server has Sandbox {__version__}. "
            f"Install Sandbox {__version__} on {HOST}, or restart the server if it was upgraded.",
        )
    assert not job.is_claimed
    assert "has Sandbox 0.0.9" in server.jobs.status("task-1").reason
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
    assert "0.0.9" not in server.jobs.status("task-1").reason


async def test_worker_that_sends_no_version_is_rejected(server, job):
    claim = msgspec.to_builtins(server.claim(job))
    del claim["version"], claim["protocol"]
    body = msgspec.msgpack.encode({**claim, "token": server.tokens(job)[-1], "nonce": os.urandom(32)})
    async with server.connect(len(body).to_bytes(4) + body) as client:
        await check_not_accepted(client, "has an earlier version of Sandbox (protocol 1), and the server has Sandbox")


async def test_worker_with_another_protocol_version_is_rejected(server, job):
    async with server.connect(server.claim(job, protocol=PROTOCOL_VERSION + 1)) as client:
        await check_not_accepted(client, f"(protocol {PROTOCOL_VERSION + 1})")
    assert not job.is_claimed


@pytest.mark.parametrize("version", ["1.0\n", "\x1b[2J", "x" * 65, "<b>"])
async def test_text_that_is_not_a_version_is_malformed(server, job, version):
    async with server.connect(server.claim(job, version=version)) as client:
        await check_not_accepted(client)
    assert server.jobs.status("task-1").reason == job.reason


async def test_running_worker_survives_a_server_upgrade_with_the_same_protocol_version(server, job, monkeypatch):
    claim = server.claim(job)
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)
    monkeypatch.setattr(worker_authorization, "__version__", "99.0.0")
    await server.restart()
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)


async def test_running_worker_is_rejected_by_a_server_with_another_protocol_version(server, job, monkeypatch):
    claim = server.claim(job)
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)
    monkeypatch.setattr(worker_authorization, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    await server.restart()
    async with server.connect(claim) as client:
        await check_not_accepted(client, f"(protocol {PROTOCOL_VERSION})")


async def test_reason_is_shown_until_another_worker_claims_the_next_job(server, job, monkeypatch):
    """The rejected worker ends. Its job is replaced after a pause that grows with each rejection."""
    for name in ("POLL_SECONDS", "_RESUBMIT_SECONDS", "_REPLACE_SECONDS_MAX"):
        monkeypatch.setattr(jobs, name, 0.02)
    async with server.connect(server.claim(job, version="0.0.9")) as client:
        assert isinstance(await client.read(), WorkerDismissed)
    server.engine.set_phase(job, JobPhase.ENDED)
    replaced = await wait_until(lambda: (now := server.jobs.of_task("task-1")) is not job and now)
    reason = server.jobs.status("task-1").reason
    assert reason.startswith("The worker was rejected; another one will be started after a pause. The host")
    await wait_until(lambda: server.tokens(replaced), "the submission")
    await wait_until(lambda: replaced.phase is JobPhase.RUNNING)
    assert "has Sandbox 0.0.9" in server.jobs.status("task-1").reason
    async with server.connect(server.claim(replaced)) as client:
        assert isinstance(await client.read(), Claimed)
    assert "0.0.9" not in server.jobs.status("task-1").reason


class FakeVerifier:
    """Accepts one token. error: raised instead of a check."""

    def __init__(self):
        self.error, self.calls = None, []

    async def verify(self, name, host, token):
        self.calls.append((name, host, token))
        if self.error is not None:
            raise self.error
        if token != "valid":
            raise WorkerRejectedError("The token is not valid.")


class TestIdentityToken:
    """The engine gives each worker an identity token instead of a join token."""

    @pytest.fixture
    async def server(self, tmp_path):
        server = ClusterServer(tmp_path)
        server.verifier = FakeVerifier()
        await server.start()
        yield server
        await server.stop()

    async def send_token(self, client, token="valid"):
        await challenge_of(client)
        await client.send(HostProof(None, token))

    async def test_worker_with_a_valid_token_gets_the_task(self, server, job):
        assert server.tokens(job) == [NO_JOIN_TOKEN]
        async with server.connect(server.claim(job)) as client:
            await self.send_token(client)
            assert isinstance(await client.read(), Claimed)
        assert server.verifier.calls == [(job.name, HOST, "valid")]

    @pytest.mark.parametrize("token", ["", "invalid", "x" * IDENTITY_TOKEN_CHARACTERS_MAX])
    async def test_worker_without_a_valid_token_is_rejected(self, server, job, token):
        async with server.connect(server.claim(job)) as client:
            await self.send_token(client, token)
            await check_not_accepted(client, "The token is not valid.")
        assert "The token is not valid." in server.jobs.status("task-1").reason
        async with server.connect(server.claim(job)) as client:
            await self.send_token(client)
            assert isinstance(await client.read(), Claimed)
        assert "The token" not in server.jobs.status("task-1").reason

    async def test_token_that_is_too_long_is_malformed(self, server, job):
        async with server.connect(server.claim(job)) as client:
            await self.send_token(client, "x" * (IDENTITY_TOKEN_CHARACTERS_MAX + 1))
            await check_not_accepted(client)
        assert server.verifier.calls == []

    @pytest.mark.parametrize("changes", [{"version": "6.6.6"}, {"protocol": PROTOCOL_VERSION + 1}, {"host": "evil"}])
    async def test_values_of_a_worker_without_a_valid_token_are_not_shown(self, server, job, changes, monkeypatch):
        """Anyone who can connect can send such a claim: NO_JOIN_TOKEN is no secret."""
        monkeypatch.setattr(worker_authorization, "_PROOF_SECONDS", 0.1)
        before = server.jobs.status("task-1").reason
        async with server.connect(server.claim(job, **changes)) as client:
            await challenge_of(client)
            await check_not_accepted(client)
        async with server.connect(server.claim(job, **changes)) as client:
            await challenge_of(client)
            await client.send(HEARTBEAT_WITH_FREE_LOCK)
            await check_not_accepted(client)
        assert server.jobs.status("task-1").reason == before
        async with server.connect(server.claim(job, **changes)) as client:
            await self.send_token(client, "invalid")
            await check_not_accepted(client, "The token is not valid.")
        reason = server.jobs.status("task-1").reason
        assert not [text for text in ("6.6.6", "version", "evil") if text in reason]

    async def test_version_of_a_worker_with_a_valid_token_is_checked(self, server, job):
        async with server.connect(server.claim(job, version="0.0.9")) as client:
            await self.send_token(client)
            await check_not_accepted(client, "0.0.9")
        assert "0.0.9" in server.jobs.status("task-1").reason

    async def test_worker_tries_again_while_the_engine_is_not_responding(self, server, job):
        server.verifier.error = EngineUnavailableError("It is not responding.")
        async with server.connect(server.claim(job)) as client:
            await self.send_token(client)
            await check_not_accepted(client)
        assert not job.is_claimed
        server.verifier.error = None
        async with server.connect(server.claim(job)) as client:
            await self.send_token(client)
            assert isinstance(await client.read(), Claimed)

    async def test_worker_that_reconnects_is_identified_by_its_random_number(self, server, job):
        claim = server.claim(job)
        async with server.connect(claim) as client:
            await self.send_token(client)
            assert isinstance(await client.read(), Claimed)
        await server.restart()
        async with server.connect(claim) as client:
            assert isinstance(await client.read(), Claimed)
        async with server.connect(server.claim(job)) as other:
            await check_not_accepted(other, "Another worker has this attempt")
        assert len(server.verifier.calls) == 1

    async def test_server_that_checks_no_tokens_accepts_no_worker_without_a_join_token(self, server, job):
        """The settings select another engine, but the job is still stored."""
        claim = server.claim(job)
        await server.stop()
        server.verifier = None
        await server.start()
        async with server.connect(claim) as client:
            await check_not_accepted(client, "The worker has no join token.")

    async def test_valid_token_does_not_replace_the_confirmation_of_the_host(self, server, job, monkeypatch):
        monkeypatch.setattr(jobs, "_HOST_CONFIRMATION_TIMEOUT_SECONDS", 0.2)
        async with server.connect(server.claim(job, host="host-2")) as client:
            await self.send_token(client)
            await check_not_accepted(client)
        assert not job.is_claimed


async def test_claim_without_a_join_token_is_rejected_by_a_server_with_join_tokens(server, job):
    async with server.connect(server.claim(job, token=NO_JOIN_TOKEN)) as client:
        await check_not_accepted(client, "Another worker has this attempt")
