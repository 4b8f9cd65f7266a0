"""All limits that users cannot set: value, unit and effect. `docs/limits.md` lists the public ones."""

BODY_BYTES_MAX = 1024 * 1024
"""A request body; a larger one gets 413."""

MANIFEST_DEPTH_MAX = 64
"""Nesting of a manifest; a deeper one gets 400."""

MANIFEST_VALUES_MAX = 20_000
"""Scalars and containers of a manifest with aliases expanded; more get 400."""

MANIFEST_ALIASES_MAX = 16
"""YAML aliases of a manifest, and anchors; more get 400."""

LABELS_MAX = 64
"""Labels of a task; more get 400. A list query with more labels matches no task."""

MANIFEST_ERRORS_MAX = 100
"""Errors of a manifest that are listed; additional ones are only counted."""

OUTPUT_LINE_BYTES_MAX = 1024 * 1024
"""A line of output that is kept whole; a longer one is split and marked."""

PARSED_LINE_BYTES_MAX = 16 * 1024 * 1024
"""A line of agent output that the runner parses. A longer line is not buffered and yields no event."""

OUTPUT_BYTES_MAX = 1024**3
"""Recorded output of a task; additional output is dropped, and a `gap` event says so."""

OUTPUT_BYTES_PER_SECOND = 8 * 1024 * 1024
OUTPUT_BURST_BYTES = 64 * 1024 * 1024
"""Sustained rate and burst of output. Beyond them the agent's writes block; nothing is lost."""

RUNNER_CPU_CORES = 0.2
"""CPU cores, on average, for work that a sandbox causes in its runner. Beyond that, model requests are delayed last."""

RUNNER_CPU_BURST_SECONDS = 2.0
"""CPU seconds that an idle runner may spend at once."""

RUNNER_CPU_DEBT_SECONDS_MAX = 5.0
"""CPU seconds: the debt never exceeds this value, however much work the runner does."""

OUTPUT_SYNC_SECONDS = 0.2
"""Output is flushed to disk at most this much later."""

PROGRESS_INTERVAL_SECONDS = 1.0
"""Minimum interval of progress snapshots that are caused only by output bytes."""

TOOL_CALL_EVENTS_MAX = 100_000
"""Tool calls and retries of one agent with an event each; additional ones are counted, and a `gap` event says so."""

CONVERSATION_BYTES_MAX = 256 * 1024**2
"""Conversation events of a task as encoded; more are not recorded, and a `gap` event says so."""

CONVERSATION_TEXT_CHARACTERS_MAX = 100_000
"""Characters of a message, or of the input or output of a tool call, in an event; further ones are cut and counted."""

OPEN_TOOL_CALLS_MAX = 1000
"""Tool calls of one agent that are timed concurrently; additional ones are counted without a duration."""

SANDBOX_START_SECONDS = 60.0
"""Time for the agent to start in its sandbox; after that, the attempt ends with `provision_failed`."""

SANDBOX_TEARDOWN_SECONDS = 60.0
"""Time to end a sandbox and remove its files. After that, an event says what is left."""

DEBUG_SESSION_END_SECONDS = 10.0
"""Time for a debug session to end when its preserved sandbox is released; after that, the release is refused."""

DISK_COMMAND_SECONDS = 60.0
"""Time for one command that creates, checks, mounts, unmounts or measures a disk, or one scan for open files on it."""

DISK_RELEASE_SECONDS = 10.0
"""Time for all processes to release a task's disk; after that, the attempt ends with `sandbox_lost` or is not
provisioned.
"""

DISK_CHECK_SECONDS = 2.0
DISK_CHECK_SECONDS_MAX = 60.0
"""Interval of disk usage checks: the minimum, and the maximum if a check takes a long time."""

DISK_CHECK_FAILURES_MAX = 3
"""Consecutive failed usage checks of a disk without an enforced size; then the attempt ends with `sandbox_lost`."""

KERNEL_USAGE_CHECK_SECONDS = 0.1
"""Interval of checks of kernel objects that are not charged to a sandbox's control group."""

FILE_USAGE_CHECK_SECONDS = 0.5
"""Interval of checks of a sandbox's open files."""

SOCKETS_MAX = 8192
"""Sockets of a sandbox, of all kinds, including unaccepted connections.

No control group is charged for their memory.
"""

UDP_SOCKETS_ON_PORT_MAX = 256
"""UDP sockets of one sandbox that share a port. With 8000 of them, one datagram of 128 segments to a broadcast address
occupies a processor in the kernel for 0.5 s.
"""

IDLE_SLAB_BYTES_MAX = 1024 * 1024 * 1024
"""Memory of freed kernel objects that is still allocated, attributed to one sandbox."""

IDLE_CACHE_MEMORY_DIVISOR = 8
"""The same for inodes, names of files and other caches: 1/8 of the machine's memory, at least IDLE_SLAB_BYTES_MAX."""

OOM_KILLS_MAX = 1000
"""Processes of one sandbox that the kernel killed for lack of memory.

With each of them, up to two a second, the kernel writes a list of the sandbox's processes to the machine's log.
"""

CALL_BUFFER_BYTES_MAX = 256 * 1024 * 1024
"""Buffers that the kernel holds for system calls in progress, attributed to one sandbox."""

NETLINK_BYTES_MAX = 16 * 1024 * 1024
"""Unread data in the netlink sockets of one sandbox."""

FILE_LOCKS_MAX = 8192
"""POSIX file locks of one sandbox."""

SHARED_FILE_LOCKS_MAX = 256
"""Locks of any kind on files that the host uses too. Whenever any program on the machine closes such a file, the kernel
walks all its locks: 0.4 ms for 16,000 on /dev/null.
"""

OPEN_FILES_OF_SANDBOX_MAX = 131072
"""Descriptors of all processes of one sandbox together."""

EPOLL_ENTRIES_MAX = 32768
"""Epoll entries of one sandbox. An event of a file wakes all its entries at once, which takes 4 ms for this many."""

OPEN_FILES_GROWTH_MAX = 24576
"""Growth of the machine's open files after which a sandbox's waiting threads are interrupted. A waiting system call
keeps its file open even without a descriptor. The value is above OPEN_DIRECTORIES_MAX plus the files that can be in
transit.
"""

OPEN_DIRECTORIES_MAX = 8192
"""Open directories of one sandbox. A partly read one takes up to 20 KiB that no control group is charged for."""

SOCKET_BUFFER_BYTES_MIN = 16 * 1024 * 1024
SOCKET_BUFFER_BYTES_MAX = 256 * 1024 * 1024
"""Buffers of one sandbox's TCP and UDP sockets: an eighth of vm.memory, within these bounds."""

RECEIVED_BYTES_HEADROOM = 160 * 1024 * 1024
"""Unread data in TCP and UDP sockets in addition to those buffers: the kernel accepts 20 KiB for each of
SOCKETS_MAX.
"""

SECRET_SCAN_SECONDS_MIN = 5.0
"""Minimum time for the secret scan of collected files, even if its share of `collect_timeout` is less."""

GIT_KILLED_GRACE_SECONDS = 1.0
"""Delay before a clone with a possibly killed git is reported as failed, because the runner may be killed as well."""

METADATA_SECONDS = 10.0
"""Time to store the metadata of a task whose collection did not finish."""

OUTPUT_DRAIN_SECONDS = 5.0
OUTPUT_DRAIN_SECONDS_MAX = 60.0
"""Draining the pipes after all processes died: the maximum without new data, and the maximum in total."""

CONTROL_SECONDS = 5.0
"""Time for one request on a runner's control socket."""

TERM_GRACE_SECONDS = 30.0
"""Time between TERM to the agent and KILL of everything in the sandbox."""

KILL_SECONDS = 10.0
"""Time for all processes to end after KILL; after that, the attempt ends with `sandbox_lost`."""

SANDBOX_PROCESSES_MAX = 512
"""Processes and threads of a sandbox; beyond it fork fails inside."""

OVERCOMMIT_CPUS = 8
OVERCOMMIT_MEMORY = 2
OVERCOMMIT_DISK = 4
"""Overcommit factors of the machine's CPUs, memory and disk. A task that alone exceeds the resulting capacity gets
507.
"""

UNFINISHED_TASKS_MAX = 5_000
"""Unfinished tasks; a further submission gets 503. A waiting task takes two descriptors and some CPU time."""

UNFINISHED_MANIFEST_BYTES_MAX = 128 * 1024 * 1024
"""Manifests of the unfinished tasks together; a further submission gets 503. In memory they take up to four times as
much.
"""

QUEUE_OVERTAKES_MAX = 10
"""Younger tasks that may start before a task that waits for more capacity; after that, younger tasks wait behind it."""

MEMORY_AVAILABLE_BYTES_MIN = 512 * 1024 * 1024
"""Memory that must be available on the host before a task that requests at least this much starts."""

MEMORY_CHECK_SECONDS = 1.0
"""Interval of checks of the host's available memory while tasks wait."""

MEASUREMENT_CACHE_SECONDS = 600.0
"""How long a disk measurement that finished without a waiting caller serves the next caller."""

JANITOR_INTERVAL_SECONDS = 300.0
"""Interval of the janitor, which removes expired preserved sandboxes and leftovers of crashes."""

PERIODIC_JOB_SECONDS = 240.0
"""Time of one periodic job per run. Then the next job runs, and the next run does the rest."""

CLOCK_TRUST_SECONDS = 3600.0
"""How long the wall clock must run evenly before anything with at least this retention time is removed by age."""

CLOCK_JUMP_SECONDS = 60.0
"""Deviation of the wall clock from the monotonic clock that counts as a clock change."""

PROBE_WAIT_SECONDS = 60.0
"""How long a probe waits until a server has cleaned up what earlier probes left."""

PROBE_BACKOFF_SECONDS = 5.0
"""Pause before the runtimes are probed again if none works; each later pause is twice as long."""

PROBE_BACKOFF_SECONDS_MAX = 300.0
"""Maximum pause between probes, however often none worked."""

PROBE_JITTER = 0.25
"""Up to this fraction of such a pause is skipped at random."""

JOURNAL_COMPRESSION_DELAY_SECONDS = 3600.0
"""Time from a task's end until its journal is compressed."""

IDEMPOTENCY_SECONDS = 24 * 3600.0
"""How long an idempotency key is remembered; after that, the same key creates a new task."""

PATCH_BYTES_MAX = 256 * 1024 * 1024
"""A patch; content beyond it is left out and kept as files (`patch_truncated`)."""

ARTIFACT_BYTES_MAX = 2 * 1024**3
"""All files of a task that match its patterns, together. A file beyond this limit is skipped, and an event says so.

The tar of changed files has a separate limit, half as large; patch and transcript have their own limits.
"""

SHUTDOWN_SECONDS = 2.0
"""Time from SIGTERM to the exit of the server, including open event streams."""

LAUNCH_SHUTDOWN_SECONDS = 0.5
"""How long a stopping server waits for running launches; then it cancels pending secret lookups."""

FOLLOW_POLL_SECONDS = 0.02
"""Poll interval of a busy journal; an idle one is polled ten times less often."""

RUNNER_SILENCE_SECONDS = 60.0
"""How long a runner may write nothing before it is pinged, and the interval of pings."""

RUNNER_PINGS_MAX = 5
"""Consecutive unanswered pings of a silent runner; then it is killed, and a finisher takes over."""

LAUNCH_SECONDS = 30.0
JOURNAL_READ_BYTES_PER_SECOND = 256 * 1024
"""A runner has this time to receive its launch order, and as much again to take over the journal. The time to read the
journal at this rate is added. An idle machine reads it sixty times as fast, but after a reboot the finishers of all
lost tasks may read at the same time.
"""

INDEX_INTERVAL_SECONDS = 1.0
"""Maximum delay of the index behind the journal of a running task."""

LOSS_CHECK_SECONDS = 1.0
"""How long a journal may be silent before its lock is checked."""

JOURNAL_REPLAYS_MAX = 2
"""Unlocked journals that are scanned from start to end concurrently, per kind of reader (launchers, tailers).

Additional scans wait.
"""

RETRY_SECONDS = 1.0
"""Pause of the server before a retry after an error of the host: full disk, damaged index, process limit."""

UNSTARTED_ATTEMPTS_MAX = 3
"""Consecutive attempts whose agent never started because of a lost machine or a failed clone; then the task fails."""

RESUMES_MAX = 3
"""How often a task's lost agent resumes its session; then the task is retried or fails."""

RETRY_BACKOFF_SECONDS = 2.0
RETRY_BACKOFF_SECONDS_MAX = 300.0
"""Backoff before an attempt that may fail for the same reason: the first pause, doubled each time, and the longest."""

FINISHERS_MAX = 4
"""Finishers started for one attempt; if all of them die, the server finalizes the task itself."""

FINISHER_BACKOFF_SECONDS = 4.0
FINISHER_BACKOFF_FACTOR = 8
"""Time from the start of a finisher that died to the start of the next one, multiplied by the factor each time."""

SUBSCRIBER_EVENTS_MAX = 10_000
SUBSCRIBER_BYTES_MAX = 16 * 1024**2
"""Events buffered for a slow subscriber to all tasks; beyond it a `gap` event says which ones it missed."""

CANCEL_SECONDS = 10.0
"""Time to record a cancel request, even if a runner is just starting; after that, the request gets 503."""

CANCEL_SECONDS_MIN = 1.0
"""Minimum time to contact a runner whose start used up CANCEL_SECONDS, and to wait for the journal's writer."""

FOLLOW_BATCH_BYTES = 256 * 1024
"""Bytes of a journal that are read at a time for one subscriber."""

NEW_TASKS_FREE_PERCENT = 5.0
NEW_TASKS_FREE_BYTES = 4 * 1024**3
"""First watermark: with less free space in the data directory's file system, tasks wait and the server is not ready."""

OUTPUT_FREE_PERCENT = 2.0
OUTPUT_FREE_BYTES = 1024**3
"""Second watermark: with less free space, runners drop output, and a `gap` event says so."""

WATERMARK_HYSTERESIS_FACTOR = 1.25
"""A watermark counts as recovered once this multiple of it is free."""

DISK_SPACE_CHECK_SECONDS = 1.0
"""Interval of free-space checks, of the server and of each runner."""

RUNNER_RESERVE_BYTES = 4 * 1024**2
"""Disk space that each runner reserves for the end of its task.

Enough for a result of 256 KiB escaped sixfold (1.5 MiB), a thousand artifacts of 1 KiB each, a thousand refusals in the
metadata, and the file system's overhead.
"""

SERVER_RESERVE_BYTES = 16 * 1024**2
"""Disk space that the server reserves to record task ends and to open its index.

Twice the size of the ends of a thousand waiting tasks (4 MiB) and the index's log (4 MiB).
"""

BACKUP_MANIFEST_BYTES_MAX = 256 * 1024**2
"""Manifest of a backup, enough for more than a million files. Restoring reads it into memory."""

BUFFERED_OUTPUT_BYTES_MAX = 1024**2
"""Output that a runner buffers while the disk rejects writes; more output is dropped, and a `gap` event says so."""

JOURNAL_WRITE_RETRY_SECONDS = 24 * 3600.0
"""How long a runner retries to record the end of its task; then it exits, and the server tries to record the end."""

REDACTION_HOLD_SECONDS = 0.2
"""How long complete lines are held if their end may be the start of a secret value."""

METRICS_INTERVAL_SECONDS = 5.0
"""Interval of resource usage samples of a sandbox."""

TERMINALS_MAX = 32
"""Terminal clients of one task, shells and read-only viewers together; more get 409."""

DEBUG_SESSION_IDLE_SECONDS = 2.0
"""How long the sandbox of a debug session waits without a client before it ends."""

DEBUG_SESSION_SECONDS_MAX = 24 * 3600.0
"""Maximum lifetime of the sandbox of a debug session; then its shells end."""

DEBUG_SESSION_START_SECONDS = 60.0
"""Time for a debug shell to become ready; after that, the request gets 503."""

TERMINAL_REPLAY_BYTES = 64 * 1024
"""Recent output of the agent's terminal that is kept for clients that connect later."""

TERMINAL_INPUT_SECONDS = 30.0
"""How long the input of a terminal client may wait; then it is dropped, so the client can disconnect."""

TERMINAL_BACKLOG_BYTES_MAX = 1024 * 1024
"""Output queued for one read-only viewer of the agent's terminal; beyond it, the viewer has to reconnect."""


DEFAULT_SERVER = "http://localhost:8122"
