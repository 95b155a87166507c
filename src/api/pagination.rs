//! `limit` and `after` of every list.

use std::str::FromStr;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use serde::Deserialize;
use utoipa::IntoParams;

use super::ApiError;
use crate::registry::Page;
use coar_core::error::{Error, ErrorKind};

const LIMIT: u32 = 100;
const DEFAULT: u32 = 20;

/// A page of a list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// Maximum number of objects.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 100, default = 20)]
    limit: Option<String>,
    /// The last id of the previous page.
    after: Option<String>,
}

impl PageQuery {
    /// The page for identifiers of type `I`.
    ///
    /// # Errors
    /// A limit out of range, or an identifier of another type.
    pub(super) fn page<I: FromStr<Err: std::fmt::Display>>(&self) -> Result<Page<I>, Error> {
        let limit = match self.limit.as_deref() {
            None => DEFAULT,
            Some(text) => text
                .parse()
                .ok()
                .filter(|limit| (1..=LIMIT).contains(limit))
                .ok_or_else(|| {
                    Error::field("invalid_value", "limit", format!("is `{text}`; expected 1 to {LIMIT}"))
                        .limit(LIMIT.into())
                })?,
        };
        let after = self.after.as_deref().map(str::parse::<I>).transpose();
        let after = after.map_err(|problem| Error::field("invalid_value", "after", problem.to_string()))?;
        Ok(Page { limit, after })
    }
}

/// The error of a query string that cannot be read.
pub(super) fn invalid_query(problem: &dyn std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Invalid,
        "invalid_query",
        format!("The query cannot be read: {problem}."),
    )
}

/// A page of a list, from the query. Routes with more parameters flatten a [`PageQuery`] into their own.
#[derive(Debug)]
pub(super) struct Paged<I>(pub Page<I>);

impl<S: Sync, I: FromStr<Err: std::fmt::Display>> FromRequestParts<S> for Paged<I> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query = Query::<PageQuery>::try_from_uri(&parts.uri).map_err(|error| invalid_query(&error))?;
        Ok(Self(query.page()?))
    }
}
