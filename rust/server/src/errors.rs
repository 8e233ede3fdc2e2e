//! Errors as OpenAI's clients know them.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::json;
use slora_core::SubmitError;
use slora_runtime::{RegisterError, RequestError};
use slora_text::TextError;

/// Longest time that a client is asked to wait; clients give up on longer ones.
const MAX_RETRY_AFTER_S: u64 = 120;

/// An answer that is an error: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// The adapter store's own code, behind `adapter_invalid`.
    pub reason: Option<&'static str>,
    pub retry_after_s: Option<u64>,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), param: None, reason: None, retry_after_s: None }
    }

    /// A field's value is not what it may be.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).with_param(param)
    }

    /// A field that is known and not supported.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message).with_param(param)
    }

    pub fn model_not_found(model: &str) -> Self {
        let message = format!(
            "the model {model:?} does not exist or you do not have access to it; hint: GET /v1/models lists yours"
        );
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).with_param("model")
    }

    pub fn overloaded(message: impl Into<String>, retry_after_s: u64) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_overloaded", message).with_retry_after(retry_after_s)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message).with_retry_after(5)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    pub fn with_param(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    /// The same for every path outside, whether something is there or not.
    pub fn path_not_allowed() -> Self {
        let message = "the path must be absolute and, links resolved, beneath one of the server's adapter folders; hint: start \
                       the server with --adapter-root";
        Self::new(StatusCode::BAD_REQUEST, "path_not_allowed", message).with_param("lora_path")
    }

    pub fn with_retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds.clamp(1, MAX_RETRY_AFTER_S));
        self
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body, which is an event's data too when a stream breaks.
    pub fn json(&self) -> String {
        let (message, kind) = (&self.message, self.kind());
        let mut error = json!({"message": message, "type": kind, "param": self.param, "code": self.code});
        if let Some(reason) = &self.reason {
            error["reason"] = json!(reason);
        }
        json!({"error": error}).to_string()
    }

    pub fn response(&self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        let bad = |code| ApiError::new(StatusCode::BAD_REQUEST, code, message.clone());
        match error {
            RequestError::Submit(error) => submit_error(error, message),
            RequestError::Text(error) => text_error(&error),
            RequestError::NoTokenizer(_) => bad("no_tokenizer"),
            RequestError::AdapterFailed { failure, .. } => adapter_failed(message, failure.code),
            RequestError::EngineFailed(_) | RequestError::Closed => ApiError::unavailable(message),
            RequestError::NotFinite => ApiError::internal(message),
            _ => ApiError::internal(message),
        }
    }
}

fn submit_error(error: SubmitError, message: String) -> ApiError {
    let bad = |code| ApiError::new(StatusCode::BAD_REQUEST, code, message.clone());
    match error {
        SubmitError::TooLong { .. } | SubmitError::PoolTooSmall { .. } => bad("context_length_exceeded"),
        SubmitError::EmptyPrompt | SubmitError::Token { .. } => bad("invalid_value"),
        SubmitError::Sampling(_) => {
            let param = message.split([' ', ':']).next().unwrap_or_default().to_owned();
            bad("invalid_value").with_param(&param)
        }
        SubmitError::UnknownAdapter(name) => ApiError::model_not_found(&name),
        SubmitError::AdapterFailed { failure, .. } => adapter_failed(message, failure.code),
        SubmitError::QueueFull { .. } => ApiError::overloaded(message, 1),
        _ => ApiError::internal(message),
    }
}

/// An adapter that is known and cannot be used: the user's affair, and no use in trying again.
fn adapter_failed(message: String, reason: &'static str) -> ApiError {
    let mut error = ApiError::new(StatusCode::BAD_REQUEST, "adapter_invalid", message).with_param("model");
    error.reason = Some(reason);
    error
}

/// Errors of messages, templates and tokenizing.
pub(crate) fn text_error(error: &TextError) -> ApiError {
    let message = error.to_string();
    match error {
        TextError::TooManyStops { .. } | TextError::StopLength { .. } => ApiError::invalid("stop", message),
        TextError::TooLong { .. } => ApiError::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message),
        TextError::NoChatTemplate => {
            ApiError::new(StatusCode::BAD_REQUEST, "no_chat_template", message).with_param("messages")
        }
        TextError::Tokenizer(_) => ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", message),
        TextError::File { .. } => ApiError::internal(message),
        TextError::Part { .. } => ApiError::unsupported("messages", message),
        _ => ApiError::invalid("messages", message),
    }
}

impl From<RegisterError> for ApiError {
    fn from(error: RegisterError) -> Self {
        let message = error.to_string();
        let bad = |code| ApiError::new(StatusCode::BAD_REQUEST, code, message.clone());
        match error {
            RegisterError::Name(_) => bad("invalid_value").with_param("lora_name"),
            RegisterError::Checkpoint(error) => checkpoint_error(&error),
            RegisterError::Engine(slora_core::AdapterError::Exists(_)) => bad("adapter_exists").with_param("lora_name"),
            RegisterError::Engine(slora_core::AdapterError::Unknown(name)) => ApiError::model_not_found(&name),
            RegisterError::Engine(slora_core::AdapterError::TooLarge { .. }) => {
                let mut error = bad("adapter_invalid");
                error.reason = Some("too_many_pages");
                error
            }
            RegisterError::Stopped(error) => error.into(),
            _ => ApiError::internal(message),
        }
    }
}

/// A checkpoint that cannot be served exactly, with the store's code as the reason.
pub(crate) fn checkpoint_error(error: &slora_store::AdapterError) -> ApiError {
    if let slora_store::AdapterError::OutsideRoots { .. } = error {
        return ApiError::path_not_allowed();
    }
    let mut answer =
        ApiError::new(StatusCode::BAD_REQUEST, "adapter_invalid", error.to_string()).with_param("lora_path");
    answer.reason = Some(error.code());
    answer
}

#[cfg(test)]
mod tests {
    use slora_core::LoadFailure;

    use super::*;

    #[test]
    fn the_shape_is_openais() {
        let error = ApiError::invalid("n", "n is 0, it must be 1 to 128");
        let value: serde_json::Value = serde_json::from_str(&error.json()).unwrap();
        assert_eq!(value["error"]["type"], "invalid_request_error");
        assert_eq!(value["error"]["param"], "n");
        assert_eq!(value["error"]["code"], "invalid_value");
    }

    #[test]
    fn no_mistake_of_a_user_is_a_server_error() {
        let too_long = SubmitError::TooLong { max_context: 8, needed: 10, prompt_len: 9, max_tokens: 1 };
        let error = ApiError::from(RequestError::from(too_long));
        assert_eq!((error.status.as_u16(), error.code), (400, "context_length_exceeded"));
        assert!(error.message.contains("maximum context length"));
        let failure = LoadFailure { code: "changed", message: "another file lies there now".into() };
        let failed = ApiError::from(RequestError::AdapterFailed { name: "a".into(), failure });
        assert_eq!((failed.status.as_u16(), failed.reason), (400, Some("changed")));
        let unknown = RequestError::from(SubmitError::UnknownAdapter("x".into()));
        assert_eq!(ApiError::from(unknown).status.as_u16(), 404);
    }

    #[test]
    fn nobody_is_asked_to_wait_longer_than_clients_do() {
        assert_eq!(ApiError::overloaded("full", 5000).retry_after_s, Some(120));
        assert_eq!(ApiError::overloaded("full", 0).retry_after_s, Some(1));
    }
}
