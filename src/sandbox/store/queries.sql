-- name: save_task
-- Adds a task or replaces its row.
INSERT INTO tasks (
    id, name, state, created_at, started_at, state_changed_at, idempotency_key, journal_offset, task, fold,
    artifacts, number, cost, change
)
VALUES (
    :id, :name, :state, :created_at, :started_at, :state_changed_at, :idempotency_key, :journal_offset, :task, :fold,
    :artifacts, :number, :cost, :change
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
    artifacts = excluded.artifacts,
    number = excluded.number,
    cost = excluded.cost,
    change = max(excluded.change, change);

-- name: delete_task
-- Deletes a task with its texts.
DELETE FROM tasks WHERE id = :id;

-- name: all_tasks
-- All tasks, each with the projection version that it was indexed with.
SELECT fold, state_changed_at, id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id;

-- name: save_texts
-- Adds or replaces a task's texts; writes nothing if they are unchanged.
INSERT INTO texts (task_id, prompt, patch) VALUES (:id, :prompt, :patch)
ON CONFLICT (task_id) DO UPDATE SET prompt = excluded.prompt, patch = excluded.patch
WHERE prompt != excluded.prompt OR patch IS NOT excluded.patch;

-- name: searchable
-- The searchable columns of a task that may change.
SELECT number, content, state, started_at, state_changed_at, cost FROM searchable WHERE id = :id;

-- name: load_searchable
-- The number of a task, its indexed state, and the task.
SELECT searchable.number, searchable.state, tasks.id, task, journal_offset, tasks.state, artifacts, prompt, patch
FROM searchable JOIN tasks ON tasks.id = searchable.id LEFT JOIN texts ON texts.task_id = tasks.id
WHERE searchable.id = :id;

-- name: add_searchable
-- Makes a task searchable; its terms are added with the new number.
INSERT INTO searchable (id, content, name, state, created_at, started_at, state_changed_at, cost)
VALUES (:id, :content, :name, :state, :created_at, :started_at, :state_changed_at, :cost);

-- name: update_searchable
-- Updates the searchable columns of a task.
UPDATE searchable
SET state = :state, started_at = :started_at, state_changed_at = :state_changed_at, cost = :cost
WHERE id = :id;

-- name: delete_searchable
-- Removes a task from all searches.
DELETE FROM searchable WHERE id = :id;

-- name: add_terms
-- Adds the terms of a task (a text, separated by spaces).
INSERT INTO search (rowid, terms) VALUES (:number, :terms);

-- name: delete_terms
-- Removes the terms of a task, which must be those that were added.
INSERT INTO search (search, rowid, terms) VALUES ('delete', :number, :terms);

-- name: set_number
-- Sets the number of a task that an earlier version stored.
UPDATE tasks SET number = :number WHERE id = :id;

-- name: unsearchable_ids
-- The ids of the tasks that are not searchable yet, oldest first.
SELECT id FROM tasks WHERE number IS NULL ORDER BY created_at, id;

-- name: count_change
-- Numbers a change of a task's state.
UPDATE changes SET last = last + 1 RETURNING last;

-- name: last_change_position
-- The id of the index, and the number of the latest change.
SELECT index_id, last FROM changes;

-- name: changed_tasks
-- The tasks whose state changed after a given change, each with its latest change.
SELECT change, id, task FROM tasks WHERE change > :after ORDER BY change LIMIT :limit;

-- name: load_task
-- One task.
SELECT id, task, journal_offset, state, artifacts, prompt, patch
FROM tasks LEFT JOIN texts ON texts.task_id = tasks.id
WHERE id = :id;

-- name: load_task_state
-- One task, without the columns that can contain megabytes.
SELECT id, task, journal_offset, state FROM tasks WHERE id = :id;

-- name: prompt_beginnings
-- The first bytes of the prompts of some tasks.
SELECT task_id, substr(prompt, 1, :bytes) FROM texts WHERE task_id IN (SELECT value FROM json_each(:ids));

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
-- The same page, if few tasks are in the states: reads all of them. Sorting rows with the tasks' data would take longer.
SELECT tasks.id, value, task FROM (
    SELECT rowid AS task_rowid, id, {sort} AS value FROM tasks INDEXED BY tasks_by_state
    WHERE state IN (SELECT value FROM json_each(:states)) AND {filters}
    ORDER BY {sort} {order} NULLS LAST, id {order}
    LIMIT :limit OFFSET :offset
) AS page CROSS JOIN tasks ON tasks.rowid = task_rowid
ORDER BY value {order} NULLS LAST, tasks.id {order};

-- name: found_page
-- A page, read from all tasks that have the terms. CROSS JOIN fixes the order of the join. A row without data, because its
-- id is damaged, remains in the page: a page with fewer rows would be the last one.
SELECT page.id, value, coalesce(task, x'') FROM (
    SELECT id, {sort} AS value FROM search CROSS JOIN searchable ON number = search.rowid
    WHERE search MATCH :terms AND {filters}
    ORDER BY {sort} {order} NULLS LAST, id {order}
    LIMIT :limit OFFSET :offset
) AS page LEFT JOIN tasks ON tasks.id = page.id
ORDER BY value {order} NULLS LAST, page.id {order};

-- name: next_positions
-- The next positions in the list, each with the task's number, regardless of the search.
SELECT id, {sort}, number FROM tasks
WHERE {filters}
ORDER BY {sort} {order} NULLS LAST, id {order}
LIMIT :window;

-- name: found_numbers
-- The tasks in a range of numbers that have the terms. In descending order, the newest tasks are found fastest.
SELECT rowid FROM search WHERE search MATCH :terms AND rowid BETWEEN :first AND :last ORDER BY rowid {order};

-- name: encoded_tasks
-- The data of the tasks on a page. A statement for each task would take four times as long as one for all of them.
SELECT id, task FROM tasks WHERE id IN (SELECT value FROM json_each(:ids));

-- name: last_number
-- The highest task number, which is at least the number of tasks; 0 if there are no tasks.
SELECT coalesce(max(number), 0) FROM searchable;

-- name: count_all
-- The number of tasks. Without WHERE, SQLite counts the entries of each page of an index instead of reading them.
SELECT count(*) FROM tasks;

-- name: count_filtered
-- The number of tasks that match the filters.
SELECT count(*) FROM tasks WHERE {filters};

-- name: count_found
-- The number of tasks that have the terms.
SELECT count(*) FROM search WHERE search MATCH :terms;

-- name: count_found_in_period
-- The number of tasks that have the terms and were created in a period.
SELECT count(*) FROM search CROSS JOIN searchable ON number = search.rowid WHERE search MATCH :terms AND {filters};

-- name: totals_filtered
-- The number of tasks that match the filters, and their cost. `total` returns a float, which cannot overflow.
SELECT count(*), total(cost) FROM tasks WHERE {filters};

-- name: totals_found
-- The number of tasks that have the terms and match the filters, and their cost.
SELECT count(*), total(cost) FROM search CROSS JOIN searchable ON number = search.rowid
WHERE search MATCH :terms AND {filters};

-- name: filter_none
-- All tasks.
true

-- name: filter_in_states
-- Tasks in one of the states (a JSON list).
state IN (SELECT value FROM json_each(:states))

-- name: filter_states
-- Tasks in one of the states (a JSON list). The plus prevents the planner from using an index of states and sorting all
-- matches, because reading in the page's order is faster.
+state IN (SELECT value FROM json_each(:states))

-- name: filter_created
-- Tasks that were created in a period; its end is exclusive.
created_at >= :created_after AND created_at < :created_before

-- name: filter_created_in_order
-- The same, read in the page's order; see filter_states.
+created_at >= :created_after AND +created_at < :created_before

-- name: filter_after_value
-- Tasks after the cursor, if no value is NULL. {comparison}: > or <.
({sort}, id) {comparison} (:cursor_value, :cursor_id)

-- name: filter_after_nullable
-- The same if values may be NULL, which come last.
(({sort}, id) {comparison} (:cursor_value, :cursor_id) OR {sort} IS NULL)

-- name: filter_after_null
-- The same if the cursor's value is NULL.
{sort} IS NULL AND id {comparison} :cursor_id
