-- Firmware versions that the fleet has run. Times are the database's.
CREATE TABLE firmware_versions (
    -- As devices claim it; empty where they name none.
    model TEXT NOT NULL,
    firmware TEXT NOT NULL,
    -- 0: proven. 1: unproven. 2: found worse.
    state INTEGER NOT NULL,
    first_seen_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL,
    PRIMARY KEY (model, firmware)
) WITHOUT ROWID;

CREATE INDEX firmware_versions_by_changed_at ON firmware_versions (changed_at);
