//! Fuzz targets: bodies and heads of requests.

use axum::body::Body;
use axum::extract::{FromRequest as _, FromRequestParts as _, Multipart};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use bytes::Bytes;
use futures::FutureExt as _;

use super::extract::{Fields, media_type};
use super::generations::mode::{LONGEST_WAIT, Mode, mode};
use super::idempotency::{Once, content_of};
use super::pagination::Paged;
use super::{drawing, generations, multipart};
use crate::registry::SharedSecrets;
use crate::service::{Limits, Links, Room, Signed};
use coar_core::ids::ConceptId;
use coar_core::image::ImageLimits;

/// The result of a future that never waits.
fn done<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("the future is ready")
}

/// A form with the boundary `x`, received in pieces whose length the first byte determines. It is refused, or is within
/// its limits, and is read the same in other pieces.
pub fn form(bytes: &[u8]) {
    let Some((&first, bytes)) = bytes.split_first() else {
        return;
    };
    let limits = Limits {
        image: ImageLimits {
            bytes: 4096,
            ..ImageLimits::default()
        },
        ..Limits::default()
    };
    let read = |piece: usize| {
        let pieces: Vec<_> = bytes
            .chunks(piece)
            .map(|piece| Ok::<_, std::convert::Infallible>(Bytes::copy_from_slice(piece)))
            .collect();
        let request = Request::post("/v1/concepts")
            .header(header::CONTENT_TYPE, "multipart/form-data; boundary=x")
            .body(Body::from_stream(futures::stream::iter(pieces)))
            .expect("the request is well formed");
        let form = done(Multipart::from_request(request, &())).expect("the request has a form");
        done(multipart::registration(form, &limits, Room::Memory))
    };
    let whole = read(bytes.len().max(1));
    let cut = read(usize::from(first) + 1);
    match (whole, cut) {
        (Ok(whole), Ok(cut)) => {
            assert!(whole.images.len() <= limits.images && whole.captions.len() <= limits.images);
            assert!(whole.images.iter().all(|image| image.length() <= limits.image.bytes));
            assert_eq!(content_of(&whole).ok(), content_of(&cut).ok());
        }
        (whole, cut) => assert!(whole.is_err() && cut.is_err(), "{whole:?} {cut:?}"),
    }
}

/// The JSON body of a generation, and everything else that is read field by field.
pub fn json_body(bytes: &[u8]) {
    let Ok(mut fields) = Fields::parse(bytes) else { return };
    let content = fields.content();
    assert_eq!(content.len(), 64);
    if let Ok(input) = generations::read(Fields::parse(bytes).expect("it was parsed before")) {
        assert!(input.draw.output_compression.is_none_or(|percent| percent <= 100));
        assert!(input.draw.partial_images.is_none_or(|count| count <= 3));
    }
    let _ = drawing::input(&mut fields);
    let mut fields = Fields::parse(bytes).expect("it was parsed before");
    let _ = fields.nullable_text("description");
    let _ = fields.nullable_integer::<u32>("concepts", u64::from(u32::MAX));
    let _ = fields.no_op("background", &["auto"]);
    if let Ok(Some(mut inner)) = fields.object("quotas") {
        assert!(inner.integer("images", 0..=100).is_err() || inner.take("images").is_none());
        let _ = inner.finish();
    }
    let _ = fields.finish();
}

/// A request's head. Its lines are `Idempotency-Key`, `Prefer`, `Accept`, `Content-Type`, `Host`, the query, and an
/// image's file name with its signature.
pub fn head(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let mut headers = HeaderMap::new();
    let mut told = HeaderName::from_static("idempotency-key");
    for following in [
        HeaderName::from_static("prefer"),
        header::ACCEPT,
        header::CONTENT_TYPE,
        header::HOST,
    ] {
        if let Ok(value) = HeaderValue::from_bytes(next()) {
            headers.append(told, value);
        }
        told = following;
    }
    let query = String::from_utf8_lossy(next()).into_owned();
    if let Mode::Wait(seconds) = mode(&headers) {
        assert!((1..=LONGEST_WAIT).contains(&seconds));
    }
    assert!(!media_type(&headers).contains(';'));
    let Ok(request) = Request::get(format!("/v1/concepts?{query}")).body(()) else {
        return;
    };
    let (mut parts, ()) = request.into_parts();
    parts.headers = headers;
    let _ = done(Once::from_request_parts(&mut parts, &()));
    if let Ok(Paged(page)) = done(Paged::<ConceptId>::from_request_parts(&mut parts, &())) {
        assert!((1..=100).contains(&page.limit));
    }
    let links = Links::new(
        SharedSecrets::of("a secret of the fuzzer's"),
        std::time::Duration::from_secs(60),
    );
    let [file, expires, signature] = [next(), next(), next()].map(String::from_utf8_lossy);
    let signed = Signed {
        expires: &expires,
        signature: &signature,
    };
    assert!(links.check(&file, signed).is_err(), "a signature needs the secret");
}
