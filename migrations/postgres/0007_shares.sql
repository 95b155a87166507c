-- How many bytes each blob has: what a tenant keeps is counted from it. Blobs of earlier releases are added little by little.
CREATE TABLE blobs (
    -- SHA-256.
    hash        TEXT COLLATE "C" PRIMARY KEY,
    bytes       BIGINT NOT NULL
);

-- SHA-256 of the file that a reference image was made of. NULL in rows of earlier releases.
ALTER TABLE concept_pictures ADD COLUMN upload TEXT;

-- Quotas; NULL: the server's default.
ALTER TABLE tenants ADD COLUMN requests_per_minute BIGINT;
ALTER TABLE tenants ADD COLUMN bytes BIGINT;

-- Requests that each tenant has made in each second, over all processes, beside the images.
ALTER TABLE picture_tallies ADD COLUMN requests BIGINT NOT NULL DEFAULT 0;

-- Only a delivery that is still to be sent needs its body.
UPDATE webhook_deliveries SET body = '' WHERE status <> 'pending';

-- Answers for a key are found by what the request has made.
CREATE INDEX idempotency_keys_made ON idempotency_keys (made) WHERE made IS NOT NULL;
