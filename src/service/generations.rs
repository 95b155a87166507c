//! Generations: started for a client that waits, or queued; looked up, cancelled, deleted.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::facts::{read_metadata, webhook_form};
use super::{Caller, GenerateInput, Plan, Service};
use crate::jobs::{DrawEvent, Held, Waiting};
use crate::registry::{Backend, Generation, GenerationStatus, Listed, Page, StoredImage};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::{GenerationId, TenantId};

/// Poll interval for a generation that another process may end.
const LOOK: Duration = Duration::from_secs(1);

/// A generation in its present state.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationView {
    pub generation: Generation,
    pub images: Vec<StoredImage>,
    /// The number of queued generations of all tenants before it, while it is queued.
    pub queue_position: Option<u32>,
}

/// The input of a generation that is stored.
#[derive(Debug, Clone, Default)]
pub struct GenerationInput {
    pub draw: GenerateInput,
    /// A JSON object of strings.
    pub metadata: Option<Value>,
    pub webhook_url: Option<String>,
    /// 0 to [`PRIORITY_LIMIT`](super::PRIORITY_LIMIT).
    pub priority: i32,
}

/// A generation that was started for a client that waits.
#[derive(Debug)]
pub struct Begun {
    pub view: GenerationView,
    pub events: mpsc::Receiver<DrawEvent>,
    /// Dropping it cancels the generation, unless it has ended.
    pub waiting: Waiting,
}

fn no_generation(id: &str) -> Error {
    let message = format!("There is no generation `{id}`.");
    Error::new(ErrorKind::NotFound, "generation_not_found", message)
}

impl Service {
    /// Checks the URL of a webhook.
    ///
    /// # Errors
    /// What is wrong with it: its form, or a destination that is not allowed.
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
        let metadata = input.metadata.map(read_metadata).transpose()?.unwrap_or_default();
        let mut plan = self.plan(caller, input.draw).await?;
        plan.new.metadata = metadata
            .into_iter()
            .map(|(key, value)| (key, Value::from(value)))
            .collect();
        plan.new.webhook_url = webhook_url;
        plan.new.priority = input.priority;
        Ok(plan)
    }

    /// Counts generations that an earlier process has queued as in flight. Call it before the queue is processed.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn readmit_queued(&self) -> Result<(), Error> {
        for (id, tenant) in self.registry.queued_generations().await? {
            self.drawings.hold_queued(id, Box::new(self.readmit(tenant)));
        }
        Ok(())
    }

    /// Queues a background generation.
    ///
    /// # Errors
    /// `quota_exceeded`; `overloaded`: too many are queued.
    pub async fn queue_generation(&self, caller: &Caller, plan: Plan) -> Result<GenerationView, Error> {
        let mut admitted = self.admit(caller, plan.new.settings.n).await?;
        let mut new = plan.new;
        new.background = true;
        admitted.drawing();
        // In a shared database another process may draw it, so it counts by its row.
        let held: Held = match self.registry.backend() {
            Backend::Sqlite => Box::new(admitted),
            Backend::Postgres => Box::new(()),
        };
        let generation = self.drawings.queue(new, held).await?;
        self.view(generation).await
    }

    /// Starts a generation for a client that waits.
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

    /// Waits for a generation's end for a limited time. The generation continues after that.
    ///
    /// # Errors
    /// When it was deleted or the registry fails.
    pub async fn wait_begun(
        &self,
        caller: &Caller,
        mut begun: Begun,
        within: Duration,
    ) -> Result<GenerationView, Error> {
        let id = begun.view.generation.id;
        let ended = async { while !matches!(begun.events.recv().await, None | Some(DrawEvent::Ended(_))) {} };
        // In both cases the row has the present state.
        let _ = tokio::time::timeout(within, ended).await;
        let view = self.view(self.row(caller, id).await?).await?;
        if !view.generation.status.is_final() {
            self.drawings.keep(id, begun.waiting).await?;
        }
        Ok(view)
    }

    async fn row(&self, caller: &Caller, id: GenerationId) -> Result<Generation, Error> {
        let found = self.registry.generation(caller.tenant, id).await?;
        found.ok_or_else(|| no_generation(&id.to_string()))
    }

    async fn wait(&self, caller: &Caller, id: GenerationId, within: Duration) -> Result<GenerationView, Error> {
        let until = Instant::now() + within;
        let interest = self.drawings.interest(id);
        loop {
            // Subscribe before reading the row, so no notification is missed.
            let woken = interest.woken();
            let generation = self.row(caller, id).await?;
            if generation.status.is_final() || Instant::now() >= until {
                return self.view(generation).await;
            }
            // Another process may end it, and its notification may be lost.
            let look = match self.registry.backend() {
                Backend::Sqlite => until,
                Backend::Postgres => until.min(Instant::now() + LOOK),
            };
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep_until(look) => {}
            }
        }
    }

    /// A generation with its images and its position in the queue.
    async fn view(&self, generation: Generation) -> Result<GenerationView, Error> {
        let mut views = self.views(generation.new.tenant, vec![generation]).await?;
        views
            .pop()
            .ok_or_else(|| Error::internal("a generation has no details"))
    }

    /// Generations of one tenant, each with its images and its position in the queue.
    async fn views(&self, tenant: TenantId, generations: Vec<Generation>) -> Result<Vec<GenerationView>, Error> {
        let details = self.registry.generation_details(tenant, &generations).await?;
        let view = |(mut generation, (images, queue_position)): (Generation, (Vec<StoredImage>, Option<u32>))| {
            if let Some(done) = self.drawings.progress(generation.id) {
                generation.done = generation.done.max(done);
            }
            GenerationView {
                generation,
                images,
                queue_position,
            }
        };
        Ok(generations.into_iter().zip(details).map(view).collect())
    }

    /// A generation in its present state; waits for its end, at most `within`.
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
        Ok(Listed {
            rows: self.views(caller.tenant, listed.rows).await?,
            has_more: listed.has_more,
        })
    }

    /// Cancels a generation. One that has ended is not changed; unless it was cancelled, that is a conflict.
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

    /// Removes a generation and its images; one that has not ended is cancelled first.
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
