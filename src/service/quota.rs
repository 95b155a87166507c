//! Quotas of tenants. What a tenant has is counted in the database. What it does at present is counted in memory, and
//! also in the database if several processes share one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio_util::task::TaskTracker;

use super::{Caller, Service};
use crate::registry::{Backend, Quotas, Registry, Usage};
use coar_core::error::Error;
use coar_core::ids::TenantId;

/// The window of `pictures_per_minute`.
const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);
/// Retry delay for a request that was refused because too many are in flight.
const NEXT_REQUEST: Duration = Duration::from_secs(1);

/// The current activity of every tenant.
#[derive(Debug, Clone, Default)]
pub struct Tallies {
    all: Arc<Mutex<HashMap<TenantId, Tally>>>,
    /// Tasks that release images that were counted in the database; the server waits for them when it stops.
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct Tally {
    in_flight: u32,
    /// Admissions of the last minute, oldest first: at most as many as the quota, since each has an image.
    admitted: VecDeque<Admission>,
    next: u64,
    /// Requests of the last minute, oldest first: the beginning of a second, and the number of requests in it.
    made: VecDeque<(Instant, u32)>,
}

#[derive(Debug, Clone, Copy)]
struct Admission {
    id: u64,
    at: Instant,
    images: u32,
}

/// How much of a quota is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    pub limit: u32,
    pub remaining: u32,
    /// Time until all of it is available again; for requests in flight that is unknown, so one second.
    pub reset: Duration,
}

/// A tenant's remaining quotas; `None`: unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    pub requests: Option<Allowance>,
    pub images: Option<Allowance>,
}

/// A request that counts as in flight until this is dropped. Its images are then released, unless they were drawn.
#[derive(Debug)]
pub struct Admitted {
    tallies: Tallies,
    tenant: TenantId,
    /// `None`: no images were counted, or they have been drawn.
    images: Option<u64>,
    /// The same for processes that share a database: the registry, the second and the number of images that were
    /// counted.
    shared: Option<(Registry, i64, u32)>,
}

impl Admitted {
    /// The engine has accepted the request: from now on its images count, even if it fails.
    pub fn drawing(&mut self) {
        self.images = None;
        self.shared = None;
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut tallies = self.tallies.lock();
        if let Some(tally) = tallies.get_mut(&self.tenant) {
            tally.in_flight = tally.in_flight.saturating_sub(1);
            tally.admitted.retain(|admission| Some(admission.id) != self.images);
        }
        drop(tallies);
        if let Some((registry, second, images)) = self.shared.take() {
            let tenant = self.tenant;
            // Without a runtime the process is ending; the count expires after a minute.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                let give_back = async move {
                    if let Err(error) = registry.take_back(tenant, second, images).await {
                        tracing::debug!(%error, "images were not given back; the minute's count expires");
                    }
                };
                self.tallies.tasks.spawn_on(give_back, &runtime);
            }
        }
    }
}

fn too_many(images: u32, limit: u32) -> Error {
    let problem = format!("is {images}; you may draw {limit} images a minute");
    Error::field("quota_exceeded", "n", problem).limit(limit.into())
}

impl Tally {
    /// Counts a request. Over the limit: the number of requests in the last minute, and the time to wait.
    fn count_request(&mut self, limit: u32, now: Instant) -> Result<(), (u32, Duration)> {
        while self
            .made
            .front()
            .is_some_and(|(at, _)| now.duration_since(*at) >= MINUTE)
        {
            self.made.pop_front();
        }
        let made: u32 = self.made.iter().map(|(_, count)| count).sum();
        if made >= limit {
            let oldest = self.made.front().map_or(now, |(at, _)| *at);
            return Err((made, (oldest + MINUTE).duration_since(now)));
        }
        match self.made.back_mut() {
            Some((at, count)) if now.duration_since(*at) < SECOND => *count += 1,
            _ => self.made.push_back((now, 1)),
        }
        Ok(())
    }

    fn forget(&mut self, now: Instant) {
        while self
            .admitted
            .front()
            .is_some_and(|first| now.duration_since(first.at) >= MINUTE)
        {
            self.admitted.pop_front();
        }
    }

    fn drawn(&self) -> u32 {
        self.admitted.iter().map(|admission| admission.images).sum()
    }

    /// Time until this many images are available again.
    fn wait(&self, mut missing: u32, now: Instant) -> Duration {
        for admission in &self.admitted {
            missing = missing.saturating_sub(admission.images);
            if missing == 0 {
                return (admission.at + MINUTE).duration_since(now);
            }
        }
        MINUTE
    }

    fn standing(&mut self, quotas: Quotas, now: Instant) -> Standing {
        self.forget(now);
        Standing {
            requests: quotas.requests_in_flight.map(|limit| Allowance {
                limit,
                remaining: limit.saturating_sub(self.in_flight),
                reset: if self.in_flight == 0 {
                    Duration::ZERO
                } else {
                    NEXT_REQUEST
                },
            }),
            images: quotas.pictures_per_minute.map(|limit| Allowance {
                limit,
                remaining: limit.saturating_sub(self.drawn()),
                reset: self
                    .admitted
                    .back()
                    .map_or(Duration::ZERO, |last| (last.at + MINUTE).duration_since(now)),
            }),
        }
    }
}

impl Tallies {
    /// Spawns background work on `tasks`.
    pub fn new(tasks: TaskTracker) -> Self {
        Self {
            all: Arc::default(),
            tasks,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, Tally>> {
        // No operation leaves the map half-written.
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn admit(&self, tenant: TenantId, quotas: Quotas, images: u32, now: Instant) -> Result<Admitted, Error> {
        let mut tallies = self.lock();
        let tally = tallies.entry(tenant).or_default();
        tally.forget(now);
        if let Some(limit) = quotas.requests_in_flight
            && tally.in_flight >= limit
        {
            let what = format!("{} requests are queued or running", tally.in_flight);
            return Err(Error::quota_exceeded("requests_in_flight", limit, NEXT_REQUEST, &what));
        }
        let mut id = None;
        if let Some(limit) = quotas.pictures_per_minute {
            if images > limit {
                // Waiting does not help: the request itself is too large.
                return Err(too_many(images, limit));
            }
            let over = (tally.drawn() + images).saturating_sub(limit);
            if over > 0 {
                let what = format!("{} images were admitted in the last minute", tally.drawn());
                return Err(Error::quota_exceeded(
                    "pictures_per_minute",
                    limit,
                    tally.wait(over, now),
                    &what,
                ));
            }
            let admission = Admission {
                id: tally.next,
                at: now,
                images,
            };
            tally.next += 1;
            tally.admitted.push_back(admission);
            id = Some(admission.id);
        }
        tally.in_flight += 1;
        Ok(Admitted {
            tallies: self.clone(),
            tenant,
            images: id,
            shared: None,
        })
    }
}

impl Service {
    /// The effective quotas of a tenant; `None`: unlimited.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn quotas(&self, tenant: TenantId) -> Result<Quotas, Error> {
        let own = self.registry.tenant_by_id(tenant).await?.map(|tenant| tenant.quotas);
        let quotas = own.unwrap_or_default().or(self.limits.quotas);
        // As in the configuration, an administrator's 0 means unlimited.
        let any = |quota: Option<u32>| quota.filter(|number| *number > 0);
        Ok(Quotas {
            requests_per_minute: any(quotas.requests_per_minute),
            bytes: quotas.bytes.filter(|number| *number > 0),
            concepts: any(quotas.concepts),
            trainings: any(quotas.trainings),
            requests_in_flight: any(quotas.requests_in_flight),
            pictures_per_minute: any(quotas.pictures_per_minute),
        })
    }

    /// Counts a request that creates, starts, checks or cancels something, even if it fails.
    ///
    /// # Errors
    /// `quota_exceeded`; when the registry fails.
    pub async fn admit_request(&self, caller: &Caller) -> Result<(), Error> {
        let Some(limit) = self.quotas(caller.tenant).await?.requests_per_minute else {
            return Ok(());
        };
        let counted = match self.registry.backend() {
            Backend::Postgres => {
                let counted = self.registry.admit_request(caller.tenant, limit).await?;
                counted.map_err(|full| (full.count, full.wait))
            }
            Backend::Sqlite => {
                let mut tallies = self.tallies.lock();
                tallies
                    .entry(caller.tenant)
                    .or_default()
                    .count_request(limit, Instant::now())
            }
        };
        counted.map_err(|(made, wait)| {
            let what = format!("{made} requests were made in the last minute");
            Error::quota_exceeded("requests_per_minute", limit, wait, &what)
        })
    }

    /// Admits a generation of this many images. The guard belongs to the generation: to its stream of events, or to its
    /// background task.
    ///
    /// # Errors
    /// `quota_exceeded`; when the registry fails.
    pub async fn admit(&self, caller: &Caller, images: u32) -> Result<Admitted, Error> {
        let quotas = self.quotas(caller.tenant).await?;
        if self.registry.backend() == Backend::Postgres {
            return self.admit_shared(caller.tenant, quotas, images).await;
        }
        self.tallies.admit(caller.tenant, quotas, images, Instant::now())
    }

    /// The same for all processes of a database. Stored requests in flight count everywhere, others only in the process
    /// that responds to them.
    async fn admit_shared(&self, tenant: TenantId, mut quotas: Quotas, images: u32) -> Result<Admitted, Error> {
        let per_minute = quotas.pictures_per_minute.take();
        if let Some(limit) = quotas.requests_in_flight {
            let (elsewhere, _) = self.registry.activity(tenant).await?;
            if elsewhere >= limit {
                let what = format!("{elsewhere} requests are queued or running");
                return Err(Error::quota_exceeded("requests_in_flight", limit, NEXT_REQUEST, &what));
            }
            quotas.requests_in_flight = Some(limit - elsewhere);
        }
        let mut admitted = self.tallies.admit(tenant, quotas, images, Instant::now())?;
        let Some(limit) = per_minute else { return Ok(admitted) };
        if images > limit {
            return Err(too_many(images, limit));
        }
        match self.registry.admit_images(tenant, images, limit).await? {
            Ok(second) => {
                admitted.shared = Some((self.registry.clone(), second, images));
                Ok(admitted)
            }
            Err(full) => {
                let what = format!("{} images were admitted in the last minute", full.count);
                Err(Error::quota_exceeded("pictures_per_minute", limit, full.wait, &what))
            }
        }
    }

    /// Counts a generation as in flight that was admitted before a restart of the server.
    pub(super) fn readmit(&self, tenant: TenantId) -> Admitted {
        self.tallies.lock().entry(tenant).or_default().in_flight += 1;
        Admitted {
            tallies: self.tallies.clone(),
            tenant,
            images: None,
            shared: None,
        }
    }

    /// A tenant's remaining quotas.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn standing(&self, tenant: TenantId) -> Result<Standing, Error> {
        let quotas = self.quotas(tenant).await?;
        let shared = match self.registry.backend() {
            Backend::Postgres => Some(self.registry.activity(tenant).await?),
            Backend::Sqlite => None,
        };
        let mut tallies = self.tallies.lock();
        let mut standing = tallies.entry(tenant).or_default().standing(quotas, Instant::now());
        drop(tallies);
        if let Some((requests, images)) = shared {
            if let Some(allowance) = &mut standing.requests {
                allowance.remaining = allowance.remaining.saturating_sub(requests);
            }
            if let Some(allowance) = &mut standing.images {
                allowance.remaining = allowance.limit.saturating_sub(images);
                allowance.reset = if images == 0 { Duration::ZERO } else { MINUTE };
            }
        }
        Ok(standing)
    }

    /// Checks that a tenant's quotas allow the addition; returns the effective quotas. The registry checks them again
    /// in the transaction that adds it: of two requests for the last place the second is refused there.
    ///
    /// # Errors
    /// `quota_exceeded`; when the registry fails.
    pub async fn check_room(&self, caller: &Caller, addition: Usage) -> Result<Quotas, Error> {
        let quotas = self.quotas(caller.tenant).await?;
        quotas.check(self.registry.usage(caller.tenant).await?, addition)?;
        Ok(quotas)
    }
}

#[cfg(test)]
mod tests {
    use coar_core::error::ErrorKind;

    use super::*;

    const TENANT: TenantId = TenantId::DEFAULT;
    const QUOTAS: Quotas = Quotas {
        concepts: None,
        trainings: None,
        requests_in_flight: Some(2),
        pictures_per_minute: Some(5),
        requests_per_minute: None,
        bytes: None,
    };

    fn standing(tallies: &Tallies, now: Instant) -> (u32, u32, u64) {
        let standing = tallies.lock().entry(TENANT).or_default().standing(QUOTAS, now);
        let (requests, images) = (standing.requests.unwrap(), standing.images.unwrap());
        (requests.remaining, images.remaining, images.reset.as_secs())
    }

    #[test]
    fn images_come_back_a_minute_after_they_were_admitted() {
        let (tallies, begin) = (Tallies::default(), Instant::now());
        let later = |seconds| begin + Duration::from_secs(seconds);
        let mut first = tallies.admit(TENANT, QUOTAS, 3, begin).unwrap();
        first.drawing();
        drop(first);
        let mut second = tallies.admit(TENANT, QUOTAS, 2, later(20)).unwrap();
        second.drawing();
        drop(second);
        assert_eq!(standing(&tallies, later(20)), (2, 0, 60));
        let refused = tallies.admit(TENANT, QUOTAS, 1, later(20)).unwrap_err();
        assert_eq!(
            (refused.code, refused.limit, refused.retry_after),
            ("quota_exceeded", Some(5), Some(40))
        );
        let refused = tallies.admit(TENANT, QUOTAS, 4, later(20)).unwrap_err();
        assert_eq!(
            (refused.field.as_deref(), refused.retry_after),
            (Some("pictures_per_minute"), Some(60))
        );
        let never = tallies.admit(TENANT, QUOTAS, 6, later(20)).unwrap_err();
        assert_eq!((never.kind, never.field.as_deref()), (ErrorKind::Invalid, Some("n")));
        assert_eq!(standing(&tallies, later(60)), (2, 3, 20));
        assert!(tallies.admit(TENANT, QUOTAS, 3, later(60)).is_ok());
    }

    #[test]
    fn requests_of_a_minute_are_counted() {
        let (mut tally, begin) = (Tally::default(), Instant::now());
        let later = |seconds| begin + Duration::from_secs(seconds);
        for at in [0, 0, 20] {
            tally.count_request(3, later(at)).unwrap();
        }
        assert_eq!(tally.count_request(3, later(30)), Err((3, Duration::from_secs(30))));
        assert_eq!(tally.made.len(), 2);
        tally.count_request(3, later(60)).unwrap();
        tally.count_request(3, later(61)).unwrap();
        assert_eq!(tally.count_request(3, later(61)), Err((3, Duration::from_secs(19))));
    }

    #[test]
    fn what_was_not_drawn_is_given_back_and_other_tenants_are_not_counted() {
        let (tallies, now) = (Tallies::default(), Instant::now());
        let one = tallies.admit(TENANT, QUOTAS, 5, now).unwrap();
        let none = Quotas {
            pictures_per_minute: None,
            ..QUOTAS
        };
        let two = tallies.admit(TENANT, none, 100, now).unwrap();
        let refused = tallies.admit(TENANT, none, 1, now).unwrap_err();
        assert_eq!(
            (refused.field.as_deref(), refused.limit),
            (Some("requests_in_flight"), Some(2))
        );
        assert!(tallies.admit(TenantId::new(), QUOTAS, 5, now).is_ok());
        assert_eq!(standing(&tallies, now), (0, 0, 60));
        drop(one);
        drop(two);
        assert_eq!(standing(&tallies, now), (2, 5, 0));
    }
}
