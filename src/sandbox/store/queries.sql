-- name: insert_task
-- Adds a task; changes no row when the id is taken.
INSERT INTO tasks (
    id, name, state, created_at, started_at, state_changed_at, idempotency_key, journal_offset, task, fold,
    artifacts
)
VALUES (
    :id, :name, :state, :created_at, :started_at, :state_changed_at, :idempotency_key, :journal_offset, :task, :fold,
    :artifacts
)
ON CONFLICT (id) DO NOTHING;

-- name: save_task
-- Replaces what is known of a task, or adds it.
INSERT INTO tasks (
    id, name, state, created_at, started_at, state_changed_at, idempotency_key, journal_offset, task, fold,
    artifacts
)
VALUES (
    :id, :name, :state, :created_at, :started_at, :state_changed_at, :idempotency_key, :journal_offset, :task, :fold,
    :artifacts
)
ON CONFLICT (id) DO UPDATE SET
    name = excluded.name,
    state = excluded.state,
    created_at = excluded.created_at,
    started_at = excluded.started_at,
    state_changed_at = excluded.state_changed_at,
    idempotency_key = excluded.idempotency_key,
    journal_offset = excluded.journal_offset,
    task = excluded.task,
    fold = excluded.fold,
    artifacts = excluded.artifacts;

-- name: forget_task
-- Takes a task out; its labels and texts go with it.
DELETE FROM tasks WHERE id = :id;

-- name: every_task
-- Every task, and by which rules it was worked out of its journal.
SELECT fold, state_changed_at, id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id;

-- name: labels
-- The labels of a task.
SELECT key, value FROM labels WHERE task_id = :id;

-- name: drop_labels
-- Takes all labels from a task.
DELETE FROM labels WHERE task_id = :id;

-- name: add_label
-- Gives a task one label.
INSERT INTO labels (task_id, key, value) VALUES (?, ?, ?);

-- name: keep_texts
-- Writes down a task's texts, where others or none are known.
INSERT INTO texts (task_id, prompt, patch) VALUES (:id, :prompt, :patch)
ON CONFLICT (task_id) DO UPDATE SET prompt = excluded.prompt, patch = excluded.patch
WHERE prompt != excluded.prompt OR patch IS NOT excluded.patch;

-- name: load_task
-- One task.
SELECT id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id
WHERE id = :id;

-- name: find_by_idempotency_key
-- The newest task that was submitted with a key, not before a time.
SELECT id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id
WHERE idempotency_key = :key AND created_at >= :since
ORDER BY created_at DESC, id DESC
LIMIT 1;

-- name: unfinished_tasks
-- Every task in one of the states (a JSON list), oldest first.
SELECT id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id
WHERE state IN (SELECT value FROM json_each(:states))
ORDER BY created_at, id;

-- name: count_by_state
-- How many tasks are in each state that any task is in.
SELECT state, count(*) FROM tasks GROUP BY state;

-- name: task_ids
-- Every task.
SELECT id FROM tasks;

-- name: task_page
-- A page of tasks, without their artifacts and texts. {filters} are joined from those below, {sort} is a column, {order} is ASC or DESC.
SELECT id, {sort}, task FROM tasks
WHERE {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :limit OFFSET :offset;

-- name: page_of_rare_states
-- The same page where few tasks are in the states: all of them are looked at.
SELECT id, {sort}, task FROM tasks INDEXED BY tasks_by_state
WHERE state IN (SELECT value FROM json_each(:states)) AND {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :limit OFFSET :offset;

-- name: count_all
-- How many tasks there are.
SELECT count(*) FROM tasks;

-- name: count_in_states
-- How many tasks are in one of the states (a JSON list).
SELECT count(*) FROM tasks WHERE state IN (SELECT value FROM json_each(:states));

-- name: count_label
-- How many tasks have a label.
SELECT count(*) FROM labels WHERE key = :key AND value = :value;

-- name: page_of_few
-- The same page where label 0 is rare: all tasks that have it are looked at. CROSS keeps the planner from turning round.
SELECT id, {sort}, task FROM labels AS few CROSS JOIN tasks ON tasks.id = few.task_id
WHERE few.key = :key_0 AND few.value = :value_0 AND {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :limit OFFSET :offset;

-- name: count_labelled
-- How many tasks have label 0 and match.
SELECT count(*) FROM labels AS few WHERE few.key = :key_0 AND few.value = :value_0 AND {filters};

-- name: count_labelled_in_states
-- The same where states are asked for.
SELECT count(*) FROM labels AS few CROSS JOIN tasks INDEXED BY tasks_by_id ON tasks.id = few.task_id
WHERE few.key = :key_0 AND few.value = :value_0 AND {filters};

-- name: filter_none
-- Every task.
true

-- name: filter_states
-- Tasks in one of the states (a JSON list). The plus, here and below, keeps the planner from collecting and
-- sorting everything that matches, where reading in the page's order gets a page of it at once.
+state IN (SELECT value FROM json_each(:states))

-- name: filter_label
-- Tasks that have a label, by its {number} and the column {task_id}.
EXISTS (
    SELECT 1 FROM labels AS other
    WHERE other.task_id = {task_id} AND other.key = :key_{number} AND other.value = :value_{number}
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
