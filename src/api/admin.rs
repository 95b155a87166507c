//! `/v1/admin`: keys and tenants, for callers with the scope `admin`.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Admin;
use super::extract::{Fields, MaybeFields};
use super::idempotency::{IdempotencyHeader, Once};
use super::openapi::{ErrorBody, List};
use super::pagination::Paged;
use super::{ApiError, AppState};
use crate::registry::{ApiKey, Tenant};
use crate::service::{KeyRequest, QuotaChange, Scope, Scopes};
use coar_core::error::Error;
use coar_core::ids::{KeyId, TenantId};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_key, list_keys))
        .routes(routes!(revoke_key))
        .routes(routes!(create_tenant, list_tenants))
        .routes(routes!(show_tenant, change_tenant, delete_tenant))
        .routes(routes!(change_webhook_secret))
}

/// What a key may be used for.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ScopeName {
    Read,
    Generate,
    Train,
    Admin,
    Metrics,
}

impl From<Scope> for ScopeName {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::Read => Self::Read,
            Scope::Generate => Self::Generate,
            Scope::Train => Self::Train,
            Scope::Admin => Self::Admin,
            Scope::Metrics => Self::Metrics,
        }
    }
}

/// An API key, without its secret.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Key)]
struct KeyObject {
    #[schema(example = "key_01990000000070008000000000000000")]
    id: String,
    #[schema(example = "key")]
    object: &'static str,
    /// Name of the tenant that the key belongs to.
    #[schema(example = "acme")]
    tenant: String,
    /// What the key is for.
    #[schema(example = "web shop")]
    name: String,
    /// The beginning of the secret, to recognise the key.
    #[schema(example = "coar_k3v9x2ab")]
    prefix: String,
    scopes: Vec<ScopeName>,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds; null: it never expires.
    expires_at: Option<i64>,
    /// Unix seconds; null: not revoked.
    revoked_at: Option<i64>,
    /// Unix seconds, to within a minute; null: never used.
    last_used_at: Option<i64>,
}

impl From<&ApiKey> for KeyObject {
    fn from(key: &ApiKey) -> Self {
        let seconds = |ms: i64| ms / 1000;
        Self {
            id: key.id.to_string(),
            object: "key",
            tenant: key.tenant_name.clone(),
            name: key.name.clone(),
            prefix: format!("coar_{}", key.public_id),
            scopes: key.scopes.iter().map(Into::into).collect(),
            created_at: seconds(key.created_at),
            expires_at: key.expires_at.map(seconds),
            revoked_at: key.revoked_at.map(seconds),
            last_used_at: key.last_used_at.map(seconds),
        }
    }
}

/// A new API key.
#[derive(Debug, Serialize, ToSchema)]
struct NewKeyObject {
    #[serde(flatten)]
    key: KeyObject,
    /// The secret to send as `Authorization: Bearer …`. It is returned only once.
    #[schema(example = "coar_k3v9x2ab_0000000000000000000000000000000000000000000")]
    secret: String,
}

/// A new key.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct CreateKey {
    /// Name of an existing tenant.
    #[schema(example = "acme", pattern = "^[a-z0-9][a-z0-9-]{0,62}$")]
    tenant: String,
    /// What the key is for; at most 100 characters, without control characters.
    #[schema(example = "web shop", max_length = 100, pattern = r"^[^\x00-\x1f\x7f-\x9f]*$")]
    name: Option<String>,
    /// Default: read, generate, train.
    #[schema(min_items = 1)]
    scopes: Option<Vec<ScopeName>>,
    /// Days after which the key expires, 1 to 3650; default: never.
    #[schema(minimum = 1, maximum = 3650)]
    expires_in_days: Option<u32>,
}

/// A tenant.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Tenant)]
struct TenantObject {
    #[schema(example = "tenant_01990000000070008000000000000000")]
    id: String,
    #[schema(example = "tenant")]
    object: &'static str,
    #[schema(example = "acme")]
    name: String,
    /// Secret that signs this tenant's webhooks (Standard Webhooks).
    webhook_secret: String,
    quotas: QuotasObject,
    /// Unix seconds.
    created_at: i64,
}

/// Quotas of a tenant. Null: the server's default; 0: unlimited.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Quotas)]
struct QuotasObject {
    /// Concepts.
    concepts: Option<u32>,
    /// Trainings that are queued or running.
    trainings: Option<u32>,
    /// Generations that are queued or running.
    requests_in_flight: Option<u32>,
    pictures_per_minute: Option<u32>,
    /// Requests that create, start, check or cancel something.
    requests_per_minute: Option<u32>,
    /// Bytes of reference images, concept files and stored images, above which uploads are refused.
    bytes: Option<u64>,
}

impl From<&Tenant> for TenantObject {
    fn from(tenant: &Tenant) -> Self {
        Self {
            id: tenant.id.to_string(),
            object: "tenant",
            name: tenant.name.clone(),
            webhook_secret: tenant.webhook_secret.clone(),
            quotas: QuotasObject {
                concepts: tenant.quotas.concepts,
                trainings: tenant.quotas.trainings,
                requests_in_flight: tenant.quotas.requests_in_flight,
                pictures_per_minute: tenant.quotas.pictures_per_minute,
                requests_per_minute: tenant.quotas.requests_per_minute,
                bytes: tenant.quotas.bytes,
            },
            created_at: tenant.created_at / 1000,
        }
    }
}

/// A new tenant.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct CreateTenant {
    /// 1 to 63 of a-z, 0-9 and -, the first not a hyphen.
    #[schema(example = "acme", pattern = "^[a-z0-9][a-z0-9-]{0,62}$")]
    name: String,
    #[schema(inline)]
    quotas: Option<ChangeQuotas>,
}

/// Changes to a tenant.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct ChangeTenant {
    #[schema(inline)]
    quotas: Option<ChangeQuotas>,
}

/// Changes to quotas. Absent: unchanged; null: the server's default; 0: unlimited.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct ChangeQuotas {
    /// Concepts.
    #[schema(maximum = 4294967295u64, example = 1000)]
    concepts: Option<u32>,
    /// Trainings that are queued or running.
    #[schema(maximum = 4294967295u64, example = 10)]
    trainings: Option<u32>,
    /// Generations that are queued or running.
    #[schema(maximum = 4294967295u64, example = 16)]
    requests_in_flight: Option<u32>,
    #[schema(maximum = 4294967295u64, example = 60)]
    pictures_per_minute: Option<u32>,
    /// Requests that create, start, check or cancel something.
    #[schema(maximum = 4294967295u64, example = 600)]
    requests_per_minute: Option<u32>,
    /// Bytes of reference images, concept files and stored images, above which uploads are refused.
    #[schema(maximum = 9007199254740991u64, example = 10737418240u64)]
    bytes: Option<u64>,
}

/// Many JSON parsers do not represent larger integers exactly.
const BYTES_LIMIT: u64 = (1 << 53) - 1;

fn quotas(fields: &mut Fields) -> Result<QuotaChange, Error> {
    let Some(mut inner) = fields.object("quotas")? else {
        return Ok(QuotaChange::default());
    };
    let change = QuotaChange {
        concepts: inner.nullable_integer("concepts", u32::MAX.into())?,
        trainings: inner.nullable_integer("trainings", u32::MAX.into())?,
        requests_in_flight: inner.nullable_integer("requests_in_flight", u32::MAX.into())?,
        pictures_per_minute: inner.nullable_integer("pictures_per_minute", u32::MAX.into())?,
        requests_per_minute: inner.nullable_integer("requests_per_minute", u32::MAX.into())?,
        bytes: inner.nullable_integer("bytes", BYTES_LIMIT)?,
    };
    inner.finish()?;
    Ok(change)
}

/// Responses with secrets must not be cached.
const NO_STORE: [(header::HeaderName, &str); 1] = [(header::CACHE_CONTROL, "no-store")];

fn missing(name: &'static str) -> Error {
    Error::field("missing_parameter", name, "is missing")
}

/// Create a key
///
/// Its secret is returned once and not stored. From the first key on, every request needs one.
#[utoipa::path(
    post, path = "/v1/admin/keys", tag = "Administration", operation_id = "createKey",
    request_body = CreateKey,
    responses(
        (status = 201, description = "The key with its secret", body = NewKeyObject),
        (status = 404, description = "`tenant_not_found`", body = ErrorBody),
    ),
)]
async fn create_key(
    State(state): State<AppState>,
    Admin(_): Admin,
    mut fields: Fields,
) -> Result<impl IntoResponse, ApiError> {
    let scopes = match fields.texts("scopes")? {
        None => Scopes::default(),
        Some(words) => words
            .join(",")
            .parse()
            .map_err(|problem: String| Error::field("invalid_value", "scopes", problem))?,
    };
    let request = KeyRequest {
        tenant: fields.text("tenant")?.ok_or_else(|| missing("tenant"))?,
        name: fields.text("name")?,
        scopes,
        expires_in_days: fields
            .integer("expires_in_days", 0..=u32::MAX.into())?
            .map(|days| days as u32),
    };
    fields.finish()?;
    let created = state.service()?.keys.create(request).await?;
    let body = NewKeyObject {
        key: KeyObject::from(&created.key),
        secret: created.text,
    };
    Ok((StatusCode::CREATED, NO_STORE, Json(body)))
}

/// List keys
///
/// Keys of all tenants, newest first, including revoked and expired ones.
#[utoipa::path(
    get, path = "/v1/admin/keys", tag = "Administration", operation_id = "listKeys",
    params(super::pagination::PageQuery),
    responses((status = 200, description = "Keys", body = List<KeyObject>)),
)]
async fn list_keys(
    State(state): State<AppState>,
    Admin(_): Admin,
    Paged(page): Paged<KeyId>,
) -> Result<Json<List<KeyObject>>, ApiError> {
    let listed = state.service()?.keys.list(page).await?;
    Ok(Json(List::of(&listed, |key| key.into())))
}

/// Revoke a key
///
/// The key is refused after at most one second. It stays in the list.
#[utoipa::path(
    delete, path = "/v1/admin/keys/{id}", tag = "Administration", operation_id = "revokeKey",
    params(("id" = String, Path, description = "The key's id")),
    responses(
        (status = 204, description = "Revoked"),
        (status = 404, description = "`key_not_found`", body = ErrorBody),
    ),
)]
async fn revoke_key(
    State(state): State<AppState>,
    Admin(_): Admin,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    state.service()?.keys.revoke(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Create a tenant
#[utoipa::path(
    post, path = "/v1/admin/tenants", tag = "Administration", operation_id = "createTenant",
    params(IdempotencyHeader), request_body = CreateTenant,
    responses(
        (status = 201, description = "The tenant", body = TenantObject),
        (status = 409, description = "`name_taken`", body = ErrorBody),
    ),
)]
async fn create_tenant(
    State(state): State<AppState>,
    Admin(caller): Admin,
    once: Once,
    mut fields: Fields,
) -> Result<Response, ApiError> {
    let content = fields.content();
    let name = fields.text("name")?.ok_or_else(|| missing("name"))?;
    let quotas = quotas(&mut fields)?;
    fields.finish()?;
    let service = state.service()?.clone();
    let work = async move {
        let tenant = service.add_tenant(&name, quotas).await?;
        let location = [(header::LOCATION, format!("/v1/admin/tenants/{name}"))];
        Ok((
            StatusCode::CREATED,
            location,
            NO_STORE,
            Json(TenantObject::from(&tenant)),
        )
            .into_response())
    };
    once.run(&state, &caller, &content, work).await
}

/// List tenants
#[utoipa::path(
    get, path = "/v1/admin/tenants", tag = "Administration", operation_id = "listTenants",
    params(super::pagination::PageQuery),
    responses((status = 200, description = "Tenants, newest first", body = List<TenantObject>)),
)]
async fn list_tenants(
    State(state): State<AppState>,
    Admin(_): Admin,
    Paged(page): Paged<TenantId>,
) -> Result<impl IntoResponse, ApiError> {
    let listed = state.service()?.tenants(page).await?;
    Ok((
        NO_STORE,
        Json(List::<TenantObject>::of(&listed, |tenant| tenant.into())),
    ))
}

/// Show a tenant
#[utoipa::path(
    get, path = "/v1/admin/tenants/{name}", tag = "Administration", operation_id = "showTenant",
    params(("name" = String, Path, description = "The tenant's name")),
    responses(
        (status = 200, description = "The tenant", body = TenantObject),
        (status = 404, description = "`tenant_not_found`", body = ErrorBody),
    ),
)]
async fn show_tenant(
    State(state): State<AppState>,
    Admin(_): Admin,
    Path(name): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    let tenant = state.service()?.tenant(&name).await?;
    Ok((NO_STORE, Json(TenantObject::from(&tenant))))
}

/// Change a tenant's quotas
#[utoipa::path(
    patch, path = "/v1/admin/tenants/{name}", tag = "Administration", operation_id = "changeTenant",
    params(("name" = String, Path, description = "The tenant's name")),
    request_body = ChangeTenant,
    responses(
        (status = 200, description = "The tenant", body = TenantObject),
        (status = 404, description = "`tenant_not_found`", body = ErrorBody),
    ),
)]
async fn change_tenant(
    State(state): State<AppState>,
    Admin(_): Admin,
    Path(name): Path<String>,
    mut fields: Fields,
) -> Result<impl IntoResponse, ApiError> {
    let change = quotas(&mut fields)?;
    fields.finish()?;
    let tenant = state.service()?.change_quotas(&name, change).await?;
    Ok((NO_STORE, Json(TenantObject::from(&tenant))))
}

/// A request for a new webhook secret.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct ChangeWebhookSecret {
    /// Hours for which webhooks are signed with both the old and the new secret, 0 to 720.
    #[schema(minimum = 0, maximum = 720, default = 24)]
    keep_old_hours: Option<u32>,
}

/// Hours for which a webhook secret still signs beside its successor: the default and the maximum.
const KEEP_OLD_HOURS: u64 = 24;
const KEEP_OLD_LIMIT: u64 = 720;

/// Change a tenant's webhook secret
///
/// The response contains the new secret. For `keep_old_hours`, webhooks are signed with both, so that receivers can
/// change theirs.
#[utoipa::path(
    post, path = "/v1/admin/tenants/{name}/webhook-secret", tag = "Administration", operation_id = "changeWebhookSecret",
    params(("name" = String, Path, description = "The tenant's name")),
    request_body = Option<ChangeWebhookSecret>,
    responses(
        (status = 200, description = "The tenant, with its new secret", body = TenantObject),
        (status = 404, description = "`tenant_not_found`", body = ErrorBody),
    ),
)]
async fn change_webhook_secret(
    State(state): State<AppState>,
    Admin(_): Admin,
    Path(name): Path<String>,
    MaybeFields(mut fields): MaybeFields,
) -> Result<impl IntoResponse, ApiError> {
    let hours = fields
        .integer("keep_old_hours", 0..=KEEP_OLD_LIMIT)?
        .unwrap_or(KEEP_OLD_HOURS);
    fields.finish()?;
    let tenant = state.service()?.rotate_webhook_secret(&name, hours as u32).await?;
    Ok((NO_STORE, Json(TenantObject::from(&tenant))))
}

/// Delete a tenant
///
/// Also deletes its keys, concepts, trainings, generations and images. `default`, the caller's own tenant and the
/// tenant with the last valid key of an administrator cannot be deleted.
#[utoipa::path(
    delete, path = "/v1/admin/tenants/{name}", tag = "Administration", operation_id = "deleteTenant",
    params(("name" = String, Path, description = "The tenant's name")),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`tenant_not_found`", body = ErrorBody),
        (status = 409, description = "`tenant_in_use`, `last_admin_key`", body = ErrorBody),
    ),
)]
async fn delete_tenant(
    State(state): State<AppState>,
    Admin(caller): Admin,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    state.service()?.delete_tenant(&caller, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}
