-- The version of the projection from the journal. Tasks with another version are indexed again.
ALTER TABLE tasks ADD COLUMN fold INTEGER NOT NULL DEFAULT 0;

CREATE INDEX tasks_by_fold ON tasks (fold, id);
