-- That there has been an API key is a fact of its own, written with the first key and never removed: deleting the tenant that
-- owns the keys must not open the server to callers without one.
INSERT INTO settings (key, value) SELECT 'keys_required', 'yes' WHERE EXISTS (SELECT 1 FROM api_keys);

-- The web-hook secret before the last change, which signs beside the present one until that time, in milliseconds.
ALTER TABLE tenants ADD COLUMN webhook_secret_before TEXT;
ALTER TABLE tenants ADD COLUMN webhook_secret_before_until INTEGER;
