"""Limits and intervals that users cannot set: value, unit and effect. `docs/limits.md` lists the public ones.

`gateway` and `secrets` each have their own module `limits`.
"""

BODY_BYTES_MAX = 1024 * 1024
"""Maximum size of a request body; a larger one gets 413."""

MANIFEST_DEPTH_MAX = 64
"""Maximum nesting of a manifest; a deeper one gets 400."""

MANIFEST_VALUES_MAX = 20_000
"""Maximum number of scalars and containers of a manifest with its aliases expanded; more get 400."""

MANIFEST_ALIASES_MAX = 16
"""Maximum number of YAML aliases of a manifest, and of anchors; more get 400."""

LABELS_MAX = 64
"""Maximum number of labels of a task; more get 400. A list query with more labels matches no task."""

SEARCHED_PROMPT_CHARACTERS_MAX = 16_384
"""Maximum number of characters of a prompt that are searched, from the beginning of the prompt."""

SEARCH_CHARACTERS_MAX = 200
"""Maximum length of a search query for tasks; a longer one gets 400."""

REPOSITORY_FILTER_CHARACTERS_MAX = 2048
"""Maximum length of the repository by which a list of tasks is filtered; a longer one gets 400."""

TASK_ID_CHARACTERS_MAX = 128
"""Maximum length of the id of a task."""

INPUT_ERRORS_MAX = 100
"""Maximum number of errors that are listed for a manifest or a request; additional ones are only counted."""

OUTPUT_LINE_BYTES_MAX = 1024 * 1024
"""Maximum length of a line of output that is recorded whole; a longer one is split and marked."""

PARSED_LINE_BYTES_MAX = 16 * 1024 * 1024
"""Maximum length of a line of output that the runner parses. A longer line is not buffered and yields no event."""

OUTPUT_BYTES_MAX = 1024**3
"""Maximum size of a task's recorded output; additional output is dropped, and a `gap` event reports it."""

OUTPUT_BYTES_PER_SECOND = 8 * 1024 * 1024
OUTPUT_BURST_BYTES = 64 * 1024 * 1024
"""Sustained rate and burst size of output. Beyond them, the agent's writes block; nothing is lost."""

RUNNER_CPU_CORES = 0.2
"""Average number of CPU cores for the work that a sandbox causes in its runner. Work beyond this is delayed.

Model requests are delayed last.
"""

RUNNER_CPU_BURST_SECONDS = 2.0
"""CPU seconds that a runner can use in one burst after it has been idle."""

RUNNER_CPU_DEBT_SECONDS_MAX = 5.0
"""Maximum debt of the runner's CPU budget, in CPU seconds, however much work the runner does."""

OUTPUT_SYNC_INTERVAL_SECONDS = 0.2
"""Interval at which recorded output is flushed to disk."""

PROGRESS_INTERVAL_SECONDS = 1.0
"""Minimum interval between progress snapshots if only output bytes have changed."""

TOOL_CALL_EVENTS_MAX = 100_000
"""Maximum number of events about the ends of one agent's tool calls, and about retries, that are recorded.

A `gap` event reports that more were left out. Tool calls are still counted.
"""

CONVERSATION_BYTES_MAX = 256 * 1024**2
"""Maximum encoded size of a task's conversation events.

Additional events are not recorded, and a `gap` event reports this.
"""

CONVERSATION_TEXT_CHARACTERS_MAX = 100_000
"""Maximum number of characters of a message, or of the input or output of a tool call, in one event.

Additional characters are cut and counted.
"""

FINAL_MESSAGE_CHARACTERS_MAX = 10_000
"""Maximum length of the agent's last message in the status of a task; a longer message is cut and ends with `…`."""

OPEN_TOOL_CALLS_MAX = 1000
"""Maximum number of an agent's concurrent tool calls that are timed; others are counted without a duration."""

AGENT_START_TIMEOUT_SECONDS = 60.0
"""Time limit for the agent's start in its sandbox; after that, the attempt ends with `provision_failed`."""

SANDBOX_TEARDOWN_SECONDS = 60.0
"""Time limit for ending a sandbox and removing its files. After that, a runner records an event about the failure."""

DELETION_TIMEOUT_SECONDS = 10.0
"""How long the deletion of a finished task waits for a process that still uses the task, such as its runner.

After that, the deletion is refused.
"""

DEBUG_SESSION_END_TIMEOUT_SECONDS = 10.0
"""Time limit for ending a debug session when its preserved sandbox is released; after that, the release is refused."""

DISK_COMMAND_TIMEOUT_SECONDS = 60.0
"""Time limit for one command that creates, checks, mounts, unmounts or measures a disk, and for one open-file scan."""

DISK_FILES_MAX = 1_048_576
"""Maximum number of files and directories on a disk with an enforced size. Smaller disks have one for each 16 KiB.

This also limits the number of one task's inodes in the kernel's cache.
"""

DISK_DIRECTORIES_MAX = 196_608
"""Maximum number of directories on a disk with an enforced size, with bubblewrap.

This limits the depth of directories. One read of /proc/self/maps copies the whole path of a mapped file without
interruption, which takes 0.8 s if all these directories are nested and have long names. During part of that time, the
kernel can hold a lock that every rename on the machine needs.
"""

DISK_RELEASE_TIMEOUT_SECONDS = 10.0
"""Time limit for all processes to release a task's disk.

After that, an attempt that ends unmounts the disk lazily, and a new attempt on it ends with `provision_failed`.
"""

DISK_CHECK_INTERVAL_SECONDS_MIN = 2.0
DISK_CHECK_INTERVAL_SECONDS_MAX = 60.0
"""Interval between disk usage checks: the minimum, and the maximum if a check takes a long time."""

DISK_CHECK_FAILURES_MAX = 3
"""Number of consecutive failed usage checks of a disk without an enforced size after which the attempt ends with
`sandbox_lost`."""

KERNEL_USAGE_CHECK_INTERVAL_SECONDS = 0.1
"""Interval between checks of kernel objects that are not charged to a sandbox's control group."""

FILE_USAGE_CHECK_INTERVAL_SECONDS = 0.5
"""Interval between checks of a sandbox's open files."""

SOCKETS_MAX = 8192
"""Maximum number of sockets of a sandbox, of all kinds, including unaccepted connections.

No control group is charged for their memory.
"""

UDP_SOCKETS_ON_PORT_MAX = 256
"""Maximum number of UDP sockets of one sandbox that share a port.

With 8000 of them, one datagram of 128 segments to a broadcast address keeps a processor busy in the kernel for 0.5 s.
"""

FREE_SLAB_BYTES_MAX = 1024 * 1024 * 1024
"""Maximum memory attributed to one sandbox for kernel objects that were freed but still occupy memory."""

RECLAIMABLE_SLAB_MEMORY_DIVISOR = 8
"""Maximum memory attributed to one sandbox for freed inodes, file names and other cached objects that still occupy it.

This is 1/8 of the machine's memory, at least FREE_SLAB_BYTES_MAX.
"""

ANON_VMA_CHAIN_BYTES_MAX = 96 * 1024 * 1024
"""Maximum memory attributed to one sandbox for the links between anonymous mappings (64 bytes each).

When a process ends, the kernel removes its links without interruption: 0.14 s for each million. A program can create
1.5 million between two counts.
"""

VMA_BYTES_MAX = 160 * 1024 * 1024
"""Maximum memory attributed to one sandbox for the mappings of processes (struct vm_area_struct, 192 bytes each).

To truncate a file, the kernel walks all mappings of the file without interruption: 0.35 s for each million. Programs
can create 1.2 million in a second, and a count takes 0.8 s.
"""

DENTRIES_MAX = 5 * 1024 * 1024
"""Maximum number of file names in the kernel's cache (dentries) that are attributed to one sandbox.

A file can have many names (hard links), and the kernel also caches names that do not exist. When a program watches a
directory with inotify, the kernel walks all cached names in it without interruption: 0.15 s for each million. A program
can add a million names between two counts.
"""

CACHED_EXTENTS_MAX = 6 * 1024 * 1024
"""Maximum number of extents and holes of one sandbox's files that the kernel has cached. Each takes 40 uncharged bytes.

When a file is truncated, the kernel removes the file's extents and holes without interruption: 0.09 s per million.
"""

OOM_KILLS_MAX = 1000
"""Maximum number of processes of one sandbox that the kernel has killed for lack of memory.

At each kill, up to twice a second, the kernel writes a list of the sandbox's processes to the machine's log.
"""

SYSCALL_BUFFER_BYTES_MAX = 256 * 1024 * 1024
"""Maximum size, attributed to one sandbox, of the kernel's buffers for system calls in progress."""

TERMINAL_CPU_SECONDS_MAX = 1.0
"""Maximum CPU time of the kernel threads that process what one sandbox writes to terminals.

Only the time in excess of half a processor counts.
"""

KERNEL_LOCK_HOLD_SECONDS_MAX = 2.0
"""Maximum time for which one sandbox may hold a kernel lock while the machine waits for it.

This applies to the locks for opening terminals, for network devices and for nested epoll instances. The first second of
each wait does not count.
"""

HOST_INODE_LOCK_SECONDS_MAX = 4.0
"""Maximum time for which a program may wait for its own memory while it lists a directory of the host.

Meanwhile, the host cannot change this directory.
"""

TERMINAL_AND_LOCK_CHECK_INTERVAL_SECONDS = 0.25
"""Interval at which the CPU time for writes to terminals, and locks that the machine needs, are measured."""

CLOSING_FILES_BYTES_MAX = 1024 * 1024 * 1024
"""Maximum memory attributed to one sandbox for the files of ending processes while the kernel closes these files.

These files are in no descriptor table. A program can delay the closing by keeping a processor busy.
"""

NETLINK_BYTES_MAX = 16 * 1024 * 1024
"""Maximum size of unread data in the netlink sockets of one sandbox."""

FILE_LOCKS_MAX = 8192
"""Maximum number of file locks that one sandbox holds.

When a program closes a file, the kernel walks all locks of the file without interruption. The end of a process that
holds n locks on one file takes a time that grows with the square of n: 8 s for 18,000.
"""

LOCKS_ON_HOST_FILES_MAX = 256
"""Maximum number of locks of any kind, by one sandbox, on files that the host uses too.

Whenever any program on the machine closes such a file, the kernel walks all locks of the file: 0.4 ms for 16,000 on
/dev/null.
"""

OPEN_FILES_OF_SANDBOX_MAX = 131072
"""Maximum number of open file descriptors in one sandbox, summed over all of its processes."""

EPOLL_ENTRIES_MAX = 32768
"""Maximum number of epoll entries of one sandbox. An event wakes all entries of its file: 4 ms for this many."""

OPEN_FILES_GROWTH_INTERRUPT_THRESHOLD = 24576
"""Growth in the number of open files on the machine after which a sandbox's waiting threads are interrupted.

A waiting system call keeps its file open even without a descriptor. The value is above OPEN_DIRECTORIES_MAX plus the
files that can be in transit over sockets.
"""

OPEN_DIRECTORIES_MAX = 8192
"""Maximum number of open directories of one sandbox.

A partly read directory can use 20 KiB of uncharged kernel memory.
"""

EARLY_COUNT_MEMORY_GROWTH_BYTES = 128 * 1024 * 1024
"""If the kernel memory that is not charged to a sandbox grows by more than this, the sandbox's files are counted early.

One processor can create 0.4 GiB of partly read directories in a second. A count of many files takes 0.2 s, and the
pause after the count 2 s.
"""

SOCKET_BUFFER_BYTES_MIN = 16 * 1024 * 1024
SOCKET_BUFFER_BYTES_MAX = 256 * 1024 * 1024
"""Bounds of the limit on the total size of a sandbox's TCP and UDP socket buffers. The limit is 1/8 of vm.memory."""

RECEIVED_BYTES_HEADROOM = 160 * 1024 * 1024
"""Unread data that TCP and UDP sockets may contain in addition to the limit on their buffers.

The kernel accepts 20 KiB for each of SOCKETS_MAX sockets.
"""

PAGE_FRAGMENT_BYTES_MAX = 1024 * 1024 * 1024
"""Maximum memory, attributed to one sandbox, that small packets in TCP and UDP sockets keep allocated."""

SECRET_SCAN_SECONDS_MIN = 5.0
"""Minimum time for the secret scan of collected files, even if its share of `collect_timeout` is less."""

GIT_KILLED_GRACE_SECONDS = 1.0
"""Delay before a clone is reported as failed, if git may have been killed: the runner may be about to be killed too."""

METADATA_TIMEOUT_SECONDS = 10.0
"""Time limit for storing the metadata of a task whose collection did not finish."""

OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS = 5.0
OUTPUT_DRAIN_TIMEOUT_SECONDS = 60.0
"""Time limits for draining the pipes after all processes have ended: the time without new data, and the total time.

After a forced cancellation, the first one is the total time.
"""

SHELL_OUTPUT_DRAIN_TIMEOUT_SECONDS = 5.0
"""Time limit for sending the rest of a shell's output to its client after the shell has ended."""

CONTROL_REQUEST_TIMEOUT_SECONDS = 5.0
"""Time limit for one request on a runner's control socket."""

TERM_GRACE_SECONDS = 30.0
"""Maximum time between SIGTERM to the agent and SIGKILL to everything in the sandbox."""

KILL_TIMEOUT_SECONDS = 10.0
"""Time limit for all processes to end after SIGKILL; after that, the attempt ends with `sandbox_lost`."""

SANDBOX_PROCESSES_MAX = 512
"""Maximum number of processes and threads of a sandbox. At this number, fork(2) fails in the sandbox."""

CPU_OVERCOMMIT_FACTOR = 8
MEMORY_OVERCOMMIT_FACTOR = 2
DISK_OVERCOMMIT_FACTOR = 4
"""Overcommit factors for the machine's CPUs, memory and disk.

A task that alone exceeds the resulting capacity gets 507.
"""

UNFINISHED_TASKS_MAX = 5_000
"""Maximum number of unfinished tasks, or fewer if the limit on open files is low; another submission gets 503.

A waiting task uses two file descriptors.
"""

UNFINISHED_MANIFEST_BYTES_MAX = 128 * 1024 * 1024
"""Maximum total size of the manifests of all unfinished tasks, plus 64 bytes per value; another submission gets 503.

In memory, they use up to four times as much, because of characters beyond U+FFFF.
"""

QUEUE_OVERTAKES_MAX = 10
"""Maximum number of younger tasks that can start ahead of a task that is waiting for more capacity.

After that, younger tasks wait until this task has started.
"""

MEMORY_AVAILABLE_BYTES_MIN = 512 * 1024 * 1024
"""Memory that must be available on the host before a task that requests at least this much can start."""

MEMORY_CHECK_INTERVAL_SECONDS = 1.0
"""Interval between checks of the host's available memory while tasks are waiting."""

UNUSED_DISK_MEASUREMENT_SECONDS_MAX = 600.0
"""How long the next caller can use a disk measurement that finished while no caller was waiting."""

JANITOR_INTERVAL_SECONDS = 300.0
"""Pause between two runs of the janitor's actions, such as the removal of expired tasks and preserved sandboxes."""

MAINTENANCE_ACTION_TIMEOUT_SECONDS = 240.0
"""Time limit for one run of a maintenance action. After that, the next action runs. A later run finishes the work."""

CLOCK_TRUST_SECONDS = 3600.0
"""How long the wall clock must run without a jump before the server removes data by age.

Data that is kept for a shorter time is removed even after a jump.
"""

CLOCK_JUMP_SECONDS = 60.0
"""Deviation of the wall clock from the monotonic clock that counts as a clock change."""

PROBE_CLEANUP_TIMEOUT_SECONDS = 60.0
"""Time limit for a probe to wait until a server has removed the leftovers of earlier probes."""

PROBE_PAUSE_SECONDS = 5.0
"""Pause before the runtimes are probed again if none works; each later pause is twice as long."""

PROBE_PAUSE_SECONDS_MAX = 300.0
"""Maximum pause between probes."""

PROBE_INTERVAL_SECONDS_MIN = 30.0
"""Minimum interval between probes of a working runtime. Such a probe follows a failure to create a task's sandbox."""

PROBE_JITTER = 0.25
"""Maximum fraction by which the pause between probes is randomly shortened."""

JOURNAL_COMPRESSION_DELAY_SECONDS = 3600.0
"""Time between a task's end and the compression of its journal."""

IDEMPOTENCY_SECONDS = 24 * 3600.0
"""How long an idempotency key is valid; after that, the same key creates a new task."""

PATCH_BYTES_MAX = 256 * 1024 * 1024
"""Maximum size of a patch; changes beyond it are stored as files instead (`patch_truncated`)."""

CHAIN_TOTALS_TASKS_MAX = 100
"""Maximum number of tasks in the totals of a chain."""

CURRENT_SUBJECT_CHARACTERS_MAX = 200
"""Maximum length of `Progress.current_subject`."""

EARLIER_PATCHES_MAX = 100
"""Maximum number of patches that a task inherits from the earlier tasks of its chain; a task with more gets 409."""

EARLIER_PATCHES_BYTES_MAX = 512 * 1024 * 1024
"""Maximum total size of the patches that a task inherits from its chain; a task with more gets 409."""

AGENT_SESSION_BYTES_MAX = 16 * 1024 * 1024
"""Maximum size of an agent's session that is kept. A task that continues a larger one gets the conversation as text."""

EARLIER_CONVERSATION_CHARACTERS_MAX = 60_000
"""Maximum length of the earlier conversation that an agent gets as text; the beginning is left out."""

EARLIER_CONVERSATION_EVENTS_MAX = 20_000
"""Number of events at the end of a task that are searched for its conversation."""

MATCHED_FILES_BYTES_MAX = 2 * 1024**3
"""Maximum total size of a task's files that match its patterns. Files beyond it are skipped and reported as events.

The patch, the tar of changed files and the transcript have their own limits.
"""

CHANGED_FILES_TAR_BYTES_MAX = 1024**3
"""Maximum size of the tar of changed files, which accompanies an incomplete patch. Further files are left out."""

WORKER_RECORD_BYTES_MAX = 4 * 1024 * 1024
"""Maximum size of a record that a worker may send, including its newline.

The largest record of a runner, a line of output with escapes, has about half this size.
"""

WORKER_SMALL_RECORD_BYTES_MAX = 256 * 1024
"""Maximum size of a record that a worker may send, except output, parts of the conversation and the agent's exit."""

WORKER_ARTIFACT_RECORDS_BYTES_MAX = 64 * 1024 * 1024
"""Maximum total size of a task's artifact records that a worker may send; each counts as at least 1 KiB.

The server keeps the content of the records in memory until the task has ended.
"""

WORKER_RECORD_VALUES_MAX = 200_000
"""Maximum number of values in an event that a worker may send. Only the event with the agent's report has many."""

WORKER_ARTIFACTS_MAX = 20_000
"""Maximum number of artifacts of a task that a worker may send, twice as many as a runner collects.

The server copies the list of a task's artifacts for each new artifact, and one read of the journal returns up to 4000
new artifacts.
"""

SHUTDOWN_TIMEOUT_SECONDS = 2.0
"""Maximum time between SIGTERM and the server's exit, even with open event streams."""

SHUTDOWN_LAUNCH_WAIT_SECONDS = 0.5
"""How long a stopping server waits for launches in progress; after that, it cancels pending secret lookups."""

FOLLOW_POLL_INTERVAL_SECONDS = 0.02
"""Minimum time between reads of a journal. Without inotify, the poll interval; an idle journal is polled less often."""

RUNNER_SILENCE_SECONDS = 60.0
"""How long a runner may write nothing before it is pinged, and the interval between pings."""

RUNNER_PINGS_MAX = 5
"""Number of consecutive unanswered pings after which a silent runner is killed and a finisher takes over."""

LAUNCH_TIMEOUT_SECONDS = 30.0
JOURNAL_READ_BYTES_PER_SECOND_MIN = 256 * 1024
"""Time limit for a runner to receive its launch order, and then the same limit for it to take over the journal.

The time to read the journal at JOURNAL_READ_BYTES_PER_SECOND_MIN, the assumed minimum speed, is added. An idle machine
reads a journal sixty times as fast, but after a reboot, the finishers of all lost tasks may read at the same time.
"""

INDEX_INTERVAL_SECONDS = 1.0
"""Maximum time by which the index lags behind the journal of a running task."""

JOURNAL_SILENCE_SECONDS = 1.0
"""How long a journal may be silent before its lock is checked."""

CONCURRENT_JOURNAL_REPLAYS_MAX = 2
"""Maximum number of journals that are replayed concurrently, per kind of reader. Additional replays wait.

The kinds are tailing, recovery and cancel requests.
"""

HOST_ERROR_PAUSE_SECONDS = 1.0
"""Pause before the server or a runner retries after an error on the host, such as a full disk or a process limit."""

UNSTARTED_ATTEMPTS_MAX = 3
"""Maximum number of consecutive attempts whose agent never started, because they were lost or cloning failed.

An attempt is lost with its host, its runner or its sandbox. After that number, the task fails.
"""

RESUMES_MAX = 3
"""Maximum number of times that a task's lost agent resumes its session; after that, the task is retried or fails."""

RETRY_BACKOFF_SECONDS = 2.0
RETRY_BACKOFF_SECONDS_MAX = 300.0
"""Backoff before an attempt that may fail for the same reason: the first pause, doubled each time, and the maximum."""

FINISHERS_MAX = 4
"""Maximum number of finishers for one attempt. If all of them die, the server records the end of the task itself."""

FINISHER_BACKOFF_SECONDS = 4.0
FINISHER_BACKOFF_FACTOR = 8
"""Time between the start of a finisher that died and the start of the next one, multiplied by the factor each time."""

SUBSCRIBER_EVENTS_MAX = 10_000
SUBSCRIBER_BYTES_MAX = 16 * 1024**2
"""Maximum number and size of events buffered for a slow subscriber to all tasks.

Beyond them, a `gap` event reports which events the subscriber missed.
"""

CANCEL_TIMEOUT_SECONDS = 10.0
"""Time limit for recording a cancel request, even if a runner is just starting; after that, the request gets 503."""

CANCEL_TIMEOUT_SECONDS_MIN = 1.0
"""Minimum time limit for contacting the runner, or waiting for the task's lock, even after CANCEL_TIMEOUT_SECONDS."""

FOLLOW_BATCH_BYTES = 256 * 1024
"""Maximum number of bytes of a journal that are read at a time for one subscriber; at least one record is read."""

NEW_TASKS_FREE_PERCENT = 5.0
NEW_TASKS_FREE_BYTES = 4 * 1024**3
"""First watermark: if the data directory's file system has less free space, tasks wait and the server is not ready."""

OUTPUT_FREE_PERCENT = 2.0
OUTPUT_FREE_BYTES = 1024**3
"""Second watermark: if there is less free space, runners drop output, and a `gap` event reports it."""

WATERMARK_HYSTERESIS_FACTOR = 1.25
"""A watermark counts as recovered once this multiple of it is free."""

DISK_SPACE_CHECK_INTERVAL_SECONDS = 1.0
"""Interval between free-space checks by the server and by each runner."""

RUNNER_RESERVE_BYTES = 4 * 1024**2
"""Disk space that each runner reserves for the end of its task.

It is enough for a result of 256 KiB (1.5 MiB if each character is escaped), a thousand artifacts of 1 KiB each, and a
thousand refusals in the metadata. The rest is for the file system's overhead.
"""

SERVER_RESERVE_BYTES = 16 * 1024**2
"""Disk space that the server reserves to record task ends and to open its index.

This is twice the size of the end records of a thousand waiting tasks (4 MiB) and the index's log (4 MiB).
"""

BACKUP_MANIFEST_BYTES_MAX = 256 * 1024**2
"""Maximum size of a backup's manifest, enough for a million files. A restore reads the manifest into memory."""

BUFFERED_OUTPUT_BYTES_MAX = 1024**2
"""Maximum size of output that a runner buffers while the disk rejects writes.

More output is dropped, and a `gap` event reports it.
"""

JOURNAL_WRITE_TIMEOUT_SECONDS = 24 * 3600.0
"""How long a runner retries to record the end of its task.

After that, the runner exits, and the server tries to record the end.
"""

REDACTION_HOLD_SECONDS = 0.2
"""How long complete lines are held back if their end may be the start of a secret value."""

METRICS_INTERVAL_SECONDS_MAX = 5.0
"""Longest interval between samples of a sandbox's resource usage."""
METRICS_INTERVAL_SECONDS_MIN = 0.5
"""Interval between the first samples of a sandbox's usage. It reaches METRICS_INTERVAL_SECONDS_MAX after 20 s."""

LOAD_SAMPLE_INTERVAL_SECONDS = 15.0
"""Interval at which the server samples its own load and its host's."""
LOAD_SAMPLES_MAX = 2880
"""Maximum number of samples of the server's and its host's load in memory, enough for 12 hours."""

TERMINAL_CLIENTS_MAX = 32
"""Maximum number of terminal clients of one task, including shells and read-only viewers; more get 409."""

DEBUG_SESSION_IDLE_TIMEOUT_SECONDS = 2.0
"""How long the sandbox of a debug session waits without a client before it ends."""

DEBUG_SESSION_SECONDS_MAX = 24 * 3600.0
"""Maximum lifetime of the sandbox of a debug session; after that, its shells end."""

DEBUG_SESSION_START_TIMEOUT_SECONDS = 60.0
"""Time limit for the start of a debug shell; after that, the request gets 503."""

TERMINAL_REPLAY_BYTES = 64 * 1024
"""Maximum size of the agent's recent terminal output that is replayed to clients that connect later."""

TERMINAL_INPUT_TIMEOUT_SECONDS = 30.0
"""How long the input of a terminal client may wait; after that, it is dropped, so the client can disconnect."""

TERMINAL_BACKLOG_BYTES_MAX = 1024 * 1024
"""Maximum size of output queued for one client of the agent's terminal. Beyond it, the client is disconnected."""

SHARED_MEMORY_FILES_MAX = 131_072
"""Maximum number of files and directories in /dev/shm, with bubblewrap.

One read of a directory there lists all of its files without interruption: 0.6 s for 2 million. Copying the path of
a mapped file in nested directories takes longer; see DISK_DIRECTORIES_MAX.
"""
