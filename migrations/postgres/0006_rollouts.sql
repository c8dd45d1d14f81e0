-- Staged changes of rules. Times are the database's.

-- One row for each rule that has, or had, a staged change.
CREATE TABLE rollouts (
    -- The rule's.
    id UUID NOT NULL PRIMARY KEY,
    -- Grows with each write, so that no step is taken twice.
    revision BIGINT NOT NULL,
    -- When it last took a step.
    stepped_at BIGINT NOT NULL,
    -- 0: over. 1: running or paused. 2: halted.
    phase SMALLINT NOT NULL,
    -- The evidence window of which counts are read.
    window_number BIGINT NOT NULL,
    -- JSON.
    rollout TEXT NOT NULL
);

-- What each run of a node has counted in the evidence window that it knew last.
CREATE TABLE rollout_counts (
    -- The rule's.
    id UUID NOT NULL,
    run UUID NOT NULL,
    window_number BIGINT NOT NULL,
    -- JSON.
    counts TEXT NOT NULL,
    PRIMARY KEY (id, run)
);
