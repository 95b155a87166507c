-- That there has been an API key is a fact of its own, written with the first key and never removed: deleting the tenant that
-- owns the keys must not open the server to callers without one.
INSERT INTO settings (key, value) SELECT 'keys_required', 'yes' WHERE EXISTS (SELECT 1 FROM api_keys);
