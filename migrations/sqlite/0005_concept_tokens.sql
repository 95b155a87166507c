-- How many context tokens the version's file has: requests are costed from these, without the file. NULL in rows of earlier
-- releases, which are filled in when such a version is first used.
ALTER TABLE concept_versions ADD COLUMN text_tokens INTEGER;
ALTER TABLE concept_versions ADD COLUMN image_tokens INTEGER;
