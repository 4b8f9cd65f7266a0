-- There may be ten thousand of them, and no list shows them: they stand last in the row, which is read up to what is
-- asked for. A JSON list, and `task` is the task without it.
ALTER TABLE tasks ADD COLUMN artifacts BLOB NOT NULL DEFAULT X'5B5D';

-- A damaged row stays as it is, and is read anew from its journal.
UPDATE tasks SET
    artifacts = CAST(json_extract(CAST(task AS TEXT), '$.artifacts') AS BLOB),
    task = CAST(json_remove(CAST(task AS TEXT), '$.artifacts') AS BLOB)
WHERE CASE WHEN json_valid(CAST(task AS TEXT)) THEN json_type(CAST(task AS TEXT), '$.artifacts') = 'array' END;
