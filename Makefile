# Two commands do everything on a machine with Rust, a C++ compiler and Python 3 with pip:
#   make serve   installs libtorch if missing, builds, serves the pocket model on 127.0.0.1:8080
#   make test    installs libtorch if missing, builds and runs every test

LISTEN ?= 127.0.0.1:8080
DATA ?= data

.PHONY: serve build test check ui sdk fuzz golden libtorch pocket samples

libtorch: .libtorch/torch/lib/libtorch_cpu.so

.libtorch/torch/lib/libtorch_cpu.so:
	./scripts/install-libtorch.sh

build: libtorch
	cargo build --release --bin coar

serve: build
	./target/release/coar serve --listen $(LISTEN) --data $(DATA)

test: libtorch
	cargo test

# Formatting and lints, warnings denied.
check: libtorch
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings

# The page in a real browser (chromium), screenshots in target/ui. Says so and passes where there is none.
ui: libtorch
	tests/ui/run.sh

# The official OpenAI package against the real server. Installs it into target/.
sdk: libtorch
	tests/sdk/run.sh

# Requests made from /openapi.json, against the real server. Installs the fuzzer into target/.
fuzz: libtorch
	cargo build
	tests/fuzz_api/run.sh

# Every case of a golden directory, each with its largest difference: COAR_GOLDEN=DIR make golden
golden: libtorch
	cargo test --test it golden::every_case -- --nocapture

# A pocket model from nothing: two to three hours on two cores (estimated from its parts). Each stage continues where it was interrupted.
pocket: build
	./target/release/coar pocket train --dir runs/pocket --out assets/pocket

# The pictures in concepts/.
samples: build
	./target/release/coar pocket draw --samples concepts
