-- The registry. Ids are 16-byte blobs, times are Unix milliseconds, hashes are SHA-256.

CREATE TABLE devices (
    id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    tenant TEXT NOT NULL DEFAULT 'default' CHECK (length(tenant) BETWEEN 1 AND 64 AND tenant NOT GLOB '*[^ -~]*'),
    model TEXT CHECK (length(model) BETWEEN 1 AND 64 AND model NOT GLOB '*[^ -~]*'),
    secret_sha256 BLOB NOT NULL CHECK (length(secret_sha256) = 32),
    previous_secret_sha256 BLOB CHECK (length(previous_secret_sha256) = 32),
    previous_valid_until INTEGER,
    state INTEGER NOT NULL DEFAULT 0 CHECK (state IN (0, 1, 2)),
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    CHECK ((previous_secret_sha256 IS NULL) = (previous_valid_until IS NULL))
) WITHOUT ROWID;

-- Pages of one tenant or one model, in the order of ids.
CREATE INDEX devices_by_tenant ON devices (tenant, id);
CREATE INDEX devices_by_model ON devices (model, id);

CREATE TABLE rules (
    id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    spec TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    revision INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE meta (
    key TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

INSERT INTO meta (key, value) VALUES ('rules_revision', '0');

-- Newest first by seq. Never holds a secret or a hash.
CREATE TABLE audit (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    before TEXT,
    after TEXT
);

CREATE TABLE tokens (
    id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    name TEXT NOT NULL,
    role TEXT NOT NULL,
    sha256 BLOB NOT NULL CHECK (length(sha256) = 32),
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
) WITHOUT ROWID;

CREATE UNIQUE INDEX tokens_by_sha256 ON tokens (sha256);
