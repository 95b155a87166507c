//! Device time spent on images and on trainings, measured by the device's clock.

use tch::Device;

use crate::model::ModelError;
use crate::model::accelerator::Event;
use coar_core::scheduler::Turn;

/// Adds up the device time between the start and the end of each slice. The host may finish a slice long before the
/// device.
#[derive(Debug)]
pub(super) struct DeviceTime {
    device: Device,
    open: Vec<(Turn, Event, Event)>,
    /// Seconds so far.
    pub generation: f64,
    pub training: f64,
}

/// Number of slices whose times are read together, since reading waits for the last one.
const TOGETHER: usize = 64;

impl DeviceTime {
    pub fn new(device: Device) -> Self {
        Self {
            device,
            open: vec![],
            generation: 0.0,
            training: 0.0,
        }
    }

    /// Marks the start of a slice.
    pub fn begin(&self) -> Result<Event, ModelError> {
        Event::record(self.device)
    }

    /// Marks the end of the slice that started at `begun`.
    pub fn end(&mut self, turn: Turn, begun: Event) -> Result<(), ModelError> {
        self.open.push((turn, begun, Event::record(self.device)?));
        if self.open.len() < TOGETHER && turn != Turn::Training {
            return Ok(());
        }
        for (turn, from, to) in self.open.drain(..) {
            let seconds = from.seconds_until(&to)?;
            match turn {
                Turn::Generation => self.generation += seconds,
                Turn::Training => self.training += seconds,
                Turn::Idle => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_added_up_by_kind() {
        let mut time = DeviceTime::new(Device::Cpu);
        for turn in [Turn::Generation, Turn::Idle, Turn::Training] {
            let begun = time.begin().unwrap();
            let until = std::time::Instant::now() + std::time::Duration::from_millis(2);
            while std::time::Instant::now() < until {}
            time.end(turn, begun).unwrap();
        }
        assert!(time.generation >= 0.002 && time.training >= 0.002);
        assert!(time.open.is_empty());
    }
}
