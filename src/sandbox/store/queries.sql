-- name: insert_task
-- Adds a task; changes nothing if the id exists.
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
-- Adds a task or replaces its row.
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

-- name: delete_task
-- Deletes a task with its labels and texts.
DELETE FROM tasks WHERE id = :id;

-- name: all_tasks
-- All tasks, each with the projection version that it was indexed with.
SELECT fold, state_changed_at, id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id;

-- name: labels
-- The labels of a task.
SELECT key, value FROM labels WHERE task_id = :id;

-- name: delete_labels
-- Deletes all labels of a task.
DELETE FROM labels WHERE task_id = :id;

-- name: add_label
-- Adds a label to a task.
INSERT INTO labels (task_id, key, value) VALUES (?, ?, ?);

-- name: save_texts
-- Adds or replaces a task's texts; writes nothing if they are unchanged.
INSERT INTO texts (task_id, prompt, patch) VALUES (:id, :prompt, :patch)
ON CONFLICT (task_id) DO UPDATE SET prompt = excluded.prompt, patch = excluded.patch
WHERE prompt != excluded.prompt OR patch IS NOT excluded.patch;

-- name: load_task
-- One task.
SELECT id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id
WHERE id = :id;

-- name: find_by_idempotency_key
-- The newest task that was submitted with a key, at or after a time.
SELECT id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id
WHERE idempotency_key = :key AND created_at >= :since
ORDER BY created_at DESC, id DESC
LIMIT 1;

-- name: unfinished_tasks
-- The tasks in one of the states (a JSON list), oldest first.
SELECT id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id
WHERE state IN (SELECT value FROM json_each(:states))
ORDER BY created_at, id;

-- name: count_by_state
-- The number of tasks in each state that occurs.
SELECT state, count(*) FROM tasks GROUP BY state;

-- name: task_ids
-- The ids of all tasks.
SELECT id FROM tasks;

-- name: task_page
-- A page of tasks, without their artifacts and texts. {filters}: filters from below, joined by AND. {sort}: a column.
-- {order}: ASC or DESC.
SELECT id, {sort}, task FROM tasks
WHERE {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :limit OFFSET :offset;

-- name: page_of_rare_states
-- The same page, if few tasks are in the states: reads all of them.
SELECT id, {sort}, task FROM tasks INDEXED BY tasks_by_state
WHERE state IN (SELECT value FROM json_each(:states)) AND {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :limit OFFSET :offset;

-- name: count_all
-- The number of tasks.
SELECT count(*) FROM tasks;

-- name: count_in_states
-- The number of tasks in one of the states (a JSON list).
SELECT count(*) FROM tasks WHERE state IN (SELECT value FROM json_each(:states));

-- name: count_label
-- The number of tasks with a label.
SELECT count(*) FROM labels WHERE key = :key AND value = :value;

-- name: page_of_rare_label
-- The same page, if label 0 is rare: reads all tasks that have it. CROSS JOIN fixes the order of the join.
SELECT id, {sort}, task FROM labels AS labelled CROSS JOIN tasks ON tasks.id = labelled.task_id
WHERE labelled.key = :key_0 AND labelled.value = :value_0 AND {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :limit OFFSET :offset;

-- name: count_labelled
-- The number of tasks that have label 0 and match the filters.
SELECT count(*) FROM labels AS labelled WHERE labelled.key = :key_0 AND labelled.value = :value_0 AND {filters};

-- name: count_labelled_in_states
-- The same with a filter by state.
SELECT count(*) FROM labels AS labelled CROSS JOIN tasks INDEXED BY tasks_by_id ON tasks.id = labelled.task_id
WHERE labelled.key = :key_0 AND labelled.value = :value_0 AND {filters};

-- name: filter_none
-- All tasks.
true

-- name: filter_states
-- Tasks in one of the states (a JSON list). The plus prevents the planner from using an index of states and sorting all
-- matches, because reading in the page's order is faster.
+state IN (SELECT value FROM json_each(:states))

-- name: filter_label
-- Tasks with a label. {number}: the label's number. {task_id}: the column with the task's id.
EXISTS (
    SELECT 1 FROM labels AS other
    WHERE other.task_id = {task_id} AND other.key = :key_{number} AND other.value = :value_{number}
)

-- name: filter_after_value
-- Tasks after the cursor, if no value is NULL. {comparison}: > or <.
({sort}, id) {comparison} (:cursor_value, :cursor_id)

-- name: filter_after_nullable
-- The same if values may be NULL, which come last.
(({sort}, id) {comparison} (:cursor_value, :cursor_id) OR {sort} IS NULL)

-- name: filter_after_null
-- The same if the cursor's value is NULL.
{sort} IS NULL AND id {comparison} :cursor_id
