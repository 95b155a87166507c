//! The description of the API at `/openapi.json`, built from the handlers, and the schemas that all of them share.

use axum::Json;
use serde::Serialize;
use utoipa::openapi::path::{Operation, Parameter};
use utoipa::openapi::schema::{ObjectBuilder, SchemaType, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi as Document, Ref, RefOr, ResponseBuilder, Schema, Server};
use utoipa::{Modify, OpenApi, ToSchema};

use crate::registry::Listed;

/// A list's envelope.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct List<T: ToSchema> {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<T>,
    /// Whether there are more: request them with `?after=` and the last id.
    has_more: bool,
}

impl<T: ToSchema> List<T> {
    /// Converts rows to objects.
    pub(super) fn of<R>(listed: &Listed<R>, object: impl for<'a> Fn(&'a R) -> T) -> Self {
        Self {
            object: "list",
            data: listed.rows.iter().map(object).collect(),
            has_more: listed.has_more,
        }
    }
}

/// One event of a stream of server-sent events; comments keep the connection open between them.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ServerEvent {
    /// Name of the event.
    #[schema(example = "progress")]
    pub event: String,
    /// A JSON object, serialized.
    #[schema(example = "{\"step\": 12, \"total_steps\": 60}")]
    pub data: String,
}

/// Metadata of the caller: at most 16 pairs, keys of 1 to 64 characters, values of at most 512.
pub(super) fn metadata_schema() -> Schema {
    let text = |fewest, most| {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(fewest))
            .max_length(Some(most))
            .build()
    };
    let object = ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::Object, Type::Null]))
        .property_names(Some(Schema::Object(text(1, 64))))
        .additional_properties(Some(Schema::Object(text(0, 512))))
        .max_properties(Some(16))
        .examples([serde_json::json!({"order": "4711"})])
        .build();
    Schema::Object(object)
}

/// The form of all errors.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Error)]
pub(super) struct ErrorBody {
    pub error: ErrorFacts,
}

/// Details of an error.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorFacts {
    /// Kind of error: `invalid_request_error`, `authentication_error`, `permission_error`, `rate_limit_error` or
    /// `server_error`.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    pub kind: &'static str,
    /// Stable identifier for programs.
    #[schema(example = "invalid_value")]
    pub code: &'static str,
    /// Explanation for people. Its wording may change.
    #[schema(example = "`limit` is `0`; expected 1 to 100")]
    pub message: String,
    /// The parameter that is wrong.
    #[schema(example = "limit")]
    pub param: Option<String>,
    /// The limit that was exceeded.
    #[schema(example = 100)]
    pub limit: Option<u64>,
    /// Id of the request in the server's log.
    pub request_id: Option<String>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "coar",
        description = "One frozen autoregressive image model, and the concepts of all its tenants.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    components(schemas(ErrorBody, super::openai::EventObject)),
    security(("key" = [])),
    tags(
        (name = "Concepts", description = "Subjects and styles that the model has learned"),
        (name = "Trainings", description = "Runs that make versions of concepts"),
        (name = "Generations", description = "Images, with coar's own API: queued, streamed, stored"),
        (name = "Images", description = "Images, in OpenAI's format"),
        (name = "Models", description = "Models that requests can name"),
        (name = "Administration", description = "Keys and tenants; scope `admin`"),
        (name = "Health", description = "Probes; no key required"),
    ),
    modifiers(&Common),
)]
pub(super) struct Api;

/// Common to all routes: the key, and the form of errors.
struct Common;

impl Modify for Common {
    fn modify(&self, document: &mut Document) {
        let bearer = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("`coar_…`; not required while no key has ever existed"))
            .build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
    }
}

/// Describes a list's `after`: an identifier of the listed objects, whose type follows from the path's last segment.
fn describe_after(path: &str, operation: &mut Operation) {
    let Some(thing) = path.rsplit('/').next().and_then(|last| last.strip_suffix('s')) else {
        return;
    };
    for parameter in operation.parameters.iter_mut().flatten() {
        if let RefOr::T(Parameter {
            name,
            schema: Some(RefOr::T(Schema::Object(schema))),
            ..
        }) = parameter
            && name == "after"
        {
            schema.pattern = Some(format!("^{thing}_[0-9a-f]{{32}}$"));
        }
    }
}

/// Adds the server's URL, if the operator has configured it, and to every operation the responses that any route can
/// give.
pub(super) fn complete(mut document: Document, public_url: Option<&str>) -> Document {
    document.servers = public_url.map(|url| vec![Server::new(url.trim_end_matches('/'))]);
    let error = |description: &str| {
        let content = ContentBuilder::new()
            .schema(Some(Ref::from_schema_name("Error")))
            .build();
        RefOr::T(
            ResponseBuilder::new()
                .description(description)
                .content("application/json", content)
                .build(),
        )
    };
    for (name, path) in &mut document.paths.paths {
        // Versions are identified by their numbers.
        if let Some(list) = path.get.as_mut().filter(|_| !name.ends_with("/versions")) {
            describe_after(name, list);
        }
        let operations = [
            &mut path.get,
            &mut path.put,
            &mut path.post,
            &mut path.delete,
            &mut path.patch,
        ];
        for operation in operations.into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            // Routes that declare `security(())` need no key.
            if operation.security.is_none() {
                responses
                    .entry("401".into())
                    .or_insert_with(|| error("`invalid_api_key`"));
                responses
                    .entry("403".into())
                    .or_insert_with(|| error("`missing_scope`"));
            }
            responses
                .entry("default".into())
                .or_insert_with(|| error("Any other error"));
        }
    }
    document
}

/// The handler of `/openapi.json`.
pub(super) async fn serve(document: std::sync::Arc<Document>) -> Json<Document> {
    Json(Document::clone(&document))
}
