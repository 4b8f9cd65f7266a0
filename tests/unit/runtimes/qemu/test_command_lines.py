"""Parts of the QEMU runtime that can be tested without a guest: arguments, frames and redirection."""

import asyncio
import json
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import Command, SandboxSpec, Stats
from sandbox.model.failure import AttemptError
from sandbox.runtimes.qemu import command_lines, guest_components
from sandbox.runtimes.qemu.channel import COST_PER_SECOND_MAX, READ_COST, UNSOLICITED_FRAMES_MAX, Channel, GuestStream
from sandbox.runtimes.qemu.command_lines import (
    Accelerator,
    QemuDescriptors,
    measure_tsc_khz,
    qemu_arguments,
    virtiofsd_arguments,
)
from sandbox.runtimes.qemu.guest import frames, guest_setup
from sandbox.runtimes.qemu.runtime import KvmStatus
from sandbox.runtimes.qemu.sandbox import merge_stats

SPEC = SandboxSpec("abcdefghijkl", Path("/disk"), 2, 512 << 20, 64, {Path("/host/claude"): "/run/sandbox/claude"})
COMPONENTS = guest_components.GuestComponents(
    "/usr/libexec/virtiofsd", Path("/k"), [Path("/m/a.ko.xz")], Path("/py"), Path("/py/bin/python3")
)


def guest_spec(**unreadable_programs: str) -> command_lines.GuestSpec:
    return command_lines.GuestSpec(
        SPEC,
        COMPONENTS,
        {Path(path): inside for path, inside in unreadable_programs.items()},
        Accelerator.TCG,
        Path("/run/s"),
    )


# The jail


def test_guest_has_only_user_networking_and_virtual_devices():
    arguments = qemu_arguments(SPEC, Accelerator.TCG, QemuDescriptors(1, 2, 3, 4))
    devices = {arguments[index + 1].partition(",")[0] for index, word in enumerate(arguments) if word == "-device"}
    assert devices == {"vhost-user-fs-pci", "virtio-serial-pci", "virtserialport", "virtio-net-pci"}
    assert arguments[arguments.index("-netdev") + 1] == "user,id=net,ipv6=off"
    assert "spawn=deny" in arguments[arguments.index("-sandbox") + 1]
    assert "kvm" not in " ".join(arguments)


def test_kvm_is_passed_as_a_descriptor():
    arguments = " ".join(qemu_arguments(SPEC, Accelerator.KVM, QemuDescriptors(1, 2, 3, 104)))
    assert "-add-fd fd=104,set=1 -accel kvm,device=/dev/fdset/1 -cpu host" in arguments
    assert "tsc_early_khz" not in arguments


def test_only_an_emulated_kernel_skips_mitigations_and_slow_features():
    descriptors = QemuDescriptors(1, 2, 3, 4)
    emulated, by_kvm = (
        arguments[arguments.index("-append") + 1].split()
        for arguments in (
            qemu_arguments(SPEC, Accelerator.TCG, descriptors),
            qemu_arguments(SPEC, Accelerator.KVM, descriptors),
        )
    )
    emulated_only = {"mitigations", "tsc", "lsm", "initcall_blacklist", "cryptomgr.notests", "nowatchdog"}
    assert emulated_only <= {word.partition("=")[0] for word in emulated}
    assert not emulated_only & {word.partition("=")[0] for word in by_kvm}
    assert set(by_kvm) < set(emulated)
    assert "console=ttyS0" in emulated, "the console output explains why a boot failed"


def test_guest_memory_is_task_memory_plus_overhead():
    arguments = qemu_arguments(SPEC, Accelerator.TCG, QemuDescriptors(1, 2, 3, 4))
    assert arguments[arguments.index("-m") + 1] == str(512 + 160)


def test_virtiofsd_serves_the_share_but_not_the_jail_root():
    arguments = virtiofsd_arguments(
        "/usr/libexec/virtiofsd", command_lines.SHARE_DIRECTORY, QemuDescriptors(1, 2, 3, 4)
    )
    assert "--shared-dir=/share" in arguments
    assert "--fd=1" in arguments


def test_unreadable_program_is_exposed_for_virtiofsd_only():
    with_unreadable_program = command_lines.GuestSpec(SPEC, COMPONENTS, SPEC.programs, Accelerator.TCG, Path("/run/s"))
    assert command_lines.exposed_program_entries(with_unreadable_program) == [("program", "hidden-0", "/host/claude")]
    assert Path("/host/claude") not in command_lines.exposed_paths(with_unreadable_program).values()
    assert Path("/host/claude") in command_lines.exposed_paths(guest_spec()).values()


def test_missing_components_error_names_the_fix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guest_components, "QEMU", "/nowhere/qemu")
    monkeypatch.setattr(guest_components, "_VIRTIOFSD", ("/nowhere/virtiofsd",))
    with pytest.raises(AttemptError, match=r"Not found: QEMU, virtiofsd.*script/setup --with-qemu"):
        guest_components.find_components()


def test_measured_tsc_frequency_is_plausible():
    assert 10**3 < measure_tsc_khz() < 10**9


# The guest agent

_IMPORTS_OF_GUEST_AGENT = """
import marshal, json, sys
before = set(sys.modules)
{start}
origins = {{name: getattr(sys.modules[name].__spec__, "origin", "") or "" for name in set(sys.modules) - before}}
print(json.dumps([name for name, origin in origins.items() if origin.endswith(".py")]))
"""


def test_guest_agent_is_precompiled_with_few_imports(tmp_path: Path):
    code = tmp_path / "code"
    code.write_bytes(guest_components.compile_guest_agent())
    start = guest_components.build_start_script(Path("/py/bin/python3")).decode()
    assert start.startswith("#!/py/bin/python3 -ISE\n")
    local_start = start.replace(repr(guest_components.GUEST_AGENT_PATH), repr(str(code))).replace(".main()", ".main")
    python = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    command = [str(python), "-ISEc", _IMPORTS_OF_GUEST_AGENT.format(start=local_start)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert completed.returncode == 0, completed.stderr
    # Each import costs an emulated guest 0.1 s.
    assert set(json.loads(completed.stdout)) <= {"struct", "types", "ctypes", "ctypes._endian"}


# KVM


def test_kvm_failure_is_shared_between_processes_until_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: path == "/dev/kvm")
    kvm_status = KvmStatus(tmp_path / "run")
    assert kvm_status.is_usable()
    kvm_status.record_failure()
    assert not KvmStatus(tmp_path / "run").is_usable()
    kvm_status.reset()
    assert kvm_status.is_usable()


def test_kvm_failure_of_an_earlier_boot_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: True)
    kvm_status = KvmStatus(tmp_path)
    kvm_status.record_failure()
    (tmp_path / "kvm-does-not-work").write_text("another boot")
    assert kvm_status.is_usable()


# Frames


def test_string_lists_round_trip_with_trailing_bytes():
    lists = [[b"/workspace"], [b"/bin/sh", b"-c", b""], [b"A=1\n", b"B="]]
    assert frames.unpack_three_string_lists(frames.pack_string_lists(*lists) + b"in\0put") == (lists, b"in\0put")


def received_frames(*chunks: bytes, request_count: int = 0) -> list[tuple[bytes, int, bytes]]:
    """Return the frames that a channel receives when the guest sends these chunks after `request_count` requests."""
    received: list[tuple[bytes, int, bytes]] = []

    async def run() -> None:
        host_end, guest_end = socket.socketpair()
        stream = GuestStream(
            channel := Channel(lambda *frame: received.append(frame) or is_output(frame)), frames.STDOUT_STREAM
        )

        def is_output(frame: tuple[bytes, int, bytes]) -> bool:
            return frame[0] == frames.DATA and stream.feed(frame[2])

        await channel.open(host_end)
        for _ in range(request_count):
            channel.send(frames.GET_STATS, 0)
        with guest_end:
            for chunk in chunks:
                guest_end.send(chunk)
                await asyncio.sleep(0)
        await asyncio.wait_for(channel.ended, 10)

    asyncio.run(run())
    return received


def test_frames_are_parsed_at_any_chunk_boundaries():
    encoded = frames.pack(frames.DATA, 1, b"abc") + frames.pack(frames.CLOSED, 1)
    expected = [(frames.DATA, 1, b"abc"), (frames.CLOSED, 1, b"")]
    assert received_frames(*(bytes([value]) for value in encoded)) == received_frames(encoded) == expected


def test_oversized_frame_closes_the_channel():
    huge = frames.HEADER.pack(frames.DATA, b"\1", frames.GUEST_FRAME_BYTES_MAX + 1)
    assert received_frames(frames.pack(frames.DATA, 1, b"a") + huge + frames.pack(frames.DATA, 1, b"b")) == [
        (frames.DATA, 1, b"a")
    ]


@pytest.mark.parametrize(
    "frame",
    [(frames.DATA, 1, b""), (b"?", 9, b"x"), (frames.STATS, 0, bytes(32)), (frames.EXIT, 0, b"")],
    ids=["empty output", "unknown type", "stats", "exit"],
)
def test_flood_of_unrequested_frames_closes_the_channel(frame: tuple[bytes, int, bytes]):
    flood = frames.pack(*frame) * 500
    assert len(received_frames(flood, flood)) == UNSOLICITED_FRAMES_MAX + 1


def test_responses_and_output_are_unlimited():
    responses, output = frames.pack(frames.STATS, 0, bytes(32)) * 200, frames.pack(frames.DATA, 1, b"x") * 2000
    assert len(received_frames(responses + output, output, request_count=50)) == 4200


def reads_and_frames(piece: bytes) -> tuple[int, int]:
    """Return the numbers of reads and frames in one second while a guest sends `piece` continuously."""
    frame_count = 0

    async def run() -> int:
        def count_frame(kind: bytes, number: int, body: bytes) -> bool:
            nonlocal frame_count
            frame_count += 1
            return True

        host_end, guest_end = socket.socketpair()
        guest_end.setblocking(False)
        channel, reads = Channel(count_frame), 0
        data_received = channel.data_received

        def count_read(data: bytes) -> None:
            nonlocal reads
            reads += 1
            data_received(data)

        channel.data_received = count_read  # type: ignore[method-assign]
        await channel.open(host_end)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 1
        with guest_end:
            while loop.time() < deadline:
                with suppress(BlockingIOError):
                    guest_end.send(piece)
                await asyncio.sleep(0)
        channel.abort()
        return reads

    return asyncio.run(run()), frame_count


def test_single_byte_writes_are_throttled():
    reads, _ = reads_and_frames(b"\0")
    assert reads <= 2 * COST_PER_SECOND_MAX / READ_COST + 1


def test_small_frames_are_throttled():
    flood = frames.pack(frames.DATA, 1, b"x") * 4000
    _, frame_count = reads_and_frames(flood)
    assert frame_count <= 2 * COST_PER_SECOND_MAX + 40_000


@pytest.mark.parametrize(("size", "count"), [(frames.GUEST_FRAME_BYTES_MAX, 1000), (80, 50_000)], ids=["long", "lines"])
async def test_output_is_not_throttled(size: int, count: int, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(Channel, "_resume_reading", lambda _: pauses.append(1), raising=False)

    async def run() -> int:
        sizes: list[int] = []
        host_end, guest_end = socket.socketpair()
        guest_end.setblocking(False)
        channel = Channel(lambda kind, number, body: bool(sizes.append(len(body))) or True)
        await channel.open(host_end)
        with guest_end:
            for _ in range(count // 1000):
                await asyncio.get_running_loop().sock_sendall(
                    guest_end, frames.pack(frames.DATA, 1, bytes(size)) * 1000
                )
        await asyncio.wait_for(channel.ended, 10)
        return sum(sizes)

    assert (await run()) == size * count
    assert not pauses


def test_stats_reported_by_the_guest_are_clamped_to_the_limits():
    spec = SandboxSpec("attempt", Path("/disk"), cpus=1, memory_bytes=1000, processes_max=10)
    stats = merge_stats(Stats(1.5, 5000, 4, oom_kills=1), (2**64 - 1, 2**64 - 1, 2, 3), spec)
    assert stats == Stats(1.5, 1000, 10, oom_kills=3, fork_failures=3)
    assert merge_stats(Stats(1.5, 5000, 4), (700, 7, 0, 0), spec) == Stats(1.5, 700, 7)


def test_encoded_command_sets_pwd_and_rejects_nul_characters():
    from sandbox.runtimes.qemu.sandbox import _encode_command

    (directory, argv, environment), rest = frames.unpack_three_string_lists(
        _encode_command(Command(["a", "b"], {"X": "y"}, "/workspace"))
    )
    assert (directory, argv, rest) == ([b"/workspace"], [b"a", b"b"], b"")
    assert environment == [b"PWD=/workspace", b"X=y"]
    with pytest.raises(AttemptError, match="NUL"):
        _encode_command(Command(["a\0b"], {}, "/workspace"))


# Redirection


def run_redirection(program: bytes, address: str, port: int) -> str:
    """Interpret the BPF program. Return the address that the kernel would connect to."""
    memory = {4: int.from_bytes(socket.inet_aton(address), "little"), 24: socket.htons(port)}
    registers = dict.fromkeys(range(11), 0)
    position = 0
    while True:
        code, names, offset, value = struct.unpack_from("=BBhi", program, position * 8)
        target, source = names & 15, names >> 4
        position += 1
        if code == 0x95:
            assert registers[0] == 1, "the connection is refused"
            return socket.inet_ntoa(memory[4].to_bytes(4, "little"))
        if code == 0x61:
            registers[target] = memory[offset]
        elif code == 0x63:
            memory[offset] = registers[source]
        elif code == 0xB7:
            registers[target] = value
        elif code == 0x05 or (code == 0x15) == (registers[target] == value):
            position += offset


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [
        ("127.0.0.1", 8123, "10.0.2.2"),
        ("127.0.0.1", 3128, "10.0.2.2"),
        ("127.0.0.1", 3000, "127.0.0.1"),
        ("127.0.0.2", 8123, "127.0.0.2"),
        ("198.18.3.4", 3128, "198.18.3.4"),
    ],
)
def test_only_gateway_ports_on_loopback_are_redirected(address: str, port: int, expected: str):
    assert run_redirection(guest_setup.assemble_redirection([8123, 3128], "10.0.2.2"), address, port) == expected
