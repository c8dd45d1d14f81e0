-- What the check of a new rule reads: the devices of every node, and the rules that nobody confirmed. Times are the database's.

-- One row for each run of a gateway, written every few seconds; rows older than a day are dropped.
CREATE TABLE device_counts (
    id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    node TEXT NOT NULL,
    at INTEGER NOT NULL,
    -- JSON: devices by model, firmware version and tenant.
    counts TEXT NOT NULL
) WITHOUT ROWID;

-- When the rule was last made or changed without a confirmation; null where it was confirmed.
ALTER TABLE rules ADD COLUMN unconfirmed_at INTEGER;
