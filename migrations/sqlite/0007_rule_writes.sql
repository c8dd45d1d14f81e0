-- Which changes of the rules are made, so that one whose outcome was not known is made once. Old rows are deleted.
CREATE TABLE rule_writes (
    id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    at INTEGER NOT NULL
) WITHOUT ROWID;

-- When a record reached the database, if it had to wait for it in a node's journal.
ALTER TABLE audit ADD COLUMN arrived_at INTEGER;
