//! Normalises paths that clients build: a base URL that ends with `/` makes `/v1//images/generations`.

use axum::extract::Request;
use axum::http::Uri;
use axum::http::uri::PathAndQuery;
use axum::middleware::Next;
use axum::response::Response;

const GENERATIONS: &str = "/v1/images/generations";

/// The path without empty segments; `None`: it has none.
fn tidy(path: &str) -> Option<String> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let tidied = format!("/{}", segments.join("/"));
    (tidied != path).then_some(tidied)
}

/// OpenAI's routes, whose URLs client libraries build. Paths of other routes are not changed, so that a proxy's path rules
/// apply to exactly what is served.
fn is_openai(path: &str) -> bool {
    let model = path.strip_prefix("/v1/models/");
    matches!(path, "/v1/images/edits" | "/v1/images/variations" | "/v1/models")
        || path == GENERATIONS
        || model.is_some_and(|id| !id.contains('/'))
}

fn tidied_uri(uri: &Uri) -> Option<Uri> {
    let path = tidy(uri.path()).filter(|path| is_openai(path))?;
    let path_and_query = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path_and_query).ok()?);
    Uri::from_parts(parts).ok()
}

/// Also serves OpenAI's routes at paths with doubled or trailing slashes.
pub(super) async fn tidied(mut request: Request, next: Next) -> Response {
    if let Some(uri) = tidied_uri(request.uri()) {
        *request.uri_mut() = uri;
    }
    next.run(request).await
}

/// The message of a 404 for an unknown path; names the route that was probably meant.
pub(super) fn not_found_message(path: &str) -> String {
    let tidied = tidy(path);
    let plain = tidied.as_deref().unwrap_or(path);
    if plain.ends_with("/images/generations") && plain != GENERATIONS {
        return format!(
            "There is nothing at `{path}`; images are at `{GENERATIONS}`: let the client's base URL end with `/v1`."
        );
    }
    match tidied {
        Some(tidied) => format!("There is nothing at `{path}`; without the additional slashes it is `{tidied}`."),
        None => format!("There is nothing at `{path}`."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_openai_paths_are_normalised() {
        let tidied = |uri: &'static str| tidied_uri(&Uri::from_static(uri)).map(|uri| uri.to_string());
        for (from, to) in [
            ("/v1//images/generations", Some("/v1/images/generations")),
            ("//v1/images/generations/?a=//b", Some("/v1/images/generations?a=//b")),
            ("/v1/models/", Some("/v1/models")),
            ("/v1//models/coar:rex/", Some("/v1/models/coar:rex")),
            ("http://host/v1//models", Some("http://host/v1/models")),
            ("/v1/images/generations", None),
            ("//metrics", None),
            ("/v1//admin/keys", None),
            ("/v1//models/a/b", None),
            ("/", None),
        ] {
            assert_eq!(tidied(from).as_deref(), to, "{from}");
        }
    }

    #[test]
    fn not_found_names_the_probable_route() {
        assert_eq!(not_found_message("/v1/nothing"), "There is nothing at `/v1/nothing`.");
        assert!(not_found_message("/v1/concepts/").ends_with("it is `/v1/concepts`."));
        for path in [
            "/images/generations",
            "/v1/v1/images/generations",
            "/api//images/generations/",
        ] {
            assert!(not_found_message(path).contains("`/v1/images/generations`"), "{path}");
        }
    }
}
