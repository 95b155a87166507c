//! Keys: whether they are required, and who may delete which tenant.

use super::*;

async fn add(registry: &Registry, tenant: TenantId, scopes: &str, expires_at: Option<i64>) -> ApiKey {
    let new = NewKey {
        tenant,
        public_id: uuid::Uuid::new_v4().simple().to_string()[..8].to_owned(),
        hash: "hash".into(),
        name: String::new(),
        scopes: scopes.parse().unwrap(),
        expires_at,
    };
    registry.add_key(&new).await.unwrap()
}

fn by(key: &ApiKey) -> Deletion {
    Deletion {
        asked_with: Some(key.id),
        ..Deletion::default()
    }
}

const ALL: Deletion = Deletion {
    asked_with: None,
    including_the_last_admin_key: true,
};

#[tokio::test]
async fn keys_stay_required_when_the_rows_of_all_keys_are_gone() {
    let (_dir, storage) = test_storage().await;
    let registry = Registry::connect(&storage).await.unwrap();
    assert!(!registry.keys_required().await.unwrap());
    let acme = registry.add_tenant("acme", Quotas::default()).await.unwrap();
    assert!(!registry.keys_required().await.unwrap());
    add(&registry, acme.id, "read", None).await;
    assert!(registry.keys_required().await.unwrap());
    assert!(registry.delete_tenant(acme.id, Deletion::default()).await.unwrap());
    let page = Page { limit: 9, after: None };
    assert!(registry.keys(page).await.unwrap().rows.is_empty());
    assert!(registry.keys_required().await.unwrap());
    let again = Registry::connect(&storage).await.unwrap();
    assert!(again.keys_required().await.unwrap());
}

#[tokio::test]
async fn names_with_u0000_are_unknown_on_both_databases() {
    let (_dir, registry) = test_registry().await;
    for name in ["a\0b", "\0", "default\0"] {
        assert!(registry.tenant(name).await.unwrap().is_none());
        assert!(registry.concept(TenantId::DEFAULT, name).await.unwrap().is_none());
        let changed = registry.rotate_webhook_secret(name, std::time::Duration::ZERO).await;
        assert!(changed.unwrap().is_none());
        assert!(registry.set_quotas(name, Quotas::default()).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn databases_that_have_keys_are_migrated_to_need_them() {
    for with_key in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        {
            let pool = earlier(dir.path(), 5).await;
            if with_key {
                sqlx::query(
                    "INSERT INTO api_keys (id, tenant_id, public_id, hash, name, scopes, created_at, revoked_at)
                     VALUES ('key_1', $1, 'abcdefgh', 'hash', '', 'admin', 1, 2)",
                )
                .bind(TenantId::DEFAULT.to_string())
                .execute(&pool)
                .await
                .unwrap();
            }
        }
        let registry = Registry::open(dir.path()).await.unwrap();
        let pool = &registry.pools.writes;
        sqlx::query("DELETE FROM api_keys").execute(pool).await.unwrap();
        assert_eq!(registry.keys_required().await.unwrap(), with_key);
    }
}

#[tokio::test]
async fn the_last_valid_admin_key_stays() {
    let (_dir, registry) = test_registry().await;
    let mut tenants = vec![];
    for name in ["acme", "globex", "initech", "hooli"] {
        tenants.push(registry.add_tenant(name, Quotas::default()).await.unwrap().id);
    }
    let [acme, globex, initech, hooli] = tenants[..] else {
        unreachable!()
    };
    let admin = add(&registry, acme, "read,admin", None).await;
    // None of these is a valid administrator's key.
    add(&registry, globex, "read,generate,train", None).await;
    add(&registry, globex, "admin", Some(now() - 1)).await;
    let revoked = add(&registry, initech, "admin", None).await;
    assert!(registry.revoke_key(revoked.id).await.unwrap());
    let refused = registry.delete_tenant(acme, Deletion::default()).await;
    assert!(matches!(refused, Err(RegistryError::LastAdminKey)), "{refused:?}");
    assert!(registry.tenant("acme").await.unwrap().is_some());
    let own = registry.delete_tenant(acme, by(&admin)).await;
    assert!(matches!(own, Err(RegistryError::OwnTenant)), "{own:?}");
    let gone = registry.delete_tenant(globex, by(&revoked)).await;
    assert!(matches!(gone, Err(RegistryError::KeyInvalid)), "{gone:?}");
    assert!(registry.delete_tenant(globex, by(&admin)).await.unwrap());
    let other = add(&registry, hooli, "admin", Some(now() + 60_000)).await;
    assert!(registry.delete_tenant(acme, by(&other)).await.unwrap());
    // The command line can override this.
    assert!(registry.delete_tenant(hooli, Deletion::default()).await.is_err());
    assert!(registry.delete_tenant(hooli, ALL).await.unwrap());
    // Without administrators there is none to protect.
    assert!(registry.delete_tenant(initech, Deletion::default()).await.unwrap());
}

#[tokio::test]
async fn two_administrators_cannot_delete_each_other() {
    for _ in 0..8 {
        let (_dir, registry) = test_registry().await;
        let one = registry.add_tenant("one", Quotas::default()).await.unwrap().id;
        let two = registry.add_tenant("two", Quotas::default()).await.unwrap().id;
        let key_of_one = add(&registry, one, "admin", None).await;
        let key_of_two = add(&registry, two, "admin", None).await;
        let (first, second) = tokio::join!(
            registry.delete_tenant(two, by(&key_of_one)),
            registry.delete_tenant(one, by(&key_of_two)),
        );
        let refused = match (first, second) {
            (Ok(true), Err(refused)) | (Err(refused), Ok(true)) => refused,
            other => panic!("{other:?}"),
        };
        assert!(matches!(refused, RegistryError::KeyInvalid), "{refused}");
    }
}
