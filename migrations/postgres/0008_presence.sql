-- Presence of devices, written behind by the nodes that hold their sockets.

-- The newest state of each device that a node has seen.
CREATE TABLE presence (
    device UUID NOT NULL PRIMARY KEY,
    -- Id of the session, less 2^63: so that the order of ids, of 64 bits without a sign, is that of the column.
    epoch BIGINT NOT NULL,
    -- Order of the transitions of one session.
    number BIGINT NOT NULL,
    -- 0: online. 1: offline. 2: unknown.
    state SMALLINT NOT NULL,
    since BIGINT NOT NULL,
    -- Where it is unknown: the cause.
    reason TEXT NOT NULL,
    -- JSON, where it is offline.
    evidence TEXT,
    -- Of its last session.
    tenant TEXT NOT NULL,
    model TEXT,
    firmware TEXT
);

-- What led there. Old rows are deleted.
CREATE TABLE presence_history (
    device UUID NOT NULL,
    epoch BIGINT NOT NULL,
    number BIGINT NOT NULL,
    state SMALLINT NOT NULL,
    at BIGINT NOT NULL,
    reason TEXT NOT NULL,
    evidence TEXT,
    PRIMARY KEY (device, epoch, number)
);

CREATE INDEX presence_history_by_at ON presence_history (at);

-- The nodes that write presence, by the tag that their session ids have.
CREATE TABLE presence_nodes (
    tag BIGINT NOT NULL PRIMARY KEY,
    node TEXT NOT NULL,
    -- Less than the epochs of its present run, and greater than those of earlier ones.
    boot BIGINT NOT NULL,
    -- By the database's clock.
    seen_at BIGINT NOT NULL
);
