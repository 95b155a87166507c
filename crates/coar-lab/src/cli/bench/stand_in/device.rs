//! A simulated device that takes time instead of computing. Only for benchmarks of everything around the engine,
//! with several simulated devices on one machine. `coar serve` cannot start it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use coar_core::engine::{
    Command, DeviceThread, EngineError, EngineHandle, Gauge, GenerateRequest, GenerationEvent, Health, Load, ModelInfo,
    Ticket, TrainingEvent,
};
use coar_core::image::RgbImage;
use coar_engine::model::{LuminaMgpt, ModelError};

/// Timing of the simulated device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// One step of the whole batch: one code of every image in it.
    pub step: Duration,
    /// Maximum number of images per step; more wait.
    pub pictures: usize,
    /// Limit of queued requests; more are rejected.
    pub queue: usize,
}

struct Drawing {
    request: Box<GenerateRequest>,
    events: mpsc::Sender<GenerationEvent>,
    codes: u32,
    done: u32,
}

impl Drawing {
    /// Advances by one code; false if it has ended.
    fn advance(&mut self) -> bool {
        if self.events.is_closed() {
            return false;
        }
        self.done += 1;
        if self.done < self.codes {
            let (count, columns) = (self.request.count, (self.request.sampling.width / 16).max(1));
            if self.done.is_multiple_of(columns) {
                let _ = self.events.try_send(GenerationEvent::Progress {
                    done: self.done * count,
                    total: self.codes * count,
                });
            }
            return true;
        }
        let (width, height) = (self.request.sampling.width, self.request.sampling.height);
        for index in 0..self.request.count {
            let rgb = vec![128; (width * height * 3) as usize];
            let image = RgbImage { width, height, rgb };
            let _ = self.events.try_send(GenerationEvent::Image { index, image });
        }
        let _ = self.events.try_send(GenerationEvent::Done {
            text_tokens: 0,
            image_tokens: u64::from(self.codes * self.request.count),
        });
        false
    }
}

/// Joins the thread when the last handle is dropped.
#[derive(Debug)]
struct Joined(Option<std::thread::JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take()
            && thread.join().is_err()
        {
            tracing::error!("the simulated device panicked");
        }
    }
}

/// Starts a simulated device that generates grey images. Requests are checked, and their tokens counted, as for the
/// model.
///
/// # Errors
/// When its thread cannot be started.
pub fn stand_in(pace: Pace, model: &LuminaMgpt, info: ModelInfo) -> Result<EngineHandle, ModelError> {
    let counter = model.token_counter(i64::MAX);
    let pixels = model.vqgan.config().pixels_per_code();
    let (commands, inbox) = mpsc::channel(pace.queue.max(1));
    let (sender, health) = watch::channel(Health::Ready);
    let gauge = Arc::new(Gauge::new(pace.queue));
    let own = gauge.clone();
    let thread = std::thread::Builder::new()
        .name("coar-stand-in".to_owned())
        .spawn(move || {
            run(pace, pixels, inbox, &own);
            sender.send_replace(Health::Stopped("the engine has stopped".to_owned()));
        })
        .map_err(|error| ModelError::invalid("engine", format!("cannot start its thread: {error}")))?;
    let thread = DeviceThread {
        commands,
        health,
        info,
        counter,
        gauge,
        guard: Arc::new(Joined(Some(thread))),
    };
    Ok(thread.into())
}

fn run(pace: Pace, pixels: u32, mut inbox: mpsc::Receiver<Command>, gauge: &Gauge) {
    let mut waiting: VecDeque<(Drawing, Ticket)> = VecDeque::new();
    let mut drawn: Vec<Drawing> = Vec::new();
    loop {
        let idle = waiting.is_empty() && drawn.is_empty();
        gauge.beat(!idle);
        let mut command = match idle {
            true => match inbox.blocking_recv() {
                Some(command) => Some(command),
                None => return,
            },
            false => inbox.try_recv().ok(),
        };
        while let Some(next) = command {
            match next {
                Command::Generate {
                    request,
                    events,
                    ticket,
                } => {
                    let codes = (request.sampling.width / pixels) * (request.sampling.height / pixels);
                    let drawing = Drawing {
                        request,
                        events,
                        codes,
                        done: 0,
                    };
                    waiting.push_back((drawing, ticket));
                }
                Command::Train { events, .. } => {
                    let error = EngineError::Device("a stand-in does not train".to_owned());
                    let _ = events.try_send(TrainingEvent::Failed(error));
                }
                // The requester may have been dropped.
                Command::EndTrainings { done } => {
                    let _ = done.send(());
                }
                Command::Drain { done } => {
                    let _ = done.send(());
                    return;
                }
            }
            command = inbox.try_recv().ok();
        }
        let pictures = |drawn: &[Drawing]| {
            drawn
                .iter()
                .map(|drawing| drawing.request.count as usize)
                .sum::<usize>()
        };
        while pictures(&drawn) < pace.pictures
            && let Some((drawing, ticket)) = waiting.pop_front()
        {
            let _ = drawing.events.try_send(GenerationEvent::Started);
            drop(ticket);
            drawn.push(drawing);
        }
        std::thread::sleep(pace.step);
        drawn.retain_mut(Drawing::advance);
        let codes: u64 = waiting
            .iter()
            .map(|(drawing, _)| u64::from(drawing.codes * drawing.request.count))
            .sum();
        gauge.publish(Load {
            waiting_tokens: codes,
            tokens_per_second: pictures(&drawn) as f64 / pace.step.as_secs_f64().max(1e-6),
            images: pictures(&drawn),
            free_rows: 2 * pace.pictures.saturating_sub(pictures(&drawn)),
            ..Load::default()
        });
    }
}
