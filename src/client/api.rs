//! The routes that the command line uses. Responses stay JSON, so that fields of newer servers can be shown too.

use bytes::Bytes;
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Client, ClientError, Events};

/// A concept to register; absent values take the server's defaults.
#[derive(Debug, Clone, Default)]
pub struct NewConcept {
    /// Fields of the form in order, such as `name`, `kind`, `class`, `caption`, `steps`.
    pub fields: Vec<(&'static str, String)>,
    /// File names and bytes of the reference images.
    pub images: Vec<(String, Bytes)>,
}

/// Images to draw; absent values take the server's defaults.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Draw {
    pub prompt: String,
    pub n: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_mask: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_format: Option<&'static str>,
}

/// The largest page size of a list.
const PAGE: &str = "100";

/// A name or identifier as one segment of a path. All other characters are escaped, so that no name reaches another
/// route.
fn segment(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    let escaped = |byte: u8| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    match name {
        // These two would be resolved as relative segments, even with escaped dots. Escaped twice they are names that
        // do not exist.
        "." | ".." => name.replace('.', "%252E"),
        _ => name.bytes().map(escaped).collect(),
    }
}

impl Client {
    /// Every entry of a list, page by page.
    async fn all(&self, path: &str, filter: &[(&str, &str)]) -> Result<Vec<Value>, ClientError> {
        let mut found: Vec<Value> = Vec::new();
        loop {
            let mut query = filter.to_vec();
            query.push(("limit", PAGE));
            let last = found.last().and_then(|entry| entry["id"].as_str()).map(str::to_owned);
            if let Some(last) = &last {
                query.push(("after", last));
            }
            let mut page = self.json(self.request(Method::GET, path).query(&query)).await?;
            let Some(entries) = page["data"].as_array_mut() else {
                return Err(ClientError::Answer("a list has no `data`".to_owned()));
            };
            let empty = entries.is_empty();
            found.append(entries);
            if empty || page["has_more"] != true {
                return Ok(found);
            }
        }
    }

    async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.json(self.request(Method::GET, path)).await
    }

    /// The models: the base model and every concept that is ready.
    pub async fn models(&self) -> Result<Vec<Value>, ClientError> {
        self.all("/v1/models", &[]).await
    }

    /// Registers a concept and queues its training; returns the concept, with its `training`.
    pub async fn add_concept(&self, new: NewConcept) -> Result<Value, ClientError> {
        let mut form = Form::new();
        for (name, value) in new.fields {
            form = form.text(name, value);
        }
        for (name, bytes) in new.images {
            form = form.part("images", Part::stream(bytes).file_name(name));
        }
        self.json(self.request(Method::POST, "/v1/concepts").multipart(form))
            .await
    }

    /// Every concept, optionally of one kind or status.
    pub async fn concepts(&self, filter: &[(&str, &str)]) -> Result<Vec<Value>, ClientError> {
        self.all("/v1/concepts", filter).await
    }

    /// A concept by name or identifier.
    pub async fn concept(&self, name: &str) -> Result<Value, ClientError> {
        self.get(&format!("/v1/concepts/{}", segment(name))).await
    }

    /// The versions of a concept, newest first.
    pub async fn versions(&self, name: &str) -> Result<Vec<Value>, ClientError> {
        self.all(&format!("/v1/concepts/{}/versions", segment(name)), &[]).await
    }

    /// Puts another version to use; returns the concept.
    pub async fn roll_back(&self, name: &str, version: u64) -> Result<Value, ClientError> {
        let path = format!("/v1/concepts/{}", segment(name));
        self.json(self.request(Method::PATCH, &path).json(&json!({"version": version})))
            .await
    }

    /// Deletes a concept with its images, versions and trainings.
    pub async fn delete_concept(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/v1/concepts/{}", segment(name));
        self.send(self.request(Method::DELETE, &path)).await.map(drop)
    }

    /// A concept's file, of the version in use or another.
    pub async fn concept_file(&self, name: &str, version: Option<u64>) -> Result<Bytes, ClientError> {
        let mut request = self.request(Method::GET, &format!("/v1/concepts/{}/weights", segment(name)));
        if let Some(version) = version {
            request = request.query(&[("version", version)]);
        }
        let answer = self.send(request).await?;
        answer.bytes().await.map_err(|error| ClientError::broken(&error))
    }

    /// Imports a concept file, under its own name or another; returns the concept.
    pub async fn import_concept(&self, file: Bytes, name: Option<&str>) -> Result<Value, ClientError> {
        let mut request = self.request(Method::POST, "/v1/concepts/import").body(file);
        if let Some(name) = name {
            request = request.query(&[("name", name)]);
        }
        self.json(request.header("Content-Type", "application/octet-stream"))
            .await
    }

    /// Every training, optionally of one concept or status.
    pub async fn trainings(&self, filter: &[(&str, &str)]) -> Result<Vec<Value>, ClientError> {
        self.all("/v1/trainings", filter).await
    }

    /// A training by its identifier.
    pub async fn training(&self, id: &str) -> Result<Value, ClientError> {
        self.get(&format!("/v1/trainings/{}", segment(id))).await
    }

    /// `progress`, `preview` and `ended` events of a training.
    pub async fn training_events(&self, id: &str) -> Result<Events, ClientError> {
        let path = format!("/v1/trainings/{}/events", segment(id));
        self.events(self.request(Method::GET, &path)).await
    }

    /// Cancels a training; returns it.
    pub async fn cancel_training(&self, id: &str) -> Result<Value, ClientError> {
        let path = format!("/v1/trainings/{}/cancel", segment(id));
        self.json(self.request(Method::POST, &path)).await
    }

    /// Queues a failed or cancelled training again; returns it.
    pub async fn retry_training(&self, id: &str) -> Result<Value, ClientError> {
        let path = format!("/v1/trainings/{}/retry", segment(id));
        self.json(self.request(Method::POST, &path)).await
    }

    /// Draws images. Events: `queued`, `progress`, `image`, and one of `completed`, `failed` and `cancelled`. Dropping
    /// the stream cancels.
    pub async fn draw(&self, draw: &Draw) -> Result<Events, ClientError> {
        self.events(self.request(Method::POST, "/v1/generations").json(draw))
            .await
    }

    /// Fetches an image by its URL, which may be relative to the server's. The key is not sent: URLs are signed, and
    /// may belong to another caller.
    pub async fn image(&self, url: &str) -> Result<Bytes, ClientError> {
        let url = match url.starts_with('/') {
            true => format!("{}{url}", self.base),
            false => url.to_owned(),
        };
        let answer = self.send(self.http.get(url)).await?;
        answer.bytes().await.map_err(|error| ClientError::broken(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_segment() {
        assert_eq!(segment("rex-2"), "rex-2");
        assert_eq!(segment("../keys?x#y"), "..%2Fkeys%3Fx%23y");
        assert_eq!(segment("ü"), "%C3%BC");
        for name in [".", "..", "a/..", "%2e%2e"] {
            let url = reqwest::Url::parse(&format!("http://h/v1/concepts/{}/x", segment(name))).unwrap();
            let parts: Vec<&str> = url.path_segments().unwrap().collect();
            assert_eq!(
                (parts.len(), &parts[..2], parts[3]),
                (4, &["v1", "concepts"][..], "x"),
                "{name}: {url}"
            );
        }
    }

    #[test]
    fn absent_settings_are_not_sent() {
        let draw = Draw {
            prompt: "a cat".into(),
            n: 2,
            seed: Some(7),
            ..Draw::default()
        };
        assert_eq!(
            serde_json::to_value(&draw).unwrap(),
            json!({"prompt": "a cat", "n": 2, "seed": 7})
        );
    }

    #[test]
    fn addresses_are_checked() {
        assert!(Client::new("http://127.0.0.1:8080/", None).is_ok());
        for bad in ["localhost:8080", "ftp://example.org", "", "/tmp"] {
            assert!(
                matches!(Client::new(bad, None), Err(ClientError::Address { .. })),
                "{bad}"
            );
        }
    }
}
