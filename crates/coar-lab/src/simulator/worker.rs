//! One worker: its queue, its batch, its trainings, and the sequence of units of work of its device, as in
//! `coar_engine::device::thread`. Uninterrupted units are merged.

use std::collections::VecDeque;
use std::time::Duration;

use coar_core::routing::Candidate;
use coar_core::scheduler::{DeviceShare, Turn as DeviceTurn};

use super::cache::Cache;
use super::times::Times;

/// A queued request.
#[derive(Debug, Clone)]
pub(super) struct Queued {
    pub request: usize,
    /// Index of its size.
    pub size: usize,
    pub codes: u32,
    /// Device seconds at admission: prompt, concept.
    pub lead: f64,
}

/// An image in the batch.
#[derive(Debug, Clone)]
struct Drawing {
    request: usize,
    size: usize,
    codes: u32,
    left: u32,
    /// Tokens in the cache of each of its rows.
    context: f64,
    /// Tokens added per step.
    growth: f64,
}

/// A training on this worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    pub training: usize,
    /// Remaining steps, including the start counted as steps.
    pub left: f64,
    /// Device seconds since its last checkpoint.
    since_checkpoint: f64,
}

/// The current activity of the device.
#[derive(Debug, Clone)]
struct Turn {
    number: u64,
    drawing: bool,
    contended: bool,
    begun: f64,
    /// Seconds before the first step.
    lead: f64,
    step: f64,
    steps: u32,
}

impl Turn {
    fn ends(&self) -> f64 {
        self.begun + self.lead + f64::from(self.steps) * self.step
    }
}

/// Device seconds inside the measurement window.
#[derive(Debug, Clone, Default)]
pub(super) struct Meter {
    pub window: (f64, f64),
    pub drawing: f64,
    pub training: f64,
    /// Rows times seconds of decoding.
    pub row_seconds: f64,
}

/// The result of a slice.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Requests whose pixels are scheduled, and when.
    pub drawn: Vec<(usize, f64)>,
    pub trained: Option<usize>,
}

/// A slice in progress.
#[derive(Debug)]
pub(super) struct Begun {
    pub ends: f64,
    pub number: u64,
    /// Admitted requests.
    pub admitted: Vec<usize>,
    /// When their first code is done.
    pub first_code: f64,
}

/// One worker.
#[derive(Debug, Clone)]
pub(super) struct Worker {
    pub up: bool,
    /// Whether it takes images, and whether it takes trainings.
    pub draws: bool,
    pub trains: bool,
    pub cache: Cache,
    pub meter: Meter,
    /// Requests in transit to this worker.
    pub incoming: usize,
    queue: VecDeque<Queued>,
    rows: Vec<Drawing>,
    trainings: VecDeque<Running>,
    /// When each pixel thread is free again.
    threads: Vec<f64>,
    /// Requests whose pixels are being decoded.
    pixels: Vec<usize>,
    /// Device seconds still needed for pixels.
    debt: f64,
    share: DeviceShare,
    turn: Option<Turn>,
    turns: u64,
    places: usize,
    queue_places: usize,
    training_share: f64,
}

impl Worker {
    pub fn new(times: &Times, window: (f64, f64)) -> Self {
        Self {
            up: true,
            draws: true,
            trains: true,
            cache: Cache::new(times.concept_places()),
            meter: Meter {
                window,
                ..Meter::default()
            },
            incoming: 0,
            queue: VecDeque::new(),
            rows: vec![],
            trainings: VecDeque::new(),
            threads: vec![0.0; times.engine.picture_threads],
            pixels: vec![],
            debt: 0.0,
            share: DeviceShare::new(times.engine.training_share),
            turn: None,
            turns: 0,
            places: times.places(),
            queue_places: times.engine.queue,
            training_share: times.engine.training_share,
        }
    }

    /// Images running, queued and in transit.
    pub fn load(&self) -> usize {
        self.rows.len() + self.queue.len() + self.incoming
    }

    /// Its reported load: how long one more image would take here, relative to an idle worker, if images only shared
    /// the device's time.
    pub fn slowness(&self) -> f64 {
        let kept = match self.trainings.is_empty() {
            true => 1.0,
            false => (1.0 - self.training_share).max(0.01),
        };
        (self.load() + 1) as f64 / kept
    }

    /// Whether one more would find free rows and an empty queue.
    pub fn begins_at_once(&self) -> bool {
        self.up && self.draws && self.load() < self.places
    }

    /// As seen by the server's routing, for an image of `codes` codes. Those in transit count as large as this one.
    pub fn candidate(&self, concept: Option<u32>, codes: u32) -> Candidate {
        let here = self
            .rows
            .iter()
            .map(|row| row.codes)
            .chain(self.queue.iter().map(|queued| queued.codes));
        Candidate {
            pending_tokens: here.map(u64::from).sum::<u64>() + self.incoming as u64 * u64::from(codes),
            begins_at_once: self.begins_at_once(),
            warm_concepts: concept.is_some_and(|concept| self.cache.is_warm(concept)).into(),
        }
    }

    /// Whether one more would be accepted.
    pub fn has_room(&self) -> bool {
        self.up && self.draws && self.load() < self.places + self.queue_places
    }

    pub fn trainings(&self) -> usize {
        self.trainings.len()
    }

    /// Enqueues a request.
    pub fn enter(&mut self, queued: Queued) {
        self.queue.push_back(queued);
    }

    /// Adds a training.
    pub fn train(&mut self, training: usize, left: f64) {
        self.trainings.push_back(Running {
            training,
            left,
            since_checkpoint: 0.0,
        });
    }

    pub fn is_idle(&self) -> bool {
        self.turn.is_none()
    }

    /// Ends the current slice with the step in progress, so that new work can be admitted. Returns the new end.
    pub fn cut(&mut self, now: f64) -> Option<(f64, u64)> {
        let admits = self.rows.len() < self.places;
        let turn = self.turn.as_mut()?;
        if turn.drawing && !admits && self.trainings.is_empty() {
            return None;
        }
        let under_way = ((now - turn.begun - turn.lead) / turn.step).ceil().max(1.0);
        if under_way >= f64::from(turn.steps) {
            return None;
        }
        turn.steps = under_way as u32;
        self.turns += 1;
        turn.number = self.turns;
        Some((turn.ends(), turn.number))
    }

    /// Starts the next slice, if there is work.
    pub fn begin(&mut self, now: f64, times: &Times) -> Option<Begun> {
        let drawing = !self.rows.is_empty() || !self.queue.is_empty() || self.debt > 0.0;
        let training = !self.trainings.is_empty();
        self.turns += 1;
        let mut turn = Turn {
            number: self.turns,
            drawing,
            contended: drawing && training,
            begun: now,
            lead: 0.0,
            step: 0.0,
            steps: 0,
        };
        let mut admitted = vec![];
        match (drawing, training) {
            (false, false) => return None,
            (true, true) if self.share.turn(true, true) == DeviceTurn::Training => self.plan_training(&mut turn, times),
            (false, true) => self.plan_training(&mut turn, times),
            _ => admitted = self.plan_drawing(&mut turn, times),
        }
        let begun = Begun {
            ends: turn.ends(),
            number: turn.number,
            admitted,
            first_code: turn.begun + turn.lead + turn.step,
        };
        self.turn = Some(turn);
        Some(begun)
    }

    fn plan_training(&self, turn: &mut Turn, times: &Times) {
        turn.drawing = false;
        turn.step = times.training_step();
        turn.steps = 1;
        match (turn.contended, &self.trainings.front()) {
            (true, _) => turn.step /= times.training.beside,
            (false, Some(alone)) if self.trainings.len() == 1 => turn.steps = alone.left.ceil().max(1.0) as u32,
            _ => {}
        }
    }

    /// Admits what fits, and decodes until an image's last code, or until a training is behind.
    fn plan_drawing(&mut self, turn: &mut Turn, times: &Times) -> Vec<usize> {
        let slower = if turn.contended { times.training.beside } else { 1.0 };
        turn.lead = std::mem::take(&mut self.debt) / slower;
        let mut admitted = vec![];
        while self.rows.len() < self.places {
            let Some(queued) = self.queue.pop_front() else { break };
            let size = &times.sizes[queued.size];
            turn.lead += queued.lead / slower;
            admitted.push(queued.request);
            self.rows.push(Drawing {
                request: queued.request,
                size: queued.size,
                codes: queued.codes,
                left: queued.codes,
                context: f64::from(size.prompt_tokens),
                growth: 1.0 + f64::from(size.row_ends) / f64::from(size.codes),
            });
        }
        let Some(least) = self.rows.iter().map(|row| row.left).min() else {
            return admitted;
        };
        turn.step = self.step(1, times) / slower;
        turn.steps = least;
        if turn.contended {
            let left = self
                .share
                .generation_left()
                .map_or(f64::INFINITY, |left| left.as_secs_f64());
            turn.steps = least.min(((left - turn.lead) / turn.step).ceil().clamp(1.0, f64::from(u32::MAX)) as u32);
        }
        turn.step = self.step(turn.steps, times) / slower;
        admitted
    }

    /// Mean seconds of each of the next `steps`.
    fn step(&self, steps: u32, times: &Times) -> f64 {
        let each = times.engine.rows_per_picture as f64;
        let half = f64::from(steps - 1) / 2.0;
        let tokens: f64 = self.rows.iter().map(|row| row.context + half * row.growth).sum();
        times.decode.step(each * self.rows.len() as f64, each * tokens)
    }

    /// Ends the slice with this number; `None` if the current slice has another one.
    pub fn finish(&mut self, number: u64, times: &Times) -> Option<Outcome> {
        let turn = self.turn.take_if(|turn| turn.number == number)?;
        self.measure(&turn, turn.ends(), times);
        let kind = match turn.drawing {
            true => DeviceTurn::Generation,
            false => DeviceTurn::Training,
        };
        let spent = Duration::from_secs_f64(turn.ends() - turn.begun);
        self.share.spent(kind, spent, turn.contended);
        let mut outcome = Outcome::default();
        match turn.drawing {
            true => outcome.drawn = self.draw(&turn, times),
            false => outcome.trained = self.step_training(&turn, times),
        }
        Some(outcome)
    }

    fn step_training(&mut self, turn: &Turn, times: &Times) -> Option<usize> {
        let mut running = self.trainings.pop_front()?;
        running.left -= f64::from(turn.steps);
        running.since_checkpoint += turn.ends() - turn.begun;
        running.since_checkpoint %= times.training.checkpoint_seconds.max(turn.step);
        if running.left <= 0.0 {
            return Some(running.training);
        }
        self.trainings.push_back(running);
        None
    }

    fn draw(&mut self, turn: &Turn, times: &Times) -> Vec<(usize, f64)> {
        for row in &mut self.rows {
            row.left -= turn.steps.min(row.left);
            row.context += f64::from(turn.steps) * row.growth;
        }
        let done: Vec<Drawing> = self.rows.extract_if(.., |row| row.left == 0).collect();
        done.into_iter()
            .map(|row| {
                (
                    row.request,
                    self.decode(row.request, turn.ends(), &times.sizes[row.size]),
                )
            })
            .collect()
    }

    /// Assigns an image to the first free pixel thread; returns when its pixels will be done.
    fn decode(&mut self, request: usize, now: f64, size: &super::times::Size) -> f64 {
        self.debt += size.pixels_device_ms / 1e3;
        self.pixels.push(request);
        let first = self.threads.iter_mut().min_by(|a, b| a.total_cmp(b));
        let Some(thread) = first else { return now };
        *thread = thread.max(now) + size.pixels_ms / 1e3;
        *thread
    }

    /// Its pixels are done.
    pub fn delivered(&mut self, request: usize) {
        self.pixels.retain(|one| *one != request);
    }

    fn measure(&mut self, turn: &Turn, until: f64, times: &Times) {
        let meter = &mut self.meter;
        let seconds = (until.min(meter.window.1) - turn.begun.max(meter.window.0)).max(0.0);
        match turn.drawing {
            true => {
                let rows = times.engine.rows_per_picture * self.rows.len();
                meter.drawing += seconds;
                meter.row_seconds += rows as f64 * seconds;
            }
            false => meter.training += seconds,
        }
    }

    /// Kills the worker; returns its requests, and its trainings as of their last checkpoints.
    pub fn die(&mut self, now: f64, times: &Times) -> (Vec<usize>, Vec<(usize, f64)>) {
        if let Some(turn) = self.turn.take() {
            self.measure(&turn, now, times);
            if let (false, Some(front)) = (turn.drawing, self.trainings.front_mut()) {
                let steps = ((now - turn.begun) / turn.step).floor();
                front.left -= steps;
                front.since_checkpoint += steps * turn.step;
                front.since_checkpoint %= times.training.checkpoint_seconds.max(turn.step);
            }
        }
        self.up = false;
        self.cache.clear();
        self.debt = 0.0;
        self.share = DeviceShare::new(self.training_share);
        self.threads.fill(0.0);
        let mut requests: Vec<usize> = self.rows.drain(..).map(|row| row.request).collect();
        requests.extend(self.queue.drain(..).map(|queued| queued.request));
        requests.append(&mut self.pixels);
        let step = times.training_step();
        let whole = times.training_steps();
        let trainings = self.trainings.drain(..).map(|running| {
            let left = running.left + (running.since_checkpoint / step).floor();
            (running.training, left.min(whole))
        });
        (requests, trainings.collect())
    }
}
