-- A JSON list, which `task` no longer contains. There may be ten thousand artifacts, and no list of tasks shows them. The
-- column is the last one, because SQLite reads a row only up to the last requested column.
ALTER TABLE tasks ADD COLUMN artifacts BLOB NOT NULL DEFAULT X'5B5D';

-- A damaged row is left unchanged; the task is indexed again from its journal.
UPDATE tasks SET
    artifacts = CAST(json_extract(CAST(task AS TEXT), '$.artifacts') AS BLOB),
    task = CAST(json_remove(CAST(task AS TEXT), '$.artifacts') AS BLOB)
WHERE CASE WHEN json_valid(CAST(task AS TEXT)) THEN json_type(CAST(task AS TEXT), '$.artifacts') = 'array' END;
