-- Staged changes of rules. Times are the database's.

-- One row for each rule that has, or had, a staged change.
CREATE TABLE rollouts (
    -- The rule's.
    id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    -- Grows with each write, so that no step is taken twice.
    revision INTEGER NOT NULL,
    -- When it last took a step.
    stepped_at INTEGER NOT NULL,
    -- 0: over. 1: running or paused. 2: halted.
    phase INTEGER NOT NULL,
    -- The evidence window of which counts are read.
    window_number INTEGER NOT NULL,
    -- JSON.
    rollout TEXT NOT NULL
) WITHOUT ROWID;

-- What each run of a node has counted in the evidence window that it knew last.
CREATE TABLE rollout_counts (
    -- The rule's.
    id BLOB NOT NULL CHECK (length(id) = 16),
    run BLOB NOT NULL CHECK (length(run) = 16),
    window_number INTEGER NOT NULL,
    -- JSON.
    counts TEXT NOT NULL,
    PRIMARY KEY (id, run)
) WITHOUT ROWID;
