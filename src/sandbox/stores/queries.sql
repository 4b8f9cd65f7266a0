-- name: insert_task
-- Adds a task; changes no row when the id is taken.
INSERT INTO tasks (
    id, name, state, created_at, started_at, state_changed_at, idempotency_key, journal_offset, task
)
VALUES (
    :id, :name, :state, :created_at, :started_at, :state_changed_at, :idempotency_key, :journal_offset, :task
)
ON CONFLICT (id) DO NOTHING;

-- name: save_task
-- Replaces what is known of a task, or adds it.
INSERT INTO tasks (
    id, name, state, created_at, started_at, state_changed_at, idempotency_key, journal_offset, task
)
VALUES (
    :id, :name, :state, :created_at, :started_at, :state_changed_at, :idempotency_key, :journal_offset, :task
)
ON CONFLICT (id) DO UPDATE SET
    name = excluded.name,
    state = excluded.state,
    created_at = excluded.created_at,
    started_at = excluded.started_at,
    state_changed_at = excluded.state_changed_at,
    idempotency_key = excluded.idempotency_key,
    journal_offset = excluded.journal_offset,
    task = excluded.task;

-- name: labels
-- The labels of a task.
SELECT key, value FROM labels WHERE task_id = :id;

-- name: drop_labels
-- Takes all labels from a task.
DELETE FROM labels WHERE task_id = :id;

-- name: add_label
-- Gives a task one label.
INSERT INTO labels (task_id, key, value) VALUES (?, ?, ?);

-- name: load_task
-- One task.
SELECT task, journal_offset FROM tasks WHERE id = :id;

-- name: find_by_idempotency_key
-- The newest task that was submitted with a key, not before a time.
SELECT task, journal_offset FROM tasks
WHERE idempotency_key = :key AND created_at >= :since
ORDER BY created_at DESC, id DESC
LIMIT 1;

-- name: unfinished_tasks
-- Every task in one of the states (a JSON list), oldest first.
SELECT task, journal_offset FROM tasks
WHERE state IN (SELECT value FROM json_each(:states))
ORDER BY created_at, id;

-- name: count_by_state
-- How many tasks are in each state that any task is in.
SELECT state, count(*) FROM tasks GROUP BY state;

-- name: task_ids
-- Every task.
SELECT id FROM tasks;

-- name: task_page
-- A page of tasks. {filters} are joined from those below, {sort} is a column, {order} is ASC or DESC.
SELECT task FROM tasks
WHERE {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :limit OFFSET :offset;

-- name: count_matching
-- How many tasks there are on all pages.
SELECT count(*) FROM tasks WHERE {filters};

-- name: filter_none
-- Every task.
true

-- name: filter_states
-- Tasks in one of the states (a JSON list). The plus, here and below, keeps the planner from collecting and
-- sorting everything that matches, where reading in the page's order gets a page of it at once.
+state IN (SELECT value FROM json_each(:states))

-- name: filter_labels
-- Tasks that have all of the labels; {pairs} are (key, value) by parameter.
+id IN (
    SELECT task_id FROM labels
    WHERE (key, value) IN (VALUES {pairs})
    GROUP BY task_id
    HAVING count(*) = :label_count
)

-- name: filter_behind_all_valued
-- What comes behind a place; {way} is > or <.
({sort}, id) {way} (:place_value, :place_id)

-- name: filter_behind_some_valued
-- The same where some have no value: they come last.
(({sort}, id) {way} (:place_value, :place_id) OR {sort} IS NULL)

-- name: filter_behind_valueless
-- The same among those that have none.
{sort} IS NULL AND id {way} :place_id
