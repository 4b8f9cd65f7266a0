-- The term of a state is one word. A starting server adds the terms of all tasks again.
INSERT INTO search (search) VALUES ('delete-all');
DELETE FROM searchable;
UPDATE tasks SET number = NULL;
