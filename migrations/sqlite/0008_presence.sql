-- Presence of devices, written behind by the nodes that hold their sockets.

-- The newest state of each device that a node has seen.
CREATE TABLE presence (
    device BLOB NOT NULL PRIMARY KEY CHECK (length(device) = 16),
    -- Id of the session, less 2^63: so that the order of ids, of 64 bits without a sign, is that of the column.
    epoch INTEGER NOT NULL,
    -- Order of the transitions of one session.
    number INTEGER NOT NULL,
    -- 0: online. 1: offline. 2: unknown.
    state INTEGER NOT NULL,
    since INTEGER NOT NULL,
    -- Where it is unknown: the cause.
    reason TEXT NOT NULL,
    -- JSON, where it is offline.
    evidence TEXT,
    -- Of its last session.
    tenant TEXT NOT NULL,
    model TEXT,
    firmware TEXT
) WITHOUT ROWID;

-- What led there. Old rows are deleted.
CREATE TABLE presence_history (
    device BLOB NOT NULL CHECK (length(device) = 16),
    epoch INTEGER NOT NULL,
    number INTEGER NOT NULL,
    state INTEGER NOT NULL,
    at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    evidence TEXT,
    PRIMARY KEY (device, epoch, number)
) WITHOUT ROWID;

CREATE INDEX presence_history_by_at ON presence_history (at);

-- The nodes that write presence, by the tag that their session ids have.
CREATE TABLE presence_nodes (
    tag INTEGER NOT NULL PRIMARY KEY,
    node TEXT NOT NULL,
    -- Less than the epochs of its present run, and greater than those of earlier ones.
    boot INTEGER NOT NULL,
    -- By the database's clock.
    seen_at INTEGER NOT NULL
) WITHOUT ROWID;
