-- Many processes on one database: who they are, what they hold; priorities, back-off, attempts without progress.

CREATE TABLE processes (
    id          TEXT PRIMARY KEY,
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
    draining    INTEGER NOT NULL DEFAULT 0,
    started_at  INTEGER NOT NULL,
    -- By the database's clock.
    seen_at     INTEGER NOT NULL
) STRICT;

-- The process that draws it, or has taken it to draw; NULL: nobody.
ALTER TABLE generations ADD COLUMN owner TEXT;
-- Among those of its tenant the higher one is drawn first.
ALTER TABLE generations ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
-- Not to be begun before.
ALTER TABLE generations ADD COLUMN not_before INTEGER NOT NULL DEFAULT 0;

CREATE INDEX generations_owner ON generations (owner) WHERE owner IS NOT NULL;
CREATE INDEX generations_queue ON generations (tenant_id, priority, id) WHERE status = 'queued';

ALTER TABLE trainings ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE trainings ADD COLUMN not_before INTEGER NOT NULL DEFAULT 0;
-- How often it failed in a way that another attempt may mend.
ALTER TABLE trainings ADD COLUMN failures INTEGER NOT NULL DEFAULT 0;
-- How often its lease ran out since its last checkpoint.
ALTER TABLE trainings ADD COLUMN takeovers INTEGER NOT NULL DEFAULT 0;
-- The process that trains it; the lease is what counts.
ALTER TABLE trainings ADD COLUMN worker TEXT;

CREATE INDEX trainings_turn ON trainings (tenant_id, started_at);

-- What a request with a key has made: a concept's, training's or generation's identifier. It stands here as soon as the
-- thing does, so that a process that dies before it answers makes nothing twice.
ALTER TABLE idempotency_keys ADD COLUMN made TEXT;

-- Pictures that each tenant was admitted in each second, over all processes.
CREATE TABLE picture_tallies (
    tenant_id   TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    -- Unix seconds.
    second      INTEGER NOT NULL,
    pictures    INTEGER NOT NULL,
    PRIMARY KEY (tenant_id, second)
) STRICT;

-- The oldest schema whose programs may still use this database.
INSERT INTO settings (key, value) VALUES ('schema_requires', '3') ON CONFLICT (key) DO UPDATE SET value = excluded.value;
