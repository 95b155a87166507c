//! The HTTP API, tested on the real server with the real pocket model.

mod archives;
mod bad_input;
mod browser;
mod clients;
mod command_line;
mod concepts;
mod concurrency;
mod contract;
mod generations;
mod guard;
mod idempotency;
mod images;
mod isolation;
mod lifecycle;
mod listening;
mod observe;
mod quotas;
mod shares;
mod tenants;
mod trainings;
mod webhooks;
