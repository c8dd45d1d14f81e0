//! Extractors with errors in the API's form: bodies, queries, ids in paths, pages.

use std::{borrow::Cow, convert::Infallible, str::FromStr, sync::Arc, time::Duration};

use axum::{
    Json,
    body::HttpBody as _,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderValue, StatusCode, header, request::Parts},
};
use bytes::Bytes;
use seawall_proto::{
    cohorts::ProposalId,
    hello::IdentityNames,
    id::{DeviceId, InvalidLabel, Label, RuleId},
};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{
    Api,
    call::Call,
    problem::{Code, Problem},
};
use crate::store::StoreError;

/// Default number of items of a page.
pub const PAGE_DEFAULT: u32 = 100;
/// Maximum number of items of a page.
pub const PAGE_MAX: u32 = crate::store::PAGE_MAX;

/// A JSON body. Unknown fields, wrong types, a missing media type and too many bytes have different errors.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<Api>> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Problem> {
        let (parts, bytes) = read(request, api).await?;
        object(parts, bytes).await.map(Self)
    }
}

/// An optional JSON body: an empty one, whatever its media type, and `null` are read as `{}`.
#[derive(Debug)]
pub struct OptionalBody<T>(pub T);

impl<T: DeserializeOwned + Default> FromRequest<Arc<Api>> for OptionalBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Problem> {
        let (parts, bytes) = read(request, api).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        let body: Option<T> = object(parts, bytes).await?;
        Ok(Self(body.unwrap_or_default()))
    }
}

/// Reads a body, if there is enough memory for it beside the bodies of all other calls.
async fn read(request: Request, api: &Api) -> Result<(Parts, Bytes), Problem> {
    let (parts, body) = request.into_parts();
    let announced = parts.headers.get(header::CONTENT_LENGTH);
    let len = announced.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let len = len.unwrap_or(if body.is_end_stream() { 0 } else { api.body_bytes_max });
    if len > api.body_bytes_max {
        return Err(Problem::of_body(StatusCode::PAYLOAD_TOO_LARGE));
    }
    // The settings bound a body far below 4 GiB.
    let permits = u32::try_from(len).unwrap_or(u32::MAX);
    let permit = Arc::clone(&api.bodies).try_acquire_many_owned(permits).map_err(|_| {
        Problem::new(
            Code::Busy,
            "other requests take all the memory for bodies: try again in a second",
        )
    })?;
    if let Some(call) = parts.extensions.get::<Arc<Call>>() {
        call.hold_body(permit);
    }
    let bytes = Bytes::from_request(Request::from_parts(parts.clone(), body), &()).await?;
    Ok((parts, bytes))
}

/// Reads a JSON object. Serde would also accept an array of the values of its fields.
async fn object<T: DeserializeOwned>(parts: Parts, bytes: Bytes) -> Result<T, Problem> {
    let is_array = bytes.trim_ascii_start().first() == Some(&b'[');
    let Json(value) = Json::<T>::from_request(Request::from_parts(parts, bytes.into()), &()).await?;
    if is_array {
        return Err(Problem::invalid("expected a JSON object, got an array"));
    }
    Ok(value)
}

/// A query string. Unknown and repeated names are errors.
#[derive(Debug)]
pub struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(params) = Query::<T>::from_request_parts(parts, state).await?;
        Ok(Self(params))
    }
}

/// The revisions that `If-Match` names (RFC 9110 §13.1.1), as `"7"`. Without it, and with `*`, any.
#[derive(Clone, Debug)]
pub struct IfMatch(Option<Vec<u64>>);

impl IfMatch {
    /// Any revision.
    pub const ANY: Self = Self(None);

    /// The revisions. `None`: any.
    pub fn revisions(&self) -> Option<&[u64]> {
        self.0.as_deref()
    }

    pub fn has(&self, revision: u64) -> bool {
        self.revisions().is_none_or(|wanted| wanted.contains(&revision))
    }

    /// The problem of a change that was not made, since the object has this revision: `precondition_failed` if that is
    /// not one of these.
    pub fn problem(&self, revision: u64) -> Problem {
        if self.has(revision) {
            return StoreError::OtherRevision(revision).into();
        }
        let detail = format!("If-Match: the revision is \"{revision}\"");
        Problem::new(Code::PreconditionFailed, detail)
    }
}

impl FromRequestParts<Arc<Api>> for IfMatch {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _api: &Arc<Api>) -> Result<Self, Infallible> {
        let values: Vec<&[u8]> = parts
            .headers
            .get_all(header::IF_MATCH)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        let is_any = values.is_empty() || values.iter().any(|value| value.trim_ascii() == b"*");
        let tags = values.iter().flat_map(|value| value.split(|byte| *byte == b','));
        // A weak tag, or another text, is of no revision.
        let revision = |tag: &[u8]| {
            let digits = tag.trim_ascii().strip_prefix(b"\"")?.strip_suffix(b"\"")?;
            std::str::from_utf8(digits).ok()?.parse().ok()
        };
        Ok(Self((!is_any).then(|| tags.filter_map(revision).collect())))
    }
}

/// The `{id}` of a path.
#[derive(Debug)]
pub struct Id<T>(pub T);

impl<T: FromPath> FromRequestParts<Arc<Api>> for Id<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Problem> {
        let Path(text) = Path::<String>::from_request_parts(parts, api).await?;
        T::from_path(&text, &api.state.config.identity)
            .map(Self)
            .ok_or_else(|| Problem::new(Code::BadRequest, "the id in the path is not a UUID"))
    }
}

/// An id that a path names by its UUID, or a device by its external id.
pub trait FromPath: Sized {
    fn from_path(text: &str, names: &IdentityNames) -> Option<Self>;
}

impl FromPath for DeviceId {
    fn from_path(text: &str, names: &IdentityNames) -> Option<Self> {
        names.device(text).map(|named| named.id)
    }
}

impl FromPath for Uuid {
    fn from_path(text: &str, _names: &IdentityNames) -> Option<Self> {
        // Ids that the gateway assigns have one form.
        DeviceId::from_str(text).ok().map(DeviceId::as_uuid)
    }
}

impl FromPath for ProposalId {
    fn from_path(text: &str, names: &IdentityNames) -> Option<Self> {
        Uuid::from_path(text, names).map(Self)
    }
}

impl FromPath for RuleId {
    fn from_path(text: &str, names: &IdentityNames) -> Option<Self> {
        Uuid::from_path(text, names).map(Self)
    }
}

/// A part of a list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PageParams {
    /// Maximum number of items: 1 to 1,000. Default 100.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
    /// `next_cursor` of the previous page. Default: the first page.
    pub cursor: Option<String>,
}

impl PageParams {
    /// # Errors
    /// Out of range.
    pub fn limit(&self) -> Result<u32, Problem> {
        page_limit(self.limit)
    }

    /// # Errors
    /// The cursor is not one of this list.
    pub fn cursor<T: FromStr>(&self) -> Result<Option<T>, Problem> {
        page_cursor(self.cursor.as_deref())
    }
}

/// # Errors
/// Out of range.
pub fn page_limit(limit: Option<u32>) -> Result<u32, Problem> {
    match limit.unwrap_or(PAGE_DEFAULT) {
        limit @ 1..=PAGE_MAX => Ok(limit),
        _ => Err(Problem::new(
            Code::BadRequest,
            format!("limit: expected 1 to {PAGE_MAX}"),
        )),
    }
}

/// # Errors
/// The cursor is not one of this list.
pub fn page_cursor<T: FromStr>(cursor: Option<&str>) -> Result<Option<T>, Problem> {
    cursor
        .map(|text| {
            text.parse()
                .map_err(|_| Problem::new(Code::BadRequest, "cursor: expected next_cursor of the previous page"))
        })
        .transpose()
}

/// One page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// The `cursor` of the next page; null on the last page.
    pub next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// Returns a page of a list that is in memory, sorted by `key`.
    pub fn of_sorted<K: FromStr + Ord + ToString>(
        all: Vec<T>,
        params: &PageParams,
        key: impl Fn(&T) -> K,
    ) -> Result<Self, Problem> {
        let limit = params.limit()? as usize;
        let start = params
            .cursor::<K>()?
            .map_or(0, |first| all.partition_point(|item| key(item) < first));
        let mut items: Vec<T> = all.into_iter().skip(start).take(limit + 1).collect();
        let next_cursor = items.get(limit).map(|item| key(item).to_string());
        items.truncate(limit);
        Ok(Self { items, next_cursor })
    }
}

/// Distinguishes a `null` field from a missing one. For `#[serde(default, deserialize_with = …)]`.
pub fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(deserializer).map(Some)
}

/// Parses a filter of a list: a short text.
///
/// # Errors
/// The text is empty, longer than allowed, or not printable ASCII.
pub fn label(name: &'static str, text: Option<&str>) -> Result<Option<Label>, Problem> {
    let Some(text) = text else { return Ok(None) };
    match Label::parse(text) {
        Ok(Some(label)) => Ok(Some(label)),
        Ok(None) | Err(InvalidLabel) => Err(Problem::new(Code::BadRequest, format!("{name}: {InvalidLabel}"))),
    }
}

/// A duration in a body: text such as `15m` or `1h 30m`, or a number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

/// Text such as `15m` or `1h 30m`, or a number of seconds.
#[derive(ToSchema)]
#[schema(as = Span)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes `Span` for the OpenAPI document")]
pub enum SpanDoc {
    Text(String),
    Seconds(u32),
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written<'a> {
            Seconds(u32),
            Text(#[serde(borrow)] Cow<'a, str>),
        }
        let wrong = || serde::de::Error::custom("expected a duration such as \"15m\" or \"1h 30m\", or seconds");
        match Written::deserialize(deserializer).map_err(|_: D::Error| wrong())? {
            Written::Seconds(seconds) => Ok(Self(Duration::from_secs(seconds.into()))),
            Written::Text(text) => humantime::parse_duration(text.trim()).map(Self).map_err(|_| wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_a_list_without_gaps_or_repeats() {
        let mut seen = Vec::new();
        let mut params = PageParams {
            limit: Some(3),
            cursor: None,
        };
        loop {
            let page = Page::of_sorted((0..10_u32).collect(), &params, |n| *n).unwrap();
            seen.extend(page.items);
            match page.next_cursor {
                Some(cursor) => params.cursor = Some(cursor),
                None => break,
            }
        }

        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn spans_are_text_or_seconds() {
        let span = |json: &str| serde_json::from_str::<Span>(json).map(|span| span.0.as_secs());

        assert_eq!(span("\"15m\"").unwrap(), 900);
        assert_eq!(span("\"1h 30m\"").unwrap(), 5_400);
        assert_eq!(span("25").unwrap(), 25);
        for wrong in ["-1", "1.5", "\"soon\"", "\"\"", "null", "{}"] {
            assert!(span(wrong).is_err(), "{wrong}");
        }
    }
}
