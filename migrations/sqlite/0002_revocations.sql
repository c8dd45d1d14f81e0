-- Devices whose resume tokens of before a revision no longer count. Old ones are dropped, and the floor rises to their revision.

CREATE TABLE revocations (
    revision INTEGER NOT NULL,
    device BLOB NOT NULL CHECK (length(device) = 16),
    at INTEGER NOT NULL,
    PRIMARY KEY (revision, device)
) WITHOUT ROWID;

INSERT INTO meta (key, value) VALUES ('revocations_revision', '0'), ('revocations_floor', '0');
