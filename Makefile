# Two commands do everything on a machine with Rust, a C++ compiler and Python 3 with pip:
#   make serve   installs libtorch if missing, builds, serves the pocket model on 127.0.0.1:8080
#   make test    installs libtorch if missing, builds and runs every test

LISTEN ?= 127.0.0.1:8080
DATA ?= data

.DEFAULT_GOAL := help

# The targets of this file.
help:
	@awk '/^#/ { text = text substr($$0, 2) "\n"; next } \
		/^[a-z][a-z-]*:/ { split($$0, name, ":"); if (text != "") { split(text, line, "\n"); printf "%-16s%s\n", name[1], line[1]; \
		for (i = 2; line[i] != ""; i++) printf "%-16s%s\n", "", line[i] } } { text = "" }' Makefile

.PHONY: help serve build build-lab test test-api docs-test check bench-device contract operations ui sdk clients fuzz golden libtorch pocket samples deploy-check proxy pgbouncer deny sbom faults limits memory neighbours fuzz-parsers gpu-check gpu-check-test

# Installs libtorch into ~/.cache/coar, linked from .libtorch.
libtorch: .libtorch/torch/lib/libtorch_cpu.so

.libtorch/torch/lib/libtorch_cpu.so:
	./scripts/install-libtorch.sh

# The server and its command line: target/release/coar.
build: libtorch
	cargo build --release --bin coar

# Evaluation, benchmarks, the pocket model's training, the fleet simulator.
build-lab: libtorch
	cargo build --release -p coar-lab

# Builds, and serves the pocket model on LISTEN (127.0.0.1:8080) with its data in DATA (./data).
serve: build
	./target/release/coar serve --listen $(LISTEN) --data $(DATA)

# Every test of every crate.
test: libtorch
	cargo test --workspace

# Server and core without libtorch: their unit tests, and an API process beside a worker.
test-api:
	tests/api_build/run.sh

# Formatting and lints, warnings denied.
check: libtorch
	cargo fmt --check
	cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml > /dev/null
	cargo clippy --workspace --all-targets -- -D warnings

# Every part of the device benchmark on the CPU, with the accelerator's code path: docs/performance.md.
bench-device: libtorch
	scripts/build-for-tests.sh
	$(or $(CARGO_TARGET_DIR),target)/debug/coar-lab bench device --device cpu --small --out $(or $(CARGO_TARGET_DIR),target)/bench-device

# The registry's tests again on PostgreSQL and S3, and many callers at once on a server that uses them: servers of their own, ended
# afterwards. Skipped, with a message, where there is no PostgreSQL and none can be installed.
contract: libtorch
	./scripts/with-postgres.sh sh -c './scripts/crate-tests.sh coar-registry && cargo test --workspace --test it api::concurrency'

# What an operator does, on real processes: backup, restore, restarts one by one, checksums, a tenant's removal.
operations: libtorch
	tests/operations/run.sh

# The page in a real browser (chromium), screenshots in target/ui. Skipped, with a message, where there is none.
ui: libtorch
	tests/ui/run.sh

# The official OpenAI package, the examples and the Python client (clients/python) against the real server. Installs into target/.
sdk: libtorch
	tests/sdk/run.sh

# Other people's clients, unchanged and at pinned versions, against the real server: docs/howto/clients.md. Installs into target/. What
# cannot be installed is left out, with a message, unless COAR_NEED_CLIENTS=1.
clients: libtorch
	tests/clients/run.sh

# Requests made from /openapi.json, against the real server, and fewer of them on PostgreSQL and S3, where there is PostgreSQL.
# Installs the fuzzer into target/.
fuzz: libtorch
	scripts/build-for-tests.sh
	tests/fuzz_api/run.sh
	./scripts/with-postgres.sh tests/fuzz_api/run.sh 3

# Real processes that are killed, stopped, cut off and filled up at random: make faults SEED=7 FAULTS=200 MINUTES=40 ONLY=kill_worker
faults: libtorch
	tests/faults/run.sh

# Single questions with a figure each, all of them or some: make limits QUESTIONS="lost_training sqlite_writers"
limits: libtorch
	tests/faults/run.sh $(or $(QUESTIONS),lost_training paused_worker handed_back sqlite_writers disk_full out_of_memory slow_clients registry)

# What one tenant's uploads and concepts can make a default server's memory grow by; fails above 256 MB.
memory: libtorch
	scripts/build-for-tests.sh
	python3 tests/limits/memory.py

# One tenant at its worst, in every way that its scopes allow, beside another that works: docs/howto/neighbours.md.
# make neighbours SECONDS=10 MODES=sqlite ONLY=uploads,streams
neighbours: libtorch
	tests/neighbours/run.sh

# Every parser of foreign bytes, for 20 seconds each (SECONDS=N): docs/fuzzing.md.
fuzz-parsers: libtorch
	fuzz/run.sh $(or $(SECONDS),20)

# Every command of README, tutorial and how-tos, pasted as a user would, against a real server. Lists what needs a GPU, containers or a
# cluster and was left out.
docs-test: libtorch
	scripts/build-for-tests.sh
	tests/docs/run.sh

# Every case of a golden directory, each with its largest difference: COAR_GOLDEN=DIR make golden
golden: libtorch
	$(if $(COAR_GOLDEN),COAR_GOLDEN=$(abspath $(COAR_GOLDEN))) cargo test -p coar-engine --test it golden::every_case -- --nocapture

# Every part of the program on this machine's GPU, in nine minutes at most; the report goes to target/gpu-check: docs/howto/gpu-7b.md.
# make gpu-check SECONDS=200 ARGS="--parts env,parity"
gpu-check: build-lab
	scripts/gpu-check.sh pack
	scripts/gpu-check.sh run --seconds $(or $(SECONDS),500) $(ARGS)

# The same script without a GPU, and what it must refuse.
gpu-check-test: libtorch
	tests/gpu_check/run.sh

# A pocket model from nothing: two to three hours on two cores (estimated from its parts). Each stage continues where it was interrupted.
pocket: build-lab
	./target/release/coar-lab pocket train --dir runs/pocket --out assets/pocket

# The pictures in concepts/.
samples: build-lab
	./target/release/coar-lab pocket draw --samples concepts

# Image, compose file, Helm chart, alarms: all that can be checked without a container engine and a cluster; it says what it leaves out.
deploy-check:
	tests/deploy/run.sh

# Studio, documentation, API and events behind a real nginx with the configurations of docs/howto/service.md, at the root and under a
# path. Skipped, with a message, where there is no nginx.
proxy: libtorch
	scripts/build-for-tests.sh
	tests/proxy/run.sh

# That a PgBouncer in transaction mode is refused, with a real one. Skipped, with a message, where there is none.
pgbouncer:
	scripts/with-postgres.sh tests/pgbouncer/run.sh

# Licences, sources, duplicates and known faults of the dependencies, by deny.toml. The tool is built on first use, into target/tools
# (four minutes on two cores). Tool and database of faults come from the network: what cannot be fetched is skipped, loudly.
deny:
	scripts/deny.sh

# What the program is made of, as CycloneDX 1.5: target/coar.cdx.json.
sbom: target/tools/bin/cargo-cyclonedx
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) target/tools/bin/cargo-cyclonedx cyclonedx --format json --spec-version 1.5 --target x86_64-unknown-linux-gnu --override-filename coar.cdx
	python3 scripts/sbom.py coar.cdx.json scripts/libtorch-cpu.txt > target/coar.cdx.json
	rm -f coar.cdx.json crates/*/coar.cdx.json
	@echo target/coar.cdx.json

target/tools/bin/cargo-cyclonedx:
	cargo install --locked --root target/tools --target-dir target/tools/build --version 0.5.9 cargo-cyclonedx
	rm -rf target/tools/build
