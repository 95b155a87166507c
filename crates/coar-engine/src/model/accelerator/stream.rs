//! Streams: each thread's own order of work on a device, and events in it.

use std::ffi::c_void;
use std::time::Instant;

use tch::Device;

use super::native::{
    checked, coar_event_free, coar_event_record, coar_event_seconds, coar_event_wait, coar_stream_is_own,
    coar_stream_synchronize, coar_stream_use_new, index_of,
};
use crate::model::ModelError;

/// Gives the calling thread a stream of its own on `device`, independent of other threads. No-op on the CPU.
///
/// # Errors
/// When the device fails.
pub fn use_own_stream(device: Device) -> Result<(), ModelError> {
    match index_of(device) {
        // SAFETY: changes the calling thread's current stream.
        Some(index) => checked(|text, room| unsafe { coar_stream_use_new(index, text, room) }),
        None => Ok(()),
    }
}

/// Whether the calling thread has a stream of its own on `device`, as [`super::Graph`]s need.
pub(in crate::model) fn has_own_stream(device: Device) -> bool {
    let mut own = 0;
    match index_of(device) {
        Some(index) => {
            // SAFETY: writes a number.
            let asked = checked(|text, room| unsafe { coar_stream_is_own(index, &raw mut own, text, room) });
            asked.is_ok() && own == 1
        }
        None => false,
    }
}

/// Waits until `device` has completed all work of the calling thread. No-op on the CPU.
///
/// # Errors
/// Any failure of that work: kernels fail later than the calls that launch them.
pub fn synchronize(device: Device) -> Result<(), ModelError> {
    match index_of(device) {
        // SAFETY: waits for the calling thread's current stream.
        Some(index) => checked(|text, room| unsafe { coar_stream_synchronize(index, text, room) }),
        None => Ok(()),
    }
}

/// A point in the calling thread's work on a device.
#[derive(Debug)]
pub struct Event(Moment);

#[derive(Debug)]
enum Moment {
    Clock(Instant),
    Device(*mut c_void),
}

impl Event {
    /// Records the work submitted to `device` so far; on the CPU, the current time.
    ///
    /// # Errors
    /// When the device fails.
    pub fn record(device: Device) -> Result<Self, ModelError> {
        let Some(index) = index_of(device) else {
            return Ok(Self(Moment::Clock(Instant::now())));
        };
        let mut event = std::ptr::null_mut();
        // SAFETY: writes a pointer that only `coar_event_free` frees.
        checked(|text, room| unsafe { coar_event_record(index, &raw mut event, text, room) })?;
        Ok(Self(Moment::Device(event)))
    }

    /// Waits until the device has reached this event.
    ///
    /// # Errors
    /// Any failure before it.
    pub fn wait(&self) -> Result<(), ModelError> {
        match self.0 {
            // SAFETY: a live event.
            Moment::Device(event) => checked(|text, room| unsafe { coar_event_wait(event, text, room) }),
            Moment::Clock(_) => Ok(()),
        }
    }

    /// Seconds of device time from this event to a later one of the same device. Waits for the later one.
    ///
    /// # Errors
    /// When the device fails, or the events are of different devices.
    pub fn seconds_until(&self, later: &Self) -> Result<f64, ModelError> {
        match (&self.0, &later.0) {
            (Moment::Clock(from), Moment::Clock(to)) => Ok(to.saturating_duration_since(*from).as_secs_f64()),
            (&Moment::Device(from), &Moment::Device(to)) => {
                let mut seconds = 0.0;
                // SAFETY: two live events.
                checked(|text, room| unsafe { coar_event_seconds(from, to, &raw mut seconds, text, room) })?;
                Ok(seconds)
            }
            _ => Err(ModelError::invalid("event", "is of another device")),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Moment::Device(event) = self.0 {
            // SAFETY: the pointer was made by `coar_event_record` and is freed once.
            unsafe { coar_event_free(event) };
        }
    }
}
