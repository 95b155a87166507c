-- Deliveries are claimed fairly: at most a few at once of each tenant and to each host. Empty in rows of earlier releases.
ALTER TABLE webhook_deliveries ADD COLUMN host TEXT COLLATE "C" NOT NULL DEFAULT '';
-- Until when a process may be sending it; NULL while none does.
ALTER TABLE webhook_deliveries ADD COLUMN sending_until BIGINT;
CREATE INDEX webhook_deliveries_sending ON webhook_deliveries (sending_until) WHERE sending_until IS NOT NULL;

-- Waiting jobs are counted by tenant when one is added.
CREATE INDEX trainings_waiting ON trainings (tenant_id) WHERE status = 'queued';
CREATE INDEX generations_waiting ON generations (tenant_id) WHERE status = 'queued';
