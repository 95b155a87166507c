//! Generations: begun for somebody who waits, or queued; looked at, cancelled, deleted.

use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::facts::webhook_form;
use super::{Caller, GenerateInput, Plan, Service};
use crate::error::{Error, ErrorKind};
use crate::ids::GenerationId;
use crate::jobs::{DrawEvent, Held, Waiting};
use crate::registry::{Backend, Generation, GenerationStatus, Listed, Page, StoredImage};

/// A generation as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationView {
    pub generation: Generation,
    pub images: Vec<StoredImage>,
    /// Queued ones of all tenants that are before it, while it is queued.
    pub queue_position: Option<u32>,
}

/// What a caller wants drawn and kept.
#[derive(Debug, Clone, Default)]
pub struct GenerationInput {
    pub draw: GenerateInput,
    pub metadata: Option<Map<String, Value>>,
    pub webhook_url: Option<String>,
}

/// A generation that somebody waits for.
#[derive(Debug)]
pub struct Begun {
    pub view: GenerationView,
    pub events: mpsc::Receiver<DrawEvent>,
    /// Dropping it cancels the generation, unless that has ended.
    pub waiting: Waiting,
}

const PAIRS: usize = 16;
const KEY_LIMIT: usize = 64;
const VALUE_LIMIT: usize = 512;

/// Checks what a caller notes down of an object: 16 pairs of strings.
///
/// # Errors
/// Which limit it exceeds.
pub fn check_metadata(metadata: &Map<String, Value>) -> Result<(), Error> {
    let wrong =
        |problem: String, limit: usize| Err(Error::field("invalid_value", "metadata", problem).limit(limit as u64));
    if metadata.len() > PAIRS {
        return wrong(format!("has {} pairs; the limit is {PAIRS}", metadata.len()), PAIRS);
    }
    for (key, value) in metadata {
        let Value::String(value) = value else {
            let problem = format!("must hold strings; `{key}` is something else");
            return Err(Error::field("invalid_value", "metadata", problem));
        };
        if key.is_empty() || key.chars().count() > KEY_LIMIT {
            return wrong(
                format!("has a key of no or more than {KEY_LIMIT} characters"),
                KEY_LIMIT,
            );
        }
        if value.chars().count() > VALUE_LIMIT {
            return wrong(
                format!("has under `{key}` more than {VALUE_LIMIT} characters"),
                VALUE_LIMIT,
            );
        }
    }
    Ok(())
}

fn no_generation(id: &str) -> Error {
    let message = format!("There is no generation `{id}`.");
    Error::new(ErrorKind::NotFound, "generation_not_found", message)
}

impl Service {
    /// An address that a web-hook may go to.
    ///
    /// # Errors
    /// What is wrong with the address: its form, or that it leads where this server must not go.
    pub(super) fn webhook_url(&self, url: Option<String>) -> Result<Option<String>, Error> {
        let Some(url) = webhook_form(url)? else { return Ok(None) };
        let checked = self.drawings.webhooks().policy().check(&url);
        checked.map_err(|problem| Error::field("invalid_value", "webhook_url", problem))?;
        Ok(Some(url))
    }

    /// Checks and completes a generation; nothing is stored.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub async fn plan_generation(&self, caller: &Caller, input: GenerationInput) -> Result<Plan, Error> {
        let webhook_url = self.webhook_url(input.webhook_url)?;
        let metadata = input.metadata.unwrap_or_default();
        check_metadata(&metadata)?;
        let mut plan = self.plan(caller, input.draw).await?;
        plan.new.metadata = Value::Object(metadata);
        plan.new.webhook_url = webhook_url;
        Ok(plan)
    }

    /// Queues a generation that nobody waits for.
    ///
    /// # Errors
    /// `quota_exceeded`; `overloaded`: too many are queued.
    pub async fn queue_generation(&self, caller: &Caller, plan: Plan) -> Result<GenerationView, Error> {
        let mut admitted = self.admit(caller, plan.new.settings.n).await?;
        let limit = self.limits.queued_generations;
        if self.registry.waiting_generations().await? >= limit {
            let message = "Too many generations are queued; try again soon.";
            return Err(Error::new(ErrorKind::Overloaded, "overloaded", message).limit(limit as u64));
        }
        let mut new = plan.new;
        new.background = true;
        admitted.drawing();
        // Of a shared database another process may draw it: it counts by its row.
        let held: Held = match self.registry.backend() {
            Backend::Sqlite => Box::new(admitted),
            Backend::Postgres => Box::new(()),
        };
        let generation = self.drawings.queue(new, held).await?;
        self.view(generation).await
    }

    /// Begins a generation for somebody who waits.
    ///
    /// # Errors
    /// `quota_exceeded`; `overloaded`: the engine's queue is full.
    #[tracing::instrument(name = "service.generate", skip_all)]
    pub async fn begin_generation(&self, caller: &Caller, plan: Plan) -> Result<Begun, Error> {
        let mut admitted = self.admit(caller, plan.new.settings.n).await?;
        let (generation, events, waiting) = self.drawings.begin(plan.new, &plan.prepared).await?;
        admitted.drawing();
        self.drawings.hold(generation.id, Box::new(admitted));
        let view = self.view(generation).await?;
        Ok(Begun { view, events, waiting })
    }

    /// Waits for a generation's end, at most for so long; the waiting is over then, and it goes on without.
    ///
    /// # Errors
    /// When it is gone or the registry fails.
    pub async fn wait_begun(&self, caller: &Caller, begun: Begun, within: Duration) -> Result<GenerationView, Error> {
        let id = begun.view.generation.id;
        let view = self.wait(caller, id, within).await?;
        if !view.generation.status.is_final() {
            self.drawings.keep(id, begun.waiting).await?;
        }
        Ok(view)
    }

    async fn wait(&self, caller: &Caller, id: GenerationId, within: Duration) -> Result<GenerationView, Error> {
        let until = Instant::now() + within;
        loop {
            // Interest is registered before looking, so that no end in between is missed.
            let woken = self.drawings.ended().woken();
            let found = self.registry.generation(caller.tenant, id).await?;
            let generation = found.ok_or_else(|| no_generation(&id.to_string()))?;
            if generation.status.is_final() || Instant::now() >= until {
                return self.view(generation).await;
            }
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// A generation, with its pictures and its place.
    async fn view(&self, mut generation: Generation) -> Result<GenerationView, Error> {
        let queued = generation.status == GenerationStatus::Queued;
        if let Some(done) = self.drawings.progress(generation.id) {
            generation.done = generation.done.max(done);
        }
        Ok(GenerationView {
            images: self.registry.images(generation.new.tenant, generation.id).await?,
            queue_position: match queued {
                true => Some(self.registry.generations_before(generation.id).await?),
                false => None,
            },
            generation,
        })
    }

    /// A generation as it stands, or as it stands when it has ended or `within` is over.
    ///
    /// # Errors
    /// When there is none.
    pub async fn generation(&self, caller: &Caller, id: &str, within: Duration) -> Result<GenerationView, Error> {
        let id: GenerationId = id.parse().map_err(|_| no_generation(id))?;
        self.wait(caller, id, within).await
    }

    /// Generations, newest first.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn generations(
        &self,
        caller: &Caller,
        status: Option<GenerationStatus>,
        page: Page<GenerationId>,
    ) -> Result<Listed<GenerationView>, Error> {
        let listed = self.registry.generations(caller.tenant, status, page).await?;
        let mut rows = Vec::new();
        for generation in listed.rows {
            rows.push(self.view(generation).await?);
        }
        let has_more = listed.has_more;
        Ok(Listed { rows, has_more })
    }

    /// Cancels a generation; one that has ended stays as it is, and that is a conflict, unless it was cancelled.
    ///
    /// # Errors
    /// When there is none, or it has ended already.
    pub async fn cancel_generation(&self, caller: &Caller, id: &str) -> Result<GenerationView, Error> {
        let before = self.generation(caller, id, Duration::ZERO).await?.generation;
        let (key, status) = (before.id, before.status);
        if !status.is_final() {
            self.drawings.cancel(before).await?;
        }
        let after = self.wait(caller, key, Duration::ZERO).await?;
        match after.generation.status {
            GenerationStatus::Cancelled => Ok(after),
            ended => Err(Error::new(
                ErrorKind::Conflict,
                "generation_ended",
                format!("The generation has {} already.", ended.as_str()),
            )),
        }
    }

    /// Removes a generation and its pictures; one that has not ended is cancelled first.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn delete_generation(&self, caller: &Caller, id: &str) -> Result<(), Error> {
        let before = self.generation(caller, id, Duration::ZERO).await?.generation;
        let key = before.id;
        if !before.status.is_final() {
            self.drawings.cancel(before).await?;
        }
        match self.registry.delete_generation(caller.tenant, key).await? {
            true => Ok(()),
            false => Err(no_generation(id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metadata_has_limits() {
        let check = |value: Value| check_metadata(value.as_object().unwrap()).map_err(|error| error.limit);
        assert_eq!(check(json!({"order": "7", "ü": "x".repeat(512)})), Ok(()));
        assert_eq!(check(json!({"a": 7})), Err(None));
        assert_eq!(check(json!({"": "x"})), Err(Some(64)));
        assert_eq!(check(json!({ "k".repeat(65): "x" })), Err(Some(64)));
        assert_eq!(check(json!({"k": "x".repeat(513)})), Err(Some(512)));
        let many: Map<String, Value> = (0..17).map(|i| (i.to_string(), json!(""))).collect();
        assert_eq!(check(Value::Object(many)), Err(Some(16)));
    }
}
