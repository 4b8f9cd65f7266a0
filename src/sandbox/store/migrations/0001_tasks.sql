-- Tasks and their labels. Times are microseconds since 1970 in UTC.
-- `task` is the whole task as JSON; the other columns are for filters and sorting.
CREATE TABLE tasks (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    state_changed_at INTEGER NOT NULL,
    journal_offset INTEGER NOT NULL,
    task BLOB NOT NULL
) STRICT;

-- A page is read in the order of one of these indexes; the state is included for the filter by state.
CREATE INDEX tasks_by_creation ON tasks (created_at, id, state);
CREATE INDEX tasks_by_start ON tasks (started_at, id, state);
CREATE INDEX tasks_by_change ON tasks (state_changed_at, id, state);
CREATE INDEX tasks_by_name ON tasks (name, id, state);

-- For counts, and for the few unfinished tasks.
CREATE INDEX tasks_by_state ON tasks (state);

CREATE TABLE labels (
    task_id TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (task_id, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX labels_by_value ON labels (key, value, task_id);
