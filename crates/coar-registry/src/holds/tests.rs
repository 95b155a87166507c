//! Concurrent storing and removing, and a slow blob store.

use object_store::throttle::{ThrottleConfig, ThrottledStore};

use super::*;
use crate::tests::{test_registry, test_storage};
use crate::{NewConcept, Quotas};
use coar_core::concept::ConceptKind;
use coar_core::ids::TenantId;
use coar_core::training::{Preset, TrainingSpec};

/// Latency of each call to the slow store.
const SLOW: Duration = Duration::from_secs(2);

fn slowed(registry: &Registry) -> Registry {
    let config = ThrottleConfig {
        wait_put_per_call: SLOW,
        wait_delete_per_call: SLOW,
        ..ThrottleConfig::default()
    };
    Registry {
        blobs: registry.blobs.wrap(|store| ThrottledStore::new(store, config)),
        ..registry.clone()
    }
}

fn named(name: &str, images: Vec<String>) -> (NewConcept, TrainingSpec) {
    let new = NewConcept {
        images,
        ..NewConcept::new(name, ConceptKind::Style)
    };
    (
        new,
        TrainingSpec::preset(Preset::Pocket, ConceptKind::Style, name, None, 6),
    )
}

async fn holds(registry: &Registry) -> i64 {
    let (count,) = sqlx::query_as("SELECT count(*) FROM blob_holds")
        .fetch_one(&registry.pools.reads)
        .await
        .unwrap();
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn slow_store_blocks_neither_tenants_nor_database() {
    let (_dir, storage) = test_storage().await;
    // Fewer connections than tenants: a connection that is kept during a store call would cause a visible wait.
    let registry = Registry::connect_with(&storage, 4).await.unwrap();
    let slow = slowed(&registry);
    let mut tenants = Vec::new();
    for number in 0..16 {
        tenants.push(
            registry
                .add_tenant(&format!("t{number}"), Quotas::default())
                .await
                .unwrap(),
        );
    }
    let began = Instant::now();
    let mut callers = tokio::task::JoinSet::new();
    for tenant in tenants {
        let slow = slow.clone();
        callers.spawn(async move {
            // Each tenant registers the shared image and one of its own.
            let own = Bytes::from(tenant.name.clone());
            let stored = slow.store(vec!["shared".into(), own]).await.unwrap();
            let (new, spec) = named("ink", stored.hashes().to_vec());
            let added = slow.add_concept(tenant.id, &new, &spec).await;
            slow.settle(stored, added.is_ok()).await;
            added.unwrap();
        });
    }
    // Other work continues meanwhile.
    let all = tokio::spawn(callers.join_all());
    let mut longest = Duration::ZERO;
    while !all.is_finished() {
        let asked = Instant::now();
        registry.setting("test", "value").await.unwrap();
        longest = longest.max(asked.elapsed());
        tokio::time::sleep(LOOK).await;
    }
    all.await.unwrap();
    let took = began.elapsed();
    assert!(
        longest < Duration::from_secs(1),
        "a write took {longest:?} while the store was slow"
    );
    assert!(
        took < 5 * SLOW,
        "16 tenants took {took:?}, two calls of the store take {:?}",
        2 * SLOW
    );
    assert_eq!(
        (holds(&registry).await, registry.blobs.all().await.unwrap().len()),
        (0, 17)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn storing_during_a_removal_keeps_the_bytes() {
    let (_dir, registry) = test_registry().await;
    let (tenant, slow) = (TenantId::DEFAULT, slowed(&registry));
    let first = registry.store(vec!["image".into()]).await.unwrap();
    let (new, spec) = named("first", first.hashes().to_vec());
    registry.add_concept(tenant, &new, &spec).await.unwrap();
    registry.settle(first, true).await;
    let removing = tokio::spawn(async move { slow.delete_concept(tenant, "first").await });
    let until = Instant::now() + SLOW;
    while holds(&registry).await == 0 {
        assert!(Instant::now() < until, "the removal did not take a hold");
        tokio::task::yield_now().await;
    }
    // The removal has been sent to the store: storing waits for its end.
    let second = registry.store(vec!["image".into()]).await.unwrap();
    assert!(removing.await.unwrap().unwrap());
    let (new, spec) = named("second", second.hashes().to_vec());
    registry.add_concept(tenant, &new, &spec).await.unwrap();
    // Held blobs are not removed, whether or not a row refers to them.
    registry.remove_unreferenced(second.hashes()).await.unwrap();
    let hash = second.first().to_owned();
    registry.settle(second, true).await;
    assert_eq!(registry.blobs.get(&hash).await.unwrap(), "image");
    assert_eq!(holds(&registry).await, 0);
}

#[tokio::test]
async fn holds_protect_blobs_until_they_expire() {
    let (_dir, registry) = test_registry().await;
    let stored = registry.store(vec!["a".into(), "b".into(), "a".into()]).await.unwrap();
    assert_eq!(stored.hashes().len(), 3);
    registry.remove_unreferenced(stored.hashes()).await.unwrap();
    assert_eq!(
        (
            registry.collect_garbage().await.unwrap(),
            registry.expire_holds().await.unwrap()
        ),
        (0, 0)
    );
    assert_eq!(registry.blobs.all().await.unwrap().len(), 2);
    // Its process died long ago.
    drop(stored);
    sqlx::query("UPDATE blob_holds SET expires_at = 1")
        .execute(&registry.pools.writes)
        .await
        .unwrap();
    assert_eq!(registry.expire_holds().await.unwrap(), 2);
    assert_eq!(
        (holds(&registry).await, registry.blobs.all().await.unwrap().len()),
        (0, 0)
    );
    let refused = registry.store(vec!["c".into()]).await.unwrap();
    registry.settle(refused, false).await;
    assert_eq!(
        (holds(&registry).await, registry.blobs.all().await.unwrap().len()),
        (0, 0)
    );
}

#[tokio::test]
async fn failed_store_blocks_no_later_attempt() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::open(dir.path()).await.unwrap();
    let hash = content_hash(b"b");
    // A folder in the file's place makes writing fail.
    let file = dir.path().join("blobs").join(&hash[..2]).join(&hash);
    std::fs::create_dir_all(file.join("full")).unwrap();
    assert!(
        registry
            .store(vec!["a".into(), "b".into()])
            .await
            .unwrap_err()
            .is_transient()
    );
    // Both can be stored again at once; leftovers of the first attempt go with the expired holds.
    std::fs::remove_dir_all(&file).unwrap();
    let again = registry.store(vec!["b".into()]).await.unwrap();
    assert_eq!(registry.expire_holds().await.unwrap(), 1);
    assert_eq!(registry.blobs.all().await.unwrap(), [hash]);
    registry.settle(again, false).await;
}

#[tokio::test]
async fn failed_removal_is_retried_later() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::open(dir.path()).await.unwrap();
    let stored = registry.store(vec!["a".into()]).await.unwrap();
    let hash = stored.first().to_owned();
    registry.settle(stored, true).await;
    // A folder in the file's place makes removal fail.
    let file = dir.path().join("blobs").join(&hash[..2]).join(&hash);
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let failed = registry.remove_unreferenced(std::slice::from_ref(&hash)).await;
    assert!(failed.unwrap_err().is_transient());
    std::fs::remove_dir(&file).unwrap();
    // A failed removal blocks no later store.
    let again = registry.store(vec!["a".into()]).await.unwrap();
    sqlx::query("DELETE FROM blob_holds WHERE removing = 0")
        .execute(&registry.pools.writes)
        .await
        .unwrap();
    drop(again);
    assert_eq!((registry.expire_holds().await.unwrap(), file.exists()), (1, false));
}
