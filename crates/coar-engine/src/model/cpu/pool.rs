//! Uses libtorch's own thread pool (OpenMP), so two pools do not compete for the same cores.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;

type Region = extern "C" fn(*mut c_void);

struct Pool {
    parallel: unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint),
    barrier: unsafe extern "C" fn(),
    thread: unsafe extern "C" fn() -> c_int,
    threads: unsafe extern "C" fn() -> c_int,
    set_threads: unsafe extern "C" fn(c_int),
}

fn pool() -> Option<&'static Pool> {
    static POOL: OnceLock<Option<Pool>> = OnceLock::new();
    POOL.get_or_init(|| {
        let process = libloading::os::unix::Library::this();
        // SAFETY: these functions have had these signatures since OpenMP 4 and exist wherever libtorch's own
        // parallel loops do.
        let pool = unsafe {
            Pool {
                parallel: *process.get(b"GOMP_parallel\0").ok()?,
                barrier: *process.get(b"GOMP_barrier\0").ok()?,
                thread: *process.get(b"omp_get_thread_num\0").ok()?,
                threads: *process.get(b"omp_get_num_threads\0").ok()?,
                set_threads: *process.get(b"omp_set_num_threads\0").ok()?,
            }
        };
        // Never unloaded.
        std::mem::forget(process);
        Some(pool)
    })
    .as_ref()
}

/// One thread of a team that runs the same work.
#[derive(Clone, Copy)]
pub(super) struct Member {
    /// 0 is the calling thread.
    pub thread: usize,
    pub threads: usize,
}

impl Member {
    /// This thread's part of `0..count`, in multiples of `unit` as far as possible.
    #[inline(always)]
    pub fn part(self, count: usize, unit: usize) -> (usize, usize) {
        let each = count.div_ceil(unit).div_ceil(self.threads) * unit;
        ((each * self.thread).min(count), (each * (self.thread + 1)).min(count))
    }

    /// A barrier: waits for every thread of the team, and makes earlier writes visible to all.
    #[inline(always)]
    pub fn wait(self) {
        if self.threads > 1
            && let Some(pool) = pool()
        {
            // SAFETY: called inside a parallel region, by every thread of it.
            unsafe { (pool.barrier)() }
        }
    }
}

extern "C" fn region<F: Fn(Member) + Sync>(work: *mut c_void) {
    // SAFETY: `work` is the closure that `team` holds until the region has ended.
    let work = unsafe { &*work.cast::<F>() };
    let member = match pool() {
        // SAFETY: called inside the region.
        Some(pool) => unsafe {
            Member {
                thread: (pool.thread)() as usize,
                threads: (pool.threads)().max(1) as usize,
            }
        },
        None => Member { thread: 0, threads: 1 },
    };
    work(member);
}

/// Runs `work` once on each of `threads` threads, including the calling one, and waits for all. `work` must not
/// panic: a panic cannot unwind through the pool.
pub(super) fn team<F: Fn(Member) + Sync>(threads: usize, work: F) {
    match pool() {
        Some(pool) if threads > 1 => {
            let mut work = work;
            // SAFETY: the region ends before `parallel` returns, and `work` may be shared among threads.
            unsafe { (pool.parallel)(region::<F>, (&raw mut work).cast(), threads as c_uint, 0) };
        }
        _ => work(Member { thread: 0, threads: 1 }),
    }
}

/// libtorch's number of threads.
pub(super) fn threads() -> usize {
    tch::get_num_threads().max(1) as usize
}

/// Calls `work` with every index below `count`, on libtorch's number of threads. `work` must not panic.
pub(in crate::model) fn for_each(count: usize, work: impl Fn(usize) + Sync) {
    let threads = threads().min(count);
    team(threads, |member| {
        let mut index = member.thread;
        while index < count {
            work(index);
            index += member.threads;
        }
    });
}

/// Makes libtorch compute on the calling thread only, without a pool. If the pools of a process have more threads
/// than there are cores, libgomp puts all of them to sleep between any two operations: a second pool made every
/// decode step four times as long.
pub fn without_pool() {
    if let Some(pool) = pool() {
        // SAFETY: sets a value of this thread.
        unsafe { (pool.set_threads)(1) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_index_is_visited_once_and_parts_cover_everything() {
        let visits: Vec<AtomicUsize> = (0..37).map(|_| AtomicUsize::new(0)).collect();
        for_each(visits.len(), |index| {
            visits[index].fetch_add(1, Ordering::Relaxed);
        });
        assert!(visits.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        for (count, unit, threads) in [(192, 8, 2), (10, 1, 4), (3, 8, 2), (1, 1, 1)] {
            let parts: Vec<_> = (0..threads)
                .map(|thread| Member { thread, threads }.part(count, unit))
                .collect();
            assert_eq!((parts[0].0, parts[threads - 1].1), (0, count));
            assert!(parts.windows(2).all(|pair| pair[0].1 == pair[1].0), "{parts:?}");
        }
    }

    #[test]
    fn a_team_meets() {
        let arrived = AtomicUsize::new(0);
        team(2, |member| {
            arrived.fetch_add(1, Ordering::SeqCst);
            member.wait();
            assert_eq!(arrived.load(Ordering::SeqCst), member.threads);
        });
    }
}
