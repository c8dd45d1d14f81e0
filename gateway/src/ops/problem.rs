//! Errors of the API, as `application/problem+json` (RFC 9457). Start with [`Problem`].

use std::borrow::Cow;

use axum::{
    extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{call, import::BadLine, preview::RulePreview};
use crate::store::StoreError;

/// Media type of every error.
pub const MEDIA_TYPE: &str = "application/problem+json";
/// Maximum length of the text about a request that could not be parsed. Serde repeats parts of the request.
const DETAIL_LEN_MAX: usize = 300;

/// The kinds of error: the word in `code`, and the end of `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    Conflict,
    NeedsConfirmation,
    DeviceOffline,
    /// The object has another revision than `If-Match` names.
    PreconditionFailed,
    TooLarge,
    UriTooLong,
    HeadersTooLarge,
    UnsupportedMediaType,
    Invalid,
    MailboxFull,
    Internal,
    DatabaseUnavailable,
    /// The database answers, and can't do what the request needs: until somebody repairs it.
    DatabaseRefuses,
    TimedOut,
    TooManyReaders,
    Busy,
}

impl Code {
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict | Self::NeedsConfirmation | Self::DeviceOffline => StatusCode::CONFLICT,
            Self::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UriTooLong => StatusCode::URI_TOO_LONG,
            Self::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            Self::MailboxFull => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::DatabaseUnavailable | Self::DatabaseRefuses | Self::TimedOut | Self::TooManyReaders | Self::Busy => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::Conflict => "conflict",
            Self::NeedsConfirmation => "needs_confirmation",
            Self::DeviceOffline => "device_offline",
            Self::PreconditionFailed => "precondition_failed",
            Self::TooLarge => "too_large",
            Self::UriTooLong => "uri_too_long",
            Self::HeadersTooLarge => "headers_too_large",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::Invalid => "invalid",
            Self::MailboxFull => "mailbox_full",
            Self::Internal => "internal",
            Self::DatabaseUnavailable => "database_unavailable",
            Self::DatabaseRefuses => "database_refuses",
            Self::TimedOut => "timed_out",
            Self::TooManyReaders => "too_many_readers",
            Self::Busy => "busy",
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::BadRequest => "Bad request",
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "Not found",
            Self::MethodNotAllowed => "Method not allowed",
            Self::Conflict => "Conflict",
            Self::NeedsConfirmation => "Confirmation required",
            Self::DeviceOffline => "Device offline",
            Self::PreconditionFailed => "Precondition failed",
            Self::TooLarge => "Content too large",
            Self::UriTooLong => "URI too long",
            Self::HeadersTooLarge => "Request header fields too large",
            Self::UnsupportedMediaType => "Unsupported media type",
            Self::Invalid => "Invalid value",
            Self::MailboxFull => "Mailbox full",
            Self::Internal => "Internal error",
            Self::DatabaseUnavailable => "Database unavailable",
            Self::DatabaseRefuses => "Database refuses",
            Self::TimedOut => "Timed out",
            Self::TooManyReaders => "Too many event readers",
            Self::Busy => "Too many concurrent requests",
        }
    }
}

/// An error for the caller. Boxed inside, so that results stay small.
#[derive(Clone, Debug)]
pub struct Problem(Box<Parts>);

#[derive(Clone, Debug)]
struct Parts {
    code: Code,
    detail: Cow<'static, str>,
    preview: Option<RulePreview>,
    bad_lines: Option<(u64, Vec<BadLine>)>,
}

impl Problem {
    pub fn code(&self) -> Code {
        self.0.code
    }

    #[must_use]
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Parts {
            code,
            detail: detail.into(),
            preview: None,
            bad_lines: None,
        }))
    }

    /// 422: a value of the request is not allowed.
    #[must_use]
    pub fn invalid(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Invalid, detail)
    }

    /// 404: `what` is the kind of the missing object.
    #[must_use]
    pub fn not_found(what: &'static str) -> Self {
        Self::new(Code::NotFound, format!("there is no such {what}"))
    }

    /// 409 with the devices that the rule would match.
    #[must_use]
    pub fn needs_confirmation(preview: RulePreview) -> Self {
        let why = preview
            .confirmation
            .as_deref()
            .unwrap_or("the rule would refuse many devices");
        let detail = format!("{why}: repeat with \"confirm\": true if that is intended");
        let mut problem = Self::new(Code::NeedsConfirmation, detail);
        problem.0.preview = Some(preview);
        problem
    }

    /// 422 with the number of bad lines, and the first ones.
    #[must_use]
    pub fn bad_lines(bad: u64, named: Vec<BadLine>) -> Self {
        let lines = if bad == 1 { "line is" } else { "lines are" };
        let mut problem = Self::invalid(format!("{bad} {lines} wrong, so nothing was imported"));
        problem.0.bad_lines = Some((bad, named));
        problem
    }
}

/// The form of every error (RFC 9457).
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// `urn:seawall:problem:` and the code.
    #[serde(rename = "type")]
    problem_type: String,
    /// The same for every error of this code.
    title: &'static str,
    /// HTTP status.
    status: u16,
    /// The kind of error, for programs.
    code: &'static str,
    /// Description of this error, for people.
    detail: Cow<'static, str>,
    /// `urn:seawall:request:` and the id of the request, as in `X-Request-Id` and in the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<String>,
    /// With `needs_confirmation`: the devices that the rule would match.
    #[serde(skip_serializing_if = "Option::is_none")]
    preview: Option<RulePreview>,
    /// With a refused import: the number of bad lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    bad: Option<u64>,
    /// With a refused import: the first bad lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    bad_lines: Option<Vec<BadLine>>,
}

impl ProblemBody {
    fn of(problem: Problem) -> Self {
        let Parts {
            code,
            detail,
            preview,
            bad_lines,
        } = *problem.0;
        let (bad, bad_lines) = bad_lines.unzip();
        let id = call::current_id();
        Self {
            problem_type: format!("urn:seawall:problem:{}", code.as_str()),
            title: code.title(),
            status: code.status().as_u16(),
            code: code.as_str(),
            detail,
            instance: (!id.is_empty()).then(|| format!("urn:seawall:request:{id}")),
            preview,
            bad,
            bad_lines,
        }
    }
}

impl Problem {
    /// Returns status and body.
    pub(super) fn into_json(self) -> (StatusCode, String) {
        let status = self.0.code.status();
        // Texts and numbers always have a JSON form.
        let body = serde_json::to_string(&ProblemBody::of(self)).unwrap_or_default();
        (status, body)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let code = self.0.code;
        let body = ProblemBody::of(self);
        let mut response = (code.status(), axum::Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        if code == Code::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if code == Code::Busy {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict(detail) => Self::new(Code::Conflict, detail),
            StoreError::OtherRevision(_) | StoreError::Outdated => Self::new(Code::Conflict, error.to_string()),
            StoreError::Invalid(detail) => Self::invalid(detail),
            StoreError::TimedOut => Self::new(
                Code::DatabaseUnavailable,
                if call::current().is_change {
                    "the database did not answer in time: whether the change was made is not known"
                } else {
                    "the database did not answer in time"
                },
            ),
            StoreError::Unavailable { .. }
            | StoreError::FileFailed(_)
            | StoreError::NoConnectionFree(_)
            | StoreError::ReadOnlyServer
            | StoreError::Busy
            | StoreError::Locked(_)
            | StoreError::DiskFull(_)
            | StoreError::ReadOnly(_)
            | StoreError::Unreadable(_)
            | StoreError::FileChanged(_)
            | StoreError::OnlyRead(_) => Self::new(Code::DatabaseUnavailable, error.to_string()),
            // It answers: so no answer comes from this node's memory instead.
            StoreError::NotADatabase(_)
            | StoreError::Damaged(_)
            | StoreError::Unusable(_)
            | StoreError::Undecodable(_)
            | StoreError::Corrupt { .. }
            | StoreError::Open { .. }
            | StoreError::Migration(..)
            | StoreError::Unexpected(_) => Self::new(Code::DatabaseRefuses, error.to_string()),
        }
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        match &rejection {
            JsonRejection::JsonDataError(_) => Self::invalid(shortened(&rejection.body_text())),
            JsonRejection::JsonSyntaxError(_) => Self::new(Code::BadRequest, shortened(&rejection.body_text())),
            JsonRejection::MissingJsonContentType(_) => {
                Self::new(Code::UnsupportedMediaType, "expected Content-Type: application/json")
            }
            JsonRejection::BytesRejection(_) => Self::of_body(rejection.status()),
            other => Self::new(Code::BadRequest, shortened(&other.body_text())),
        }
    }
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        Self::of_body(rejection.status())
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(Code::BadRequest, shortened(&rejection.body_text()))
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::new(Code::BadRequest, shortened(&rejection.body_text()))
    }
}

impl Problem {
    /// A body that could not be read.
    pub(super) fn of_body(status: StatusCode) -> Self {
        if status == StatusCode::PAYLOAD_TOO_LARGE {
            Self::new(Code::TooLarge, "the body is over ops.body_bytes_max")
        } else {
            Self::new(Code::BadRequest, "the body did not arrive whole")
        }
    }
}

/// Returns the text without control characters, cut between characters at the maximum length.
pub(super) fn shortened(text: &str) -> String {
    let mut short = String::new();
    for character in text.chars() {
        if short.len() + character.len_utf8() > DETAIL_LEN_MAX {
            break;
        }
        short.push(if character.is_control() { ' ' } else { character });
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_is_short_and_without_control_characters() {
        let text = shortened(&"\u{1b}[2Jé".repeat(200));

        assert!(text.len() <= DETAIL_LEN_MAX);
        assert!(!text.contains(char::is_control));
    }

    #[test]
    fn database_that_answers_and_refuses_is_not_called_unavailable() {
        let refused = Problem::from(StoreError::Unusable("violates a constraint".into()));
        let away = Problem::from(StoreError::Unavailable("connection refused".into()));

        assert_eq!(refused.code(), Code::DatabaseRefuses);
        assert_eq!(refused.code().status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(refused.into_json().1.contains("violates a constraint"));
        assert_eq!(away.code(), Code::DatabaseUnavailable);
    }

    #[test]
    fn the_form_is_the_one_that_devices_get() {
        let response = Problem::not_found("device").into_response();

        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()[header::CONTENT_TYPE], MEDIA_TYPE);
    }
}
