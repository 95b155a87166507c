//! What the server promises over HTTP, checked against the real server with the real pocket model.

mod bad_input;
mod concepts;
mod guard;
mod idempotency;
mod isolation;
mod lifecycle;
mod quotas;
mod tenants;
mod trainings;
