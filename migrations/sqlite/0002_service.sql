-- Tenants and their keys; versions of concepts; stored generations; web-hooks. What a 0001 database holds becomes the
-- tenant `default`'s. Tables that get other constraints are built anew beside the old ones, children first dropped, so
-- that no ON DELETE CASCADE fires; renaming carries the references along. All of it is one transaction.

CREATE TABLE settings (
    key         TEXT PRIMARY KEY,
    value       TEXT NOT NULL
) STRICT;

CREATE TABLE tenants (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    -- `whsec_…`: signs the tenant's web-hooks. NULL only until the database is opened next.
    webhook_secret TEXT,
    -- Quotas; NULL: the server's default.
    concepts    INTEGER,
    trainings   INTEGER,
    requests_in_flight INTEGER,
    pictures_per_minute INTEGER,
    created_at  INTEGER NOT NULL
) STRICT;

INSERT INTO tenants (id, name, created_at)
VALUES ('tenant_00000000000000000000000000000000', 'default', unixepoch() * 1000);

CREATE TABLE api_keys (
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    -- The 8 characters that a key is looked up by.
    public_id   TEXT NOT NULL UNIQUE,
    -- SHA-256 of the whole key, in hex. The key itself is nowhere.
    hash        TEXT NOT NULL,
    name        TEXT NOT NULL,
    -- Words with commas between them: read, generate, train, admin.
    scopes      TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER,
    revoked_at  INTEGER,
    -- Written at most once a minute.
    last_used_at INTEGER
) STRICT;

CREATE INDEX api_keys_tenant ON api_keys (tenant_id, id);

CREATE TABLE concepts_new (
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    name        TEXT NOT NULL,
    kind        TEXT NOT NULL CHECK (kind IN ('subject', 'style')),
    class_noun  TEXT,
    description TEXT,
    metadata    TEXT NOT NULL DEFAULT '{}',
    -- The version in use: SHA-256 of its concept file, and its number; both NULL until the first training has succeeded.
    version     TEXT,
    version_number INTEGER,
    created_at  INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL,
    CONSTRAINT concepts_name UNIQUE (tenant_id, name),
    CHECK ((version IS NULL) = (version_number IS NULL))
) STRICT;

INSERT INTO concepts_new (id, tenant_id, name, kind, class_noun, version, version_number, created_at, updated_at)
SELECT id, 'tenant_00000000000000000000000000000000', name, kind, class_noun, version, iif(version IS NULL, NULL, 1),
       created_at, created_at
FROM concepts;

CREATE TABLE concept_pictures_new (
    concept_id  TEXT NOT NULL REFERENCES concepts_new (id) ON DELETE CASCADE,
    position    INTEGER NOT NULL,
    -- SHA-256 of the PNG in the blob store.
    blob        TEXT NOT NULL,
    PRIMARY KEY (concept_id, position)
) STRICT;

INSERT INTO concept_pictures_new SELECT concept_id, position, blob FROM concept_pictures;

CREATE TABLE trainings_new (
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    concept_id  TEXT NOT NULL REFERENCES concepts_new (id) ON DELETE CASCADE,
    status      TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    spec        TEXT NOT NULL,
    -- SHA-256 over the reference pictures' hashes and the settings; NULL in rows of 0001.
    input_fingerprint TEXT,
    -- Number of the version that it made.
    version     INTEGER,
    webhook_url TEXT,
    step        INTEGER NOT NULL DEFAULT 0,
    total_steps INTEGER NOT NULL,
    loss        REAL,
    steps_per_second REAL,
    -- The curve so far, JSON: [{step, total, next_token, prior, regularisation}].
    losses      TEXT,
    error       TEXT,
    report      TEXT,
    -- Blob of the newest checkpoint and the step that it stands at.
    checkpoint  TEXT,
    checkpoint_step INTEGER,
    resumed_from_step INTEGER NOT NULL DEFAULT 0,
    -- The queue's part: who works on it, and how often it was begun.
    attempt     INTEGER NOT NULL DEFAULT 0,
    lease_token TEXT,
    lease_until INTEGER,
    created_at  INTEGER NOT NULL,
    started_at  INTEGER,
    finished_at INTEGER
) STRICT;

INSERT INTO trainings_new (id, tenant_id, concept_id, status, spec, version, step, total_steps, loss, steps_per_second,
                           error, report, checkpoint, checkpoint_step, resumed_from_step, attempt, lease_token,
                           lease_until, created_at, started_at, finished_at)
SELECT id, 'tenant_00000000000000000000000000000000', concept_id, status, spec, iif(status = 'succeeded', 1, NULL), step,
       total_steps, loss, steps_per_second, error, report, checkpoint, checkpoint_step, resumed_from_step, attempt,
       lease_token, lease_until, created_at, started_at, finished_at
FROM trainings;

DROP TABLE concept_pictures;
DROP TABLE trainings;
DROP TABLE concepts;
ALTER TABLE concepts_new RENAME TO concepts;
ALTER TABLE concept_pictures_new RENAME TO concept_pictures;
ALTER TABLE trainings_new RENAME TO trainings;

-- Lists go by id: ids begin with their time.
CREATE INDEX concepts_list ON concepts (tenant_id, id);
CREATE INDEX concept_pictures_blob ON concept_pictures (blob);
CREATE INDEX trainings_status ON trainings (status, created_at);
CREATE INDEX trainings_concept ON trainings (concept_id, id);
CREATE INDEX trainings_list ON trainings (tenant_id, id);
CREATE INDEX trainings_checkpoint ON trainings (checkpoint) WHERE checkpoint IS NOT NULL;
CREATE INDEX trainings_input ON trainings (tenant_id, input_fingerprint);

CREATE TABLE concept_versions (
    concept_id  TEXT NOT NULL REFERENCES concepts (id) ON DELETE CASCADE,
    -- From 1, never used again.
    number      INTEGER NOT NULL,
    -- SHA-256 of the concept file in the blob store.
    hash        TEXT NOT NULL,
    -- NULL: imported.
    training_id TEXT REFERENCES trainings (id) ON DELETE SET NULL,
    input_fingerprint TEXT,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (concept_id, number)
) STRICT;

CREATE INDEX concept_versions_hash ON concept_versions (hash);
CREATE INDEX concept_versions_training ON concept_versions (training_id);

INSERT INTO concept_versions (concept_id, number, hash, training_id, created_at)
SELECT id, 1, version,
       (SELECT t.id FROM trainings t WHERE t.concept_id = concepts.id AND t.status = 'succeeded' ORDER BY t.id DESC LIMIT 1),
       coalesce((SELECT max(t.finished_at) FROM trainings t WHERE t.concept_id = concepts.id AND t.status = 'succeeded'),
                created_at)
FROM concepts WHERE version IS NOT NULL;

CREATE TABLE training_previews (
    training_id TEXT NOT NULL REFERENCES trainings (id) ON DELETE CASCADE,
    step        INTEGER NOT NULL,
    -- SHA-256 of the PNG in the blob store.
    blob        TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (training_id, step)
) STRICT;

CREATE INDEX training_previews_blob ON training_previews (blob);

CREATE TABLE generations (
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    status      TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- 1: nobody waits on a connection; queued again when the server starts. 0: failed then.
    background  INTEGER NOT NULL,
    prompt      TEXT NOT NULL,
    -- JSON: every setting resolved, the seed too.
    request     TEXT NOT NULL,
    -- JSON: [{name, version, hash}] as they were when it was accepted.
    concepts    TEXT NOT NULL DEFAULT '[]',
    metadata    TEXT NOT NULL DEFAULT '{}',
    webhook_url TEXT,
    -- Codes drawn and to draw.
    done        INTEGER NOT NULL DEFAULT 0,
    total       INTEGER NOT NULL DEFAULT 0,
    -- JSON: {input_tokens, output_tokens, …}; {code, message, field}.
    usage       TEXT,
    error       TEXT,
    attempt     INTEGER NOT NULL DEFAULT 0,
    created_at  INTEGER NOT NULL,
    started_at  INTEGER,
    finished_at INTEGER
) STRICT;

CREATE INDEX generations_list ON generations (tenant_id, id);
CREATE INDEX generations_status ON generations (status, created_at);

CREATE TABLE images_new (
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    -- NULL in rows of 0001.
    generation_id TEXT REFERENCES generations (id) ON DELETE CASCADE,
    -- Which picture of its generation.
    idx         INTEGER NOT NULL DEFAULT 0,
    seed        INTEGER,
    width       INTEGER,
    height      INTEGER,
    -- SHA-256 of the file in the blob store.
    blob        TEXT NOT NULL,
    content_type TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    -- NULL: as long as the server keeps pictures, counted from created_at.
    expires_at  INTEGER
) STRICT;

INSERT INTO images_new (id, tenant_id, blob, content_type, created_at)
SELECT id, 'tenant_00000000000000000000000000000000', blob, content_type, created_at FROM images;

DROP TABLE images;
ALTER TABLE images_new RENAME TO images;

CREATE INDEX images_list ON images (tenant_id, id);
CREATE INDEX images_generation ON images (generation_id, idx);
CREATE INDEX images_blob ON images (blob);
CREATE INDEX images_created ON images (created_at);

CREATE TABLE idempotency_keys (
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    key         TEXT NOT NULL,
    -- SHA-256 over method, path and parsed body.
    fingerprint TEXT NOT NULL,
    -- The answer; status NULL: still running.
    status      INTEGER,
    location    TEXT,
    content_type TEXT,
    body        BLOB,
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL,
    PRIMARY KEY (tenant_id, key)
) STRICT;

CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at);

CREATE TABLE webhook_deliveries (
    -- Also the `webhook-id`: the same in every attempt.
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    -- What it is about: a training's or a generation's id.
    subject     TEXT NOT NULL,
    event       TEXT NOT NULL,
    url         TEXT NOT NULL,
    -- The JSON that is sent, byte for byte.
    body        TEXT NOT NULL,
    status      TEXT NOT NULL CHECK (status IN ('pending', 'delivered', 'failed')),
    attempt     INTEGER NOT NULL DEFAULT 0,
    next_at     INTEGER NOT NULL,
    last_status INTEGER,
    last_error  TEXT,
    created_at  INTEGER NOT NULL,
    finished_at INTEGER
) STRICT;

CREATE INDEX webhook_deliveries_due ON webhook_deliveries (status, next_at);
CREATE INDEX webhook_deliveries_list ON webhook_deliveries (tenant_id, id);
CREATE INDEX webhook_deliveries_subject ON webhook_deliveries (subject);

-- Ends that somebody wants to be told of.
CREATE INDEX trainings_told ON trainings (finished_at) WHERE webhook_url IS NOT NULL;
