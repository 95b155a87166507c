-- The schema of sqlite/0003 for PostgreSQL: the same tables and columns. Times are milliseconds since 1970 (UTC); structured
-- values are JSON in text. Identifiers sort by their bytes, whatever the database's language is.

CREATE TABLE settings (
    key         TEXT PRIMARY KEY,
    value       TEXT NOT NULL
);

CREATE TABLE tenants (
    id          TEXT COLLATE "C" PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    -- `whsec_…`: signs the tenant's web-hooks. NULL only until the database is opened next.
    webhook_secret TEXT,
    -- Quotas; NULL: the server's default.
    concepts    BIGINT,
    trainings   BIGINT,
    requests_in_flight BIGINT,
    pictures_per_minute BIGINT,
    created_at  BIGINT NOT NULL
);

INSERT INTO tenants (id, name, created_at)
VALUES ('tenant_00000000000000000000000000000000', 'default', CAST(extract(epoch FROM now()) * 1000 AS BIGINT));

CREATE TABLE api_keys (
    id          TEXT COLLATE "C" PRIMARY KEY,
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    -- The 8 characters that a key is looked up by.
    public_id   TEXT NOT NULL UNIQUE,
    -- SHA-256 of the whole key, in hex. The key itself is nowhere.
    hash        TEXT NOT NULL,
    name        TEXT NOT NULL,
    -- Words with commas between them: read, generate, train, admin.
    scopes      TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    expires_at  BIGINT,
    revoked_at  BIGINT,
    -- Written at most once a minute.
    last_used_at BIGINT
);

CREATE INDEX api_keys_tenant ON api_keys (tenant_id, id);

CREATE TABLE concepts (
    id          TEXT COLLATE "C" PRIMARY KEY,
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    name        TEXT NOT NULL,
    kind        TEXT NOT NULL CHECK (kind IN ('subject', 'style')),
    class_noun  TEXT,
    description TEXT,
    metadata    TEXT NOT NULL DEFAULT '{}',
    -- The version in use: SHA-256 of its concept file, and its number; both NULL until the first training has succeeded.
    version     TEXT,
    version_number BIGINT,
    created_at  BIGINT NOT NULL,
    updated_at  BIGINT NOT NULL,
    CONSTRAINT concepts_name UNIQUE (tenant_id, name),
    CHECK ((version IS NULL) = (version_number IS NULL))
);

CREATE INDEX concepts_list ON concepts (tenant_id, id);

CREATE TABLE concept_pictures (
    concept_id  TEXT COLLATE "C" NOT NULL REFERENCES concepts (id) ON DELETE CASCADE,
    position    BIGINT NOT NULL,
    -- SHA-256 of the PNG in the blob store.
    blob        TEXT NOT NULL,
    PRIMARY KEY (concept_id, position)
);

CREATE INDEX concept_pictures_blob ON concept_pictures (blob);

CREATE TABLE trainings (
    id          TEXT COLLATE "C" PRIMARY KEY,
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    concept_id  TEXT COLLATE "C" NOT NULL REFERENCES concepts (id) ON DELETE CASCADE,
    status      TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    spec        TEXT NOT NULL,
    -- SHA-256 over the reference pictures' hashes and the settings.
    input_fingerprint TEXT,
    -- Number of the version that it made.
    version     BIGINT,
    webhook_url TEXT,
    step        BIGINT NOT NULL DEFAULT 0,
    total_steps BIGINT NOT NULL,
    loss        DOUBLE PRECISION,
    steps_per_second DOUBLE PRECISION,
    -- The curve so far, JSON: [{step, total, next_token, prior, regularisation}].
    losses      TEXT,
    error       TEXT,
    report      TEXT,
    -- Blob of the newest checkpoint and the step that it stands at.
    checkpoint  TEXT,
    checkpoint_step BIGINT,
    resumed_from_step BIGINT NOT NULL DEFAULT 0,
    -- The queue's part: who works on it, and how often it was begun.
    attempt     BIGINT NOT NULL DEFAULT 0,
    lease_token TEXT,
    lease_until BIGINT,
    created_at  BIGINT NOT NULL,
    started_at  BIGINT,
    finished_at BIGINT,
    priority    BIGINT NOT NULL DEFAULT 0,
    not_before  BIGINT NOT NULL DEFAULT 0,
    -- How often it failed in a way that another attempt may mend.
    failures    BIGINT NOT NULL DEFAULT 0,
    -- How often its lease ran out since its last checkpoint.
    takeovers   BIGINT NOT NULL DEFAULT 0,
    -- The process that trains it; the lease is what counts.
    worker      TEXT
);

CREATE INDEX trainings_status ON trainings (status, created_at);
CREATE INDEX trainings_concept ON trainings (concept_id, id);
CREATE INDEX trainings_list ON trainings (tenant_id, id);
CREATE INDEX trainings_checkpoint ON trainings (checkpoint) WHERE checkpoint IS NOT NULL;
CREATE INDEX trainings_input ON trainings (tenant_id, input_fingerprint);
CREATE INDEX trainings_told ON trainings (finished_at) WHERE webhook_url IS NOT NULL;
CREATE INDEX trainings_turn ON trainings (tenant_id, started_at);

CREATE TABLE concept_versions (
    concept_id  TEXT COLLATE "C" NOT NULL REFERENCES concepts (id) ON DELETE CASCADE,
    -- From 1, never used again.
    number      BIGINT NOT NULL,
    -- SHA-256 of the concept file in the blob store.
    hash        TEXT NOT NULL,
    -- NULL: imported.
    training_id TEXT COLLATE "C" REFERENCES trainings (id) ON DELETE SET NULL,
    input_fingerprint TEXT,
    created_at  BIGINT NOT NULL,
    PRIMARY KEY (concept_id, number)
);

CREATE INDEX concept_versions_hash ON concept_versions (hash);
CREATE INDEX concept_versions_training ON concept_versions (training_id);

CREATE TABLE training_previews (
    training_id TEXT COLLATE "C" NOT NULL REFERENCES trainings (id) ON DELETE CASCADE,
    step        BIGINT NOT NULL,
    -- SHA-256 of the PNG in the blob store.
    blob        TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    PRIMARY KEY (training_id, step)
);

CREATE INDEX training_previews_blob ON training_previews (blob);

CREATE TABLE generations (
    id          TEXT COLLATE "C" PRIMARY KEY,
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    status      TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- 1: nobody waits on a connection; queued again when its process is lost. 0: failed then.
    background  BIGINT NOT NULL,
    prompt      TEXT NOT NULL,
    -- JSON: every setting resolved, the seed too.
    request     TEXT NOT NULL,
    -- JSON: [{name, version, hash}] as they were when it was accepted.
    concepts    TEXT NOT NULL DEFAULT '[]',
    metadata    TEXT NOT NULL DEFAULT '{}',
    webhook_url TEXT,
    -- Codes drawn and to draw.
    done        BIGINT NOT NULL DEFAULT 0,
    total       BIGINT NOT NULL DEFAULT 0,
    -- JSON: {input_tokens, output_tokens, …}; {code, message, field}.
    usage       TEXT,
    error       TEXT,
    attempt     BIGINT NOT NULL DEFAULT 0,
    created_at  BIGINT NOT NULL,
    started_at  BIGINT,
    finished_at BIGINT,
    -- The process that draws it, or has taken it to draw; NULL: nobody.
    owner       TEXT COLLATE "C",
    -- Among those of its tenant the higher one is drawn first.
    priority    BIGINT NOT NULL DEFAULT 0,
    -- Not to be begun before.
    not_before  BIGINT NOT NULL DEFAULT 0
);

CREATE INDEX generations_list ON generations (tenant_id, id);
CREATE INDEX generations_status ON generations (status, created_at);
CREATE INDEX generations_owner ON generations (owner) WHERE owner IS NOT NULL;
CREATE INDEX generations_queue ON generations (tenant_id, priority, id) WHERE status = 'queued';

CREATE TABLE images (
    id          TEXT COLLATE "C" PRIMARY KEY,
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    generation_id TEXT COLLATE "C" REFERENCES generations (id) ON DELETE CASCADE,
    -- Which picture of its generation.
    idx         BIGINT NOT NULL DEFAULT 0,
    seed        BIGINT,
    width       BIGINT,
    height      BIGINT,
    -- SHA-256 of the file in the blob store.
    blob        TEXT NOT NULL,
    content_type TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    -- NULL: as long as the server keeps pictures, counted from created_at.
    expires_at  BIGINT
);

CREATE INDEX images_list ON images (tenant_id, id);
CREATE INDEX images_generation ON images (generation_id, idx);
CREATE INDEX images_blob ON images (blob);
CREATE INDEX images_created ON images (created_at);

CREATE TABLE idempotency_keys (
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    key         TEXT COLLATE "C" NOT NULL,
    -- SHA-256 over method, path and parsed body.
    fingerprint TEXT NOT NULL,
    -- The answer; status NULL: still running.
    status      BIGINT,
    location    TEXT,
    content_type TEXT,
    body        BYTEA,
    -- What the request has made: a concept's, training's or generation's identifier. It stands here as soon as the thing
    -- does, so that a process that dies before it answers makes nothing twice.
    made        TEXT,
    created_at  BIGINT NOT NULL,
    expires_at  BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, key)
);

CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at);

CREATE TABLE webhook_deliveries (
    -- Also the `webhook-id`: the same in every attempt.
    id          TEXT COLLATE "C" PRIMARY KEY,
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    -- What it is about: a training's or a generation's id.
    subject     TEXT COLLATE "C" NOT NULL,
    event       TEXT NOT NULL,
    url         TEXT NOT NULL,
    -- The JSON that is sent, byte for byte.
    body        TEXT NOT NULL,
    status      TEXT NOT NULL CHECK (status IN ('pending', 'delivered', 'failed')),
    attempt     BIGINT NOT NULL DEFAULT 0,
    next_at     BIGINT NOT NULL,
    last_status BIGINT,
    last_error  TEXT,
    created_at  BIGINT NOT NULL,
    finished_at BIGINT
);

CREATE INDEX webhook_deliveries_due ON webhook_deliveries (status, next_at);
CREATE INDEX webhook_deliveries_list ON webhook_deliveries (tenant_id, id);
CREATE INDEX webhook_deliveries_subject ON webhook_deliveries (subject);

CREATE TABLE processes (
    id          TEXT COLLATE "C" PRIMARY KEY,
    -- all, api, worker
    role        TEXT NOT NULL,
    version     TEXT NOT NULL,
    -- Where API processes reach a worker; NULL: nowhere.
    address     TEXT,
    -- JSON: the base model that a worker has loaded.
    model       TEXT,
    -- JSON: what a worker has to do, and which concepts are on its device.
    load        TEXT NOT NULL DEFAULT '{}',
    -- 1: it takes no new work.
    draining    BIGINT NOT NULL DEFAULT 0,
    started_at  BIGINT NOT NULL,
    -- By the database's clock.
    seen_at     BIGINT NOT NULL
);

-- Pictures that each tenant was admitted in each second, over all processes.
CREATE TABLE picture_tallies (
    tenant_id   TEXT COLLATE "C" NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    -- Unix seconds.
    second      BIGINT NOT NULL,
    pictures    BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, second)
);

-- The oldest schema whose programs may still use this database.
INSERT INTO settings (key, value) VALUES ('schema_requires', '3');
