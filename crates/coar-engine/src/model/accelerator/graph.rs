//! CUDA graphs.

use std::ffi::c_void;

use tch::Device;

use super::native::{checked, coar_graph_begin, coar_graph_end, coar_graph_free, coar_graph_replay, index_of};
use super::stream::synchronize;
use crate::model::ModelError;

/// A CUDA graph: work that was captured once, with its tensors, and is launched as a whole. One call replaces about a
/// thousand kernel launches.
#[derive(Debug)]
pub(in crate::model) struct Graph {
    pointer: *mut c_void,
    device: Device,
}

// SAFETY: the pointer is an object of its own that any thread may use, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures the kernels that `work` launches on `device`, without running them. The thread must have a stream of
    /// its own ([`super::use_own_stream`]), and `work` must neither synchronise with the device nor copy to it. Tensors
    /// that `work` reads or changes must live as long as the graph.
    ///
    /// # Errors
    /// When the device has no graphs, `work` fails, or uses an operation that cannot be captured.
    pub fn capture(device: Device, work: impl FnOnce() -> Result<(), ModelError>) -> Result<Self, ModelError> {
        let Some(index) = index_of(device) else {
            return Err(ModelError::invalid("device", "has no graphs"));
        };
        let mut pointer = std::ptr::null_mut();
        // SAFETY: writes a pointer that only `coar_graph_free` ends.
        checked(|text, room| unsafe { coar_graph_begin(index, &raw mut pointer, text, room) })?;
        let graph = Self { pointer, device };
        let worked = work();
        // SAFETY: a live graph whose capture has begun. The capture must end in any case: until then nothing runs.
        let ended = checked(|text, room| unsafe { coar_graph_end(graph.pointer, text, room) });
        worked.and(ended).map(|()| graph)
    }

    /// Launches the captured work on the calling thread's stream.
    ///
    /// # Errors
    /// When the device fails.
    pub fn replay(&self) -> Result<(), ModelError> {
        // SAFETY: a live graph.
        checked(|text, room| unsafe { coar_graph_replay(self.pointer, text, room) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Err(error) = synchronize(self.device) {
            tracing::debug!(%error, "cannot wait for the device before freeing a graph");
        }
        // SAFETY: the pointer was made by `coar_graph_begin` and is freed once, when no stream runs it any more.
        unsafe { coar_graph_free(self.pointer) };
    }
}
