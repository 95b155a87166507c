//! Concepts and their reference images.

use std::collections::BTreeMap;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::blobs::content_hash;
use super::db::{identifier, is_unstorable, list, locking, number, optional_number};
use super::pool::Transaction;
use super::trainings::{NewTraining, Training, insert_training};
use super::{Listed, Made, Page, Queue, Quotas, Registry, RegistryError, Usage, now};
use coar_core::concept::ConceptKind;
use coar_core::engine::ConceptTokens;
use coar_core::ids::{ConceptId, TenantId};
use coar_core::training::TrainingSpec;

/// Key-value pairs that callers attach to an object.
pub type Metadata = BTreeMap<String, String>;

/// A registered concept.
#[derive(Debug, Clone, PartialEq)]
pub struct Concept {
    pub id: ConceptId,
    pub tenant: TenantId,
    pub name: String,
    pub kind: ConceptKind,
    pub class_noun: Option<String>,
    pub description: Option<String>,
    pub metadata: Metadata,
    /// Hash of the concept file in use; `None` until it is trained.
    pub version: Option<String>,
    /// The number of that version, from 1.
    pub version_number: Option<u32>,
    /// When that version was created.
    pub version_created_at: Option<i64>,
    /// Context tokens of that version; `None` if it was stored by an earlier release.
    pub tokens: Option<ConceptTokens>,
    /// How many versions there are.
    pub versions: u32,
    pub created_at: i64,
    pub updated_at: i64,
    /// Blobs of the reference images, in order.
    pub images: Vec<String>,
}

/// Input of a registration.
#[derive(Debug, Clone)]
pub struct NewConcept {
    pub name: String,
    pub kind: ConceptKind,
    pub class_noun: Option<String>,
    /// Blobs of the reference images; stored before this is called.
    pub images: Vec<String>,
    /// Hashes of the uploaded files from which the images were made, in the same order.
    pub uploads: Vec<String>,
    /// Size in bytes of everything that is added.
    pub bytes: u64,
    pub description: Option<String>,
    pub metadata: Metadata,
    /// Webhook for the end of the first training.
    pub webhook_url: Option<String>,
    /// Priority of the first training.
    pub priority: i32,
    /// The tenant's quotas.
    pub quotas: Quotas,
}

impl NewConcept {
    /// A registration with defaults for all optional values.
    pub fn new(name: impl Into<String>, kind: ConceptKind) -> Self {
        Self {
            name: name.into(),
            kind,
            class_noun: None,
            images: vec![],
            uploads: vec![],
            bytes: 0,
            description: None,
            metadata: Metadata::new(),
            webhook_url: None,
            priority: 0,
            quotas: Quotas::default(),
        }
    }
}

/// The state of a concept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConceptStatus {
    /// It has no version yet, and its newest training is queued or running.
    Training,
    /// It has a version.
    Ready,
    /// It has no version, and its newest training failed.
    Failed,
    /// It has no version, and its newest training was cancelled.
    Cancelled,
}

impl ConceptStatus {
    /// The name used in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl std::str::FromStr for ConceptStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Training, Self::Ready, Self::Failed, Self::Cancelled];
        let known = all.into_iter().find(|status| status.as_str() == text);
        known.ok_or_else(|| format!("is `{text}`; expected `training`, `ready`, `failed` or `cancelled`"))
    }
}

/// Filter for concepts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConceptFilter {
    pub kind: Option<ConceptKind>,
    pub status: Option<ConceptStatus>,
}

/// Changes to a concept; `None` leaves a field as it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConceptChange {
    pub name: Option<String>,
    pub description: Option<Option<String>>,
    pub metadata: Option<Metadata>,
    /// The number of the version to use from now on.
    pub version: Option<u32>,
}

/// Every column of a [`Concept`].
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT c.*,
             (SELECT string_agg(p.blob, ',' ORDER BY p.position) FROM concept_pictures p WHERE p.concept_id = c.id)
             AS images,
             (SELECT count(*) FROM concept_versions v WHERE v.concept_id = c.id) AS versions,
             used.created_at AS version_created_at, used.text_tokens, used.image_tokens
             FROM concepts c LEFT JOIN concept_versions used
             ON used.concept_id = c.id AND used.number = c.version_number ",
            $rest
        )
    };
}

fn concept(row: &AnyRow) -> Result<Concept, RegistryError> {
    let text = |column: &str| row.try_get::<String, _>(column).map_err(RegistryError::from);
    Ok(Concept {
        id: identifier(row, "id")?,
        tenant: identifier(row, "tenant_id")?,
        name: text("name")?,
        kind: text("kind")?.parse().map_err(RegistryError::Row)?,
        class_noun: row.try_get("class_noun")?,
        description: row.try_get("description")?,
        metadata: serde_json::from_str(&text("metadata")?).map_err(|error| RegistryError::Row(error.to_string()))?,
        version: row.try_get("version")?,
        version_number: optional_number(row, "version_number")?,
        version_created_at: row.try_get("version_created_at")?,
        tokens: match (
            optional_number(row, "text_tokens")?,
            optional_number(row, "image_tokens")?,
        ) {
            (Some(text), Some(image)) => Some(ConceptTokens { text, image }),
            _ => None,
        },
        versions: number(row, "versions")?,
        created_at: row.try_get("created_at")?,
        updated_at: row.try_get("updated_at")?,
        images: list(row, "images")?,
    })
}

impl Registry {
    /// Stores a concept and its training atomically.
    ///
    /// # Errors
    /// `NameTaken`, `QuotaExceeded`; when the database fails.
    pub async fn add_concept(
        &self,
        tenant: TenantId,
        new: &NewConcept,
        spec: &TrainingSpec,
    ) -> Result<(Concept, Training), RegistryError> {
        let mut transaction = self.write().await?;
        let addition = Usage {
            concepts: 1,
            trainings: 1,
            bytes: new.bytes,
        };
        self.check_quota(&mut transaction, tenant, new.quotas, addition).await?;
        self.check_queue_in(&mut *transaction, Queue::Trainings, tenant).await?;
        let concept = insert_concept(&mut transaction, tenant, new, None).await?;
        let input = input_fingerprint(&new.images, spec)?;
        let first = NewTraining {
            spec,
            input: &input,
            webhook_url: new.webhook_url.as_deref(),
            priority: new.priority,
            quotas: new.quotas,
        };
        let training = insert_training(&mut transaction, &concept, first).await?;
        self.bind_key(&mut transaction, Made::Concept(concept.id)).await?;
        transaction.commit().await?;
        Ok((concept, training))
    }

    /// Stores a concept whose file already exists.
    ///
    /// # Errors
    /// `NameTaken`, `QuotaExceeded`; when the database fails.
    pub async fn add_ready_concept(
        &self,
        tenant: TenantId,
        new: &NewConcept,
        (version, tokens): (&str, ConceptTokens),
    ) -> Result<Concept, RegistryError> {
        let mut transaction = self.write().await?;
        let addition = Usage {
            concepts: 1,
            trainings: 0,
            bytes: new.bytes,
        };
        self.check_quota(&mut transaction, tenant, new.quotas, addition).await?;
        let concept = insert_concept(&mut transaction, tenant, new, Some((version, tokens))).await?;
        self.bind_key(&mut transaction, Made::Concept(concept.id)).await?;
        transaction.commit().await?;
        Ok(concept)
    }

    /// Records the context tokens of a concept version that was stored by an earlier release.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_tokens(&self, id: ConceptId, number: u32, tokens: ConceptTokens) -> Result<(), RegistryError> {
        sqlx::query(
            "UPDATE concept_versions SET text_tokens = $1, image_tokens = $2 WHERE concept_id = $3 AND number = $4",
        )
        .bind(i64::from(tokens.text))
        .bind(i64::from(tokens.image))
        .bind(id.to_string())
        .bind(i64::from(number))
        .execute(&self.pools.writes)
        .await?;
        Ok(())
    }

    /// Every concept of a tenant, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn concepts(&self, tenant: TenantId) -> Result<Vec<Concept>, RegistryError> {
        let rows = sqlx::query(select!("WHERE c.tenant_id = $1 ORDER BY c.id"))
            .bind(tenant.to_string())
            .fetch_all(&self.pools.reads)
            .await?;
        rows.iter().map(concept).collect()
    }

    /// A page of a tenant's concepts, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn concepts_page(
        &self,
        tenant: TenantId,
        filter: ConceptFilter,
        page: Page<ConceptId>,
    ) -> Result<Listed<Concept>, RegistryError> {
        let rows = sqlx::query(select!(
            "WHERE c.tenant_id = $1 AND c.id < $2 AND ($3 IS NULL OR c.kind = $3)
             AND ($4 IS NULL OR $4 = CASE WHEN c.version IS NOT NULL THEN 'ready' ELSE coalesce((
                 SELECT CASE WHEN t.status IN ('failed', 'cancelled') THEN t.status ELSE 'training' END FROM trainings t
                 WHERE t.concept_id = c.id ORDER BY t.id DESC LIMIT 1), 'training') END)
             ORDER BY c.id DESC LIMIT $5"
        ))
        .bind(tenant.to_string())
        .bind(page.after())
        .bind(filter.kind.map(ConceptKind::as_str))
        .bind(filter.status.map(ConceptStatus::as_str))
        .bind(page.fetched())
        .fetch_all(&self.pools.reads)
        .await?;
        Ok(page.cut(rows.iter().map(concept).collect::<Result<_, _>>()?))
    }

    /// A tenant's concept by name or identifier; no name looks like an identifier.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn concept(&self, tenant: TenantId, name: &str) -> Result<Option<Concept>, RegistryError> {
        if is_unstorable(name) {
            return Ok(None);
        }
        let row = sqlx::query(select!("WHERE c.tenant_id = $1 AND (c.name = $2 OR c.id = $2)"))
            .bind(tenant.to_string())
            .bind(name)
            .fetch_optional(&self.pools.reads)
            .await?;
        row.as_ref().map(concept).transpose()
    }

    /// Changes a concept; `None` if it was deleted.
    ///
    /// # Errors
    /// `NameTaken`, `NoVersion`; when the database fails.
    pub async fn change_concept(
        &self,
        id: ConceptId,
        change: &ConceptChange,
    ) -> Result<Option<Concept>, RegistryError> {
        let mut transaction = self.write().await?;
        self.hold_concept(&mut transaction, id).await?;
        let row = sqlx::query(select!("WHERE c.id = $1"))
            .bind(id.to_string())
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let before = concept(&row)?;
        let (mut hash, mut number) = (before.version, before.version_number);
        if let Some(wanted) = change.version {
            let found: Option<(String,)> =
                sqlx::query_as("SELECT hash FROM concept_versions WHERE concept_id = $1 AND number = $2")
                    .bind(id.to_string())
                    .bind(i64::from(wanted))
                    .fetch_optional(&mut *transaction)
                    .await?;
            let (found,) = found.ok_or(RegistryError::NoVersion(wanted))?;
            (hash, number) = (Some(found), Some(wanted));
        }
        let name = change.name.as_ref().unwrap_or(&before.name);
        let metadata = serde_json::to_string(change.metadata.as_ref().unwrap_or(&before.metadata));
        let changed = sqlx::query(
            "UPDATE concepts SET name = $1, description = $2, metadata = $3, version = $4, version_number = $5,
             updated_at = $6 WHERE id = $7",
        )
        .bind(name)
        .bind(change.description.as_ref().unwrap_or(&before.description))
        .bind(metadata.map_err(|error| RegistryError::Row(error.to_string()))?)
        .bind(hash)
        .bind(number.map(i64::from))
        .bind(now())
        .bind(id.to_string())
        .execute(&mut *transaction)
        .await;
        match changed {
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                return Err(RegistryError::NameTaken(name.clone()));
            }
            other => {
                other?;
            }
        }
        let row = sqlx::query(select!("WHERE c.id = $1"))
            .bind(id.to_string())
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(Some(concept(&row)?))
    }

    /// The name of another concept of the tenant that was trained from the same input; the oldest of several.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn trained_alike(
        &self,
        tenant: TenantId,
        input: &str,
        except: ConceptId,
    ) -> Result<Option<String>, RegistryError> {
        let row: Option<(String,)> = sqlx::query_as(
            "SELECT c.name FROM trainings t JOIN concepts c ON c.id = t.concept_id
             WHERE t.tenant_id = $1 AND t.input_fingerprint = $2 AND t.status = 'succeeded' AND c.id != $3
             ORDER BY t.id LIMIT 1",
        )
        .bind(tenant.to_string())
        .bind(input)
        .bind(except.to_string())
        .fetch_optional(&self.pools.reads)
        .await?;
        Ok(row.map(|(name,)| name))
    }

    /// Whether a concept's training from that input is queued, running, or has succeeded.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_trained_from(&self, id: ConceptId, input: &str) -> Result<bool, RegistryError> {
        let found = sqlx::query(
            "SELECT id FROM trainings WHERE concept_id = $1 AND input_fingerprint = $2
             AND status IN ('queued', 'running', 'succeeded') LIMIT 1",
        )
        .bind(id.to_string())
        .bind(input)
        .fetch_optional(&self.pools.reads)
        .await?;
        Ok(found.is_some())
    }

    /// Blobs of a concept's reference images, in order.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn reference_images(&self, id: ConceptId) -> Result<Vec<String>, RegistryError> {
        let rows: Vec<(String,)> =
            sqlx::query_as("SELECT blob FROM concept_pictures WHERE concept_id = $1 ORDER BY position")
                .bind(id.to_string())
                .fetch_all(&self.pools.reads)
                .await?;
        Ok(rows.into_iter().map(|(blob,)| blob).collect())
    }

    /// Whether a concept's reference images were made from exactly these files, in this order. `hashes` are those of
    /// the files.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn was_uploaded_as(&self, id: ConceptId, hashes: &[String]) -> Result<bool, RegistryError> {
        let rows: Vec<(Option<String>,)> =
            sqlx::query_as("SELECT upload FROM concept_pictures WHERE concept_id = $1 ORDER BY position")
                .bind(id.to_string())
                .fetch_all(&self.pools.reads)
                .await?;
        let known = rows.iter().map(|(upload,)| upload.as_ref());
        Ok(!rows.is_empty() && known.eq(hashes.iter().map(Some)))
    }

    /// Removes a concept by name or identifier, with its versions, trainings, previews, and every blob that nothing
    /// else refers to. False if there is none.
    ///
    /// # Errors
    /// When the database or the blob store fails.
    pub async fn delete_concept(&self, tenant: TenantId, name: &str) -> Result<bool, RegistryError> {
        let mut transaction = self.write().await?;
        // Find and lock in one step. A worker that publishes a version concurrently either comes first or finds
        // nothing, and the concept that is deleted below is this one, even if it or another is renamed.
        let statement = locking!(
            self.backend,
            "SELECT id FROM concepts WHERE tenant_id = $1 AND (name = $2 OR id = $2)",
            " FOR UPDATE"
        );
        let found: Option<(String,)> = sqlx::query_as(statement)
            .bind(tenant.to_string())
            .bind(name)
            .fetch_optional(&mut *transaction)
            .await?;
        let Some((id,)) = found else { return Ok(false) };
        let blobs: Vec<(Option<String>,)> = sqlx::query_as(
            "SELECT blob FROM concept_pictures WHERE concept_id = $1
             UNION SELECT hash FROM concept_versions WHERE concept_id = $1
             UNION SELECT checkpoint FROM trainings WHERE concept_id = $1
             UNION SELECT p.blob FROM training_previews p JOIN trainings t ON t.id = p.training_id
                   WHERE t.concept_id = $1",
        )
        .bind(&id)
        .fetch_all(&mut *transaction)
        .await?;
        sqlx::query("DELETE FROM concepts WHERE id = $1")
            .bind(&id)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let blobs: Vec<String> = blobs.into_iter().filter_map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(true)
    }

    /// The newest training of a concept.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn latest_training(&self, tenant: TenantId, id: ConceptId) -> Result<Option<Training>, RegistryError> {
        Ok(self.latest_trainings(tenant, &[id]).await?.pop())
    }
}

/// SHA-256 over the reference images and all settings but the name: equal inputs train equal concepts.
///
/// # Errors
/// When the settings cannot be written as JSON.
pub fn input_fingerprint(images: &[String], spec: &TrainingSpec) -> Result<String, RegistryError> {
    let nameless = TrainingSpec {
        name: String::new(),
        ..spec.clone()
    };
    let text = serde_json::to_vec(&(images, nameless)).map_err(|error| RegistryError::Row(error.to_string()))?;
    Ok(content_hash(&text))
}

async fn insert_concept(
    transaction: &mut Transaction,
    tenant: TenantId,
    new: &NewConcept,
    version: Option<(&str, ConceptTokens)>,
) -> Result<Concept, RegistryError> {
    let (id, created_at) = (ConceptId::new(), now());
    let inserted = sqlx::query(
        "INSERT INTO concepts (id, tenant_id, name, kind, class_noun, version, version_number, created_at, updated_at,
         description, metadata) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8, $9, $10)",
    )
    .bind(id.to_string())
    .bind(tenant.to_string())
    .bind(&new.name)
    .bind(new.kind.as_str())
    .bind(&new.class_noun)
    .bind(version.map(|(hash, _)| hash))
    .bind(version.map(|_| 1_i64))
    .bind(created_at)
    .bind(&new.description)
    .bind(serde_json::to_string(&new.metadata).map_err(|error| RegistryError::Row(error.to_string()))?)
    .execute(&mut **transaction)
    .await;
    match inserted {
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
            return Err(RegistryError::NameTaken(new.name.clone()));
        }
        other => {
            other?;
        }
    }
    for (position, blob) in new.images.iter().enumerate() {
        sqlx::query("INSERT INTO concept_pictures (concept_id, position, blob, upload) VALUES ($1, $2, $3, $4)")
            .bind(id.to_string())
            .bind(position as i64)
            .bind(blob)
            .bind(new.uploads.get(position))
            .execute(&mut **transaction)
            .await?;
    }
    if let Some((hash, tokens)) = version {
        sqlx::query(
            "INSERT INTO concept_versions (concept_id, number, hash, created_at, text_tokens, image_tokens)
             VALUES ($1, 1, $2, $3, $4, $5)",
        )
        .bind(id.to_string())
        .bind(hash)
        .bind(created_at)
        .bind(i64::from(tokens.text))
        .bind(i64::from(tokens.image))
        .execute(&mut **transaction)
        .await?;
    }
    Ok(Concept {
        id,
        tenant,
        name: new.name.clone(),
        kind: new.kind,
        class_noun: new.class_noun.clone(),
        description: new.description.clone(),
        metadata: new.metadata.clone(),
        version: version.map(|(hash, _)| hash.to_owned()),
        version_number: version.map(|_| 1),
        version_created_at: version.map(|_| created_at),
        tokens: version.map(|(_, tokens)| tokens),
        versions: version.is_some().into(),
        created_at,
        updated_at: created_at,
        images: new.images.clone(),
    })
}
