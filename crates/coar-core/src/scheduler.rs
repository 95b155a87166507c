//! The scheduling policy, without tensors and clocks.
//!
//! Images are admitted one by one between decode steps, whenever rows are free: a request with several images
//! neither waits for all its rows nor blocks others. Tenants share by cost in tokens (start-time fair queueing);
//! within a tenant the order is first come, first served.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Identifies a request inside the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// The cost of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    pub images: u32,
    pub rows_per_image: usize,
    /// Total tokens of one image over all its rows.
    pub tokens_per_image: u64,
}

#[derive(Debug)]
struct Waiting {
    job: JobId,
    cost: Cost,
    /// Images that were already admitted.
    admitted: u32,
}

#[derive(Debug, Default)]
struct Tenant {
    queue: VecDeque<Waiting>,
    /// Tokens admitted so far, on a virtual clock that all tenants share.
    served: u64,
}

/// Admits images `first..first + count` of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    pub job: JobId,
    pub first: u32,
    pub count: u32,
    /// Whether this admits the last images of the job.
    pub last: bool,
}

/// Queued requests, by tenant.
#[derive(Debug, Default)]
pub struct Scheduler {
    tenants: BTreeMap<String, Tenant>,
    /// `served` of the tenant admitted last: new tenants start there, so idle tenants accumulate no credit.
    clock: u64,
}

impl Scheduler {
    pub fn push(&mut self, tenant: &str, job: JobId, cost: Cost) {
        let clock = self.clock;
        let tenant = self.tenants.entry(tenant.to_owned()).or_default();
        if tenant.queue.is_empty() {
            tenant.served = tenant.served.max(clock);
        }
        tenant.queue.push_back(Waiting { job, cost, admitted: 0 });
    }

    /// Admits the next images, as many of one job as fit into `free_rows`. If the first one in order does not fit,
    /// nothing is admitted: small images must not starve a large one.
    pub fn admit(&mut self, free_rows: usize) -> Option<Admission> {
        let (_, tenant) = self
            .tenants
            .iter_mut()
            .filter(|(_, tenant)| !tenant.queue.is_empty())
            .min_by_key(|(_, tenant)| tenant.served)?;
        let waiting = tenant.queue.front_mut()?;
        let left = waiting.cost.images - waiting.admitted;
        let count = left.min((free_rows / waiting.cost.rows_per_image.max(1)) as u32);
        if count == 0 {
            return None;
        }
        let admission = Admission {
            job: waiting.job,
            first: waiting.admitted,
            count,
            last: count == left,
        };
        waiting.admitted += count;
        self.clock = tenant.served;
        tenant.served += u64::from(count) * waiting.cost.tokens_per_image;
        if admission.last {
            tenant.queue.pop_front();
        }
        // Drop a tenant without requests once the others have caught up with it.
        let clock = self.clock;
        self.tenants
            .retain(|_, tenant| !tenant.queue.is_empty() || tenant.served > clock);
        Some(admission)
    }

    /// Removes the queued part of a job.
    pub fn remove(&mut self, job: JobId) {
        for tenant in self.tenants.values_mut() {
            tenant.queue.retain(|waiting| waiting.job != job);
        }
    }

    /// Tokens of all queued images.
    pub fn waiting_tokens(&self) -> u64 {
        self.tenants
            .values()
            .flat_map(|tenant| &tenant.queue)
            .map(|waiting| u64::from(waiting.cost.images - waiting.admitted) * waiting.cost.tokens_per_image)
            .sum()
    }
}

/// The kind of the device's next slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Generation,
    Training,
    Idle,
}

/// Divides device time between decoding and training.
#[derive(Debug, Clone)]
pub struct DeviceShare {
    training_share: f64,
    /// Device time used by each since both have wanted the device.
    generation: Duration,
    training: Duration,
    /// Length of training slices: of the last one, or of earlier ones that were longer.
    slice: Duration,
}

/// Half-life of earlier device use.
const MEMORY: Duration = Duration::from_secs(2);
/// Longer slices count as this long, so that they do not dominate [`MEMORY`].
const LONGEST_SLICE: Duration = Duration::from_millis(500);

impl DeviceShare {
    /// `training_share` is the fraction of time for training while images wait, 0..=1.
    pub fn new(training_share: f64) -> Self {
        Self {
            training_share: training_share.clamp(0.0, 1.0),
            generation: Duration::ZERO,
            training: Duration::ZERO,
            slice: Duration::ZERO,
        }
    }

    /// Training time in seconds, rounded up by half a slice. A slice is not divided, so it starts when at least half of it
    /// is due. If it started as soon as anything is due, a short image would often wait for twice the training's share.
    fn rounded_training(&self) -> f64 {
        (self.training + self.slice.min(LONGEST_SLICE) / 2).as_secs_f64()
    }

    pub fn turn(&self, generation: bool, training: bool) -> Turn {
        match (generation, training) {
            (false, false) => Turn::Idle,
            (true, false) => Turn::Generation,
            (false, true) => Turn::Training,
            (true, true) => {
                let share = self.training_share;
                let behind = self.rounded_training() * (1.0 - share) < self.generation.as_secs_f64() * share;
                // In the initial tie decoding goes first, since callers wait for it.
                if behind || share >= 1.0 {
                    Turn::Training
                } else {
                    Turn::Generation
                }
            }
        }
    }

    /// How long decoding may continue before training falls behind, if both want the device; `None`: without limit.
    pub fn generation_left(&self) -> Option<Duration> {
        let share = self.training_share;
        let due = self.rounded_training() * (1.0 - share) / share;
        (share > 0.0).then(|| Duration::from_secs_f64((due - self.generation.as_secs_f64()).max(0.0)))
    }

    /// Records the duration of a slice; `contended` if both wanted the device.
    pub fn spent(&mut self, turn: Turn, time: Duration, contended: bool) {
        if turn == Turn::Training {
            // A slice that was interrupted is shorter.
            self.slice = time.max(self.slice * 3 / 4);
        }
        if !contended {
            (self.generation, self.training) = (Duration::ZERO, Duration::ZERO);
            return;
        }
        match turn {
            Turn::Generation => self.generation += time,
            Turn::Training => self.training += time,
            Turn::Idle => {}
        }
        if self.generation + self.training > MEMORY {
            self.generation /= 2;
            self.training /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(images: u32, tokens: u64) -> Cost {
        Cost {
            images,
            rows_per_image: 2,
            tokens_per_image: tokens,
        }
    }

    fn admitted(scheduler: &mut Scheduler, rows: usize) -> Vec<(u64, u32)> {
        std::iter::from_fn(|| scheduler.admit(rows))
            .map(|admission| (admission.job.0, admission.count))
            .collect()
    }

    #[test]
    fn images_are_admitted_as_rows_become_free() {
        let mut scheduler = Scheduler::default();
        scheduler.push("", JobId(1), cost(3, 100));
        assert_eq!(scheduler.waiting_tokens(), 300);
        assert_eq!(scheduler.admit(1), None);
        let first = scheduler.admit(5).unwrap();
        assert_eq!((first.first, first.count, first.last), (0, 2, false));
        let second = scheduler.admit(2).unwrap();
        assert_eq!((second.first, second.count, second.last), (2, 1, true));
        assert_eq!((scheduler.admit(99), scheduler.waiting_tokens()), (None, 0));
    }

    #[test]
    fn fairness_is_by_tokens_not_requests() {
        let mut scheduler = Scheduler::default();
        for job in 0..6 {
            scheduler.push("many", JobId(job), cost(1, 100));
        }
        scheduler.push("large", JobId(10), cost(1, 300));
        scheduler.push("large", JobId(11), cost(1, 300));
        let order: Vec<u64> = admitted(&mut scheduler, 2).into_iter().map(|(job, _)| job).collect();
        assert_eq!(order.len(), 8);
        // Of the first 600 tokens each tenant has got 300.
        let early = &order[..4];
        assert_eq!(early.iter().filter(|&&job| job < 10).count(), 3, "{order:?}");
    }

    #[test]
    fn idling_accumulates_no_credit() {
        let mut scheduler = Scheduler::default();
        for job in 0..10 {
            scheduler.push("busy", JobId(job), cost(1, 100));
        }
        for _ in 0..5 {
            scheduler.admit(2).unwrap();
        }
        for job in 20..30 {
            scheduler.push("late", JobId(job), cost(1, 100));
        }
        let next: Vec<bool> = admitted(&mut scheduler, 2)[..4]
            .iter()
            .map(|(job, _)| *job >= 20)
            .collect();
        assert_eq!(next.iter().filter(|late| **late).count(), 2, "{next:?}");
    }

    #[test]
    fn large_image_is_not_starved() {
        let mut scheduler = Scheduler::default();
        let wide = Cost {
            rows_per_image: 8,
            ..cost(1, 100)
        };
        scheduler.push("a", JobId(1), wide);
        scheduler.push("a", JobId(2), cost(1, 1));
        assert_eq!(scheduler.admit(4), None);
        assert_eq!(scheduler.admit(8).map(|admission| admission.job), Some(JobId(1)));
        scheduler.remove(JobId(2));
        assert_eq!(scheduler.admit(8), None);
    }

    #[test]
    fn device_time_follows_the_share_under_contention() {
        let run = |share: f64| {
            let mut device = DeviceShare::new(share);
            let mut had = [Duration::ZERO; 2];
            for _ in 0..4000 {
                let turn = device.turn(true, true);
                let (slot, time) = match turn {
                    Turn::Generation => (0, Duration::from_millis(7)),
                    _ => (1, Duration::from_millis(31)),
                };
                had[slot] += time;
                device.spent(turn, time, true);
            }
            had[1].as_secs_f64() / (had[0] + had[1]).as_secs_f64()
        };
        for share in [0.0, 0.25, 0.5, 0.9, 1.0] {
            assert!((run(share) - share).abs() < 0.03, "{share}: {}", run(share));
        }
        let device = DeviceShare::new(0.0);
        assert_eq!(device.turn(false, true), Turn::Training);
        assert_eq!(device.turn(true, false), Turn::Generation);
        assert_eq!(device.turn(false, false), Turn::Idle);
    }

    #[test]
    fn short_images_wait_for_their_share_of_training() {
        let (slice, step) = (Duration::from_millis(150), Duration::from_millis(1));
        let mut device = DeviceShare::new(0.5);
        device.spent(Turn::Training, slice, false);
        let (mut images, mut training) = (0, Duration::ZERO);
        // Images of 170 ms, with a pause after each, in which the training continues.
        for _ in 0..10 {
            let mut left = 170;
            while left > 0 {
                let turn = device.turn(true, true);
                let time = if turn == Turn::Training { slice } else { step };
                match turn {
                    Turn::Training => training += time,
                    _ => left -= 1,
                }
                device.spent(turn, time, true);
            }
            images += 1;
            device.spent(Turn::Training, slice, false);
        }
        assert_eq!((images, training), (10, 10 * slice));
    }
}
