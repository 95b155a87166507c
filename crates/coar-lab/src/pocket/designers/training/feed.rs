//! Prefetching of batches: rendered on several threads and, for an accelerator, uploaded on another.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver};
use std::thread::Scope;

use tch::{Device, Tensor};

use crate::pocket::designers::WorldError;
use coar_engine::model::{ModelError, accelerator};

/// Batches buffered per thread.
const WAITING: usize = 2;
/// Batches whose memory is kept until the device has certainly used them.
const HELD: usize = 16;

/// The output of other threads, in the order of the steps.
struct Drawn<T> {
    threads: Vec<Receiver<Result<T, WorldError>>>,
    next: usize,
}

impl<T> Drawn<T> {
    fn next(&mut self) -> Result<T, ModelError> {
        let thread = &self.threads[self.next % self.threads.len()];
        self.next += 1;
        let drawn = thread.recv().map_err(|_| stopped())?;
        Ok(drawn?)
    }
}

fn stopped() -> ModelError {
    ModelError::invalid("world", "stopped drawing")
}

/// The batches of steps, on their device.
pub(super) struct Feed<'scope, B> {
    source: Source<'scope, B>,
    device: Device,
    held: VecDeque<Rc<B>>,
}

enum Source<'scope, B> {
    /// Created by the training thread.
    Here(Box<dyn FnMut() -> Result<B, ModelError> + 'scope>),
    Thread(Receiver<Result<B, ModelError>>),
}

/// Number of rendering threads for a number of `cores`: all but one for training and one for uploads.
fn drawing_threads(device: Device, cores: usize) -> usize {
    match device {
        Device::Cpu => 1,
        _ => cores.saturating_sub(2).clamp(1, 14),
    }
}

impl<'scope, B: Send + 'scope> Feed<'scope, B> {
    /// Renders steps `from..` with `draw` on threads of the scope, and converts them to batches on `device` with
    /// `prepare`: for an accelerator on a separate thread, in parallel with training. The data of a step depends
    /// only on the step.
    ///
    /// # Errors
    /// When a thread cannot be given a stream of its own.
    pub(super) fn new<'env, T: Send + 'scope>(
        scope: &'scope Scope<'scope, 'env>,
        device: Device,
        from: i64,
        draw: impl Fn(i64) -> Result<T, WorldError> + Clone + Send + 'scope,
        mut prepare: impl FnMut(T) -> Result<B, ModelError> + Send + 'scope,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = drawing_threads(device, cores);
        let threads = (0..count)
            .map(|own| {
                let (send, receive) = mpsc::sync_channel(WAITING);
                let draw = draw.clone();
                scope.spawn(move || {
                    for step in (from + own as i64..).step_by(count) {
                        if send.send(draw(step)).is_err() {
                            return;
                        }
                    }
                });
                receive
            })
            .collect();
        let mut drawn = Drawn { threads, next: 0 };
        let source = match device {
            Device::Cpu => Source::Here(Box::new(move || prepare(drawn.next()?))),
            _ => {
                let (send, receive) = mpsc::sync_channel(WAITING);
                scope.spawn(move || {
                    let _no_grad = tch::no_grad_guard();
                    let mut on_stream = accelerator::use_own_stream(device);
                    loop {
                        let batch = std::mem::replace(&mut on_stream, Ok(()))
                            .and_then(|()| prepare(drawn.next()?))
                            .and_then(|batch| accelerator::synchronize(device).map(|()| batch));
                        let failed = batch.is_err();
                        if send.send(batch).is_err() || failed {
                            return;
                        }
                    }
                });
                Source::Thread(receive)
            }
        };
        Self {
            source,
            device,
            held: VecDeque::new(),
        }
    }

    /// The batch of the next step.
    ///
    /// # Errors
    /// When the world lacks a drawing or libtorch fails.
    pub(super) fn next(&mut self) -> Result<Rc<B>, ModelError> {
        let batch = match &mut self.source {
            Source::Here(make) => return Ok(Rc::new(make()?)),
            Source::Thread(batches) => Rc::new(batches.recv().map_err(|_| stopped())??),
        };
        // The other thread's stream reuses a tensor's memory as soon as it is dropped, even if this thread's stream
        // has not read it yet.
        if self.held.len() == HELD {
            accelerator::synchronize(self.device)?;
            self.held.clear();
        }
        self.held.push_back(batch.clone());
        Ok(batch)
    }
}

/// The mean of a loss over about the last 50 steps. It stays on the device; reading it would synchronise.
#[derive(Debug, Default)]
pub(super) struct Average(Option<Tensor>);

impl Average {
    /// # Errors
    /// When libtorch fails.
    pub(super) fn add(&mut self, value: &Tensor) -> Result<(), ModelError> {
        tch::no_grad(|| {
            self.0 = Some(match &self.0 {
                Some(mean) => mean.f_lerp(&value.detach(), 0.02)?,
                None => value.f_detach_copy()?,
            });
            Ok(())
        })
    }

    /// # Errors
    /// When libtorch fails.
    pub(super) fn get(&self) -> Result<f64, ModelError> {
        match &self.0 {
            Some(mean) => Ok(mean.f_double_value(&[])?),
            None => Ok(f64::NAN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_ordered_and_errors_end_them() {
        std::thread::scope(|scope| {
            let draw = |step: i64| match step {
                9 => Err(WorldError::pack("is empty")),
                _ => Ok(step),
            };
            let mut feed = Feed::new(scope, Device::Cpu, 5, draw, |step| Ok(10 * step));
            for expected in [50, 60, 70, 80] {
                assert_eq!(*feed.next().unwrap(), expected);
            }
            assert!(feed.next().unwrap_err().to_string().contains("is empty"));
            assert_eq!(*feed.next().unwrap(), 100);
        });
    }

    #[test]
    fn several_threads_render_only_for_an_accelerator() {
        assert_eq!(drawing_threads(Device::Cpu, 16), 1);
        assert_eq!(drawing_threads(Device::Cuda(0), 16), 14);
        assert_eq!(drawing_threads(Device::Cuda(0), 1), 1);
    }

    #[test]
    fn the_average_follows_slowly() {
        let mut average = Average::default();
        assert!(average.get().unwrap().is_nan());
        for value in [1.0f32, 2.0] {
            average.add(&Tensor::from(value)).unwrap();
        }
        assert!((average.get().unwrap() - 1.02).abs() < 1e-6);
    }
}
