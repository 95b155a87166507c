-- Concepts, their trainings, the pictures of both directions, and the jobs behind them.
-- Times are milliseconds since 1970 (UTC); structured values are JSON in text.

CREATE TABLE concepts (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    kind        TEXT NOT NULL CHECK (kind IN ('subject', 'style')),
    class_noun  TEXT,
    -- SHA-256 of the concept file; NULL until the first training has succeeded.
    version     TEXT,
    created_at  INTEGER NOT NULL,
    CONSTRAINT concepts_name UNIQUE (name)
) STRICT;

CREATE TABLE concept_pictures (
    concept_id  TEXT NOT NULL REFERENCES concepts (id) ON DELETE CASCADE,
    position    INTEGER NOT NULL,
    -- SHA-256 of the PNG in the blob store.
    blob        TEXT NOT NULL,
    PRIMARY KEY (concept_id, position)
) STRICT;

CREATE TABLE trainings (
    id          TEXT PRIMARY KEY,
    concept_id  TEXT NOT NULL REFERENCES concepts (id) ON DELETE CASCADE,
    status      TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    spec        TEXT NOT NULL,
    step        INTEGER NOT NULL DEFAULT 0,
    total_steps INTEGER NOT NULL,
    loss        REAL,
    steps_per_second REAL,
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

CREATE INDEX trainings_status ON trainings (status, created_at);
CREATE INDEX trainings_concept ON trainings (concept_id);

CREATE TABLE images (
    id          TEXT PRIMARY KEY,
    blob        TEXT NOT NULL,
    content_type TEXT NOT NULL,
    created_at  INTEGER NOT NULL
) STRICT;
