//! The page at `/`: three files from the binary, which ask the routes like any other client.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};

use crate::router::{Answer, Call, typed_response};

pub(crate) const HTML: &str = "text/html; charset=utf-8";
pub(crate) const CSS: &str = "text/css; charset=utf-8";
pub(crate) const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Nothing from elsewhere, nothing inline, and nobody may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `GET /`.
pub(crate) async fn html(_: Call) -> Answer {
    Ok(file(HTML, include_str!("page/index.html")))
}

/// `GET /page.css`.
pub(crate) async fn css(_: Call) -> Answer {
    Ok(file(CSS, include_str!("page/page.css")))
}

/// `GET /page.js`.
pub(crate) async fn script(_: Call) -> Answer {
    Ok(file(SCRIPT, include_str!("page/page.js")))
}

fn file(media_type: &'static str, content: &'static str) -> Response<Body> {
    let mut response = typed_response(media_type, content.to_owned());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    // A newer server brings newer files.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
