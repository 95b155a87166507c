//! Round trip, ends, lost owners, and queue order.

use serde_json::json;

use super::*;
use crate::{Backend, StoredImage, now};
use coar_core::ids::ImageId;

pub(crate) fn new(background: bool) -> NewGeneration {
    NewGeneration {
        tenant: TenantId::DEFAULT,
        background,
        prompt: "a cat".to_owned(),
        settings: GenerationSettings {
            sampling: coar_core::engine::SamplingParams {
                width: 96,
                height: 96,
                seed: (1 << 53) - 1,
                guidance_scale: 3.5,
                temperature: 1.0,
                top_k: 20,
                identity_mask: true,
            },
            n: 1,
            first_index: 2,
            output_format: ImageFormat::Jpeg,
            output_compression: 80,
            partial_images: 0,
        },
        concepts: vec![GenerationConcept {
            name: "rex".to_owned(),
            kind: ConceptKind::Subject,
            version: 2,
            hash: "ab".to_owned(),
        }],
        metadata: json!({"order": "7"}),
        webhook_url: None,
        total: 144,
        priority: 0,
    }
}

async fn registry() -> (tempfile::TempDir, Registry) {
    crate::tests::test_registry().await
}

async fn image(registry: &Registry, generation: &Generation) -> Result<StoredImage, RegistryError> {
    let bytes = format!("{} {}", generation.id, generation.attempt);
    let stored = registry.store(vec![bytes.into()]).await?;
    let image = StoredImage {
        id: ImageId::new(),
        tenant: generation.new.tenant,
        generation: Some(generation.id),
        index: 2,
        seed: Some(1),
        size: (96, 96),
        blob: stored.first().to_owned(),
        format: ImageFormat::Jpeg,
        created_at: now(),
        expires_at: None,
    };
    let added = registry.add_image(&image, generation.attempt).await;
    if added.is_ok() {
        // As if the first response was lost.
        registry.add_image(&image, generation.attempt).await?;
    }
    registry.settle(stored, added.is_ok()).await;
    added.map(|()| image)
}

#[tokio::test]
async fn generation_round_trips_and_ends_once() {
    let (_dir, registry) = registry().await;
    let mut added = registry.add_generation(new(false)).await.unwrap();
    assert_eq!(added.owner, Some(registry.process()));
    let read = || async { registry.generation(TenantId::DEFAULT, added.id).await.unwrap() };
    assert_eq!(read().await.as_ref(), Some(&added));
    assert_eq!(registry.generation(TenantId::new(), added.id).await.unwrap(), None);
    assert!(registry.begin_generation(added.id, 0, 5).await.unwrap());
    added.attempt = 1;
    let stored = image(&registry, &added).await.unwrap();
    assert_eq!(registry.images(TenantId::DEFAULT, &[added.id]).await.unwrap(), [stored]);
    let ended = Generation {
        status: GenerationStatus::Succeeded,
        usage: Some(TokenUsage {
            text_tokens: 3,
            image_tokens: 144,
        }),
        done: 144,
        started_at: Some(5),
        finished_at: Some(9),
        ..added.clone()
    };
    assert!(registry.end_generation(&ended, None).await.unwrap());
    assert_eq!(
        registry.generation(TenantId::DEFAULT, added.id).await.unwrap(),
        Some(ended.clone())
    );
    let late = Generation {
        status: GenerationStatus::Cancelled,
        owner: None,
        ..ended.clone()
    };
    assert!(!registry.end_generation(&late, None).await.unwrap());
    assert_eq!(
        registry.generation(TenantId::DEFAULT, added.id).await.unwrap(),
        Some(ended)
    );
    assert!(image(&registry, &added).await.is_err());
    assert!(!registry.delete_generation(TenantId::new(), added.id).await.unwrap());
    assert!(registry.delete_generation(TenantId::DEFAULT, added.id).await.unwrap());
    assert!(registry.blobs.all().await.unwrap().is_empty());
}

#[tokio::test]
async fn list_takes_a_constant_number_of_statements() {
    let (_dir, registry) = registry().await;
    let tenant = TenantId::DEFAULT;
    let mut drawn = Vec::new();
    for number in 0..5 {
        let added = registry.add_generation(new(number % 2 == 0)).await.unwrap();
        if !added.new.background {
            registry.begin_generation(added.id, 0, now()).await.unwrap();
            let added = Generation { attempt: 1, ..added };
            drawn.push(image(&registry, &added).await.unwrap());
        }
    }
    let list = async |limit| {
        let before = registry
            .pools
            .reads
            .statements
            .load(std::sync::atomic::Ordering::Relaxed);
        let listed = registry
            .generations(tenant, None, Page { limit, after: None })
            .await
            .unwrap();
        let details = registry.generation_details(tenant, &listed.rows).await.unwrap();
        let after = registry
            .pools
            .reads
            .statements
            .load(std::sync::atomic::Ordering::Relaxed);
        (details, after - before)
    };
    let (details, statements) = list(5).await;
    // Newest first: queued ones have their position, the others their image.
    let expected = [
        (vec![], Some(2)),
        (vec![drawn[1].clone()], None),
        (vec![], Some(1)),
        (vec![drawn[0].clone()], None),
        (vec![], Some(0)),
    ];
    assert_eq!(details, expected);
    assert_eq!(list(1).await.1, statements);
}

#[tokio::test]
async fn generations_of_a_dead_process_are_requeued_or_ended() {
    let (_dir, storage) = crate::tests::test_storage().await;
    let mut registry = Registry::connect(&storage).await.unwrap();
    let waited = registry.add_generation(new(false)).await.unwrap();
    let kept = registry.add_generation(new(true)).await.unwrap();
    let queued = registry.add_generation(new(true)).await.unwrap();
    for attempt in 1..=GENERATION_ATTEMPTS {
        let mut taken = registry.claim_generation().await.unwrap().unwrap();
        assert_eq!(
            (taken.id, taken.attempt, taken.owner),
            (kept.id, attempt - 1, Some(registry.process()))
        );
        for _ in 0..2 {
            assert!(registry.begin_generation(taken.id, attempt - 1, now()).await.unwrap());
        }
        taken.attempt = attempt;
        image(&registry, &taken).await.unwrap();
        // The process crashes; another one recovers.
        registry = Registry::connect(&storage).await.unwrap();
        let lost = registry.left_generations().await.unwrap();
        let ids: Vec<_> = lost.iter().map(|g| g.id).collect();
        if attempt == GENERATION_ATTEMPTS {
            assert_eq!(ids, [waited.id, kept.id]);
            break;
        }
        assert_eq!(ids, [waited.id]);
        assert!(registry.blobs.all().await.unwrap().is_empty());
        let details = registry
            .generation_details(TenantId::DEFAULT, std::slice::from_ref(&queued))
            .await
            .unwrap();
        assert_eq!(details, [(vec![], Some(2))]);
    }
}

#[tokio::test]
async fn a_fenced_process_cannot_write() {
    let (_dir, storage) = crate::tests::test_storage().await;
    let slow = Registry::connect(&storage).await.unwrap();
    let swift = Registry::connect(&storage).await.unwrap();
    swift.announce(&Default::default()).await.unwrap();
    let added = slow.add_generation(new(true)).await.unwrap();
    let mut first = slow.claim_generation().await.unwrap().unwrap();
    assert!(swift.claim_generation().await.unwrap().is_none());
    slow.begin_generation(first.id, 0, now()).await.unwrap();
    first.attempt = 1;
    // It has not sent a heartbeat for a long time.
    if swift.backend() == Backend::Postgres {
        // This process has just started and cannot declare others dead yet.
        swift.left_generations().await.unwrap();
        assert!(swift.claim_generation().await.unwrap().is_none());
    }
    let judge = Registry::connect(&storage).await.unwrap();
    assert!(judge.left_generations().await.unwrap().is_empty());
    let mut second = swift.claim_generation().await.unwrap().unwrap();
    assert_eq!((second.id, second.attempt), (added.id, 1));
    swift.begin_generation(second.id, 1, now()).await.unwrap();
    second.attempt = 2;
    // The fenced process resumes.
    assert!(matches!(image(&slow, &first).await, Err(RegistryError::LeaseLost)));
    let ended = |taken: &Generation| Generation {
        status: GenerationStatus::Succeeded,
        ..taken.clone()
    };
    assert!(!slow.end_generation(&ended(&first), None).await.unwrap());
    slow.requeue_generation(&first).await.unwrap();
    assert_eq!(slow.report_drawn(&[(first.id, 7)]).await.unwrap(), [first.id]);
    assert!(swift.report_drawn(&[(first.id, 9)]).await.unwrap().is_empty());
    image(&swift, &second).await.unwrap();
    assert!(swift.end_generation(&ended(&second), None).await.unwrap());
    assert_eq!(swift.images(TenantId::DEFAULT, &[added.id]).await.unwrap().len(), 1);
    assert_eq!(slow.blobs.all().await.unwrap().len(), 1);
}

#[tokio::test]
async fn concurrent_claims_take_each_generation_once() {
    let (_dir, storage) = crate::tests::test_storage().await;
    let first = Registry::connect(&storage).await.unwrap();
    let mut ids = std::collections::HashSet::new();
    for _ in 0..24 {
        ids.insert(first.add_generation(new(true)).await.unwrap().id);
    }
    let mut takers = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let storage = storage.clone();
        takers.spawn(async move {
            let registry = Registry::connect(&storage).await.unwrap();
            let mut taken = Vec::new();
            while let Some(next) = registry.claim_generation().await.unwrap() {
                taken.push(next.id);
            }
            taken
        });
    }
    let taken: Vec<_> = takers.join_all().await.concat();
    assert_eq!(taken.len(), ids.len());
    assert_eq!(taken.into_iter().collect::<std::collections::HashSet<_>>(), ids);
}

#[tokio::test]
async fn claim_prefers_the_least_busy_tenant_then_priority() {
    let (_dir, registry) = registry().await;
    let other = registry
        .add_tenant("acme", super::super::Quotas::default())
        .await
        .unwrap();
    let mut ids = Vec::new();
    for (tenant, priority) in [
        (TenantId::DEFAULT, 0),
        (TenantId::DEFAULT, 0),
        (other.id, 0),
        (other.id, 5),
        (TenantId::DEFAULT, 9),
    ] {
        let new = NewGeneration {
            tenant,
            priority,
            ..new(true)
        };
        ids.push(registry.add_generation(new).await.unwrap().id);
    }
    let mut order = Vec::new();
    while let Some(next) = registry.claim_generation().await.unwrap() {
        order.push(ids.iter().position(|id| *id == next.id).unwrap());
    }
    assert_eq!(order, [4, 3, 0, 2, 1]);
    registry.return_generation(ids[1], 60_000).await.unwrap();
    assert!(registry.claim_generation().await.unwrap().is_none());
    registry.return_generation(ids[2], 0).await.unwrap();
    assert_eq!(registry.claim_generation().await.unwrap().unwrap().id, ids[2]);
    let page = Page {
        limit: 1,
        after: Some(ids[1]),
    };
    let queued = registry.generations(TenantId::DEFAULT, Some(GenerationStatus::Queued), page);
    assert_eq!(queued.await.unwrap().rows[0].id, ids[0]);
    let listed = registry
        .generations(TenantId::DEFAULT, None, Page { limit: 1, after: None })
        .await
        .unwrap();
    assert_eq!((listed.rows[0].id, listed.has_more), (ids[4], true));
}
