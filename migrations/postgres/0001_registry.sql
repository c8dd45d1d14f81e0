-- The registry. Times are Unix milliseconds, hashes are SHA-256.

CREATE TABLE devices (
    id UUID NOT NULL PRIMARY KEY,
    -- Labels are printable ASCII, which the C collation keeps in byte order, as SQLite does.
    tenant TEXT COLLATE "C" NOT NULL DEFAULT 'default' CHECK (tenant COLLATE "C" ~ '^[ -~]{1,64}$'),
    model TEXT COLLATE "C" CHECK (model COLLATE "C" ~ '^[ -~]{1,64}$'),
    secret_sha256 BYTEA NOT NULL CHECK (length(secret_sha256) = 32),
    previous_secret_sha256 BYTEA CHECK (length(previous_secret_sha256) = 32),
    previous_valid_until BIGINT,
    state SMALLINT NOT NULL DEFAULT 0 CHECK (state IN (0, 1, 2)),
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    CHECK ((previous_secret_sha256 IS NULL) = (previous_valid_until IS NULL))
);

-- Pages of one tenant or one model, in the order of ids.
CREATE INDEX devices_by_tenant ON devices (tenant, id);
CREATE INDEX devices_by_model ON devices (model, id);

CREATE TABLE rules (
    id UUID NOT NULL PRIMARY KEY,
    spec TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    revision BIGINT NOT NULL
);

CREATE TABLE meta (
    key TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

INSERT INTO meta (key, value) VALUES ('rules_revision', '0');

-- Newest first by seq. Never holds a secret or a hash.
CREATE TABLE audit (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    before TEXT,
    after TEXT
);

CREATE TABLE tokens (
    id UUID NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    role TEXT NOT NULL,
    sha256 BYTEA NOT NULL CHECK (length(sha256) = 32),
    created_at BIGINT NOT NULL,
    revoked_at BIGINT
);

CREATE UNIQUE INDEX tokens_by_sha256 ON tokens (sha256);
