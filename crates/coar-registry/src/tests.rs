//! Databases of older versions, and isolation between tenants.
//!
//! Every test of this module that uses [`test_registry`] runs on SQLite and files; `scripts/with-postgres.sh` runs
//! them on PostgreSQL and S3 too, selected by two variables.

mod concurrency;
mod keys;

use super::*;

/// A new registry: on SQLite and files; on PostgreSQL if COAR_TEST_DATABASE is the address of a server on which
/// databases can be created, and on S3 if COAR_TEST_BLOBS names a bucket.
pub(crate) async fn test_registry() -> (tempfile::TempDir, Registry) {
    let (dir, storage) = test_storage().await;
    (dir, Registry::connect(&storage).await.unwrap())
}

/// Storage for several processes that share a registry.
pub(crate) async fn test_storage() -> (tempfile::TempDir, Storage) {
    let dir = tempfile::tempdir().unwrap();
    let mut storage = Storage::folder(dir.path());
    let name = format!("coar_test_{}", uuid::Uuid::new_v4().simple());
    if let Ok(server) = std::env::var("COAR_TEST_DATABASE") {
        sqlx::any::install_default_drivers();
        let (address, _) = server.rsplit_once('/').unwrap();
        let pool = sqlx::AnyPool::connect(&server).await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&pool)
            .await
            .unwrap();
        storage.database = Some(format!("{address}/{name}"));
    }
    if let Ok(bucket) = std::env::var("COAR_TEST_BLOBS") {
        storage.blobs = Some(format!("{bucket}/{name}"));
    }
    (dir, storage)
}
use coar_core::concept::ConceptKind;
use coar_core::ids::{ConceptId, ImageId, TenantId, TrainingId};
use coar_core::training::{Preset, TrainingSpec};

/// The writing pool of a database after the given number of migrations.
async fn earlier(dir: &Path, migrations: usize) -> pool::Pool {
    let mut earlier = sqlx::migrate!("../../migrations/sqlite");
    earlier.migrations = earlier.iter().take(migrations).cloned().collect::<Vec<_>>().into();
    db::open_sqlite(&dir.join("coar.sqlite"), &earlier)
        .await
        .unwrap()
        .writes
}

#[tokio::test]
async fn schema_1_is_upgraded_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    let (rex, ink, image) = (ConceptId::new(), ConceptId::new(), ImageId::new());
    let (done, running) = (TrainingId::new(), TrainingId::new());
    let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
    let blobs = Blobs::open(&dir.path().join("blobs")).unwrap();
    let mut hashes = vec![];
    for bytes in [&b"image"[..], b"concept file", b"checkpoint", b"drawn"] {
        hashes.push(blobs.put(bytes.into()).await.unwrap());
    }
    {
        let pool = earlier(dir.path(), 1).await;
        for (id, name, version) in [(rex, "rex", Some(&hashes[1])), (ink, "ink", None)] {
            sqlx::query("INSERT INTO concepts VALUES ($1, $2, 'subject', 'cat', $3, 1000)")
                .bind(id.to_string())
                .bind(name)
                .bind(version)
                .execute(&pool)
                .await
                .unwrap();
        }
        sqlx::query("INSERT INTO concept_pictures VALUES ($1, 0, $2)")
            .bind(rex.to_string())
            .bind(&hashes[0])
            .execute(&pool)
            .await
            .unwrap();
        for (id, concept, status, checkpoint) in [
            (done, rex, "succeeded", None),
            (running, ink, "running", Some(&hashes[2])),
        ] {
            sqlx::query(
                "INSERT INTO trainings (id, concept_id, status, spec, total_steps, checkpoint, checkpoint_step, created_at)
                 VALUES ($1, $2, $3, $4, 40, $5, 20, 1000)",
            )
            .bind(id.to_string())
            .bind(concept.to_string())
            .bind(status)
            .bind(serde_json::to_string(&spec).unwrap())
            .bind(checkpoint)
            .execute(&pool)
            .await
            .unwrap();
        }
        sqlx::query("INSERT INTO images VALUES ($1, $2, 'image/png', 1000)")
            .bind(image.to_string())
            .bind(&hashes[3])
            .execute(&pool)
            .await
            .unwrap();
    }
    let registry = Registry::open(dir.path()).await.unwrap();
    let tenant = TenantId::DEFAULT;
    assert_eq!(registry.collect_garbage().await.unwrap(), 0);
    let concept = registry.concept(tenant, "rex").await.unwrap().unwrap();
    assert_eq!(
        (concept.id, concept.version.as_ref(), concept.version_number),
        (rex, Some(&hashes[1]), Some(1))
    );
    assert_eq!((concept.created_at, concept.images), (1000, vec![hashes[0].clone()]));
    assert_eq!(
        registry.concept(tenant, "ink").await.unwrap().unwrap().version_number,
        None
    );
    let trained = registry.latest_training(tenant, rex).await.unwrap().unwrap();
    assert_eq!(
        (trained.id, trained.status, trained.version),
        (done, TrainingStatus::Succeeded, Some(1))
    );
    assert_eq!((trained.spec, trained.total_steps), (spec, 40));
    // A running training resumes from its checkpoint.
    assert_eq!(registry.release_all().await.unwrap(), 1);
    let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
    assert_eq!((claimed.training.id, claimed.training.resumed_from_step), (running, 20));
    let kept = registry.signed_image(image).await.unwrap().unwrap();
    assert_eq!((kept.tenant, &kept.blob), (tenant, &hashes[3]));
    assert!(
        registry
            .tenant("default")
            .await
            .unwrap()
            .unwrap()
            .webhook_secret
            .starts_with("whsec_")
    );
    assert_eq!(
        registry.server_secret().await.unwrap(),
        registry.server_secret().await.unwrap()
    );
    // Deletion includes the versions' files.
    assert!(registry.delete_concept(tenant, "rex").await.unwrap());
    assert!(registry.blobs.get(&hashes[1]).await.is_err());
}

/// Client-side limits end the wait; server-side limits end the work too.
#[tokio::test]
async fn postgresql_has_server_side_timeouts() {
    let (_dir, registry) = test_registry().await;
    if registry.backend() == Backend::Sqlite {
        return;
    }
    for (name, expected) in [
        ("statement_timeout", "9s"),
        ("lock_timeout", "5s"),
        ("idle_in_transaction_session_timeout", "9s"),
    ] {
        let (value,): (String,) = sqlx::query_as("SELECT current_setting($1)")
            .bind(name)
            .fetch_one(&registry.pools.reads)
            .await
            .unwrap();
        assert_eq!((name, value.as_str()), (name, expected));
    }
    let mut holder = registry.write().await.unwrap();
    registry.hold_name(&mut holder, "test", "name").await.unwrap();
    let mut second = registry.write().await.unwrap();
    let refused = registry.hold_name(&mut second, "test", "name").await.unwrap_err();
    assert!(
        refused.is_transient() && refused.to_string().contains("lock timeout"),
        "{refused}"
    );
}

#[tokio::test]
async fn tenants_have_separate_names_and_are_deleted_completely() {
    let (_dir, registry) = test_registry().await;
    let acme = registry.add_tenant("acme", Quotas::default()).await.unwrap();
    assert!(matches!(
        registry.add_tenant("acme", Quotas::default()).await,
        Err(RegistryError::TenantTaken(name)) if name == "acme"
    ));
    let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
    let mut trainings = vec![];
    for tenant in [TenantId::DEFAULT, acme.id] {
        let new = NewConcept {
            class_noun: Some("cat".into()),
            images: vec![registry.blobs.put(tenant.to_string().into()).await.unwrap()],
            ..NewConcept::new("rex", ConceptKind::Subject)
        };
        trainings.push(registry.add_concept(tenant, &new, &spec).await.unwrap().1.id);
    }
    assert!(registry.training(acme.id, trainings[0]).await.unwrap().is_none());
    assert!(registry.cancel_training(acme.id, trainings[0]).await.unwrap().is_none());
    let untouched = registry
        .training(TenantId::DEFAULT, trainings[0])
        .await
        .unwrap()
        .unwrap();
    assert_eq!(untouched.status, TrainingStatus::Queued);
    assert!(registry.delete_tenant(acme.id, Deletion::default()).await.unwrap());
    assert!(registry.training(acme.id, trainings[1]).await.unwrap().is_none());
    assert_eq!(registry.concepts(TenantId::DEFAULT).await.unwrap().len(), 1);
    assert_eq!(registry.blobs.all().await.unwrap().len(), 1);
    let page = Page { limit: 1, after: None };
    let listed = registry.tenants(page).await.unwrap();
    assert_eq!((listed.rows[0].name.as_str(), listed.has_more), ("default", false));
}

#[test]
fn fingerprint_ignores_the_name() {
    let spec = |name: &str| TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, name, Some("cat"), 6);
    let images = vec!["a".to_owned(), "b".to_owned()];
    let rex = input_fingerprint(&images, &spec("rex")).unwrap();
    assert_eq!(rex, input_fingerprint(&images, &spec("max")).unwrap());
    assert_ne!(rex, input_fingerprint(&images[..1], &spec("rex")).unwrap());
    let longer = TrainingSpec {
        steps: 7,
        ..spec("rex")
    };
    assert_ne!(rex, input_fingerprint(&images, &longer).unwrap());
}

#[tokio::test]
async fn schema_2_keeps_queued_and_running_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<coar_core::ids::GenerationId> = (0..3).map(|_| coar_core::ids::GenerationId::new()).collect();
    {
        let pool = earlier(dir.path(), 2).await;
        let settings = serde_json::json!({
            "n": 1, "width": 96, "height": 96, "seed": 1, "first_index": 0, "guidance_scale": 2.0, "temperature": 1.0,
            "top_k": 20, "identity_mask": true, "output_format": "png", "output_compression": 100, "partial_images": 0,
        });
        for (id, status, background) in [(ids[0], "queued", 1), (ids[1], "running", 1), (ids[2], "running", 0)] {
            sqlx::query(
                "INSERT INTO generations (id, tenant_id, status, background, prompt, request, total, attempt, created_at)
                 VALUES ($1, $2, $3, $4, 'a cat', $5, 36, 1, 1000)",
            )
            .bind(id.to_string())
            .bind(TenantId::DEFAULT.to_string())
            .bind(status)
            .bind(background)
            .bind(settings.to_string())
            .execute(&pool)
            .await
            .unwrap();
        }
        sqlx::query(
            "INSERT INTO idempotency_keys (tenant_id, key, fingerprint, created_at, expires_at) VALUES ($1, 'k', 'f', 1, 2)",
        )
        .bind(TenantId::DEFAULT.to_string())
        .execute(&pool)
        .await
        .unwrap();
    }
    let registry = Registry::open(dir.path()).await.unwrap();
    // The third no longer has a waiting caller; the second is requeued and runs after the first.
    let lost = registry.left_generations().await.unwrap();
    assert_eq!(lost.iter().map(|left| left.id).collect::<Vec<_>>(), [ids[2]]);
    let mut taken = vec![];
    while let Some(next) = registry.claim_generation().await.unwrap() {
        taken.push((next.id, next.attempt, next.new.priority));
    }
    assert_eq!(taken, [(ids[0], 1, 0), (ids[1], 1, 0)]);
    assert_eq!(registry.release_keys().await.unwrap(), 1);
    // A program that is older than the database requires refuses it and changes nothing.
    sqlx::query("UPDATE settings SET value = '99' WHERE key = 'schema_requires'")
        .execute(&registry.pools.writes)
        .await
        .unwrap();
    let refused = Registry::open(dir.path()).await;
    assert!(matches!(refused, Err(RegistryError::Newer(schema)) if schema == "99"));
}

#[tokio::test]
async fn rate_limits_count_images_and_requests_apart() {
    let (_dir, registry) = test_registry().await;
    let one = TenantId::DEFAULT;
    let two = registry.add_tenant("two", Quotas::default()).await.unwrap().id;
    let second = registry.admit_images(one, 3, 5).await.unwrap().unwrap();
    for _ in 0..2 {
        registry.admit_request(one, 2).await.unwrap().unwrap();
    }
    let full = registry.admit_request(one, 2).await.unwrap().unwrap_err();
    assert_eq!(full.count, 2);
    assert!(full.wait <= std::time::Duration::from_secs(60), "{full:?}");
    let full = registry.admit_images(one, 3, 5).await.unwrap().unwrap_err();
    assert_eq!(full.count, 3);
    registry.admit_images(one, 2, 5).await.unwrap().unwrap();
    registry.take_back(one, second, 3).await.unwrap();
    registry.admit_images(one, 3, 5).await.unwrap().unwrap();
    registry.admit_request(two, 2).await.unwrap().unwrap();
    // Counts that are a minute old no longer matter and are removed.
    sqlx::query("UPDATE picture_tallies SET second = second - 60")
        .execute(&registry.pools.writes)
        .await
        .unwrap();
    registry.admit_request(one, 1).await.unwrap().unwrap();
    registry.expire_tallies().await.unwrap();
    let (left,): (i64,) = sqlx::query_as("SELECT count(*) FROM picture_tallies")
        .fetch_one(&registry.pools.reads)
        .await
        .unwrap();
    assert_eq!(left, 1);
}
