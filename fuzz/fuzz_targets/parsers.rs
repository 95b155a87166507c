//! One program for all targets: `COAR_FUZZ` selects one. Allocations are counted, and a run that exceeds its target's
//! memory limit aborts, like a crash.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::panic::catch_unwind;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use coar_lab::fuzzing::{TARGETS, Target};

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is forwarded to the system allocator; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("COAR_FUZZ").unwrap_or_default();
    let names = TARGETS.map(|target| target.name).join(" ");
    let target = TARGETS.iter().find(|target| target.name == name);
    target.unwrap_or_else(|| panic!("COAR_FUZZ is `{name}`; the targets are: {names}"))
});

thread_local! {
    /// Message and location of the last panic.
    static SAID: RefCell<String> = const { RefCell::new(String::new()) };
}

// libFuzzer's own hook aborts the process at every panic. Panics of third-party decoders that are known to panic are
// caught in the code under test; only those that reach `catch_unwind` below are failures.
libfuzzer_sys::fuzz_target!(
    init: {
        std::panic::set_hook(Box::new(|panic| SAID.with_borrow_mut(|said| *said = panic.to_string())));
    },
    |bytes: &[u8]| {
        let target = *TARGET;
        let before = NOW.load(Relaxed);
        MOST.store(before, Relaxed);
        if catch_unwind(|| (target.run)(bytes)).is_err() {
            SAID.with_borrow(|said| eprintln!("{said}"));
            std::process::abort();
        }
        let taken = MOST.load(Relaxed).saturating_sub(before);
        if taken > target.memory {
            eprintln!("{taken} bytes of memory for {} bytes of input; the limit is {}", bytes.len(), target.memory);
            std::process::abort();
        }
    }
);
