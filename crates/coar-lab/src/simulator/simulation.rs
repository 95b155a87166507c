//! The simulation loop.

use super::FleetError;
use super::draws::{Draws, Stream, Weighted};
use super::line::{Event, TimeLine};
use super::report::{Report, Seen, report};
use super::times::Times;
use super::trainings::Trainings;
use super::worker::{Queued, Worker};
use super::workload::{Arrivals, Clock, Failures, Fleet, Workload};

/// A requested image that was not rejected.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub asked: f64,
    pub first_code: Option<f64>,
    pub done: Option<f64>,
    /// Number of restarts.
    pub attempt: u32,
    size: u8,
    codes: u32,
    concept: Option<u32>,
    /// Whether its concept was not resident.
    cold: bool,
    worker: usize,
}

/// After the last request the simulation continues for this many times the whole duration, so that requests can
/// finish.
const DRAIN: f64 = 4.0;

struct Simulation<'a> {
    times: &'a Times,
    workload: &'a Workload,
    fleet: &'a Fleet,
    line: TimeLine,
    workers: Vec<Worker>,
    requests: Vec<Request>,
    trainings: Trainings,
    clock: Clock,
    pictures: Draws,
    routing: Draws,
    failing: Draws,
    asking: Draws,
    sizes: Weighted,
    concepts: Weighted,
    /// Requests that found no live worker when their lease expired.
    stranded: Vec<usize>,
    seen: Seen,
}

/// Simulates `fleet` under `workload` and reports the results.
///
/// # Errors
/// The first invalid number.
pub fn simulate(times: &Times, workload: &Workload, fleet: &Fleet, seed: u64) -> Result<Report, FleetError> {
    workload.check()?;
    if !(1..=100_000).contains(&fleet.workers) {
        return Err(FleetError::new("workers", "must be from 1 to 100000"));
    }
    if fleet.training_workers >= fleet.workers {
        return Err(FleetError::new("training_workers", "must be fewer than workers"));
    }
    let mut simulation = Simulation::new(times, workload, fleet, seed);
    simulation.run();
    let Simulation {
        line,
        workers,
        requests,
        trainings,
        mut seen,
        ..
    } = simulation;
    seen.events = line.planned();
    let meters: Vec<_> = workers.into_iter().map(|worker| worker.meter).collect();
    Ok(report((workload, fleet), &requests, &trainings, &meters, &seen))
}

impl<'a> Simulation<'a> {
    fn new(times: &'a Times, workload: &'a Workload, fleet: &'a Fleet, seed: u64) -> Self {
        let window = (workload.warm_up, workload.seconds);
        let mut workers = vec![Worker::new(times, window); fleet.workers];
        if fleet.training_workers > 0 {
            for (index, worker) in workers.iter_mut().enumerate() {
                worker.trains = index < fleet.training_workers;
                worker.draws = !worker.trains;
            }
        }
        Self {
            times,
            workload,
            fleet,
            line: TimeLine::default(),
            workers,
            requests: vec![],
            trainings: Trainings::default(),
            clock: Clock::new(workload, seed),
            pictures: Draws::new(seed, Stream::Pictures),
            routing: Draws::new(seed, Stream::Routing),
            failing: Draws::new(seed, Stream::Failures),
            asking: Draws::new(seed, Stream::Trainings),
            sizes: Weighted::new(times.sizes.iter().map(|size| size.weight)),
            concepts: Weighted::zipf(workload.concepts, workload.zipf),
            stranded: vec![],
            seen: Seen::default(),
        }
    }

    fn run(&mut self) {
        for _ in 0..self.workload.trainings_at_start {
            self.trainings.add(0.0, self.times.training_steps());
        }
        self.hand_out(0.0);
        self.plan_picture(0.0);
        self.plan_training(0.0);
        for worker in 0..self.workers.len() {
            self.plan_death(0.0, worker);
        }
        let end = self.workload.seconds;
        let mut before = 0.0;
        let mut closed = false;
        while let Some((now, event)) = self.line.next() {
            if !closed && now > end {
                closed = true;
                self.seen.in_system_at_end = self.seen.in_system();
                self.seen.trainings_waiting_at_end = self.trainings.waiting();
            }
            if closed && (self.seen.in_system() == 0 || now > DRAIN * end) {
                break;
            }
            if !self.workload.is_steady() && self.seen.asked > 0 && self.seen.in_system() == 0 {
                break;
            }
            let counted = (now.min(end) - f64::max(before, self.workload.warm_up)).max(0.0);
            self.seen.integral += counted * self.seen.in_system() as f64;
            before = now;
            self.happen(now, event);
        }
    }

    fn happen(&mut self, now: f64, event: Event) {
        match event {
            Event::Picture => {
                self.ask(now);
                self.plan_picture(now);
            }
            Event::Training => {
                self.trainings.add(now, self.times.training_steps());
                self.plan_training(now);
                self.hand_out(now);
            }
            Event::Enters { request, attempt } => self.enter(now, request, attempt),
            Event::TurnEnds { worker, turn } => self.end_turn(now, worker, turn),
            Event::Drawn { request, attempt } => self.deliver(now, request, attempt),
            Event::Dies { worker } => self.die(now, worker),
            Event::Lives { worker } => self.live(now, worker),
            Event::Returns { request } => self.route_again(now, request),
            Event::TrainingReturns { training } => {
                self.trainings.again(training);
                self.hand_out(now);
            }
        }
    }

    fn plan_picture(&mut self, now: f64) {
        if let Some(at) = self.clock.next(now).filter(|at| *at <= self.workload.seconds) {
            self.line.plan(at, Event::Picture);
        }
    }

    fn plan_training(&mut self, now: f64) {
        let rate = self.workload.trainings_per_hour / 3600.0;
        if rate > 0.0 {
            let at = now + self.asking.exponential(1.0 / rate);
            if at <= self.workload.seconds {
                self.line.plan(at, Event::Training);
            }
        }
    }

    fn plan_death(&mut self, now: f64, worker: usize) {
        if let Some(Failures { mtbf_hours, .. }) = self.fleet.failures {
            let at = now + self.failing.exponential(3600.0 * mtbf_hours);
            if at <= self.workload.seconds {
                self.line.plan(at, Event::Dies { worker });
            }
        }
    }

    /// An image is requested: it is sent to a worker or rejected.
    fn ask(&mut self, now: f64) {
        let size = self.sizes.draw(&mut self.pictures);
        let uses = self.pictures.unit() < self.workload.concept_share;
        let concept = self.concepts.draw(&mut self.pictures) as u32;
        let mean = f64::from(self.times.sizes[size].codes);
        let codes = match self.workload.geometric {
            true => self.pictures.exponential(mean).ceil().max(1.0),
            false => mean,
        };
        let concept = uses.then_some(concept);
        self.seen.asked += 1;
        let Some(worker) = self
            .fleet
            .policy
            .choose(&self.workers, (concept, codes as u32), &mut self.routing)
        else {
            self.seen.refuse(now >= self.workload.warm_up);
            return;
        };
        let request = self.requests.len();
        self.requests.push(Request {
            asked: now,
            first_code: None,
            done: None,
            attempt: 0,
            size: size as u8,
            codes: codes as u32,
            concept,
            cold: false,
            worker,
        });
        self.send(now, request, worker);
    }

    /// Sends a request to a worker; a cold concept is fetched first.
    fn send(&mut self, now: f64, request: usize, worker: usize) {
        let known = &mut self.requests[request];
        let target = &mut self.workers[worker];
        known.worker = worker;
        target.incoming += 1;
        let mut way = self.fleet.hop_ms / 1e3;
        if let Some(concept) = known.concept {
            known.cold = !target.cache.touch(concept);
            self.seen.concept(known.cold);
            if known.cold {
                way += self.times.concepts.fetch_ms / 1e3;
            }
        }
        let attempt = known.attempt;
        match way > 0.0 {
            true => self.line.plan(now + way, Event::Enters { request, attempt }),
            false => self.enter(now, request, attempt),
        }
    }

    fn enter(&mut self, now: f64, request: usize, attempt: u32) {
        let known = &self.requests[request];
        if known.attempt != attempt {
            return;
        }
        let worker = known.worker;
        let size = usize::from(known.size);
        let mut lead = self.times.sizes[size].prefill_ms;
        if known.cold {
            lead += self.times.concepts.upload_ms;
        }
        let queued = Queued {
            request,
            size,
            codes: known.codes,
            lead: lead / 1e3,
        };
        self.workers[worker].incoming -= 1;
        self.workers[worker].enter(queued);
        self.disturb(now, worker);
    }

    /// Called when work was queued at a worker: starts the worker if it is idle, otherwise cuts its slice short.
    fn disturb(&mut self, now: f64, worker: usize) {
        if self.workers[worker].is_idle() {
            self.begin(now, worker);
        } else if let Some((ends, turn)) = self.workers[worker].cut(now) {
            self.line.plan(ends, Event::TurnEnds { worker, turn });
        }
    }

    fn begin(&mut self, now: f64, worker: usize) {
        let Some(begun) = self.workers[worker].begin(now, self.times) else {
            return;
        };
        for request in begun.admitted {
            self.requests[request].first_code = Some(begun.first_code);
        }
        let turn = begun.number;
        self.line.plan(begun.ends, Event::TurnEnds { worker, turn });
    }

    fn end_turn(&mut self, now: f64, worker: usize, turn: u64) {
        let Some(outcome) = self.workers[worker].finish(turn, self.times) else {
            return;
        };
        for (request, at) in outcome.drawn {
            let attempt = self.requests[request].attempt;
            self.line.plan(at, Event::Drawn { request, attempt });
        }
        if let Some(training) = outcome.trained {
            self.trainings.all[training].done = Some(now);
            self.hand_out(now);
        }
        if self.workers[worker].is_idle() {
            self.begin(now, worker);
        }
    }

    fn deliver(&mut self, now: f64, request: usize, attempt: u32) {
        let known = &mut self.requests[request];
        if known.attempt == attempt {
            known.done = Some(now);
            self.seen.done += 1;
            self.workers[known.worker].delivered(request);
        }
    }

    /// Assigns queued trainings to workers with a free slot.
    fn hand_out(&mut self, now: f64) {
        while let Some(worker) = self
            .trainings
            .hand_out(now, &mut self.workers, self.times.training.slots)
        {
            self.disturb(now, worker);
        }
    }

    fn die(&mut self, now: f64, worker: usize) {
        let Some(Failures { lease_seconds, .. }) = self.fleet.failures else {
            return;
        };
        let (shortest, longest) = lease_seconds;
        let returns = now + shortest + (longest - shortest) * self.failing.unit();
        let (mut requests, trainings) = self.workers[worker].die(now, self.times);
        if self.workers[worker].incoming > 0 {
            let listed: std::collections::BTreeSet<usize> = requests.iter().copied().collect();
            let coming = |(id, one): (usize, &Request)| {
                (one.worker == worker && one.done.is_none() && !listed.contains(&id)).then_some(id)
            };
            let lost: Vec<usize> = self.requests.iter().enumerate().filter_map(coming).collect();
            requests.extend(lost);
            self.workers[worker].incoming = 0;
        }
        self.seen.deaths += 1;
        self.seen.interrupted += requests.len() as u64;
        for request in requests {
            let known = &mut self.requests[request];
            known.attempt += 1;
            known.worker = usize::MAX;
            self.line.plan(returns, Event::Returns { request });
        }
        for (training, left) in trainings {
            self.trainings.all[training].left = left;
            self.line.plan(returns, Event::TrainingReturns { training });
        }
        let back = now + self.times.engine.restart_seconds;
        self.line.plan(back, Event::Lives { worker });
    }

    fn live(&mut self, now: f64, worker: usize) {
        self.workers[worker].up = true;
        self.plan_death(now, worker);
        for request in std::mem::take(&mut self.stranded) {
            self.route_again(now, request);
        }
        self.hand_out(now);
    }

    /// An accepted request is not rejected later: if every queue is full it goes to the shortest.
    fn route_again(&mut self, now: f64, request: usize) {
        let (concept, codes) = (self.requests[request].concept, self.requests[request].codes);
        let chosen = self
            .fleet
            .policy
            .choose(&self.workers, (concept, codes), &mut self.routing);
        let living = self
            .workers
            .iter()
            .enumerate()
            .filter(|(_, worker)| worker.up && worker.draws);
        let shortest = || living.min_by_key(|(_, worker)| worker.load()).map(|(index, _)| index);
        match chosen.or_else(shortest) {
            Some(worker) => self.send(now, request, worker),
            None => self.stranded.push(request),
        }
    }
}

impl Workload {
    /// Whether requests arrive during the whole time.
    pub(super) fn is_steady(&self) -> bool {
        !matches!(self.arrivals, Arrivals::AtOnce { .. })
    }
}
