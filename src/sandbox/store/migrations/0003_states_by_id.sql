-- Tells the states of tasks that a label leads to without reading the tasks.
CREATE INDEX tasks_by_id ON tasks (id, state);
