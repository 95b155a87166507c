//! Accelerator functions that tch does not bind: streams, events, graphs, the allocator, asynchronous uploads,
//! attention by row lengths. On the CPU they are no-ops, or use the clock.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::Instant;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::ModelError;

// SAFETY: declarations of `src/native/libtorch.cpp`, compiled into this crate. Tensors are pointers to `at::Tensor`, as
// torch-sys passes them.
unsafe extern "C" {
    fn coar_stream_use_new(index: c_int, text: *mut c_char, room: usize) -> c_int;
    fn coar_stream_is_own(index: c_int, own: *mut c_int, text: *mut c_char, room: usize) -> c_int;
    fn coar_stream_synchronize(index: c_int, text: *mut c_char, room: usize) -> c_int;
    fn coar_event_record(index: c_int, event: *mut *mut c_void, text: *mut c_char, room: usize) -> c_int;
    fn coar_event_seconds(
        from: *mut c_void,
        to: *mut c_void,
        seconds: *mut f64,
        text: *mut c_char,
        room: usize,
    ) -> c_int;
    fn coar_event_wait(event: *mut c_void, text: *mut c_char, room: usize) -> c_int;
    fn coar_event_free(event: *mut c_void);
    fn coar_graph_begin(index: c_int, graph: *mut *mut c_void, text: *mut c_char, room: usize) -> c_int;
    fn coar_graph_end(graph: *mut c_void, text: *mut c_char, room: usize) -> c_int;
    fn coar_graph_replay(graph: *mut c_void, text: *mut c_char, room: usize) -> c_int;
    fn coar_graph_free(graph: *mut c_void);
    fn coar_allocator_memory(index: c_int, bytes: *mut i64, text: *mut c_char, room: usize) -> c_int;
    fn coar_allocator_reset_peak(index: c_int, text: *mut c_char, room: usize) -> c_int;
    fn coar_allocator_empty(text: *mut c_char, room: usize) -> c_int;
    fn coar_set_tf32(allowed: c_int, text: *mut c_char, room: usize) -> c_int;
    fn coar_upload(
        numbers: *const i64,
        count: usize,
        index: c_int,
        out: *mut *mut C_tensor,
        text: *mut c_char,
        room: usize,
    ) -> c_int;
    fn coar_adamw(
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
    fn coar_clip(gradients: *const *const C_tensor, count: usize, limit: f64, text: *mut c_char, room: usize) -> c_int;
    fn coar_zero(tensors: *const *const C_tensor, count: usize, text: *mut c_char, room: usize) -> c_int;
    fn coar_attend_lengths(
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

fn checked(call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<(), ModelError> {
    let mut text = [0 as c_char; REASON];
    if call(text.as_mut_ptr(), REASON) == 0 {
        return Ok(());
    }
    // SAFETY: the function has written a terminated text of at most `REASON` bytes.
    let reason = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy();
    Err(ModelError::Torch(tch::TchError::Torch(reason.into_owned())))
}

fn index_of(device: Device) -> Option<c_int> {
    match device {
        Device::Cuda(index) => Some(index as c_int),
        _ => None,
    }
}

/// Loads libtorch's CUDA part if it is installed beside the CPU part: the linker leaves it out of the binary, so one
/// binary serves machines with and without it. Must be called before any other use of CUDA.
///
/// # Errors
/// The loader's own message, the same at every call.
pub fn load_cuda() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    let open = || {
        // SAFETY: the library's initialisers only register kernels with libtorch, which is already loaded.
        let opened = unsafe {
            libloading::os::unix::Library::open(
                Some("libtorch_cuda.so"),
                libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL,
            )
        };
        match opened {
            // Never unloaded: its kernels stay registered.
            Ok(library) => {
                std::mem::forget(library);
                // Reproducible image codes matter more than a faster image decoder; `--tf32` allows it.
                set_tf32(false).map_err(|error| error.to_string())
            }
            Err(error) => {
                // The loader's message is the error's source.
                let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                tracing::debug!(%reason, "libtorch's CUDA part is not available");
                Err(reason)
            }
        }
    };
    OPENED.get_or_init(open).clone()
}

/// Allows or forbids products and convolutions in f32 to round their inputs to TF32 (10 bits of mantissa) on CUDA,
/// for the whole process. libtorch's default allows it for convolutions; [`load_cuda`] forbids it.
///
/// # Errors
/// When libtorch refuses.
pub fn set_tf32(allowed: bool) -> Result<(), ModelError> {
    // SAFETY: sets flags of libtorch's global context.
    checked(|text, room| unsafe { coar_set_tf32(c_int::from(allowed), text, room) })
}

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

/// Whether the calling thread has a stream of its own on `device`, as [`Graph`]s need.
pub(super) fn has_own_stream(device: Device) -> bool {
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

/// Checks that `device` still works: a small allocation, a kernel, and a wait. After a device assert every call on
/// CUDA fails, including this one; after a failed allocation it succeeds.
///
/// # Errors
/// When the device is lost.
pub fn probe(device: Device) -> Result<(), ModelError> {
    let number = Tensor::f_ones([1], (Kind::Float, device))?.f_add_scalar(1.0)?;
    synchronize(device)?;
    match number.f_double_value(&[])? {
        2.0 => Ok(()),
        other => Err(ModelError::invalid("device", format!("computes 1 + 1 = {other}"))),
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

/// A CUDA graph: work that was captured once, with its tensors, and is launched as a whole. One call replaces about a
/// thousand kernel launches.
#[derive(Debug)]
pub(super) struct Graph {
    pointer: *mut c_void,
    device: Device,
}

// SAFETY: the pointer is an object of its own that any thread may use, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures the kernels that `work` launches on `device`, without running them. The thread must have a stream of
    /// its own ([`use_own_stream`]), and `work` must neither synchronise with the device nor copy to it. Tensors
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

/// Memory of libtorch's allocator on a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocatorMemory {
    /// Allocated in tensors, and the peak since the last [`reset_peak`].
    pub allocated: u64,
    pub allocated_peak: u64,
    /// Reserved from the driver, and the peak.
    pub reserved: u64,
    pub reserved_peak: u64,
}

/// Statistics of libtorch's allocator; `None` on the CPU.
pub fn memory(device: Device) -> Option<AllocatorMemory> {
    let index = index_of(device)?;
    let mut bytes = [0i64; 4];
    // SAFETY: writes four numbers.
    checked(|text, room| unsafe { coar_allocator_memory(index, bytes.as_mut_ptr(), text, room) }).ok()?;
    let [allocated, allocated_peak, reserved, reserved_peak] = bytes.map(|bytes| bytes.max(0) as u64);
    Some(AllocatorMemory {
        allocated,
        allocated_peak,
        reserved,
        reserved_peak,
    })
}

/// Resets the peaks of [`memory`]. No-op on the CPU.
pub fn reset_peak(device: Device) {
    if let Some(index) = index_of(device) {
        // SAFETY: changes counters of the allocator. Without CUDA there is none, and nothing to reset.
        let _ = checked(|text, room| unsafe { coar_allocator_reset_peak(index, text, room) });
    }
}

/// Returns memory that libtorch caches and does not use to the driver. No-op on the CPU.
pub fn empty_cache(device: Device) {
    if index_of(device).is_some() {
        // SAFETY: frees blocks that no tensor uses. Without CUDA there is no cache.
        let _ = checked(|text, room| unsafe { coar_allocator_empty(text, room) });
    }
}

/// `[count]` i64 on `device`, by one asynchronous copy from pinned memory.
///
/// # Errors
/// When the device or the host has too little memory.
pub fn upload(numbers: &[i64], device: Device) -> Result<Tensor, ModelError> {
    let Some(index) = index_of(device) else {
        return Ok(Tensor::f_from_slice(numbers)?.f_to_device(device)?);
    };
    let mut out = std::ptr::null_mut();
    // SAFETY: reads `numbers`, writes a pointer to a new tensor.
    checked(|text, room| unsafe { coar_upload(numbers.as_ptr(), numbers.len(), index, &raw mut out, text, room) })?;
    // SAFETY: the tensor is new and has no other owner.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Numbers to be uploaded to a device in one copy.
#[derive(Debug, Default)]
pub(super) struct Pack(Vec<i64>);

/// The position of numbers of one kind in a [`Pack`].
#[derive(Debug, Clone)]
pub(super) struct Span {
    from: i64,
    count: i64,
    kind: Kind,
}

/// A [`Pack`] on its device.
#[derive(Debug)]
pub(super) struct Sent(Tensor);

impl Pack {
    pub fn ints(&mut self, numbers: impl IntoIterator<Item = i64>) -> Span {
        self.add(numbers, Kind::Int64)
    }

    pub fn floats(&mut self, numbers: impl IntoIterator<Item = f64>) -> Span {
        self.add(
            numbers.into_iter().map(|number| number.to_bits().cast_signed()),
            Kind::Double,
        )
    }

    fn add(&mut self, numbers: impl IntoIterator<Item = i64>, kind: Kind) -> Span {
        let from = self.0.len() as i64;
        self.0.extend(numbers);
        Span {
            from,
            count: self.0.len() as i64 - from,
            kind,
        }
    }

    /// # Errors
    /// As [`upload`].
    pub fn send(self, device: Device) -> Result<Sent, ModelError> {
        Ok(Sent(upload(&self.0, device)?))
    }
}

impl Sent {
    /// The numbers of a span of the uploaded pack: `[count]` i64 or f64.
    ///
    /// # Errors
    /// When the span is of another pack.
    pub fn get(&self, span: &Span) -> Result<Tensor, ModelError> {
        let numbers = self.0.f_narrow(0, span.from, span.count)?;
        Ok(match span.kind {
            Kind::Double => numbers.f_view_dtype(Kind::Double)?,
            _ => numbers,
        })
    }
}

/// Offsets of the queries and keys of sequences in flat tensors, all `i32` on a CUDA device.
#[derive(Debug)]
pub(super) struct Ranges {
    /// `[sequences + 1]`
    pub query_starts: Tensor,
    /// `[sequences + 1]`; the last one is not read.
    pub key_starts: Tensor,
    /// `[sequences]`
    pub key_lengths: Tensor,
    pub most_queries: i64,
    pub most_keys: i64,
}

/// Attention of sequences with different numbers of keys: `query` `[1, tokens, 1, head_dim]`, `key` and `value` `[1,
/// all, heads, head_dim]`. A sequence's last query sees all of its keys, the one before one less. On the CPU it runs
/// one sequence after the other: for correctness checks, not for speed.
///
/// # Errors
/// When the device fails.
pub(super) fn attend_lengths(
    query: &Tensor,
    (key, value): (&Tensor, &Tensor),
    ranges: &Ranges,
    scale: f64,
) -> Result<Tensor, ModelError> {
    if index_of(query.device()).is_none() {
        return attend_one_by_one(query, (key, value), ranges, scale);
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: reads live tensors, writes a pointer to a new one.
    checked(|text, room| unsafe {
        coar_attend_lengths(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            ranges.query_starts.as_ptr(),
            ranges.key_starts.as_ptr(),
            ranges.key_lengths.as_ptr(),
            ranges.most_queries,
            ranges.most_keys,
            scale,
            &raw mut out,
            text,
            room,
        )
    })?;
    // SAFETY: the tensor is new and has no other owner.
    Ok(unsafe { Tensor::from_ptr(out) })
}

fn attend_one_by_one(
    query: &Tensor,
    (key, value): (&Tensor, &Tensor),
    ranges: &Ranges,
    scale: f64,
) -> Result<Tensor, ModelError> {
    let numbers = |tensor: &Tensor| Ok::<_, ModelError>(Vec::<i64>::try_from(&tensor.f_to_kind(Kind::Int64)?)?);
    let (queries, keys) = (numbers(&ranges.query_starts)?, numbers(&ranges.key_starts)?);
    let mut mixed = vec![];
    for (sequence, length) in numbers(&ranges.key_lengths)?.into_iter().enumerate() {
        let count = queries[sequence + 1] - queries[sequence];
        let part = |of: &Tensor, from: i64, count: i64| of.f_narrow(1, from, count)?.f_transpose(1, 2);
        let own = part(query, queries[sequence], count)?;
        let seen = |of: &Tensor| part(of, keys[sequence], length);
        // Query i sees the keys up to length - count + i.
        let mask = Tensor::f_full([count, length], f64::NEG_INFINITY, (query.kind(), query.device()))?
            .f_triu(length - count + 1)?;
        let attended = Tensor::f_scaled_dot_product_attention(
            &own,
            &seen(key)?,
            &seen(value)?,
            Some(&mask),
            0.0,
            false,
            scale,
            false,
        )?;
        mixed.push(attended.f_transpose(1, 2)?);
    }
    Ok(Tensor::f_cat(&mixed, 1)?)
}

/// A step of AdamW.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    pub rate: f64,
    pub betas: (f64, f64),
    pub weight_decay: f64,
    pub eps: f64,
}

impl AdamW {
    /// Updates `parameters` from `gradients` in a few kernels for all of them; `first` and `second` are their
    /// moments, `step` the number of this step as a scalar in f32 on their device.
    ///
    /// # Errors
    /// When shapes or devices differ, or the device fails.
    pub fn step(
        &self,
        (parameters, gradients): (&[&Tensor], &[Tensor]),
        (first, second): (&[&Tensor], &[&Tensor]),
        step: &Tensor,
    ) -> Result<(), ModelError> {
        let own: Vec<_> = parameters.iter().map(|tensor| tensor.as_ptr()).collect();
        let gradients = pointers(gradients);
        let first: Vec<_> = first.iter().map(|tensor| tensor.as_ptr()).collect();
        let second: Vec<_> = second.iter().map(|tensor| tensor.as_ptr()).collect();
        let count = own.len();
        if [gradients.len(), first.len(), second.len()] != [count; 3] {
            return Err(ModelError::invalid("optimizer", "has lists of different lengths"));
        }
        let (beta1, beta2) = self.betas;
        // SAFETY: pointers to live tensors, `count` in each list.
        checked(|text, room| unsafe {
            coar_adamw(
                own.as_ptr(),
                gradients.as_ptr(),
                first.as_ptr(),
                second.as_ptr(),
                count,
                step.as_ptr(),
                self.rate,
                beta1,
                beta2,
                self.weight_decay,
                self.eps,
                text,
                room,
            )
        })
    }
}

fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(tch::Tensor::as_ptr).collect()
}

/// Scales `gradients` down if their joint norm exceeds `limit`, without synchronising with the device.
///
/// # Errors
/// When the device fails.
pub fn clip(gradients: &[Tensor], limit: f64) -> Result<(), ModelError> {
    let all = pointers(gradients);
    match all.is_empty() {
        true => Ok(()),
        // SAFETY: pointers to live tensors.
        false => checked(|text, room| unsafe { coar_clip(all.as_ptr(), all.len(), limit, text, room) }),
    }
}

/// Zeroes `tensors`, all at once.
///
/// # Errors
/// When the device fails.
pub fn zero(tensors: &[Tensor]) -> Result<(), ModelError> {
    let all = pointers(tensors);
    match all.is_empty() {
        true => Ok(()),
        // SAFETY: pointers to live tensors.
        false => checked(|text, room| unsafe { coar_zero(all.as_ptr(), all.len(), text, room) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_needs_no_waiting_and_uses_the_clock() {
        let from = Event::record(Device::Cpu).unwrap();
        probe(Device::Cpu).unwrap();
        use_own_stream(Device::Cpu).unwrap();
        let to = Event::record(Device::Cpu).unwrap();
        let seconds = from.seconds_until(&to).unwrap();
        assert!((0.0..60.0).contains(&seconds), "{seconds}");
        assert_eq!(memory(Device::Cpu), None);
        assert!(Graph::capture(Device::Cpu, || Ok(())).is_err() && !has_own_stream(Device::Cpu));
        let sent = upload(&[3, -1, i64::MAX], Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(&sent).unwrap(), [3, -1, i64::MAX]);
        let mut pack = Pack::default();
        let (ints, floats) = (pack.ints([7, -7]), pack.floats([0.5, -1e300]));
        let sent = pack.send(Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(&sent.get(&ints).unwrap()).unwrap(), [7, -7]);
        assert_eq!(
            Vec::<f64>::try_from(&sent.get(&floats).unwrap()).unwrap(),
            [0.5, -1e300]
        );
    }

    /// Without libtorch's CUDA part every call returns an error; none of them aborts the process.
    #[test]
    fn calls_on_an_absent_device_fail_with_a_reason() {
        if load_cuda().is_ok() && tch::Cuda::device_count() > 0 {
            return;
        }
        let absent = Device::Cuda(0);
        for failed in [synchronize(absent), use_own_stream(absent), probe(absent)] {
            let reason = failed.unwrap_err().to_string();
            assert!(reason.contains("CUDA") || reason.contains("cuda"), "{reason}");
        }
        assert!(Event::record(absent).is_err() && upload(&[1], absent).is_err());
        assert!(Graph::capture(absent, || Ok(())).is_err());
        assert_eq!(memory(absent), None);
    }
}
