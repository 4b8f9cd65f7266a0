-- The terms of a task include the last part of its repository's path. A starting server adds the terms of all tasks again.
INSERT INTO search (search) VALUES ('delete-all');
DELETE FROM searchable;
UPDATE tasks SET number = NULL;
