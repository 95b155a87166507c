use super::*;

const TOKENS: coar_core::engine::ConceptTokens = coar_core::engine::ConceptTokens { text: 1, image: 1 };

fn answer(body: &str) -> StoredAnswer {
    StoredAnswer {
        status: 202,
        location: Some("/v1/concepts/rex".into()),
        content_type: Some("application/json".into()),
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

fn first(outcome: Claim) -> KeyClaim {
    match outcome {
        Claim::Acquired(claim) => claim,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn first_response_is_kept_and_a_lost_lease_cannot_write() {
    let (_dir, registry) = crate::tests::test_registry().await;
    let tenant = TenantId::DEFAULT;
    let claim = |fingerprint: &'static str, lease| registry.claim_key(tenant, "k", fingerprint, lease);
    // The first attempt's lease expires as soon as it is taken.
    let slow = first(claim("a", 0).await.unwrap());
    let next = first(claim("a", 60_000).await.unwrap());
    assert_eq!(claim("a", 60_000).await.unwrap(), Claim::InProgress);
    assert_eq!(claim("b", 60_000).await.unwrap(), Claim::Mismatch);
    assert!(matches!(
        registry.renew_key(&slow, 1).await,
        Err(RegistryError::LeaseLost)
    ));
    registry.store_answer(&slow, &answer("slow"), 60_000).await.unwrap();
    registry.release_key(&slow).await.unwrap();
    registry.renew_key(&next, 60_000).await.unwrap();
    registry.store_answer(&next, &answer("next"), 60_000).await.unwrap();
    assert_eq!(claim("a", 1).await.unwrap(), Claim::Replay(answer("next")));
    assert_eq!(claim("b", 1).await.unwrap(), Claim::Mismatch);
    let other = registry
        .add_tenant("other", super::super::Quotas::default())
        .await
        .unwrap();
    first(registry.claim_key(other.id, "k", "b", 60_000).await.unwrap());
}

#[tokio::test]
async fn object_created_before_a_crash_is_not_created_twice() {
    let (_dir, registry) = crate::tests::test_registry().await;
    let (tenant, style) = (TenantId::DEFAULT, coar_core::concept::ConceptKind::Style);
    let claim = |lease| registry.claim_key(tenant, "k", "a", lease);
    let add = |name: &str| {
        let (registry, new) = (registry.clone(), super::super::NewConcept::new(name, style));
        async move { registry.add_ready_concept(tenant, &new, ("hash", TOKENS)).await }
    };
    let slow = first(claim(0).await.unwrap());
    let next = first(claim(0).await.unwrap());
    // After a lost lease nothing can be created.
    assert!(matches!(slow.under(add("slow")).await, Err(RegistryError::LeaseLost)));
    assert!(registry.concept(tenant, "slow").await.unwrap().is_none());
    let made = next.clone().under(add("next")).await.unwrap();
    // Its process dies before it stores the response.
    registry.release_key(&next).await.unwrap();
    assert_eq!(claim(60_000).await.unwrap(), Claim::Orphaned(Made::Concept(made.id)));
    assert_eq!(registry.release_keys().await.unwrap(), 0);
    assert_eq!(claim(60_000).await.unwrap(), Claim::Orphaned(Made::Concept(made.id)));
    let other = registry.claim_key(tenant, "k", "b", 60_000).await.unwrap();
    assert_eq!(other, Claim::Mismatch);
    // Without a key nothing is recorded.
    add("free").await.unwrap();
}

#[tokio::test]
async fn foreground_generation_is_bound_to_the_key_at_its_end() {
    let (_dir, registry) = crate::tests::test_registry().await;
    let tenant = TenantId::DEFAULT;
    let claim = |lease| registry.claim_key(tenant, "k", "a", lease);
    let made = Made::Generation(GenerationId::new());
    let finish = |claim: KeyClaim| {
        claim.under(async {
            let mut transaction = registry.write().await.unwrap();
            registry.bind_key_if_open(&mut transaction, made).await?;
            transaction.commit().await.map_err(RegistryError::from)
        })
    };
    // The first one's lease expires as soon as it is taken; the second process is killed after the end of the
    // generation, before it responds.
    let slow = first(claim(0).await.unwrap());
    let next = first(claim(0).await.unwrap());
    assert!(matches!(finish(slow).await, Err(RegistryError::LeaseLost)));
    finish(next).await.unwrap();
    assert_eq!(claim(60_000).await.unwrap(), Claim::Orphaned(made));
}

#[tokio::test]
async fn keys_of_dead_processes_and_old_responses_expire() {
    let (_dir, registry) = crate::tests::test_registry().await;
    let tenant = TenantId::DEFAULT;
    first(registry.claim_key(tenant, "dead", "a", 60_000).await.unwrap());
    let done = first(registry.claim_key(tenant, "done", "a", 60_000).await.unwrap());
    registry.store_answer(&done, &answer("x"), 60_000).await.unwrap();
    assert_eq!(registry.release_keys().await.unwrap(), 1);
    first(registry.claim_key(tenant, "dead", "b", 60_000).await.unwrap());
    let failed = first(registry.claim_key(tenant, "failed", "a", 60_000).await.unwrap());
    registry.release_key(&failed).await.unwrap();
    first(registry.claim_key(tenant, "failed", "c", 60_000).await.unwrap());
    let old = first(registry.claim_key(tenant, "old", "a", 60_000).await.unwrap());
    registry.store_answer(&old, &answer("x"), -1).await.unwrap();
    assert_eq!(registry.expire_keys().await.unwrap(), 1);
    assert!(matches!(
        registry.claim_key(tenant, "done", "a", 1).await.unwrap(),
        Claim::Replay(_)
    ));
}

#[tokio::test]
async fn large_responses_are_blobs_removed_with_their_key() {
    let (_dir, registry) = crate::tests::test_registry().await;
    let tenant = TenantId::DEFAULT;
    let claim = || registry.claim_key(tenant, "k", "a", 60_000);
    let large = answer(&"x".repeat(BODY_LIMIT + 1));
    let blobs = || async { registry.blobs.all().await.unwrap().len() };
    registry
        .store_answer(&first(claim().await.unwrap()), &large, 60_000)
        .await
        .unwrap();
    assert_eq!(claim().await.unwrap(), Claim::Replay(large.clone()));
    // For programs with the previous schema it looks like a running request.
    let (inline, status): (Option<Vec<u8>>, Option<i64>) = sqlx::query_as("SELECT body, status FROM idempotency_keys")
        .fetch_one(&registry.pools.reads)
        .await
        .unwrap();
    assert_eq!((inline, status, blobs().await), (None, None, 1));
    assert_eq!(registry.release_keys().await.unwrap(), 0);
    assert_eq!(registry.collect_garbage().await.unwrap(), 0, "a row refers to it");
    let expire = async || {
        sqlx::query("UPDATE idempotency_keys SET expires_at = 1")
            .execute(&registry.pools.writes)
            .await
            .unwrap();
    };
    // Expired, and the key is used again; then expired and removed; then its tenant is deleted.
    expire().await;
    let again = first(claim().await.unwrap());
    assert_eq!(blobs().await, 0);
    registry.store_answer(&again, &large, 60_000).await.unwrap();
    expire().await;
    assert_eq!((registry.expire_keys().await.unwrap(), blobs().await), (1, 0));
    let lost = first(claim().await.unwrap());
    registry.release_key(&lost).await.unwrap();
    registry.store_answer(&lost, &large, 60_000).await.unwrap();
    assert_eq!(blobs().await, 0, "a lost lease leaves no blob");
    let last = first(claim().await.unwrap());
    registry.store_answer(&last, &large, 60_000).await.unwrap();
    assert!(
        registry
            .delete_tenant(tenant, crate::Deletion::default())
            .await
            .unwrap()
    );
    assert_eq!(blobs().await, 0);
}

#[tokio::test]
async fn a_response_goes_with_what_it_contains() {
    let (_dir, registry) = crate::tests::test_registry().await;
    let tenant = TenantId::DEFAULT;
    let claim = |key: &'static str| registry.claim_key(tenant, key, "a", 60_000);
    let made = Made::Generation(GenerationId::new());
    let bind = async |claim: KeyClaim| {
        let mut transaction = registry.write().await.unwrap();
        claim.under(registry.bind_key(&mut transaction, made)).await.unwrap();
        transaction.commit().await.unwrap();
    };
    let (done, runs) = (first(claim("done").await.unwrap()), first(claim("runs").await.unwrap()));
    let other = first(claim("other").await.unwrap());
    bind(done.clone()).await;
    bind(runs.clone()).await;
    let large = answer(&"x".repeat(BODY_LIMIT + 1));
    registry.store_answer(&done, &large, 60_000).await.unwrap();
    registry.store_answer(&other, &answer("other"), 60_000).await.unwrap();
    let mut transaction = registry.write().await.unwrap();
    let blobs = registry.forget_answers(&mut transaction, tenant, made).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(blobs.len(), 1);
    // A request that was still running can no longer store its response.
    registry.store_answer(&runs, &answer("late"), 60_000).await.unwrap();
    for key in ["done", "runs"] {
        assert_eq!(claim(key).await.unwrap(), Claim::Orphaned(made), "{key}");
    }
    assert_eq!(claim("other").await.unwrap(), Claim::Replay(answer("other")));
    // A response that is not stored leaves its key bound to the created object, if there is one.
    let (large, nothing) = (
        first(claim("large").await.unwrap()),
        first(claim("nothing").await.unwrap()),
    );
    bind(large.clone()).await;
    assert!(registry.answer_by_object(&large).await.unwrap());
    assert!(!registry.answer_by_object(&nothing).await.unwrap());
    assert_eq!(claim("large").await.unwrap(), Claim::Orphaned(made));
    assert!(!registry.note_made(&nothing, GenerationId::new()).await.unwrap());
}
