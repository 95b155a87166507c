//! One task polls a training's row, however many clients follow it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch::{self, Receiver, Sender};
use tokio_util::task::TaskTracker;

use crate::registry::Training;
use coar_core::ids::TrainingId;

/// Interval of polling; the training process stores its progress about as often.
pub(super) const LOOK: Duration = Duration::from_millis(500);

/// A training's state when it was last read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Seen {
    pub training: Training,
    /// No state follows.
    pub last: bool,
}

impl Seen {
    /// The first state: a training that ended earlier has no more events.
    pub fn first(training: Training) -> Self {
        let last = training.status.is_final();
        Self { training, last }
    }
}

/// The trainings that clients follow.
#[derive(Debug, Clone, Default)]
pub(in crate::api) struct Followed(Arc<Mutex<HashMap<TrainingId, Sender<Seen>>>>);

/// Removes its entry when its task ends for any reason; the followers' streams then end.
struct Entry {
    followed: Followed,
    id: TrainingId,
    sender: Sender<Seen>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut all = self.followed.lock();
        if all.get(&self.id).is_some_and(|other| other.same_channel(&self.sender)) {
            all.remove(&self.id);
        }
    }
}

impl Entry {
    /// Removes the entry unless a client follows it; returns whether it did.
    fn leave(&self) -> bool {
        let mut all = self.followed.lock();
        let alone = self.sender.receiver_count() == 0;
        if alone {
            all.remove(&self.id);
        }
        alone
    }

    /// Polls until the training has ended or was deleted, or its last follower has disconnected.
    async fn watch<F: Future<Output = Option<Training>>>(self, look: impl Fn() -> F) {
        loop {
            tokio::select! {
                () = self.sender.closed() => {
                    if self.leave() {
                        return;
                    }
                    continue;
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            let Some(training) = look().await else { return };
            // An image that was drawn as the training ended is stored after it: a final state is read twice.
            let last = training.status.is_final() && self.sender.borrow().training.status.is_final();
            let seen = Seen { training, last };
            self.sender.send_if_modified(|old| {
                let changed = *old != seen;
                *old = seen;
                changed
            });
            if last {
                return;
            }
        }
    }
}

impl Followed {
    fn lock(&self) -> MutexGuard<'_, HashMap<TrainingId, Sender<Seen>>> {
        // No operation leaves the map half-written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a training, from the state that was read last. `first` is the caller's own read; if the training has no
    /// follower yet, the task that polls is spawned on `tasks`.
    pub(super) fn join<F: Future<Output = Option<Training>> + Send + 'static>(
        &self,
        first: Seen,
        tasks: &TaskTracker,
        look: impl Fn() -> F + Send + Sync + 'static,
    ) -> Receiver<Seen> {
        let id = first.training.id;
        let mut all = self.lock();
        if let Some(sender) = all.get(&id) {
            return sender.subscribe();
        }
        let (sender, receiver) = watch::channel(first);
        all.insert(id, sender.clone());
        let entry = Entry {
            followed: self.clone(),
            id,
            sender,
        };
        tasks.spawn(entry.watch(look));
        receiver
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::registry::{NewConcept, Registry, TrainingStatus};
    use coar_core::concept::ConceptKind;
    use coar_core::ids::TenantId;
    use coar_core::training::TrainingSpec;
    use coar_core::training::spec::Preset;

    async fn queued() -> (tempfile::TempDir, Training) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).await.unwrap();
        let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Style, "ink", None, 4);
        let new = NewConcept::new("ink".to_owned(), ConceptKind::Style);
        let (_, training) = registry.add_concept(TenantId::DEFAULT, &new, &spec).await.unwrap();
        (dir, training)
    }

    #[tokio::test]
    async fn one_task_looks_for_all_and_ends_with_the_last() {
        let (_dir, training) = queued().await;
        let (followed, tasks, looks) = (Followed::default(), TaskTracker::new(), Arc::new(AtomicUsize::new(0)));
        let join = || {
            let (looks, training) = (looks.clone(), training.clone());
            followed.join(Seen::first(training.clone()), &tasks, move || {
                let step = looks.fetch_add(1, Ordering::Relaxed) as u32 + 1;
                let training = Training {
                    step,
                    ..training.clone()
                };
                async move { Some(training) }
            })
        };
        let mut all: Vec<_> = (0..10).map(|_| join()).collect();
        assert_eq!((tasks.len(), followed.lock().len()), (1, 1));
        for each in &mut all {
            each.changed().await.unwrap();
            assert_eq!(each.borrow_and_update().training.step, 1, "ten followers, one look");
        }
        drop(all);
        tasks.close();
        tokio::time::timeout(10 * LOOK, tasks.wait())
            .await
            .expect("there is no follower");
        assert!(followed.lock().is_empty());
    }

    #[tokio::test]
    async fn an_end_is_looked_at_twice_and_what_is_gone_ends_the_stream() {
        let (_dir, training) = queued().await;
        let (followed, tasks) = (Followed::default(), TaskTracker::new());
        let looks = AtomicUsize::new(0);
        let of = |seen: &Seen| (seen.last, seen.training.previews.len());
        let ended = training.clone();
        let mut seen = followed.join(Seen::first(training.clone()), &tasks, move || {
            let previews = (0..looks.fetch_add(1, Ordering::Relaxed) as u32).collect();
            let training = Training {
                status: TrainingStatus::Succeeded,
                previews,
                ..ended.clone()
            };
            async move { Some(training) }
        });
        seen.changed().await.unwrap();
        assert_eq!(of(&seen.borrow_and_update()), (false, 0));
        seen.changed().await.unwrap();
        assert_eq!(of(&seen.borrow_and_update()), (true, 1));
        assert!(seen.changed().await.is_err(), "nothing comes after the end");
        let mut seen = followed.join(Seen::first(training), &tasks, || async { None });
        assert!(seen.changed().await.is_err());
    }
}
