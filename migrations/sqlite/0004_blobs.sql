-- Blobs that are being stored or removed right now. Programs of the schema before do not look at it: while one of each runs,
-- as during an upgrade without a pause, what both store and remove in the same moment is not protected.
CREATE TABLE blob_holds (
    -- SHA-256 of the blob.
    hash        TEXT NOT NULL,
    -- One call that stores or removes.
    holder      TEXT NOT NULL,
    -- 0: it is being stored, nobody removes it. 1: it is being removed, whoever wants to store it waits.
    removing    INTEGER NOT NULL,
    -- By the database's clock. A process that dies leaves its rows behind; they count no more then.
    expires_at  INTEGER NOT NULL,
    PRIMARY KEY (hash, holder)
) STRICT;

CREATE INDEX blob_holds_holder ON blob_holds (holder);
CREATE INDEX blob_holds_expiry ON blob_holds (expires_at);

-- SHA-256 of a first answer that is too large for the database. Its status stands here and not in `status`: a program of the schema
-- before takes the request for one that still runs, and does not answer without a body.
ALTER TABLE idempotency_keys ADD COLUMN blob TEXT;
ALTER TABLE idempotency_keys ADD COLUMN blob_status INTEGER;
CREATE INDEX idempotency_keys_blob ON idempotency_keys (blob) WHERE blob IS NOT NULL;

-- When a lost lease was last counted in `takeovers`.
ALTER TABLE trainings ADD COLUMN takeover_at INTEGER NOT NULL DEFAULT 0;
