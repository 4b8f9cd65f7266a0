-- For filters by label and state: returns the state of a task without reading the task.
CREATE INDEX tasks_by_id ON tasks (id, state);
