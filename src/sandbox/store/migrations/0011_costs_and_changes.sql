-- The cost of a task in nanodollars (10^-9 USD), for sorting and for totals. A damaged row costs nothing until the task is
-- indexed again.
ALTER TABLE tasks ADD COLUMN cost INTEGER NOT NULL DEFAULT 0;
ALTER TABLE searchable ADD COLUMN cost INTEGER NOT NULL DEFAULT 0;

-- The number of the latest change of the task's state, counted over all tasks. A cursor of the stream of all tasks is such
-- a number with the id of the index: an index that is rebuilt numbers the changes again.
ALTER TABLE tasks ADD COLUMN change INTEGER NOT NULL DEFAULT 0;
CREATE TABLE changes (index_id TEXT NOT NULL, last INTEGER NOT NULL) STRICT;
INSERT INTO changes VALUES (lower(hex(randomblob(8))), (SELECT count(*) FROM tasks));

UPDATE tasks SET
    change = numbered.change,
    cost = CASE
        WHEN NOT json_valid(CAST(task AS TEXT)) THEN 0
        WHEN json_type(CAST(task AS TEXT), '$.progress.cost_usd') IN ('integer', 'real') THEN CAST(
            round(min(max(json_extract(CAST(task AS TEXT), '$.progress.cost_usd'), 0), 999999999) * 1e9) AS INTEGER
        )
        ELSE 0
    END
FROM (SELECT id, row_number() OVER (ORDER BY state_changed_at, id) AS change FROM tasks) AS numbered
WHERE numbered.id = tasks.id;

UPDATE searchable SET cost = tasks.cost FROM tasks WHERE tasks.id = searchable.id AND tasks.cost != 0;

CREATE INDEX tasks_by_state_change ON tasks (change);
CREATE INDEX tasks_by_cost ON tasks (cost, id, state, created_at, number);

-- The cost is included for the totals of a period, and of some states.
DROP INDEX tasks_by_creation;
DROP INDEX tasks_by_state;
CREATE INDEX tasks_by_creation ON tasks (created_at, id, state, number, cost);
CREATE INDEX tasks_by_state ON tasks (state, cost);
