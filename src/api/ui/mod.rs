//! Studio, the web page: `/` and `/studio/*`. Static files in the binary. It uses the same HTTP API as every other
//! client, so there is no logic here.

use std::collections::HashMap;
use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use super::{ApiError, AppState};
use coar_core::error::{Error, ErrorKind};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// The page itself, the response to `/`.
const INDEX: &str = "index.html";

/// Name, content type and text of every file.
macro_rules! files {
    ($($kind:ident: $($name:literal)+;)+) => {
        &[$($(($name, $kind, include_str!(concat!("assets/", $name))),)+)+]
    };
}

const FILES: &[(&str, &str, &str)] = files! {
    HTML: "index.html";
    CSS: "base.css" "layout.css" "parts.css";
    SVG: "icon.svg";
    JS: "api.js" "app.js" "chart.js" "completion.js" "concept.js" "concepts.js" "create.js" "curve.js" "dom.js"
        "drawing.js" "forms.js" "gallery.js" "key.js" "library.js" "prompt.js" "register.js" "settings.js" "sse.js"
        "theme.js" "training.js";
};

/// Content security policy of the page: its own files and its own server, images from memory, and nothing inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
    connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// A file, ready to be sent.
struct Asset {
    kind: &'static str,
    text: &'static str,
    tag: HeaderValue,
}

static ASSETS: LazyLock<HashMap<&'static str, Asset>> = LazyLock::new(|| {
    let asset = |&(name, kind, text): &(&'static str, &'static str, &'static str)| {
        let tag = format!("\"{}\"", hex::encode(&Sha256::digest(text)[..16]));
        let tag = HeaderValue::from_str(&tag).expect("hexadecimal digits in quotes are a header value");
        (name, Asset { kind, text, tag })
    };
    FILES.iter().map(asset).collect()
});

/// `/` and `/studio/*`. They need no service: they respond while the model is loading, and the page shows that state.
pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/", get(|headers: HeaderMap| async move { answer(INDEX, &headers) }))
        .route("/studio", get(|| async { Redirect::permanent("/") }))
        .route("/studio/", get(|| async { Redirect::permanent("/") }))
        // The page's own URLs are relative to `/`.
        .route("/studio/index.html", get(|| async { Redirect::permanent("/") }))
        .route(
            "/studio/{file}",
            get(|Path(file): Path<String>, headers: HeaderMap| async move { answer(&file, &headers) }),
        )
}

fn answer(name: &str, headers: &HeaderMap) -> Result<Response, ApiError> {
    let asset = ASSETS.get(name).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            "route_not_found",
            format!("There is nothing at `/studio/{name}`."),
        )
    })?;
    let shared: [(HeaderName, HeaderValue); 5] = [
        (header::ETAG, asset.tag.clone()),
        // Browsers cache the files and revalidate them each time, so an upgrade is visible at once.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    if known(headers, &asset.tag) {
        return Ok((StatusCode::NOT_MODIFIED, shared).into_response());
    }
    Ok((shared, [(header::CONTENT_TYPE, asset.kind)], asset.text).into_response())
}

/// Whether the client already has this version.
fn known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let given = headers.get_all(header::IF_NONE_MATCH).iter();
    given.filter_map(|value| value.to_str().ok()).any(|list| {
        list.split(',')
            .map(|one| one.trim().trim_start_matches("W/"))
            .any(|one| one == "*" || one.as_bytes() == tag.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file that the page or a module refers to is in the binary, and every file in the folder is referred to.
    #[test]
    fn the_files_are_those_that_the_page_asks_for() {
        let mut asked = vec![INDEX.to_owned()];
        for (_, _, text) in FILES {
            let ends = |rest: &str| rest.split('"').next().unwrap_or_default().to_owned();
            asked.extend(text.split("=\"studio/").skip(1).map(ends));
            asked.extend(text.split(" from \"./").skip(1).map(ends));
        }
        asked.sort();
        asked.dedup();
        let mut served: Vec<String> = FILES.iter().map(|(name, ..)| (*name).to_owned()).collect();
        served.sort();
        assert_eq!(asked, served);
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/api/ui/assets");
        let mut there: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        there.sort();
        assert_eq!(there, served);
    }

    /// The policy refuses inline code, so there must be none, and nothing may be loaded from other hosts.
    #[test]
    fn nothing_is_inline_and_nothing_comes_from_elsewhere() {
        let page = ASSETS[INDEX].text;
        for forbidden in ["<style", " style=\"", " onclick=", "javascript:", "<script>"] {
            assert!(!page.contains(forbidden), "the page has `{forbidden}`");
        }
        for (name, _, text) in FILES {
            let foreign = text.replace("http://www.w3.org/2000/svg", "");
            assert!(
                !foreign.contains("http://") && !foreign.contains("https://"),
                "{name} names another server"
            );
            for forbidden in ["innerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
                assert!(
                    !code.into_iter().any(|line| line.contains(forbidden)),
                    "{name} uses {forbidden}"
                );
            }
        }
    }

    #[test]
    fn a_known_file_is_not_sent_again() {
        let first = answer("app.js", &HeaderMap::new()).unwrap();
        assert_eq!(first.status(), StatusCode::OK);
        assert_eq!(first.headers()[header::CONTENT_TYPE], JS);
        let tag = first.headers()[header::ETAG].clone();
        for (sent, status) in [
            (tag.clone(), StatusCode::NOT_MODIFIED),
            (
                HeaderValue::from_str(&format!("\"x\", W/{}", tag.to_str().unwrap())).unwrap(),
                StatusCode::NOT_MODIFIED,
            ),
            (HeaderValue::from_static("\"x\""), StatusCode::OK),
        ] {
            let headers = HeaderMap::from_iter([(header::IF_NONE_MATCH, sent)]);
            assert_eq!(answer("app.js", &headers).unwrap().status(), status);
        }
        assert!(answer("nothing.js", &HeaderMap::new()).is_err());
    }
}
