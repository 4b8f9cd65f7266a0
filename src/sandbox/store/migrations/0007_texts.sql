-- A prompt and a patch may have half a megabyte each. No list shows them and they never change, so they are written once,
-- in a separate table; the prompt in `task` is then empty. An older row contains them until it is written again.
-- UTF-8 as BLOB, like the task: then damaged data affects only its own row, not the database.
CREATE TABLE texts (
    task_id TEXT NOT NULL PRIMARY KEY REFERENCES tasks (id) ON DELETE CASCADE,
    prompt BLOB NOT NULL,
    patch BLOB
) STRICT;
