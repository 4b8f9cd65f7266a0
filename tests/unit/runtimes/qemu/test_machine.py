"""What of guests can be known without one: the cage's words, the frames, the redirection."""

import asyncio
import json
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from sandbox.interfaces.runtime import Command, SandboxSpec, Stats
from sandbox.model.errors import AttemptError
from sandbox.runtimes.qemu import jail, parts
from sandbox.runtimes.qemu.channel import (
    CONSOLE_BYTES_MAX,
    CONSOLE_PAUSE_SECONDS,
    COST_PER_SECOND_MAX,
    READ_COST,
    UNASKED_MAX,
    Channel,
    GuestStream,
    OutputTail,
)
from sandbox.runtimes.qemu.guest import frames, redirection
from sandbox.runtimes.qemu.kvm import KvmStatus
from sandbox.runtimes.qemu.machine import (
    Accelerator,
    QemuDescriptors,
    measure_tsc_khz,
    qemu_arguments,
    virtiofsd_arguments,
)
from sandbox.runtimes.qemu.sandbox import join_figures

SPEC = SandboxSpec("abcdefghijkl", Path("/disk"), 2, 512 << 20, 64, {Path("/host/claude"): "/run/sandbox/claude"})
PARTS = parts.GuestComponents(
    "/usr/libexec/virtiofsd", Path("/k"), [Path("/m/a.ko.xz")], Path("/py"), Path("/py/bin/python3")
)


def plan(**hidden: str) -> jail.GuestPlan:
    return jail.GuestPlan(
        SPEC, PARTS, {Path(path): inside for path, inside in hidden.items()}, Accelerator.TCG, Path("/run/s")
    )


# The cage


def test_the_guest_has_no_network_but_the_one_that_dials_from_the_cage_and_no_device_of_the_hosts():
    words = qemu_arguments(SPEC, Accelerator.TCG, QemuDescriptors(1, 2, 3, 4))
    devices = {words[index + 1].partition(",")[0] for index, word in enumerate(words) if word == "-device"}
    assert devices == {"vhost-user-fs-pci", "virtio-serial-pci", "virtserialport", "virtio-net-pci"}
    assert words[words.index("-netdev") + 1] == "user,id=net,ipv6=off"
    assert "spawn=deny" in words[words.index("-sandbox") + 1]
    assert "kvm" not in " ".join(words)


def test_kvm_is_used_by_a_descriptor_that_qemu_could_not_open():
    words = " ".join(qemu_arguments(SPEC, Accelerator.KVM, QemuDescriptors(1, 2, 3, 104)))
    assert "-add-fd fd=104,set=1 -accel kvm,device=/dev/fdset/1 -cpu host" in words
    assert "tsc_early_khz" not in words


def test_only_an_emulated_kernel_leaves_out_guards_of_the_processor_and_what_is_dear_to_emulate():
    ends = QemuDescriptors(1, 2, 3, 4)
    emulated, by_kvm = (
        words[words.index("-append") + 1].split()
        for words in (qemu_arguments(SPEC, Accelerator.TCG, ends), qemu_arguments(SPEC, Accelerator.KVM, ends))
    )
    left_out = {"mitigations", "tsc", "lsm", "initcall_blacklist", "cryptomgr.notests", "nowatchdog"}
    assert left_out <= {word.partition("=")[0] for word in emulated}
    assert not left_out & {word.partition("=")[0] for word in by_kvm}
    assert set(by_kvm) < set(emulated)
    assert "console=ttyS0" in emulated, "its last words tell why a boot failed"


def test_the_guests_memory_is_the_tasks_and_what_it_needs_itself():
    words = qemu_arguments(SPEC, Accelerator.TCG, QemuDescriptors(1, 2, 3, 4))
    assert words[words.index("-m") + 1] == str(512 + 160)


def test_virtiofsd_serves_the_share_and_not_the_cages_root():
    words = virtiofsd_arguments("/usr/libexec/virtiofsd", jail.SHARE_DIRECTORY, QemuDescriptors(1, 2, 3, 4))
    assert "--shared-dir=/share" in words
    assert "--fd=1" in words


def test_a_program_that_cannot_be_read_is_laid_for_virtiofsd_and_not_where_the_command_sees_it():
    hidden = jail.GuestPlan(SPEC, PARTS, SPEC.programs, Accelerator.TCG, Path("/run/s"))
    assert jail.staged_program_entries(hidden) == [("program", "hidden-0", "/host/claude")]
    assert Path("/host/claude") not in jail.staged_paths(hidden).values()
    assert Path("/host/claude") in jail.staged_paths(plan()).values()


def test_only_an_emulated_guest_has_the_kernel_that_is_unpacked_already():
    both = msgspec.structs.replace(PARTS, vmlinux=Path("/unpacked"))
    emulated = msgspec.structs.replace(plan(), components=both)
    by_kvm = msgspec.structs.replace(emulated, accelerator=Accelerator.KVM)
    chosen = [jail.staged_paths(one)["kernel"] for one in (emulated, by_kvm, plan())]
    assert chosen == [Path("/unpacked"), PARTS.kernel, PARTS.kernel]


def test_what_is_missing_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "QEMU", "/nowhere/qemu")
    monkeypatch.setattr(parts, "_VIRTIOFSD", ("/nowhere/virtiofsd",))
    with pytest.raises(AttemptError, match=r"Not found: QEMU, virtiofsd.*script/setup --with-qemu"):
        parts.find_components()


def test_the_processor_counts_faster_than_a_megahertz_and_slower_than_a_terahertz():
    assert 10**3 < measure_tsc_khz() < 10**9


# The agent

_FINDS_ITS_AGENT = """
import marshal, json, sys
before = set(sys.modules)
{start}
origins = {{name: getattr(sys.modules[name].__spec__, "origin", "") or "" for name in set(sys.modules) - before}}
print(json.dumps([name for name, origin in origins.items() if origin.endswith(".py")]))
"""


def test_the_guests_first_program_is_compiled_already_and_loads_little_beside_itself(tmp_path: Path):
    code = tmp_path / "code"
    code.write_bytes(jail.compile_agent())
    start = jail.build_start_script(Path("/py/bin/python3")).decode()
    assert start.startswith("#!/py/bin/python3 -ISE\n")
    there = start.replace(repr(jail.AGENT_PATH), repr(str(code))).replace(".main()", ".main")
    python = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    command = [str(python), "-ISEc", _FINDS_ITS_AGENT.format(start=there)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    # Each costs an emulated guest a tenth of a second.
    assert set(json.loads(ran.stdout)) <= {"struct", "types", "ctypes", "ctypes._endian"}


# KVM


def test_a_failure_of_kvm_is_kept_in_mind_by_every_process_until_it_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.access", lambda path, mode: path == "/dev/kvm")
    finding = KvmStatus(tmp_path / "run")
    assert finding.is_usable()
    finding.record_failure()
    assert not KvmStatus(tmp_path / "run").is_usable()
    finding.reset()
    assert finding.is_usable()


def test_a_failure_before_the_machine_was_booted_counts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: True)
    finding = KvmStatus(tmp_path)
    finding.record_failure()
    (tmp_path / "kvm-does-not-work").write_text("another boot")
    assert finding.is_usable()


# Frames


def test_words_come_back_as_they_were_with_the_bytes_after_them():
    lists = [[b"/workspace"], [b"/bin/sh", b"-c", b""], [b"A=1\n", b"B="]]
    assert frames.unpack_string_lists(frames.pack_string_lists(*lists) + b"in\0put") == (lists, b"in\0put")


def heard(*chunks: bytes, asked: int = 0) -> list[tuple[bytes, int, bytes]]:
    """What a channel, which has sent so many frames, makes of bytes that a guest sends in pieces."""
    told: list[tuple[bytes, int, bytes]] = []

    async def story() -> None:
        ours, guests = socket.socketpair()
        stream = GuestStream(channel := Channel(lambda *frame: told.append(frame) or is_output(frame)), frames.OUTPUT)

        def is_output(frame: tuple[bytes, int, bytes]) -> bool:
            return frame[0] == frames.DATA and stream.feed(frame[2])

        await channel.open(ours)
        for _ in range(asked):
            channel.send(frames.GET_STATS, 0)
        with guests:
            for chunk in chunks:
                guests.send(chunk)
                await asyncio.sleep(0)
        await asyncio.wait_for(channel.ended, 10)

    asyncio.run(story())
    return told


def test_frames_are_heard_however_they_are_cut():
    whole = frames.pack(frames.DATA, 1, b"abc") + frames.pack(frames.CLOSED, 1)
    expected = [(frames.DATA, 1, b"abc"), (frames.CLOSED, 1, b"")]
    assert heard(*(bytes([one]) for one in whole)) == heard(whole) == expected


def test_a_guest_that_says_no_frame_is_not_listened_to_any_more():
    huge = frames.HEADER.pack(frames.DATA, b"\1", frames.GUEST_FRAME_BYTES_MAX + 1)
    assert heard(frames.pack(frames.DATA, 1, b"a") + huge + frames.pack(frames.DATA, 1, b"b")) == [
        (frames.DATA, 1, b"a")
    ]


@pytest.mark.parametrize(
    "frame",
    [(frames.DATA, 1, b""), (b"?", 9, b"x"), (frames.STATS, 0, bytes(32)), (frames.EXIT, 0, b"")],
    ids=["output without a byte", "of no kind", "figures", "an end"],
)
def test_a_guest_that_sends_frames_for_nothing_is_not_listened_to_any_more(frame: tuple[bytes, int, bytes]):
    flood = frames.pack(*frame) * 500
    assert len(heard(flood, flood)) == UNASKED_MAX + 1


def test_answers_and_output_are_listened_to_however_many_there_are():
    answers, output = frames.pack(frames.STATS, 0, bytes(32)) * 200, frames.pack(frames.DATA, 1, b"x") * 2000
    assert len(heard(answers + output, output, asked=50)) == 4200


def reads_and_frames(piece: bytes) -> tuple[int, int]:
    """How often a channel reads, and what it hears, in a second in which a guest sends such pieces without end."""
    heard = 0

    async def story() -> int:
        def hear(kind: bytes, number: int, body: bytes) -> bool:
            nonlocal heard
            heard += 1
            return True

        ours, guests = socket.socketpair()
        guests.setblocking(False)
        channel, reads = Channel(hear), 0
        take = channel.data_received

        def count(data: bytes) -> None:
            nonlocal reads
            reads += 1
            take(data)

        channel.data_received = count  # type: ignore[method-assign]
        await channel.open(ours)
        loop = asyncio.get_running_loop()
        until = loop.time() + 1
        with guests:
            while loop.time() < until:
                with suppress(BlockingIOError):
                    guests.send(piece)
                await asyncio.sleep(0)
        channel.abort()
        return reads

    return asyncio.run(story()), heard


def test_a_guest_that_says_a_byte_at_a_time_is_read_with_pauses():
    reads, _ = reads_and_frames(b"\0")
    assert reads <= 2 * COST_PER_SECOND_MAX / READ_COST + 1


def test_a_guest_that_sends_a_byte_a_frame_is_read_with_pauses():
    flood = frames.pack(frames.DATA, 1, b"x") * 4000
    _, heard = reads_and_frames(flood)
    assert heard <= 2 * COST_PER_SECOND_MAX + 40_000


@pytest.mark.parametrize(("size", "count"), [(frames.GUEST_FRAME_BYTES_MAX, 1000), (80, 50_000)], ids=["long", "lines"])
def test_output_is_read_without_a_pause(size: int, count: int, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(Channel, "_go_on", lambda _: pauses.append(1), raising=False)

    async def story() -> int:
        told: list[int] = []
        ours, guests = socket.socketpair()
        guests.setblocking(False)
        channel = Channel(lambda kind, number, body: bool(told.append(len(body))) or True)
        await channel.open(ours)
        with guests:
            for _ in range(count // 1000):
                await asyncio.get_running_loop().sock_sendall(guests, frames.pack(frames.DATA, 1, bytes(size)) * 1000)
        await asyncio.wait_for(channel.ended, 10)
        return sum(told)

    assert asyncio.run(story()) == size * count
    assert not pauses


def test_a_guest_uses_no_more_than_it_has_whatever_it_says():
    spec = SandboxSpec("attempt", Path("/disk"), cpus=1, memory_bytes=1000, processes_max=10)
    said = join_figures(Stats(1.5, 5000, 4, oom_kills=1), (2**64 - 1, 2**64 - 1, 2, 3), spec)
    assert said == Stats(1.5, 1000, 10, oom_kills=3, fork_failures=3)
    assert join_figures(Stats(1.5, 5000, 4), (700, 7, 0, 0), spec) == Stats(1.5, 700, 7)


def test_a_console_is_read_with_pauses_once_it_has_said_much():
    async def story() -> tuple[bytes, int]:
        ours, machines = socket.socketpair()
        machines.setblocking(False)
        tail, reads = OutputTail(), 0
        hear = tail.data_received

        def count(data: bytes) -> None:
            nonlocal reads
            reads += 1
            hear(data)

        tail.data_received = count  # type: ignore[method-assign]
        await tail.open(ours)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(machines, b"x" * (CONSOLE_BYTES_MAX + 1))
        reads, until = 0, loop.time() + 10 * CONSOLE_PAUSE_SECONDS
        while loop.time() < until:
            await loop.sock_sendall(machines, b"y")
            await asyncio.sleep(0)
        await loop.sock_sendall(machines, b"end")
        await asyncio.sleep(3 * CONSOLE_PAUSE_SECONDS)
        tail.abort()
        machines.close()
        return tail.text, reads

    text, reads = asyncio.run(story())
    assert text.endswith(b"yend")
    assert reads <= 20


def test_what_a_console_says_at_first_is_read_at_once():
    async def story() -> bytes:
        ours, machines = socket.socketpair()
        tail = OutputTail()
        await tail.open(ours)
        with machines:
            for line in (b"one\n", b"two\n", b"three\n"):
                machines.send(line)
                for _ in range(3):
                    await asyncio.sleep(0)
        tail.abort()
        return tail.text

    assert asyncio.run(story()) == b"one\ntwo\nthree\n"


def test_a_start_has_the_directory_in_the_environment_and_no_nul():
    from sandbox.runtimes.qemu.sandbox import _encode_command

    (directory, argv, environment), rest = frames.unpack_string_lists(
        _encode_command(Command(["a", "b"], {"X": "y"}, "/workspace"))
    )
    assert (directory, argv, rest) == ([b"/workspace"], [b"a", b"b"], b"")
    assert environment == [b"PWD=/workspace", b"X=y"]
    with pytest.raises(AttemptError, match="NUL"):
        _encode_command(Command(["a\0b"], {}, "/workspace"))


# Redirection


def run_redirection(program: bytes, address: str, port: int) -> str:
    """The address that the kernel would connect to: what this program does to it, step by step."""
    memory = {4: int.from_bytes(socket.inet_aton(address), "little"), 24: socket.htons(port)}
    registers = dict.fromkeys(range(11), 0)
    here = 0
    while True:
        code, names, offset, value = struct.unpack_from("=BBhi", program, here * 8)
        target, source = names & 15, names >> 4
        here += 1
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
            here += offset


@pytest.mark.parametrize(
    ("address", "port", "reached"),
    [
        ("127.0.0.1", 8123, "10.0.2.2"),
        ("127.0.0.1", 3128, "10.0.2.2"),
        ("127.0.0.1", 3000, "127.0.0.1"),
        ("127.0.0.2", 8123, "127.0.0.2"),
        ("198.18.3.4", 3128, "198.18.3.4"),
    ],
)
def test_only_the_gateways_ports_of_the_guests_loopback_lead_to_the_gateway(address: str, port: int, reached: str):
    assert run_redirection(redirection.assemble([8123, 3128], "10.0.2.2"), address, port) == reached
