#!/usr/bin/env bash
# An operator's tasks on real processes: backup and restore, checksums, garbage collection, removal of a tenant, rolling restart.
# On SQLite and a folder, and on PostgreSQL and S3 (scripts/with-postgres.sh; skipped with a message if there is no PostgreSQL).
set -euo pipefail
cd "$(dirname "$0")/../.."
scripts/build-for-tests.sh --quiet
python3 tests/operations/folder.py target/debug/coar
scripts/with-postgres.sh target/s3-venv/bin/python tests/operations/cluster.py target/debug/coar
