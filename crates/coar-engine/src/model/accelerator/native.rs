//! Bindings of `src/native/libtorch.cpp`. They need libtorch alone: its CUDA part may be absent.

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::Device;
use torch_sys::C_tensor;

use crate::model::ModelError;

// SAFETY: declarations of `src/native/libtorch.cpp`, compiled into this crate. Tensors are pointers to `at::Tensor`, as
// torch-sys passes them.
unsafe extern "C" {
    pub(super) fn coar_stream_use_new(index: c_int, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_stream_is_own(index: c_int, own: *mut c_int, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_stream_synchronize(index: c_int, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_event_record(index: c_int, event: *mut *mut c_void, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_event_seconds(
        from: *mut c_void,
        to: *mut c_void,
        seconds: *mut f64,
        text: *mut c_char,
        room: usize,
    ) -> c_int;
    pub(super) fn coar_event_wait(event: *mut c_void, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_event_free(event: *mut c_void);
    pub(super) fn coar_graph_begin(index: c_int, graph: *mut *mut c_void, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_graph_end(graph: *mut c_void, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_graph_replay(graph: *mut c_void, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_graph_free(graph: *mut c_void);
    pub(super) fn coar_allocator_memory(index: c_int, bytes: *mut i64, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_allocator_reset_peak(index: c_int, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_allocator_empty(text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_set_tf32(allowed: c_int, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_upload(
        numbers: *const i64,
        count: usize,
        index: c_int,
        out: *mut *mut C_tensor,
        text: *mut c_char,
        room: usize,
    ) -> c_int;
    pub(super) fn coar_adamw(
        parameters: *const *const C_tensor,
        gradients: *const *const C_tensor,
        first: *const *const C_tensor,
        second: *const *const C_tensor,
        count: usize,
        step: *const C_tensor,
        rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        text: *mut c_char,
        room: usize,
    ) -> c_int;
    pub(super) fn coar_clip(
        gradients: *const *const C_tensor,
        count: usize,
        limit: f64,
        text: *mut c_char,
        room: usize,
    ) -> c_int;
    pub(super) fn coar_zero(tensors: *const *const C_tensor, count: usize, text: *mut c_char, room: usize) -> c_int;
    pub(super) fn coar_attend_lengths(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        query_starts: *const C_tensor,
        key_starts: *const C_tensor,
        key_lengths: *const C_tensor,
        most_queries: i64,
        most_keys: i64,
        scale: f64,
        out: *mut *mut C_tensor,
        text: *mut c_char,
        room: usize,
    ) -> c_int;
}

/// Buffer size for an error message.
const REASON: usize = 1024;

pub(super) fn checked(call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<(), ModelError> {
    let mut text = [0 as c_char; REASON];
    if call(text.as_mut_ptr(), REASON) == 0 {
        return Ok(());
    }
    // SAFETY: the function has written a terminated text of at most `REASON` bytes.
    let reason = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy();
    Err(ModelError::Torch(tch::TchError::Torch(reason.into_owned())))
}

pub(super) fn index_of(device: Device) -> Option<c_int> {
    match device {
        Device::Cuda(index) => Some(index as c_int),
        _ => None,
    }
}
