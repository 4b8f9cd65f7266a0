-- By which rules a task was worked out of its journal; what others made is worked out again.
ALTER TABLE tasks ADD COLUMN fold INTEGER NOT NULL DEFAULT 0;

CREATE INDEX tasks_by_fold ON tasks (fold, id);
