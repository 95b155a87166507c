//! The queue: leases, attempts, checkpoints, and cleanup after deletion.

use super::*;
use crate::NewConcept;
use crate::blobs::content_hash;
use coar_core::concept::ConceptKind;
use coar_core::training::Preset;

const TOKENS: coar_core::engine::ConceptTokens = coar_core::engine::ConceptTokens { text: 1, image: 1 };

async fn registry() -> (tempfile::TempDir, Registry) {
    crate::tests::test_registry().await
}

async fn add(registry: &Registry, name: &str) -> Training {
    let image = registry.blobs.put(name.as_bytes().to_vec().into()).await.unwrap();
    let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, name, Some("cat"), 6);
    let new = NewConcept {
        class_noun: Some("cat".into()),
        images: vec![image],
        ..NewConcept::new(name, spec.kind)
    };
    registry.add_concept(TenantId::DEFAULT, &new, &spec).await.unwrap().1
}

#[tokio::test]
async fn duplicate_name_is_rejected_without_leftovers() {
    let (_dir, registry) = registry().await;
    let first = add(&registry, "rex").await;
    let second = NewConcept::new("rex", ConceptKind::Style);
    let again = registry.add_concept(TenantId::DEFAULT, &second, &first.spec).await;
    assert!(matches!(again, Err(RegistryError::NameTaken(name)) if name == "rex"));
    assert_eq!(registry.concepts(TenantId::DEFAULT).await.unwrap().len(), 1);
    assert_eq!(
        registry.claim_training(1000).await.unwrap().unwrap().training.id,
        first.id
    );
    assert!(registry.claim_training(1000).await.unwrap().is_none());
}

#[tokio::test]
async fn progress_is_stored_with_and_without_nulls() {
    let (_dir, registry) = registry().await;
    add(&registry, "rex").await;
    let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
    let progress = |step, steps_per_second| {
        Some(Progress {
            step,
            loss: 0.5,
            steps_per_second,
        })
    };
    for update in [None, progress(1, None), progress(2, Some(1.5)), None, progress(3, None)] {
        registry.report_progress(&claimed, 60_000, update).await.unwrap();
    }
    let seen = registry
        .training(TenantId::DEFAULT, claimed.training.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((seen.step, seen.loss, seen.steps_per_second), (3, Some(0.5), Some(1.5)));
}

#[tokio::test]
async fn expired_leases_are_requeued() {
    let (_dir, registry) = registry().await;
    add(&registry, "rex").await;
    let slow = registry.claim_training(-1).await.unwrap().unwrap();
    assert_eq!(registry.release_lost().await.unwrap(), 1);
    let waits = registry
        .training(TenantId::DEFAULT, slow.training.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(waits.status, TrainingStatus::Queued);
    assert!(matches!(
        registry.report_progress(&slow, 1000, None).await,
        Err(RegistryError::LeaseLost)
    ));
    let next = registry.claim_training(60_000).await.unwrap().unwrap();
    assert_eq!(registry.release_lost().await.unwrap(), 0);
    registry.report_progress(&next, 1000, None).await.unwrap();
}

#[tokio::test]
async fn only_the_lease_holder_writes() {
    let (_dir, registry) = registry().await;
    add(&registry, "rex").await;
    let slow = registry.claim_training(-1).await.unwrap().unwrap();
    let next = registry.claim_training(60_000).await.unwrap().unwrap();
    assert_eq!((slow.training.id, next.training.attempt), (next.training.id, 2));
    assert!(matches!(
        registry.report_progress(&slow, 1000, None).await,
        Err(RegistryError::LeaseLost)
    ));
    assert!(matches!(
        registry
            .succeed(&slow, ("x".into(), TOKENS), &serde_json::json!({}))
            .await,
        Err(RegistryError::LeaseLost)
    ));
    registry
        .succeed(&next, ("y".into(), TOKENS), &serde_json::json!({}))
        .await
        .unwrap();
    let concept = registry.concept(TenantId::DEFAULT, "rex").await.unwrap().unwrap();
    assert_eq!(concept.version, Some(content_hash(b"y")));
    // Nothing remains of the file that the fenced worker tried to publish.
    assert!(registry.blobs.get(&content_hash(b"x")).await.is_err());
}

#[tokio::test]
async fn checkpoints_are_replaced_and_removed_at_the_end() {
    let (_dir, registry) = registry().await;
    add(&registry, "rex").await;
    let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
    let mut blobs = vec![];
    for step in 1..3 {
        registry
            .record_checkpoint(&claimed, step.into(), vec![step].into())
            .await
            .unwrap();
        blobs.push(content_hash(&[step]));
    }
    assert!(registry.blobs.get(&blobs[0]).await.is_err());
    assert!(registry.blobs.get(&blobs[1]).await.is_ok());
    // The process dies and another takes over.
    assert_eq!(registry.release_all().await.unwrap(), 1);
    let again = registry.claim_training(60_000).await.unwrap().unwrap();
    assert_eq!(
        (again.training.resumed_from_step, again.training.checkpoint.as_ref()),
        (2, Some(&blobs[1]))
    );
    registry
        .succeed(&again, ("v".into(), TOKENS), &serde_json::json!({}))
        .await
        .unwrap();
    assert!(registry.blobs.get(&blobs[1]).await.is_err());
}

#[tokio::test]
async fn transient_failures_are_retried_and_permanent_ones_not() {
    let (_dir, registry) = registry().await;
    add(&registry, "rex").await;
    let error = serde_json::json!({"code": "internal_error"});
    for attempt in 1..=ATTEMPTS {
        // Retries back off.
        assert!(attempt == 1 || registry.claim_training(60_000).await.unwrap().is_none());
        sqlx::query("UPDATE trainings SET not_before = 0")
            .execute(&registry.pools.writes)
            .await
            .unwrap();
        let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
        registry.fail(&claimed, &error, true).await.unwrap();
        let status = registry
            .training(TenantId::DEFAULT, claimed.training.id)
            .await
            .unwrap()
            .unwrap()
            .status;
        assert_eq!(status == TrainingStatus::Failed, attempt == ATTEMPTS);
    }
    let other = add(&registry, "other").await;
    let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
    registry.fail(&claimed, &error, false).await.unwrap();
    assert_eq!(
        registry
            .training(TenantId::DEFAULT, other.id)
            .await
            .unwrap()
            .unwrap()
            .status,
        TrainingStatus::Failed
    );
}

#[tokio::test]
async fn blobs_of_a_crash_before_the_row_are_removed() {
    let (_dir, registry) = registry().await;
    add(&registry, "rex").await;
    let orphan = registry.blobs.put(b"never registered".to_vec().into()).await.unwrap();
    assert_eq!(registry.collect_garbage().await.unwrap(), 1);
    assert!(registry.blobs.get(&orphan).await.is_err());
    let kept = registry
        .concept(TenantId::DEFAULT, "rex")
        .await
        .unwrap()
        .unwrap()
        .images;
    assert!(registry.blobs.get(&kept[0]).await.is_ok());
}

#[tokio::test]
async fn deleting_a_concept_removes_unshared_blobs() {
    let (dir, registry) = registry().await;
    let training = add(&registry, "rex").await;
    let concept = registry.concept(TenantId::DEFAULT, "rex").await.unwrap().unwrap();
    let shared = concept.images[0].clone();
    let new = NewConcept {
        images: vec![shared.clone()],
        ..NewConcept::new("twin", ConceptKind::Style)
    };
    registry
        .add_ready_concept(TenantId::DEFAULT, &new, ("none", TOKENS))
        .await
        .unwrap();
    assert!(registry.delete_concept(TenantId::DEFAULT, "rex").await.unwrap());
    assert!(!registry.delete_concept(TenantId::DEFAULT, "rex").await.unwrap());
    assert!(registry.blobs.get(&shared).await.is_ok());
    assert!(
        registry
            .training(TenantId::DEFAULT, training.id)
            .await
            .unwrap()
            .is_none()
    );
    registry.delete_concept(TenantId::DEFAULT, "twin").await.unwrap();
    assert!(registry.blobs.get(&shared).await.is_err());
    drop(dir);
}

#[tokio::test]
async fn claim_is_fair_and_prefers_interrupted_trainings() {
    let (_dir, registry) = registry().await;
    let acme = registry.add_tenant("acme", crate::Quotas::default()).await.unwrap();
    let mut ids = vec![];
    for (tenant, name) in [
        (TenantId::DEFAULT, "first"),
        (TenantId::DEFAULT, "second"),
        (TenantId::DEFAULT, "third"),
        (acme.id, "other"),
        (acme.id, "last"),
    ] {
        let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, name, Some("cat"), 6);
        let new = NewConcept::new(name, ConceptKind::Subject);
        ids.push(registry.add_concept(tenant, &new, &spec).await.unwrap().1.id);
    }
    let claim = || async { registry.claim_training(60_000).await.unwrap().unwrap() };
    let number = |claimed: &Claimed| ids.iter().position(|&id| id == claimed.training.id).unwrap();
    let first = claim().await;
    let other = claim().await;
    assert_eq!((number(&first), number(&other)), (0, 3));
    // One training of each tenant is running: the tenant that has waited longest is next, its interrupted training
    // first.
    registry.release(&first).await.unwrap();
    let again = claim().await;
    assert_eq!((number(&again), again.training.attempt), (0, 1));
    registry
        .succeed(&other, ("x".into(), TOKENS), &serde_json::json!({}))
        .await
        .unwrap();
    assert_eq!(number(&claim().await), 4);
}

#[tokio::test]
async fn retry_resumes_from_the_checkpoint() {
    let (_dir, registry) = registry().await;
    let tenant = TenantId::DEFAULT;
    let id = add(&registry, "rex").await.id;
    let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
    registry.record_checkpoint(&claimed, 20, vec![1].into()).await.unwrap();
    for step in [15, 30] {
        registry.add_preview(id, step, vec![step as u8].into()).await.unwrap();
    }
    assert!(
        registry
            .retry_training(tenant, id, Quotas::default())
            .await
            .unwrap()
            .unwrap()
            .status
            == TrainingStatus::Running
    );
    let error = serde_json::json!({"code": "training_failed"});
    registry.fail(&claimed, &error, false).await.unwrap();
    let seen = registry.training(tenant, id).await.unwrap().unwrap();
    assert_eq!((seen.status, seen.previews), (TrainingStatus::Failed, vec![15, 30]));
    // While another training of the concept is queued, no second one is allowed.
    let concept = registry.concept(tenant, "rex").await.unwrap().unwrap();
    let new = NewTraining {
        spec: &seen.spec,
        input: "x",
        webhook_url: Some("https://example.com"),
        priority: 0,
        quotas: Quotas::default(),
    };
    let other = registry.add_training(&concept, new).await.unwrap().unwrap();
    for busy in [
        registry.retry_training(tenant, id, Quotas::default()).await,
        registry.add_training(&concept, new).await,
    ] {
        assert!(matches!(busy, Err(RegistryError::ConceptBusy(name)) if name == "rex"));
    }
    registry.cancel_training(tenant, other.id).await.unwrap();
    let again = registry
        .retry_training(tenant, id, Quotas::default())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (again.status, again.step, again.attempt),
        (TrainingStatus::Queued, 20, 0)
    );
    assert_eq!((again.previews, again.error), (vec![15], None));
    assert!(registry.preview(tenant, id, 15).await.unwrap().is_some());
    assert!(registry.preview(tenant, id, 30).await.unwrap().is_none());
    // Nothing is stored for a training that is not running.
    registry.add_preview(id, 45, vec![45].into()).await.unwrap();
    // Image, checkpoint, one preview.
    assert_eq!(registry.blobs.all().await.unwrap().len(), 3);
    let resumed = registry.claim_training(60_000).await.unwrap().unwrap();
    assert_eq!((resumed.training.id, resumed.training.resumed_from_step), (id, 20));
}

#[tokio::test]
async fn training_that_crashes_its_workers_fails() {
    let (_dir, registry) = registry().await;
    let id = add(&registry, "rex").await.id;
    // The takeovers are a minute apart.
    let lost = async || {
        sqlx::query("UPDATE trainings SET takeover_at = takeover_at - $1")
            .bind(TAKEOVER_MS)
            .execute(&registry.pools.writes)
            .await
            .unwrap();
        registry.claim_training(-1).await.unwrap()
    };
    for _ in 0..TAKEOVERS {
        lost().await.unwrap();
    }
    // A checkpoint in between counts as progress.
    let moved = lost().await.unwrap();
    registry.record_checkpoint(&moved, 20, vec![1].into()).await.unwrap();
    for _ in 0..TAKEOVERS {
        lost().await.unwrap();
    }
    assert!(lost().await.is_none());
    let ended = registry.training(TenantId::DEFAULT, id).await.unwrap().unwrap();
    assert_eq!(
        (ended.status, &ended.error.unwrap()["code"]),
        (TrainingStatus::Failed, &"interrupted".into())
    );
    // A manual retry is allowed.
    registry
        .retry_training(TenantId::DEFAULT, id, Quotas::default())
        .await
        .unwrap();
    assert_eq!(registry.claim_training(60_000).await.unwrap().unwrap().training.id, id);
}

#[tokio::test]
async fn kills_in_quick_succession_count_once() {
    let (_dir, registry) = registry().await;
    let id = add(&registry, "rex").await.id;
    // Killed three times as often as a training may crash its worker; the kills are noticed by the next worker, by its
    // peers, and by the restarted server.
    for _ in 0..TAKEOVERS {
        registry.claim_training(-1).await.unwrap().unwrap();
        registry.claim_training(-1).await.unwrap().unwrap();
        registry.release_lost().await.unwrap();
        registry.claim_training(60_000).await.unwrap().unwrap();
        assert_eq!(registry.release_all().await.unwrap(), 1);
    }
    let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
    assert_eq!(claimed.training.id, id);
    let (counted,): (i64,) = sqlx::query_as("SELECT takeovers FROM trainings")
        .fetch_one(&registry.pools.reads)
        .await
        .unwrap();
    assert_eq!(counted, 1);
}

#[tokio::test]
async fn concurrent_claims_take_each_training_once() {
    let (_dir, storage) = crate::tests::test_storage().await;
    let first = Registry::connect(&storage).await.unwrap();
    for number in 0..12 {
        add(&first, &format!("c{number}")).await;
    }
    let mut takers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let storage = storage.clone();
        takers.spawn(async move {
            let registry = Registry::connect(&storage).await.unwrap();
            let mut taken = Vec::new();
            while let Some(next) = registry.claim_training(60_000).await.unwrap() {
                taken.push(next.training.id);
            }
            taken
        });
    }
    let taken: Vec<_> = takers.join_all().await.concat();
    assert_eq!(taken.len(), 12);
    assert_eq!(taken.iter().collect::<std::collections::HashSet<_>>().len(), 12);
}

#[tokio::test]
async fn claim_prefers_higher_priority_within_a_tenant() {
    let (_dir, registry) = registry().await;
    add(&registry, "rex").await;
    let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Style, "ink", None, 6);
    let urgent = NewConcept {
        priority: 3,
        ..NewConcept::new("ink", ConceptKind::Style)
    };
    let urgent = registry.add_concept(TenantId::DEFAULT, &urgent, &spec).await.unwrap().1;
    assert_eq!(
        registry.claim_training(60_000).await.unwrap().unwrap().training.id,
        urgent.id
    );
}
