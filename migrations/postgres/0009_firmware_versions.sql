-- Firmware versions that the fleet has run. Times are the database's.
CREATE TABLE firmware_versions (
    -- As devices claim it; empty where they name none.
    model TEXT NOT NULL,
    firmware TEXT NOT NULL,
    -- 0: proven. 1: unproven. 2: found worse.
    state SMALLINT NOT NULL,
    first_seen_at BIGINT NOT NULL,
    changed_at BIGINT NOT NULL,
    PRIMARY KEY (model, firmware)
);

CREATE INDEX firmware_versions_by_changed_at ON firmware_versions (changed_at);
