//! Reading a request's body, within its limits.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use crate::admission::{Load, Reservation};
use crate::config::Limits;
use crate::errors::ApiError;

/// Bytes that the headers announce, if they do.
pub(crate) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is larger than {limit} bytes, which is the limit");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// Only JSON is read: a page of another origin can send other types without asking.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused =
        |message: String| Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return refused("the body is compressed; hint: send it as it is".into());
    }
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media = value.split(';').next().unwrap_or_default().trim();
    if media.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    refused(format!("the body's type is {:?}; hint: send Content-Type: application/json", crate::fields::shown(media)))
}

/// Reads the body. `reservation` holds what the headers announced and grows with what they did not.
pub(crate) async fn read(
    headers: &HeaderMap,
    body: Body,
    limits: &Limits,
    reservation: &mut Reservation,
) -> Result<Bytes, ApiError> {
    check_type(headers)?;
    let announced = announced(headers);
    if announced.is_some_and(|bytes| bytes > limits.max_body_bytes as u64) {
        return Err(too_large(limits.max_body_bytes));
    }
    let timeout = crate::server::seconds(limits.body_timeout_s);
    let reading = collect(body, limits.max_body_bytes, announced.is_none().then_some(reservation));
    tokio::time::timeout(timeout, reading).await.unwrap_or_else(|_| {
        let message = format!("the body did not arrive within {} s", limits.body_timeout_s);
        Err(ApiError::new(StatusCode::BAD_REQUEST, "body_timeout", message))
    })
}

async fn collect(mut body: Body, limit: usize, mut growing: Option<&mut Reservation>) -> Result<Bytes, ApiError> {
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let broken = |_| ApiError::new(StatusCode::BAD_REQUEST, "invalid_body", "the body broke off");
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        if all.len() + data.len() > limit {
            return Err(too_large(limit));
        }
        if let Some(reservation) = growing.as_deref_mut() {
            reservation.grow(Load { bytes: data.len() as u64, ..Load::default() })?;
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}
