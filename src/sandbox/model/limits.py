"""Every bound that is not a user's to set: its number, its unit and what happens at it. `docs/limits.md` lists them."""

BODY_BYTES_MAX = 1024 * 1024
"""A request body; over it: 413."""

MANIFEST_DEPTH_MAX = 64
"""Nesting of a manifest; over it: 400."""

MANIFEST_VALUES_MAX = 20_000
"""Scalars and containers of a manifest, aliases expanded; over it: 400."""

MANIFEST_ALIASES_MAX = 16
"""YAML aliases in a manifest, and anchors; over it: 400."""

LABELS_MAX = 64
"""Labels of a task; over it: 400. A list that is asked for with more has no task."""

MANIFEST_ERRORS_MAX = 100
"""Mistakes of a manifest that are listed; the rest is only counted."""

OUTPUT_LINE_BYTES_MAX = 1024 * 1024
"""A line of output kept whole; longer ones are split and marked."""

PARSED_LINE_BYTES_MAX = 16 * 1024 * 1024
"""A line of the agent that its runner listens to; nothing of a longer one is held in memory, and it tells nothing."""

OUTPUT_BYTES_MAX = 1024**3
"""Output of a task that is written down; what comes later is left out, and a `gap` says so."""

OUTPUT_BYTES_PER_SECOND = 8 * 1024 * 1024
OUTPUT_BURST_BYTES = 64 * 1024 * 1024
"""Output is taken this fast on and on, and so much at once; the agent's writes wait for it, and nothing is lost."""

RUNNER_CPU_CORES = 0.2
"""Processors, on average, for the work that a sandbox causes in its runner; further work waits, model requests last."""

RUNNER_CPU_BURST_SECONDS = 2.0
"""CPU seconds that an idle runner may spend at once."""

RUNNER_CPU_DEBT_SECONDS_MAX = 5.0
"""CPU seconds: the debt never grows past this, whatever work of its own a runner does."""

OUTPUT_SYNC_SECONDS = 0.2
"""Output is flushed to disk at most this much later."""

PROGRESS_INTERVAL_SECONDS = 1.0
"""Least time between two progress snapshots that nothing but output bytes asks for."""

TOOL_CALL_EVENTS_MAX = 100_000
"""Tool calls and retries of one agent that are events of their own; further ones are counted, and a `gap` says so."""

OPEN_TOOL_CALLS_MAX = 1000
"""Tool calls of one agent that are timed at once; further ones are counted, not timed."""

SANDBOX_START_SECONDS = 60.0
"""Until the agent has begun in its sandbox; past it the attempt ends with `provision_failed`."""

SANDBOX_TEARDOWN_SECONDS = 60.0
"""For ending a sandbox and removing its files; past it an event says what is left."""

DEBUG_SESSION_END_SECONDS = 10.0
"""For what a shell ran in to be gone when its preserved sandbox is released; past it the release is refused."""

DISK_COMMAND_SECONDS = 60.0
"""For one command that makes, checks, mounts, unmounts or measures a disk, or one look at what is open there."""

DISK_RELEASE_SECONDS = 10.0
"""Until nobody holds a task's disk any more; past it the attempt ends with `sandbox_lost`, or is not provisioned."""

DISK_CHECK_SECONDS = 2.0
DISK_CHECK_SECONDS_MAX = 60.0
"""How often it is looked at how full a disk is; less often where looking takes long, but as often as this."""

DISK_CHECK_FAILURES_MAX = 3
"""Looks in a row that fail at a disk that has no bound of its own; then the attempt ends with `sandbox_lost`."""

KERNEL_USAGE_CHECK_SECONDS = 0.1
"""Between two counts of what the kernel holds for a sandbox and charges to no control group."""

FILE_USAGE_CHECK_SECONDS = 0.5
"""How often the open files of a sandbox are counted."""

SOCKETS_MAX = 8192
"""In one sandbox, of all kinds, unaccepted connections included, whose memory no control group is charged for."""

UDP_SOCKETS_ON_PORT_MAX = 256
"""UDP sockets of one sandbox that share a port. One datagram of 128 segments to a broadcast address takes the kernel
0.5 s for 8000 of them, and meanwhile nothing else runs on that processor."""

IDLE_SLAB_BYTES_MAX = 1024 * 1024 * 1024
"""Of freed objects of the kernel whose memory is still taken, put down to one sandbox."""

NETLINK_BYTES_MAX = 16 * 1024 * 1024
"""Unread in the netlink sockets of one sandbox."""

FILE_LOCKS_MAX = 8192
"""POSIX locks of one sandbox."""

OPEN_FILES_OF_SANDBOX_MAX = 131072
"""Descriptors of all processes of one sandbox together."""

OPEN_DIRECTORIES_MAX = 8192
"""Directories among them. One that was read in part takes up to 20 KiB that no control group is charged for."""

SOCKET_BUFFER_BYTES_MIN = 16 * 1024 * 1024
SOCKET_BUFFER_BYTES_MAX = 256 * 1024 * 1024
"""In the buffers of one sandbox's TCP and UDP sockets: an eighth of vm.memory, within these two."""

RECEIVED_BYTES_BESIDE_BUFFERS = 160 * 1024 * 1024
"""Unread in TCP and UDP sockets, over that share: 20 KiB for each of SOCKETS_MAX, which the kernel lets pass."""

SECRET_SCAN_SECONDS_MIN = 5.0
"""For looking for secrets in all that is collected, also where its share of `collect_timeout` is less."""

GIT_KILLED_GRACE_SECONDS = 1.0
"""Until a clone whose git may have been killed is said to have failed: its runner may be killed as well."""

METADATA_SECONDS = 10.0
"""For the metadata of a task for which collecting came to no end."""

OUTPUT_DRAIN_SECONDS = 5.0
OUTPUT_DRAIN_SECONDS_MAX = 60.0
"""How long nothing may come of what is left in the pipes after everything inside is dead, and how long it may come."""

CONTROL_SECONDS = 5.0
"""For one exchange on a runner's control socket."""

TERM_GRACE_SECONDS = 30.0
"""Between TERM to the agent and KILL of everything inside."""

KILL_SECONDS = 10.0
"""Until everything inside is gone after KILL; past it the attempt ends with `sandbox_lost`."""

SANDBOX_PROCESSES_MAX = 512
"""Processes and threads of a sandbox; at it fork fails inside."""

OVERCOMMIT_CPUS = 8
OVERCOMMIT_MEMORY = 2
OVERCOMMIT_DISK = 4
"""How many times the machine's CPUs, memory and disk may be promised; what alone is past it: 507."""

QUEUE_OVERTAKES_MAX = 10
"""How many younger tasks may begin before one that waits for more room than they need; then they wait behind it."""

MEMORY_AVAILABLE_BYTES_MIN = 512 * 1024 * 1024
"""What must really be available on the machine before a task begins that asks for this much memory or more."""

MEMORY_CHECK_SECONDS = 1.0
"""How often the machine's memory is looked at while tasks wait."""

MEASUREMENT_CACHE_SECONDS = 600.0
"""What was measured of the disk while nobody waited any more serves the next who asks; later it is measured anew."""

JANITOR_INTERVAL_SECONDS = 300.0
"""Between two rounds of the janitor: preserved sandboxes whose time is over go, and what crashes left."""

PERIODIC_JOB_SECONDS = 240.0
"""For one of the janitor's duties in a round; past it the next one's turn comes, and the next round does the rest."""

CLOCK_TRUST_SECONDS = 3600.0
"""How long the wall clock must have gone evenly before what is kept for so long or longer is removed by its age."""

CLOCK_JUMP_SECONDS = 60.0
"""By how much the wall clock may leave the one that only goes forward before it counts as set."""

PROBE_WAIT_SECONDS = 60.0
"""For a probe of the machine to wait until a server has cleared away what earlier ones left."""

PROBE_BACKOFF_SECONDS = 5.0
"""Before the runtimes are probed again, where none works; each further pause is twice as long."""

PROBE_BACKOFF_SECONDS_MAX = 300.0
"""Before they are probed again, however often none worked."""

PROBE_JITTER = 0.25
"""Up to this part of such a pause is left out at random."""

JOURNAL_COMPRESSION_DELAY_SECONDS = 3600.0
"""From a task's end until its journal is compressed."""

IDEMPOTENCY_SECONDS = 24 * 3600.0
"""How long the key of a submission is known; later it makes a new task."""

PATCH_BYTES_MAX = 256 * 1024 * 1024
"""A patch; what is over it is left out, and kept as files: `patch_truncated`."""

ARTIFACT_BYTES_MAX = 2 * 1024**3
"""All files of a task that match its patterns, together; what would go over it is left out, and an event says so.

The tar of changed files has half of it for itself; patch and transcript have bounds of their own.
"""

SHUTDOWN_SECONDS = 2.0
"""From SIGTERM to the server's end, followers included."""

LAUNCH_SHUTDOWN_SECONDS = 0.5
"""How long a server that ends waits for launches under way; what still waits for a secret is broken off then."""

FOLLOW_POLL_SECONDS = 0.02
"""How often a busy journal is looked at for new records; an idle one ten times less often."""

RUNNER_SILENCE_SECONDS = 60.0
"""How long a runner may write nothing before it is asked whether it works, and between two times that it is asked."""

RUNNER_PINGS_MAX = 5
"""How often in a row a silent runner may leave that unanswered; then it is killed, and a finisher does the rest."""

LAUNCH_SECONDS = 30.0
JOURNAL_READ_BYTES_PER_SECOND = 256 * 1024
"""How long a runner may wait for its order, and then again, with what its journal's size needs, to take that over.

Read alone it goes sixty times as fast; after the machine's start all lost tasks may have their finishers at once.
"""

INDEX_INTERVAL_SECONDS = 1.0
"""The index is at most this much behind the journal of a living task."""

LOSS_CHECK_SECONDS = 1.0
"""How long a journal may be silent before its lock is looked at."""

JOURNAL_SCANS_MAX = 2
"""Journals that nobody holds any more and that are looked through from end to end at once, by who launches and by who
follows each; further ones wait."""

RETRY_SECONDS = 1.0
"""Between two tries of the server at what the machine refused: a full disk, a broken index, no more processes."""

ATTEMPTS_MAX = 3
"""Attempts in a row whose agent does not begin, since the machine lost them or the clone broke; then the task fails."""

RESUMES_MAX = 3
"""How often the agent of one task goes on in its session after it was lost; then it is retried, or the task fails."""

RETRY_BACKOFF_SECONDS = 2.0
RETRY_BACKOFF_SECONDS_MAX = 300.0
"""Before an attempt that may fail again for the same reason: the first pause, doubled each time, and the longest."""

FINISHERS_MAX = 4
"""Finishers started for one attempt; when they all die, the server ends the task's books itself."""

FINISHER_BACKOFF_SECONDS = 4.0
FINISHER_BACKOFF_FACTOR = 8
"""From the start of one that died to the next one; so much longer each time."""

SUBSCRIBER_EVENTS_MAX = 10_000
SUBSCRIBER_BYTES_MAX = 16 * 1024**2
"""Frames kept for a slow subscriber to all tasks; past it a `gap` says which ones it missed."""

CANCEL_SECONDS = 10.0
"""For writing a wish to cancel down, a runner that just starts included; past it: 503."""

CANCEL_SECONDS_MIN = 1.0
"""For asking a runner whose start took all of that; so long a wish waits at least for who writes to the journal."""

FOLLOW_BATCH_BYTES = 256 * 1024
"""How much of a journal is read for one subscriber at a time."""

NEW_TASKS_FREE_PERCENT = 5.0
NEW_TASKS_FREE_BYTES = 4 * 1024**3
"""The first watermark: with less of the data directory's file system free, tasks wait and the server is not ready."""

OUTPUT_FREE_PERCENT = 2.0
OUTPUT_FREE_BYTES = 1024**3
"""The second: with less free, runners leave output out, and a `gap` says so."""

WATERMARK_HYSTERESIS_FACTOR = 1.25
"""So many times a watermark must be free before what was held back goes on."""

DISK_SPACE_CHECK_SECONDS = 1.0
"""How often the server, and each runner for itself, looks at what is free."""

RUNNER_RESERVE_BYTES = 4 * 1024**2
"""Kept by each runner for the end of its task: a result of 256 KiB escaped six times over (1.5 MiB), a thousand
artifacts of 1 KiB each, a thousand refusals in the metadata, and what a file system needs beside."""

SERVER_RESERVE_BYTES = 16 * 1024**2
"""Kept by the server to write ends and to open its index: the ends of a thousand waiting tasks (4 MiB), the index's
log (4 MiB), and as much again."""

BACKUP_MANIFEST_BYTES_MAX = 256 * 1024**2
"""What a backup may tell of its files, more than a million of them: restoring reads it into memory."""

BUFFERED_OUTPUT_BYTES_MAX = 1024**2
"""Output that a runner keeps in memory while the disk takes nothing; later output is left out, and a `gap` says so."""

JOURNAL_WRITE_RETRY_SECONDS = 24 * 3600.0
"""How long a runner waits for the disk to take the end of its task; then it gives up, and the server goes on trying."""

REDACTION_HOLD_SECONDS = 0.2
"""How long whole lines wait for more when their end may be the beginning of a secret's value."""

METRICS_INTERVAL_SECONDS = 5.0
"""Between two samples of what a sandbox uses."""

TERMINALS_MAX = 32
"""Clients of the terminals of one task, shells and lookers-on together; past it: 409."""

DEBUG_SESSION_IDLE_SECONDS = 2.0
"""How long the sandbox of a preserved disk waits without a client; then it ends."""

DEBUG_SESSION_SECONDS_MAX = 24 * 3600.0
"""How long one sandbox of a preserved disk lives; then its shells end."""

DEBUG_SESSION_START_SECONDS = 60.0
"""Until a shell in a preserved disk is there; past it: 503."""

TERMINAL_REPLAY_BYTES = 64 * 1024
"""What is kept of what the agent's terminal showed last, for those who come later."""

TERMINAL_INPUT_SECONDS = 30.0
"""For what was typed into a terminal to be taken by it; the rest is lost then, and whoever typed it can leave."""

TERMINAL_BACKLOG_BYTES_MAX = 1024 * 1024
"""What waits for one looker-on of the agent's terminal; past it the connection ends, and it can come back."""


DEFAULT_SERVER = "http://localhost:8122"
