//! A client of the server's HTTP API, for the command line. It uses no other module of the server.

mod api;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod sse;

use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, header};
use serde_json::Value;

pub use api::{Draw, NewConcept};
pub use error::ClientError;
pub use sse::{Event, Events};

/// A server that does not accept the connection in this time is considered unreachable.
const CONNECT: Duration = Duration::from_secs(10);
/// A server that sends nothing for this long is considered unreachable. Event streams carry a comment at least every 15
/// seconds; waiting for images without a stream may take longer, so this is generous.
const SILENCE: Duration = Duration::from_secs(300);

/// Installs the TLS implementation of this process; a second call has no effect.
pub fn install_tls() {
    // Fails if a provider is already installed, which is then kept.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A server, and the key for its requests.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    /// Without a trailing slash.
    base: String,
    key: Option<String>,
}

impl Client {
    /// A client of the server at `server`, an `http` or `https` address.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub fn new(server: &str, key: Option<String>) -> Result<Self, ClientError> {
        let address = |problem: String| ClientError::Address {
            server: server.to_owned(),
            problem,
        };
        if !server.starts_with("http://") && !server.starts_with("https://") {
            return Err(address("it must begin with http:// or https://".to_owned()));
        }
        let url = reqwest::Url::parse(server).map_err(|error| address(error.to_string()))?;
        if url.path().trim_end_matches('/').ends_with("/v1") {
            return Err(address("leave out the `/v1` at its end".to_owned()));
        }
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(address("it must begin with http:// or https://".to_owned()));
        }
        install_tls();
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("coar/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE);
        if url.scheme() == "http" {
            // Without TLS no certificates are needed: a machine without any must not cause a failure.
            http = http.tls_certs_only([]);
        }
        Ok(Self {
            http: http.build().map_err(|error| address(error.to_string()))?,
            base: server.trim_end_matches('/').to_owned(),
            key,
        })
    }

    /// Completes a URL of a response, which is only a path if the server has no `public_url`.
    pub fn absolute(&self, url: &str) -> String {
        match url.starts_with('/') {
            true => format!("{}{url}", self.base),
            false => url.to_owned(),
        }
    }

    /// A request to a path of the API, with the key.
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Sends a request; any response but a success is an error.
    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let answer = request
            .send()
            .await
            .map_err(|error| ClientError::unreachable(&self.base, &error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let retry_after = answer
            .headers()
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let body = answer.bytes().await.unwrap_or_default();
        Err(ClientError::refused(status.as_u16(), &body, retry_after))
    }

    /// Sends a request and parses its response as JSON.
    async fn json(&self, request: RequestBuilder) -> Result<Value, ClientError> {
        let answer = self.send(request).await?;
        let bytes = answer.bytes().await.map_err(|error| ClientError::broken(&error))?;
        serde_json::from_slice(&bytes).map_err(|error| ClientError::Answer(error.to_string()))
    }

    /// Sends a request whose response is an event stream.
    async fn events(&self, request: RequestBuilder) -> Result<Events, ClientError> {
        let answer = self.send(request.header(header::ACCEPT, "text/event-stream")).await?;
        let kind = answer
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok());
        match kind {
            Some(kind) if kind.starts_with("text/event-stream") => Ok(Events::new(answer)),
            other => Err(ClientError::Answer(format!(
                "expected an event stream, not {}",
                other.unwrap_or("a body without a type")
            ))),
        }
    }
}
