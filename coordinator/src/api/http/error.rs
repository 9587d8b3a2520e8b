//! Every failure in the one shape OpenAI's clients understand:
//! `{"error":{"message","type","param","code"}}`, with the HTTP status that fits and, where trying
//! again makes sense, `Retry-After`.

use std::fmt;

use actix_web::http::StatusCode;
use actix_web::http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER};
use actix_web::{HttpResponse, ResponseError};
use millrace_shared::error::{ErrorCode, Status};
use schemars::JsonSchema;
use serde::Serialize;

/// A failed HTTP request.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    status: Status,
    http: StatusCode,
    code: &'static str,
    allow: Option<&'static str>,
}

/// The body of a failure, also sent as the last event of a broken stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorDetail<'a>,
}

/// What went wrong.
#[derive(Debug, Serialize, JsonSchema)]
struct ErrorDetail<'a> {
    /// For people: what was wrong, and what to do.
    message: &'a str,
    /// What kind of failure it is, as OpenAI has them.
    r#type: &'static str,
    /// The field that was wrong.
    param: Option<&'a str>,
    /// For programs.
    code: &'static str,
}

fn stable_code(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Cancelled => "cancelled",
        ErrorCode::InvalidArgument => "invalid_argument",
        ErrorCode::DeadlineExceeded => "deadline_exceeded",
        ErrorCode::NotFound => "not_found",
        ErrorCode::PermissionDenied => "permission_denied",
        ErrorCode::ResourceExhausted => "rate_limit_exceeded",
        ErrorCode::FailedPrecondition => "failed_precondition",
        ErrorCode::Unimplemented => "unimplemented",
        ErrorCode::Internal => "internal_error",
        ErrorCode::Unavailable => "unavailable",
        ErrorCode::Unauthenticated => "invalid_api_key",
    }
}

impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        // 499, which says "the client went away", is no registered status, but it is well known.
        let http = StatusCode::from_u16(status.code.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let code = stable_code(status.code);
        Self { status, http, code, allow: None }
    }
}

impl ApiError {
    /// The field `param` is wrong: 400.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Status::invalid(param, message).into()
    }

    /// The body as a whole is wrong: 400.
    pub(crate) fn bad_body(message: impl Into<String>) -> Self {
        Status::new(ErrorCode::InvalidArgument, message).into()
    }

    /// The body is longer than `limit` bytes: 413.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the request body is longer than {limit} bytes; send less at once");
        Self {
            http: StatusCode::PAYLOAD_TOO_LARGE,
            code: "request_too_large",
            ..Self::bad_body(message)
        }
    }

    /// No such path: 404.
    pub(crate) fn no_route(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        let message = format!("there is nothing at {method} {path}");
        Self { code: "unknown_url", ..Status::new(ErrorCode::NotFound, message).into() }
    }

    /// The path exists, but not for this method: 405.
    pub(crate) fn wrong_method(method: &str, allowed: &'static str) -> Self {
        Self {
            http: StatusCode::METHOD_NOT_ALLOWED,
            code: "method_not_allowed",
            allow: Some(allowed),
            ..Self::bad_body(format!("{method} is not possible here; use {allowed}"))
        }
    }

    /// A failure of a call that names a model: not found means the model.
    pub(crate) fn of_model(status: Status) -> Self {
        let missing = status.code == ErrorCode::NotFound;
        let mut error = Self::from(status);
        if missing {
            error.code = "model_not_found";
            error.status.param.get_or_insert_with(|| "model".to_owned());
        }
        error
    }

    /// The same, of a field.
    pub(crate) fn about(mut self, param: &str) -> Self {
        self.status.param = Some(param.to_owned());
        self
    }

    /// The field that is wrong.
    pub(crate) fn param(&self) -> Option<&str> {
        self.status.param.as_deref()
    }

    /// What went wrong, for people.
    pub(crate) fn message(&self) -> &str {
        &self.status.message
    }

    /// What went wrong, for programs.
    pub(crate) fn stable_code(&self) -> &'static str {
        self.code
    }

    /// What kind of failure it is.
    pub(crate) fn code(&self) -> ErrorCode {
        self.status.code
    }

    /// The JSON body.
    pub(crate) fn body(&self) -> ErrorBody<'_> {
        ErrorBody {
            error: ErrorDetail {
                message: &self.status.message,
                r#type: self.status.code.openai_type(),
                param: self.status.param.as_deref(),
                code: self.code,
            },
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.status.fmt(f)
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.http
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.http);
        response.insert_header((CONTENT_TYPE, "application/json"));
        if let Some(ms) = self.status.retry_after_ms {
            // Whole seconds, rounded up: 0 would mean "at once".
            response.insert_header((RETRY_AFTER, ms.div_ceil(1000).max(1).to_string()));
        }
        if let Some(allow) = self.allow {
            response.insert_header((ALLOW, allow));
        }
        response.json(self.body())
    }
}
