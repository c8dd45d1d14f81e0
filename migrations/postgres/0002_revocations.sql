-- Devices whose resume tokens of before a revision no longer count. Old ones are dropped, and the floor rises to their revision.

CREATE TABLE revocations (
    revision BIGINT NOT NULL,
    device UUID NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (revision, device)
);

INSERT INTO meta (key, value) VALUES ('revocations_revision', '0'), ('revocations_floor', '0');
