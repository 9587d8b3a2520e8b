//! The stable error codes that cross the wire, and how each looks over HTTP.

use std::fmt;

use serde::{Deserialize, Serialize};

/// gRPC's status codes, as far as Millrace uses them. The numbers are the wire format: never reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ErrorCode {
    /// The caller gave up.
    Cancelled = 1,
    /// The request itself is wrong; sending it again cannot help.
    InvalidArgument = 3,
    /// The deadline passed first.
    DeadlineExceeded = 4,
    /// No such model, request or method.
    NotFound = 5,
    /// The credentials are valid, but not for this.
    PermissionDenied = 7,
    /// A queue or budget is full; try again after the hint.
    ResourceExhausted = 8,
    /// The system is not in a state for this (for example: model not loaded).
    FailedPrecondition = 9,
    /// Something Millrace should support but does not yet.
    Unimplemented = 12,
    /// A fault inside Millrace.
    Internal = 13,
    /// No pipeline is ready, or it was lost; try again after the hint.
    Unavailable = 14,
    /// No credentials, or wrong ones.
    Unauthenticated = 16,
}

impl ErrorCode {
    /// The name gRPC gives the code.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancelled => "CANCELLED",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::NotFound => "NOT_FOUND",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Internal => "INTERNAL",
            Self::Unavailable => "UNAVAILABLE",
            Self::Unauthenticated => "UNAUTHENTICATED",
        }
    }

    /// The HTTP status that says the same.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Cancelled => 499,
            Self::InvalidArgument => 400,
            Self::DeadlineExceeded => 504,
            Self::NotFound => 404,
            Self::PermissionDenied => 403,
            Self::ResourceExhausted => 429,
            Self::FailedPrecondition | Self::Unavailable => 503,
            Self::Unimplemented => 501,
            Self::Internal => 500,
            Self::Unauthenticated => 401,
        }
    }

    /// The `type` field of an OpenAI-shaped error body.
    pub fn openai_type(self) -> &'static str {
        match self {
            Self::InvalidArgument | Self::Unimplemented => "invalid_request_error",
            Self::NotFound => "not_found_error",
            Self::Unauthenticated => "authentication_error",
            Self::PermissionDenied => "permission_error",
            Self::ResourceExhausted => "rate_limit_error",
            Self::Unavailable | Self::FailedPrecondition => "unavailable_error",
            Self::DeadlineExceeded => "timeout_error",
            Self::Cancelled | Self::Internal => "server_error",
        }
    }
}

/// An error as a client sees it: code, a message that says what to do, and when to try again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What kind of failure.
    pub code: ErrorCode,
    /// What was wrong, and what to do about it.
    pub message: String,
    /// The request field at fault, where one is.
    pub param: Option<String>,
    /// Milliseconds after which trying again makes sense.
    pub retry_after_ms: Option<u32>,
}

impl Status {
    /// A status without hints.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None, retry_after_ms: None }
    }
    /// The request is wrong in the field `param`.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(ErrorCode::InvalidArgument, message) }
    }
    /// Nothing can serve this now.
    pub fn unavailable(message: impl Into<String>, retry_after_ms: u32) -> Self {
        Self { retry_after_ms: Some(retry_after_ms), ..Self::new(ErrorCode::Unavailable, message) }
    }
    /// A bounded queue is full.
    pub fn exhausted(message: impl Into<String>, retry_after_ms: u32) -> Self {
        Self {
            retry_after_ms: Some(retry_after_ms),
            ..Self::new(ErrorCode::ResourceExhausted, message)
        }
    }
    /// A fault of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.message)
    }
}

impl std::error::Error for Status {}
