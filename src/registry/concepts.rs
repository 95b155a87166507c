//! Concepts and their reference pictures.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::trainings::{Training, insert_training};
use super::{Registry, RegistryError, now};
use crate::concept::ConceptKind;
use crate::ids::{ConceptId, TrainingId};
use crate::training::TrainingSpec;

/// A registered concept.
#[derive(Debug, Clone, PartialEq)]
pub struct Concept {
    pub id: ConceptId,
    pub name: String,
    pub kind: ConceptKind,
    pub class_noun: Option<String>,
    /// Hash of the concept file; `None` until it is trained.
    pub version: Option<String>,
    pub created_at: i64,
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
    let id = text("id")?;
    Ok(Concept {
        id: id
            .parse()
            .map_err(|_| RegistryError::Row(format!("concept id `{id}`")))?,
        name: text("name")?,
        kind: text("kind")?.parse().map_err(RegistryError::Row)?,
        class_noun: row.try_get("class_noun")?,
        version: row.try_get("version")?,
        created_at: row.try_get("created_at")?,
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
        new: &NewConcept,
        spec: &TrainingSpec,
    ) -> Result<(Concept, Training), RegistryError> {
        let mut transaction = self.write().await?;
        let concept = insert_concept(&mut transaction, new, None).await?;
        let training = insert_training(&mut transaction, concept.id, spec).await?;
        transaction.commit().await?;
        Ok((concept, training))
    }

    /// Stores a concept whose file is there already.
    ///
    /// # Errors
    /// When the name is taken or the database fails.
    pub async fn add_ready_concept(&self, new: &NewConcept, version: &str) -> Result<Concept, RegistryError> {
        let mut transaction = self.write().await?;
        let concept = insert_concept(&mut transaction, new, Some(version)).await?;
        transaction.commit().await?;
        Ok(concept)
    }

    /// Every concept, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn concepts(&self) -> Result<Vec<Concept>, RegistryError> {
        let rows = sqlx::query("SELECT * FROM concepts ORDER BY created_at, id")
            .fetch_all(&self.pool)
            .await?;
        let mut concepts = rows.iter().map(concept).collect::<Result<Vec<_>, _>>()?;
        for concept in &mut concepts {
            concept.pictures = self.pictures(concept.id).await?;
        }
        Ok(concepts)
    }

    /// A concept by its name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn concept(&self, name: &str) -> Result<Option<Concept>, RegistryError> {
        let row = sqlx::query("SELECT * FROM concepts WHERE name = $1")
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
    pub async fn delete_concept(&self, name: &str) -> Result<bool, RegistryError> {
        let mut transaction = self.write().await?;
        let blobs: Vec<(Option<String>,)> = sqlx::query_as(
            "SELECT blob FROM concept_pictures p JOIN concepts c ON c.id = p.concept_id WHERE c.name = $1
             UNION SELECT version FROM concepts WHERE name = $1
             UNION SELECT checkpoint FROM trainings t JOIN concepts c ON c.id = t.concept_id WHERE c.name = $1",
        )
        .bind(name)
        .fetch_all(&mut *transaction)
        .await?;
        let deleted = sqlx::query("DELETE FROM concepts WHERE name = $1")
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
    pub async fn latest_training(&self, id: ConceptId) -> Result<Option<Training>, RegistryError> {
        let row: Option<(String,)> =
            sqlx::query_as("SELECT id FROM trainings WHERE concept_id = $1 ORDER BY created_at DESC, id DESC LIMIT 1")
                .bind(id.to_string())
                .fetch_optional(&self.pool)
                .await?;
        let Some((id,)) = row else { return Ok(None) };
        let id: TrainingId = id
            .parse()
            .map_err(|_| RegistryError::Row(format!("training id `{id}`")))?;
        self.training(id).await
    }
}

async fn insert_concept(
    transaction: &mut sqlx::Transaction<'static, sqlx::Sqlite>,
    new: &NewConcept,
    version: Option<&str>,
) -> Result<Concept, RegistryError> {
    let (id, created_at) = (ConceptId::new(), now());
    let inserted = sqlx::query(
        "INSERT INTO concepts (id, name, kind, class_noun, version, created_at) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(id.to_string())
    .bind(&new.name)
    .bind(new.kind.as_str())
    .bind(&new.class_noun)
    .bind(version)
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
    Ok(Concept {
        id,
        name: new.name.clone(),
        kind: new.kind,
        class_noun: new.class_noun.clone(),
        version: version.map(str::to_owned),
        created_at,
        pictures: new.pictures.clone(),
    })
}
