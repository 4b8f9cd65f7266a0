-- The terms of a task include the task that it continues. A starting server adds the terms of all tasks again.
INSERT INTO search (search) VALUES ('delete-all');
DELETE FROM searchable;
UPDATE tasks SET number = NULL;
