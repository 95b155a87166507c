//! Limits for the waiting jobs of all tenants. When one is reached, only the tenant with the most waiting jobs is
//! refused, so that no tenant can fill a queue for the others.

use sqlx::any::Any;
use sqlx::{Executor, Row};

use super::{Registry, RegistryError};
use coar_core::ids::TenantId;

/// Maximum number of waiting jobs of all tenants together. Up to [`HARD`] times that, tenants that do not have the most
/// are still admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    pub trainings: u32,
    pub generations: u32,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            trainings: 1000,
            generations: 10_000,
        }
    }
}

/// The limit for every tenant, as a multiple of the limit for the tenant with the most jobs.
const HARD: u64 = 2;

/// A queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    Trainings,
    Generations,
}

impl Queue {
    /// The queue's name in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trainings => "trainings",
            Self::Generations => "generations",
        }
    }

    fn counts(self) -> &'static str {
        match self {
            Self::Trainings => {
                "SELECT tenant_id, count(*) AS n FROM trainings WHERE status = 'queued' GROUP BY tenant_id"
            }
            Self::Generations => {
                "SELECT tenant_id, count(*) AS n FROM generations WHERE status = 'queued' GROUP BY tenant_id"
            }
        }
    }
}

/// Whether a tenant with `own` waiting jobs may add one, given the numbers of the other tenants.
fn has_room(own: u64, others: &[u64], limit: u64) -> bool {
    let total = own + others.iter().sum::<u64>();
    let most = others.iter().copied().max().unwrap_or(0);
    total < limit || (total < limit * HARD && own < most)
}

impl Registry {
    /// Sets the queue limits.
    pub fn with_queue_limits(mut self, limits: QueueLimits) -> Self {
        self.queues = limits;
        self
    }

    /// Refuses a job of a tenant that may not queue any more. This is an early check before the work of a request; the
    /// transaction that adds the job checks again.
    ///
    /// # Errors
    /// `QueueFull`; when the database fails.
    pub async fn check_queue(&self, queue: Queue, tenant: TenantId) -> Result<(), RegistryError> {
        self.check_queue_in(&self.pools.reads, queue, tenant).await
    }

    /// Like [`Self::check_queue`], within a transaction.
    pub(super) async fn check_queue_in<'c>(
        &self,
        database: impl Executor<'c, Database = Any>,
        queue: Queue,
        tenant: TenantId,
    ) -> Result<(), RegistryError> {
        let limit = match queue {
            Queue::Trainings => self.queues.trainings,
            Queue::Generations => self.queues.generations,
        };
        let (tenant, mut own, mut others) = (tenant.to_string(), 0, Vec::new());
        for row in sqlx::query(queue.counts()).fetch_all(database).await? {
            let count = u64::try_from(row.try_get::<i64, _>("n")?).unwrap_or(0);
            match row.try_get::<String, _>("tenant_id")? == tenant {
                true => own = count,
                false => others.push(count),
            }
        }
        if has_room(own, &others, u64::from(limit)) {
            Ok(())
        } else {
            Err(RegistryError::QueueFull { queue, limit })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NewConcept, NewGeneration, Quotas};
    use coar_core::concept::ConceptKind;
    use coar_core::training::{Preset, TrainingSpec};

    #[test]
    fn the_tenant_with_the_most_is_refused_first() {
        // The tenant's jobs, those of the others, and whether there is room under a limit of 10.
        for (own, others, room) in [
            (0, &[][..], true),
            (9, &[], true),
            (10, &[], false),
            (8, &[2], false),
            (2, &[8], true),
            (0, &[5, 5], true),
            (5, &[5], false),
            (5, &[6], true),
            (6, &[5], false),
            (9, &[10], true),
            (9, &[11], false),
            (0, &[20], false),
        ] {
            assert_eq!(has_room(own, others, 10), room, "{own} {others:?}");
        }
    }

    async fn limited() -> (tempfile::TempDir, Registry, TenantId) {
        let (dir, registry) = crate::tests::test_registry().await;
        let registry = registry.with_queue_limits(QueueLimits {
            trainings: 2,
            generations: 2,
        });
        let other = registry.add_tenant("b", Quotas::default()).await.unwrap().id;
        (dir, registry, other)
    }

    fn is_full<T: std::fmt::Debug>(added: Result<T, RegistryError>) -> bool {
        match added {
            Ok(_) => false,
            Err(RegistryError::QueueFull { limit: 2, .. }) => true,
            Err(other) => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn a_full_queue_of_trainings_admits_other_tenants() {
        let (_dir, registry, other) = limited().await;
        let add = async |tenant, name: &str| {
            let new = NewConcept::new(name, ConceptKind::Style);
            let spec = TrainingSpec::preset(Preset::Pocket, new.kind, name, None, 6);
            registry.add_concept(tenant, &new, &spec).await
        };
        let (_, first) = add(TenantId::DEFAULT, "one").await.unwrap();
        add(TenantId::DEFAULT, "two").await.unwrap();
        assert!(is_full(add(TenantId::DEFAULT, "three").await));
        assert!(registry.concept(TenantId::DEFAULT, "three").await.unwrap().is_none());
        assert!(is_full(registry.check_queue(Queue::Trainings, TenantId::DEFAULT).await));
        registry.check_queue(Queue::Trainings, other).await.unwrap();
        add(other, "one").await.unwrap();
        let (_, theirs) = add(other, "two").await.unwrap();
        // At twice the limit, all tenants are refused.
        assert!(is_full(add(other, "three").await));
        // A retry counts as an addition.
        registry.cancel_training(TenantId::DEFAULT, first.id).await.unwrap();
        let again = async || {
            registry
                .retry_training(TenantId::DEFAULT, first.id, Quotas::default())
                .await
        };
        again().await.unwrap();
        registry.cancel_training(TenantId::DEFAULT, first.id).await.unwrap();
        registry.cancel_training(other, theirs.id).await.unwrap();
        assert!(is_full(again().await));
    }

    #[tokio::test]
    async fn a_full_queue_of_generations_admits_other_tenants() {
        let (_dir, registry, other) = limited().await;
        let add = async |tenant, background| {
            let new = NewGeneration {
                tenant,
                ..crate::generations::tests::new(background)
            };
            registry.add_generation(new).await
        };
        add(TenantId::DEFAULT, true).await.unwrap();
        add(TenantId::DEFAULT, true).await.unwrap();
        assert!(is_full(add(TenantId::DEFAULT, true).await));
        // Foreground generations are limited by the engine.
        add(TenantId::DEFAULT, false).await.unwrap();
        add(other, true).await.unwrap();
        assert!(is_full(add(other, true).await));
    }
}
