-- The caller's key for a submission. Few tasks have one, and only recent ones are searched.
ALTER TABLE tasks ADD COLUMN idempotency_key TEXT;

CREATE INDEX tasks_by_idempotency_key ON tasks (idempotency_key, created_at, id) WHERE idempotency_key IS NOT NULL;
