//! Concepts and their reference pictures.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::blobs::content_hash;
use super::trainings::{Training, insert_training};
use super::{Registry, RegistryError, identifier, now};
use crate::concept::ConceptKind;
use crate::ids::{ConceptId, TenantId, TrainingId};
use crate::training::TrainingSpec;

/// A registered concept.
#[derive(Debug, Clone, PartialEq)]
pub struct Concept {
    pub id: ConceptId,
    pub tenant: TenantId,
    pub name: String,
    pub kind: ConceptKind,
    pub class_noun: Option<String>,
    pub description: Option<String>,
    /// JSON object of strings.
    pub metadata: serde_json::Value,
    /// Hash of the concept file in use; `None` until it is trained.
    pub version: Option<String>,
    /// The number of that version, from 1.
    pub version_number: Option<u32>,
    pub created_at: i64,
    pub updated_at: i64,
    /// Blobs of the reference pictures, in order.
    pub pictures: Vec<String>,
}

/// What a registration stores.
#[derive(Debug, Clone)]
pub struct NewConcept {
    pub name: String,
    pub kind: ConceptKind,
    pub class_noun: Option<String>,
    /// Blobs of the reference pictures; stored before this is called.
    pub pictures: Vec<String>,
}

fn concept(row: &SqliteRow) -> Result<Concept, RegistryError> {
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
        version_number: row.try_get("version_number")?,
        created_at: row.try_get("created_at")?,
        updated_at: row.try_get("updated_at")?,
        pictures: vec![],
    })
}

impl Registry {
    /// Stores a concept with its training, all or nothing.
    ///
    /// # Errors
    /// When the name is taken or the database fails.
    pub async fn add_concept(
        &self,
        tenant: TenantId,
        new: &NewConcept,
        spec: &TrainingSpec,
    ) -> Result<(Concept, Training), RegistryError> {
        let mut transaction = self.write().await?;
        let concept = insert_concept(&mut transaction, tenant, new, None).await?;
        let input = input_fingerprint(&new.pictures, spec)?;
        let training = insert_training(&mut transaction, &concept, spec, &input).await?;
        transaction.commit().await?;
        Ok((concept, training))
    }

    /// Stores a concept whose file is there already.
    ///
    /// # Errors
    /// When the name is taken or the database fails.
    pub async fn add_ready_concept(
        &self,
        tenant: TenantId,
        new: &NewConcept,
        version: &str,
    ) -> Result<Concept, RegistryError> {
        let mut transaction = self.write().await?;
        let concept = insert_concept(&mut transaction, tenant, new, Some(version)).await?;
        transaction.commit().await?;
        Ok(concept)
    }

    /// Every concept of a tenant, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn concepts(&self, tenant: TenantId) -> Result<Vec<Concept>, RegistryError> {
        let rows = sqlx::query("SELECT * FROM concepts WHERE tenant_id = $1 ORDER BY created_at, id")
            .bind(tenant.to_string())
            .fetch_all(&self.pool)
            .await?;
        let mut concepts = rows.iter().map(concept).collect::<Result<Vec<_>, _>>()?;
        for concept in &mut concepts {
            concept.pictures = self.pictures(concept.id).await?;
        }
        Ok(concepts)
    }

    /// A tenant's concept by its name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn concept(&self, tenant: TenantId, name: &str) -> Result<Option<Concept>, RegistryError> {
        let row = sqlx::query("SELECT * FROM concepts WHERE tenant_id = $1 AND name = $2")
            .bind(tenant.to_string())
            .bind(name)
            .fetch_optional(&self.pool)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let mut concept = concept(&row)?;
        concept.pictures = self.pictures(concept.id).await?;
        Ok(Some(concept))
    }

    /// Blobs of a concept's reference pictures, in order.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn pictures(&self, id: ConceptId) -> Result<Vec<String>, RegistryError> {
        let rows: Vec<(String,)> =
            sqlx::query_as("SELECT blob FROM concept_pictures WHERE concept_id = $1 ORDER BY position")
                .bind(id.to_string())
                .fetch_all(&self.pool)
                .await?;
        Ok(rows.into_iter().map(|(blob,)| blob).collect())
    }

    /// Removes a concept, its trainings, and every blob that only they referred to. False where there is none.
    ///
    /// # Errors
    /// When the database or the blob store fails.
    pub async fn delete_concept(&self, tenant: TenantId, name: &str) -> Result<bool, RegistryError> {
        let mut transaction = self.write().await?;
        let blobs: Vec<(Option<String>,)> = sqlx::query_as(
            "WITH wanted AS (SELECT id FROM concepts WHERE tenant_id = $1 AND name = $2)
             SELECT blob FROM concept_pictures WHERE concept_id IN wanted
             UNION SELECT hash FROM concept_versions WHERE concept_id IN wanted
             UNION SELECT checkpoint FROM trainings WHERE concept_id IN wanted
             UNION SELECT p.blob FROM training_previews p JOIN trainings t ON t.id = p.training_id
                   WHERE t.concept_id IN wanted",
        )
        .bind(tenant.to_string())
        .bind(name)
        .fetch_all(&mut *transaction)
        .await?;
        let deleted = sqlx::query("DELETE FROM concepts WHERE tenant_id = $1 AND name = $2")
            .bind(tenant.to_string())
            .bind(name)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let blobs: Vec<String> = blobs.into_iter().filter_map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(deleted.rows_affected() > 0)
    }

    /// The newest training of a concept.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn latest_training(&self, tenant: TenantId, id: ConceptId) -> Result<Option<Training>, RegistryError> {
        let row: Option<(String,)> = sqlx::query_as(
            "SELECT id FROM trainings WHERE tenant_id = $1 AND concept_id = $2 ORDER BY id DESC LIMIT 1",
        )
        .bind(tenant.to_string())
        .bind(id.to_string())
        .fetch_optional(&self.pool)
        .await?;
        let Some((id,)) = row else { return Ok(None) };
        let id: TrainingId = id
            .parse()
            .map_err(|_| RegistryError::Row(format!("training id `{id}`")))?;
        self.training(tenant, id).await
    }
}

/// SHA-256 over the reference pictures and every setting but the name: equal inputs train equal concepts.
///
/// # Errors
/// When the settings cannot be written as JSON.
pub fn input_fingerprint(pictures: &[String], spec: &TrainingSpec) -> Result<String, RegistryError> {
    let nameless = TrainingSpec {
        name: String::new(),
        ..spec.clone()
    };
    let text = serde_json::to_vec(&(pictures, nameless)).map_err(|error| RegistryError::Row(error.to_string()))?;
    Ok(content_hash(&text))
}

async fn insert_concept(
    transaction: &mut sqlx::Transaction<'static, sqlx::Sqlite>,
    tenant: TenantId,
    new: &NewConcept,
    version: Option<&str>,
) -> Result<Concept, RegistryError> {
    let (id, created_at) = (ConceptId::new(), now());
    let inserted = sqlx::query(
        "INSERT INTO concepts (id, tenant_id, name, kind, class_noun, version, version_number, created_at, updated_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)",
    )
    .bind(id.to_string())
    .bind(tenant.to_string())
    .bind(&new.name)
    .bind(new.kind.as_str())
    .bind(&new.class_noun)
    .bind(version)
    .bind(version.map(|_| 1))
    .bind(created_at)
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
    for (position, blob) in new.pictures.iter().enumerate() {
        sqlx::query("INSERT INTO concept_pictures (concept_id, position, blob) VALUES ($1, $2, $3)")
            .bind(id.to_string())
            .bind(position as i64)
            .bind(blob)
            .execute(&mut **transaction)
            .await?;
    }
    if let Some(hash) = version {
        sqlx::query("INSERT INTO concept_versions (concept_id, number, hash, created_at) VALUES ($1, 1, $2, $3)")
            .bind(id.to_string())
            .bind(hash)
            .bind(created_at)
            .execute(&mut **transaction)
            .await?;
    }
    Ok(Concept {
        id,
        tenant,
        name: new.name.clone(),
        kind: new.kind,
        class_noun: new.class_noun.clone(),
        description: None,
        metadata: serde_json::json!({}),
        version: version.map(str::to_owned),
        version_number: version.map(|_| 1),
        created_at,
        updated_at: created_at,
        pictures: new.pictures.clone(),
    })
}
