-- The columns that searches filter and sort by, in a narrow table that is read many times faster than `tasks`. `number` is
-- the row of a task in `search`, and is never used again. `content` is a digest of what determines the terms of the task.
CREATE TABLE searchable (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    content BLOB NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    state_changed_at INTEGER NOT NULL
) STRICT;

-- The terms of each task (`store/listing.py`), which include its labels. The text itself is not stored here.
CREATE VIRTUAL TABLE search USING fts5 (terms, content = '', columnsize = 0, detail = none, tokenize = 'ascii');

-- A starting server adds the tasks of earlier versions, which have no number.
ALTER TABLE tasks ADD COLUMN number INTEGER;

-- The number is included for searches, and the time of creation for the filter by it.
DROP INDEX tasks_by_creation;
DROP INDEX tasks_by_start;
DROP INDEX tasks_by_change;
DROP INDEX tasks_by_name;
DROP INDEX tasks_by_id;
CREATE INDEX tasks_by_creation ON tasks (created_at, id, state, number);
CREATE INDEX tasks_by_start ON tasks (started_at, id, state, created_at, number);
CREATE INDEX tasks_by_change ON tasks (state_changed_at, id, state, created_at, number);
CREATE INDEX tasks_by_name ON tasks (name, id, state, created_at, number);

DROP TABLE labels;
