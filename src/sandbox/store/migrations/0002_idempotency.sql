-- The caller's key for a submission; few tasks have one, and it is asked for while it is young.
ALTER TABLE tasks ADD COLUMN idempotency_key TEXT;

CREATE INDEX tasks_by_idempotency_key ON tasks (idempotency_key, created_at, id) WHERE idempotency_key IS NOT NULL;
