//! The page at `/` and the description of the API, both part of the binary.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};

use crate::app::Call;
use crate::errors::ApiError;

const PAGE: &str = include_str!("../page/index.html");
const OPENAPI: &str = include_str!("openapi.json");
/// Only what the page brings itself, and only to this server.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn fixed(text: &'static str, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

pub(crate) async fn show(_: Call) -> Result<Response<Body>, ApiError> {
    let mut response = fixed(PAGE, "text/html; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    Ok(response)
}

pub(crate) async fn openapi(_: Call) -> Result<Response<Body>, ApiError> {
    Ok(fixed(OPENAPI, "application/json"))
}
