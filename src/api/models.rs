//! `/v1/models`: the values of a request's `model`.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Read;
use super::concepts::object::{InUse, KindName};
use super::openapi::ErrorBody;
use super::{ApiError, AppState};
use crate::registry::Concept;
use coar_core::engine::ModelInfo;
use coar_core::error::{Error, ErrorKind};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(show))
}

/// The stable alias of the base model.
const ALIAS: &str = "coar";

/// A concept of a model.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ModelConcept)]
struct ModelConcept {
    #[schema(example = "rex")]
    name: String,
    kind: KindName,
    /// The noun of a subject.
    #[schema(example = "dog")]
    class: Option<String>,
    version: Option<InUse>,
}

/// A model for requests: the base model alone, or with concepts.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Model)]
struct ModelObject {
    /// The base model's name, `coar`, `coar:<concept>`, `coar:<subject>+<style>`, or another name of one of them.
    #[schema(example = "coar:rex")]
    id: String,
    #[schema(example = "model")]
    object: &'static str,
    /// Unix seconds: when its newest concept version was created; 0 for the base model.
    created: i64,
    /// `coar`, or the tenant that owns its concepts.
    #[schema(example = "coar")]
    owned_by: String,
    /// Fingerprint of the base model. Concepts work only with the base model that they were trained on.
    fingerprint: String,
    /// Supported sizes, the default first.
    #[schema(example = json!(["96x96", "128x64"]))]
    sizes: Vec<String>,
    layers: usize,
    hidden_size: usize,
    /// Concepts of the model; empty for the base model.
    concepts: Vec<ModelConcept>,
}

impl ModelObject {
    fn base(info: &ModelInfo, id: &str) -> Self {
        Self {
            id: id.to_owned(),
            object: "model",
            created: 0,
            owned_by: ALIAS.to_owned(),
            fingerprint: info.fingerprint.clone(),
            sizes: info.sizes.iter().map(|(w, h)| format!("{w}x{h}")).collect(),
            layers: info.layers,
            hidden_size: info.hidden,
            concepts: vec![],
        }
    }

    fn with(info: &ModelInfo, id: &str, concepts: &[&Concept]) -> Self {
        let made = |concept: &&Concept| concept.version_created_at.unwrap_or(concept.created_at) / 1000;
        let concept = |concept: &&Concept| ModelConcept {
            name: concept.name.clone(),
            kind: concept.kind.into(),
            class: concept.class_noun.clone(),
            version: InUse::of(concept),
        };
        Self {
            created: concepts.iter().map(made).max().unwrap_or(0),
            owned_by: concepts
                .first()
                .map_or_else(String::new, |first| first.tenant.to_string()),
            concepts: concepts.iter().map(concept).collect(),
            ..Self::base(info, id)
        }
    }
}

/// All models.
#[derive(Debug, Serialize, ToSchema)]
struct ModelList {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<ModelObject>,
    /// Always false.
    has_more: bool,
}

/// Finds a model by the name in a request: its own, or an alias that the operator has configured.
fn find(state: &AppState, info: &ModelInfo, ready: &[Concept], id: &str) -> Option<ModelObject> {
    let aliases = &state.config().images.model_alias;
    let alias = aliases.iter().find(|alias| alias.name == id);
    let model = alias.map_or(id, |alias| alias.model.as_str());
    if model == info.id || model == ALIAS {
        return Some(ModelObject::base(info, id));
    }
    let names = model.strip_prefix(ALIAS).and_then(|rest| rest.strip_prefix(':'))?;
    let named = |name: &str| ready.iter().find(|concept| concept.name == name);
    let concepts: Vec<&Concept> = names.split('+').map(named).collect::<Option<_>>()?;
    Some(ModelObject::with(info, id, &concepts))
}

/// List models
///
/// The base model under both its names, each concept that is ready, and the aliases that the operator has configured.
/// The list has no further pages.
#[utoipa::path(
    get, path = "/v1/models", tag = "Models", operation_id = "listModels",
    responses((status = 200, description = "Models", body = ModelList)),
)]
async fn list(State(state): State<AppState>, Read(caller): Read) -> Result<Json<ModelList>, ApiError> {
    let service = state.service()?;
    let info = service.executor.info();
    let mut data = vec![ModelObject::base(info, &info.id)];
    if info.id != ALIAS {
        data.push(ModelObject::base(info, ALIAS));
    }
    let ready = service.ready_concepts(&caller).await?;
    for concept in &ready {
        data.push(ModelObject::with(
            info,
            &format!("{ALIAS}:{}", concept.name),
            &[concept],
        ));
    }
    // An alias of concepts is listed only for tenants that have them.
    let aliases = &state.config().images.model_alias;
    data.extend(
        aliases
            .iter()
            .filter_map(|alias| find(&state, info, &ready, &alias.name)),
    );
    Ok(Json(ModelList {
        object: "list",
        data,
        has_more: false,
    }))
}

/// Show a model
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "Models", operation_id = "showModel",
    params(("id" = String, Path, description = "As `id` in the list, or `coar:` and several concepts with `+` between",
            example = "coar:rex")),
    responses(
        (status = 200, description = "The model", body = ModelObject),
        (status = 404, description = "`model_not_found`", body = ErrorBody),
    ),
)]
async fn show(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(id): Path<String>,
) -> Result<Json<ModelObject>, ApiError> {
    let service = state.service()?;
    let info = service.executor.info();
    let ready = service.ready_concepts(&caller).await?;
    find(&state, info, &ready, &id).map(Json).ok_or_else(|| {
        let problem = format!("is `{id}`; `/v1/models` lists what this server has");
        Error::field("model_not_found", "model", problem)
            .of_kind(ErrorKind::NotFound)
            .into()
    })
}
