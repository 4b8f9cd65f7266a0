-- A prompt and a patch may have half a megabyte each. No list shows them and nothing changes them, so they are written
-- once, beside the task, whose prompt is empty then. A row from before has them in it until it is written again.
-- UTF-8 as bytes, as the task is: one that rots is found to be damaged, and not the database.
CREATE TABLE texts (
    task_id TEXT NOT NULL PRIMARY KEY REFERENCES tasks (id) ON DELETE CASCADE,
    prompt BLOB NOT NULL,
    patch BLOB
) STRICT;
