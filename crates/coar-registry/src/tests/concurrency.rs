//! Every path that writes, under concurrent load: no call fails or stalls.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::*;
use coar_core::ids::GenerationId;
use coar_core::image::ImageFormat;
use coar_core::training::StepLosses;

const TOKENS: coar_core::engine::ConceptTokens = coar_core::engine::ConceptTokens { text: 1, image: 1 };

/// The time limit of a call, for any number of callers.
const LONGEST: Duration = Duration::from_secs(1);
/// A call that takes this long hangs.
const HANGS: Duration = Duration::from_secs(30);
const CALLERS: usize = 32;
const TENANT: TenantId = TenantId::DEFAULT;

/// Blobs are files, since the test measures the database.
async fn registry(connections: u32) -> (tempfile::TempDir, Registry) {
    let (dir, storage) = test_storage().await;
    let storage = Storage { blobs: None, ..storage };
    let registry = Registry::connect_with(&storage, connections).await.unwrap();
    (dir, registry)
}

/// One of many concurrent callers, and the results of its calls.
struct Caller {
    registry: Registry,
    number: usize,
    faults: Vec<String>,
    calls: usize,
    longest: (Duration, &'static str),
}

/// Runs one call and records its time and outcome.
macro_rules! call {
    ($caller:ident, $method:ident($($argument:expr),*)) => {{
        let registry = $caller.registry.clone();
        $caller.call(stringify!($method), registry.$method($($argument),*)).await
    }};
}

impl Caller {
    async fn call<T>(&mut self, what: &'static str, call: impl Future<Output = Result<T, RegistryError>>) -> Option<T> {
        let began = Instant::now();
        let outcome = tokio::time::timeout(HANGS, call).await;
        self.calls += 1;
        self.longest = self.longest.max((began.elapsed(), what));
        match outcome {
            Ok(Ok(value)) => Some(value),
            // Conflicts with other callers are not faults.
            Ok(Err(
                RegistryError::NameTaken(_)
                | RegistryError::ConceptBusy(_)
                | RegistryError::LeaseLost
                | RegistryError::NoVersion(_)
                | RegistryError::QuotaExceeded { .. },
            )) => None,
            Ok(Err(error)) => {
                self.faults.push(format!("{what}: {error}"));
                None
            }
            Err(_) => {
                self.faults.push(format!("{what} hangs"));
                None
            }
        }
    }

    fn name(&self, what: &str) -> String {
        format!("{what}{}", self.number)
    }

    async fn concepts(&mut self, name: &str) -> Option<()> {
        let (new, spec) = concept_of(name, vec![]);
        let image = name.to_owned().into_bytes().into();
        let stored = call!(self, store(vec![image, "in all of them".into()]))?;
        let new = NewConcept {
            images: stored.hashes().to_vec(),
            ..new
        };
        let added = call!(self, add_concept(TENANT, &new, &spec));
        self.registry.settle(stored, added.is_some()).await;
        let (concept, training) = added?;
        let renamed = ConceptChange {
            name: Some(format!("{name}-renamed")),
            ..ConceptChange::default()
        };
        call!(self, change_concept(concept.id, &renamed));
        call!(self, cancel_training(TENANT, training.id));
        call!(self, retry_training(TENANT, training.id, Quotas::default()));
        let another = NewTraining {
            spec: &spec,
            input: name,
            webhook_url: None,
            priority: 0,
            quotas: Quotas::default(),
        };
        call!(self, add_training(&concept, another));
        call!(self, replay(JobId::Training(training.id)));
        call!(self, cancel_training(TENANT, training.id));
        call!(self, delete_concept(TENANT, &concept.id.to_string()));
        Some(())
    }

    /// Objects that every caller changes, cancels and deletes.
    async fn shared(&mut self) -> Option<()> {
        let shared = self.registry.concept(TENANT, "shared").await.ok().flatten()?;
        let change = ConceptChange {
            description: Some(Some(self.name("by "))),
            ..ConceptChange::default()
        };
        call!(self, change_concept(shared.id, &change));
        let (new, spec) = concept_of("contended", vec![]);
        if let Some((_, training)) = call!(self, add_concept(TENANT, &new, &spec)) {
            call!(self, cancel_training(TENANT, training.id));
        }
        call!(self, delete_concept(TENANT, "contended"));
        Some(())
    }

    async fn trainings(&mut self) -> Option<()> {
        let claimed = call!(self, claim_training(60_000))?;
        let claimed = claimed?;
        let progress = Progress {
            step: 1,
            loss: 0.5,
            steps_per_second: Some(1.0),
        };
        call!(self, report_progress(&claimed, 60_000, Some(progress)));
        let losses: [StepLosses; 0] = [];
        call!(self, record_losses(&claimed, &losses));
        for step in 1..3_u8 {
            let checkpoint = vec![step, self.number as u8].into();
            call!(self, record_checkpoint(&claimed, step.into(), checkpoint));
            call!(self, add_preview(claimed.training.id, step.into(), vec![step].into()));
        }
        let (report, error) = (serde_json::json!({}), serde_json::json!({"code": "x"}));
        match self.number % 3 {
            0 => drop(call!(
                self,
                succeed(&claimed, (vec![self.number as u8].into(), TOKENS), &report)
            )),
            1 => drop(call!(self, fail(&claimed, &error, self.number.is_multiple_of(2)))),
            _ => drop(call!(self, release(&claimed))),
        }
        Some(())
    }

    async fn generations(&mut self) -> Option<()> {
        for background in [true, false] {
            let added = call!(self, add_generation(generation_of(background)))?;
            if !background {
                call!(self, keep_generation(added.id));
            }
        }
        let mut taken = call!(self, claim_generation())??;
        call!(self, begin_generation(taken.id, taken.attempt, now()));
        taken.attempt += 1;
        taken.owner = Some(self.registry.process());
        let file = taken.id.to_string().into_bytes().into();
        let stored = call!(self, store(vec![file]))?;
        let image = StoredImage {
            id: ImageId::new(),
            tenant: TENANT,
            generation: Some(taken.id),
            index: 0,
            seed: Some(1),
            size: (96, 96),
            blob: stored.first().to_owned(),
            format: ImageFormat::Png,
            created_at: now(),
            expires_at: None,
        };
        let added = call!(self, add_image(&image, taken.attempt));
        self.registry.settle(stored, added.is_some()).await;
        call!(self, report_drawn(&[(taken.id, 7)]));
        match self.number % 4 {
            0 => call!(self, requeue_generation(&taken))?,
            1 => {
                call!(self, delete_generation(TENANT, taken.id))?;
            }
            _ => {
                let ended = Generation {
                    status: GenerationStatus::Succeeded,
                    ..taken.clone()
                };
                call!(self, end_generation(&ended, Some(&delivery_of(taken.id))))?;
            }
        }
        let returned = call!(self, claim_generation())??;
        call!(self, return_generation(returned.id, 0))
    }

    async fn keys(&mut self) -> Option<()> {
        for key in [self.name("key"), "key of all".to_owned()] {
            let claim = match call!(self, claim_key(TENANT, &key, "fingerprint", 60_000))? {
                Claim::Acquired(claim) => claim,
                _ => continue,
            };
            call!(self, renew_key(&claim, 60_000));
            let answer = StoredAnswer {
                status: 200,
                location: None,
                content_type: None,
                body: vec![self.number as u8; 20_000].into(),
            };
            call!(self, store_answer(&claim, &answer, 60_000));
            call!(self, release_key(&claim));
        }
        Some(())
    }

    async fn tenants(&mut self, round: usize) -> Option<()> {
        let name = format!("{}-{round}", self.name("tenant"));
        let tenant = call!(self, add_tenant(&name, Quotas::default()))?;
        call!(
            self,
            set_quotas(
                &name,
                Quotas {
                    concepts: Some(1),
                    ..Quotas::default()
                }
            )
        );
        let new = NewKey {
            tenant: tenant.id,
            public_id: name.clone(),
            hash: "hash".into(),
            name: name.clone(),
            scopes: Scopes::ALL,
            expires_at: None,
        };
        let key = call!(self, add_key(&new))?;
        call!(self, note_key_use(&key));
        call!(self, revoke_key(key.id));
        let second = call!(self, admit_images(tenant.id, 2, 3))?;
        if let Ok(second) = second {
            call!(self, take_back(tenant.id, second, 2));
        }
        let stored = call!(self, store(vec!["in all of them".into()]))?;
        let (new, spec) = concept_of("ink", stored.hashes().to_vec());
        let added = call!(self, add_concept(tenant.id, &new, &spec));
        self.registry.settle(stored, added.is_some()).await;
        call!(
            self,
            add_ready_concept(tenant.id, &concept_of("rex", vec![]).0, ("none", TOKENS))
        );
        call!(self, delete_tenant(tenant.id, crate::Deletion::default()));
        Some(())
    }

    async fn deliveries(&mut self) -> Option<()> {
        let id = GenerationId::new();
        call!(self, add_delivery(&delivery_of(id)));
        call!(self, add_training_delivery(&delivery_of(id)));
        for due in call!(self, claim_deliveries(4, Duration::from_secs(60), &[]))? {
            let again = Attempt {
                status: Some(500),
                problem: Some("it answered 500".into()),
                again_after: self.number.is_multiple_of(2).then_some(Duration::ZERO),
            };
            call!(self, record_attempt(due.id, &again));
            call!(self, replay(JobId::Delivery(due.id)));
        }
        Some(())
    }

    async fn upkeep(&mut self) -> Option<()> {
        let day = Duration::from_secs(24 * 3600);
        call!(self, announce(&Announcement::default()));
        call!(self, setting("a", "b"));
        call!(self, release_lost());
        call!(self, left_generations());
        call!(self, expire_images(day));
        call!(self, expire_generations(day));
        call!(self, expire_deliveries(day));
        call!(self, expire_processes(day));
        call!(self, expire_keys());
        call!(self, expire_holds());
        call!(self, signal("generations"));
        Some(())
    }

    /// Everything twice; each caller starts at a different call, so that different calls overlap.
    async fn work(mut self) -> Self {
        for round in 0..16 {
            let _ = match (round + self.number) % 8 {
                0 => self.concepts(&format!("{}-{round}", self.name("c"))).await,
                1 => self.shared().await,
                2 => self.trainings().await,
                3 => self.generations().await,
                4 => self.keys().await,
                5 => self.tenants(round).await,
                6 => self.deliveries().await,
                _ => self.upkeep().await,
            };
        }
        self
    }
}

fn concept_of(name: &str, images: Vec<String>) -> (NewConcept, TrainingSpec) {
    let new = NewConcept {
        images,
        ..NewConcept::new(name, ConceptKind::Style)
    };
    (
        new,
        TrainingSpec::preset(Preset::Pocket, ConceptKind::Style, name, None, 6),
    )
}

fn generation_of(background: bool) -> NewGeneration {
    NewGeneration {
        tenant: TENANT,
        background,
        prompt: "a cat".into(),
        settings: GenerationSettings {
            sampling: coar_core::engine::SamplingParams {
                width: 96,
                height: 96,
                seed: 1,
                guidance_scale: 1.0,
                temperature: 1.0,
                top_k: 0,
                identity_mask: true,
            },
            n: 1,
            first_index: 0,
            output_format: ImageFormat::Png,
            output_compression: 100,
            partial_images: 0,
        },
        concepts: vec![],
        metadata: serde_json::json!({}),
        webhook_url: None,
        total: 36,
        priority: 0,
    }
}

fn delivery_of(id: GenerationId) -> NewDelivery {
    NewDelivery {
        tenant: TENANT,
        subject: id.to_string(),
        event: "generation.succeeded".into(),
        url: "https://example.com/".into(),
        host: "example.com".into(),
        body: "{}".into(),
    }
}

/// Runs concurrent callers; returns the number of calls, the longest of them, and every fault.
async fn run(registry: &Registry, callers: usize) -> (usize, (Duration, &'static str), Vec<String>) {
    let (new, spec) = concept_of("shared", vec![]);
    registry.add_concept(TENANT, &new, &spec).await.unwrap();
    let mut all = JoinSet::new();
    for number in 0..callers {
        let caller = Caller {
            registry: registry.clone(),
            number,
            faults: vec![],
            calls: 0,
            longest: (Duration::ZERO, ""),
        };
        all.spawn(caller.work());
    }
    let all = all.join_all().await;
    let longest = all.iter().map(|caller| caller.longest).max().unwrap_or_default();
    let calls = all.iter().map(|caller| caller.calls).sum();
    (
        calls,
        longest,
        all.into_iter().flat_map(|caller| caller.faults).collect(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_mixed_writes_neither_fail_nor_stall() {
    let (_dir, registry) = registry(db::CONNECTIONS).await;
    let began = Instant::now();
    let (calls, (longest, what), faults) = run(&registry, CALLERS).await;
    println!(
        "{calls} calls in {:?}; the longest, {what}, took {longest:?}",
        began.elapsed()
    );
    assert!(
        faults.is_empty(),
        "{} of {calls} calls failed: {faults:#?}",
        faults.len()
    );
    assert!(longest < LONGEST, "{what} took {longest:?}");
}

/// With one connection, a read that bypasses its transaction deadlocks every time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_transaction_needs_a_second_connection() {
    let (_dir, registry) = registry(1).await;
    let (calls, _, faults) = run(&registry, 4).await;
    assert!(calls > 100 && faults.is_empty(), "{faults:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn parallel_deletes_do_not_block_each_other() {
    let (_dir, registry) = registry(db::CONNECTIONS).await;
    let names: Vec<String> = (0..9).map(|number| format!("c{number}")).collect();
    for name in &names {
        let (new, spec) = concept_of(name, vec![]);
        registry.add_concept(TENANT, &new, &spec).await.unwrap();
    }
    let mut callers = JoinSet::new();
    for name in names {
        let registry = registry.clone();
        callers.spawn(async move {
            let began = Instant::now();
            let deleted = registry.delete_concept(TENANT, &name).await;
            (deleted, began.elapsed())
        });
    }
    let calls = callers.join_all().await;
    let longest = calls.iter().map(|(_, took)| *took).max();
    let failed = calls.iter().filter(|(deleted, _)| deleted.is_err()).count();
    assert!(
        failed == 0 && longest < Some(LONGEST),
        "{failed} of 9 calls failed; the longest took {longest:?}"
    );
}

/// A concept is deleted by the name under which it is found, even if it is renamed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rename_and_delete_are_serialised() {
    let (_dir, registry) = registry(db::CONNECTIONS).await;
    for number in 0..20 {
        let (old, new) = (format!("old{number}"), format!("new{number}"));
        let (concept, spec) = concept_of(&old, vec![]);
        let first = registry.add_concept(TENANT, &concept, &spec).await.unwrap().0;
        let change = ConceptChange {
            name: Some(new.clone()),
            ..ConceptChange::default()
        };
        let (renamed, deleted) = tokio::join!(
            registry.change_concept(first.id, &change),
            registry.delete_concept(TENANT, &old)
        );
        let (renamed, deleted) = (renamed.unwrap().is_some(), deleted.unwrap());
        let left = registry.concept(TENANT, &new).await.unwrap().is_some();
        assert_ne!(renamed, deleted, "exactly one of them finds the concept");
        assert_eq!(left, renamed);
    }
}
