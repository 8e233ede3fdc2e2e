//! Connections: taking them, bounding them, dropping readers that stall.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::Sleep;
use tower_service::Service;

use crate::app::App;
use crate::errors::ApiError;
use crate::routes::Peer;
use crate::server::seconds;

/// Bytes that the system buffers for a reader: what a stalled one costs.
const SEND_BUFFER_BYTES: usize = 128 << 10;
/// Bytes that are read and written at once.
const MAX_BUFFER_BYTES: usize = 128 << 10;
/// Header fields of one request.
const MAX_HEADERS: usize = 256;

/// A listening socket that takes bursts of connections.
pub(crate) fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Takes connections until `closing` turns true; those that are open then finish what they are at.
pub(crate) async fn serve(app: Arc<App>, router: Router, listener: TcpListener, mut closing: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(app.config.limits.max_connections));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closing.changed() => return,
        };
        let Ok((stream, peer)) = accepted else {
            // Out of descriptors: some will come free.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                let connection = connection(app.clone(), router.clone(), stream, peer, closing.clone());
                tokio::spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(_) => drop(tokio::spawn(turn_away(stream))),
        }
    }
}

async fn turn_away(mut stream: TcpStream) {
    let body = ApiError::overloaded("the server has too many connections", 1).json();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(answer.as_bytes())).await;
}

async fn connection(
    app: Arc<App>,
    router: Router,
    stream: TcpStream,
    peer: SocketAddr,
    mut closing: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let limits = &app.config.limits;
    let io = TokioIo::new(Stalling::new(stream, seconds(limits.stall_timeout_s)));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(seconds(limits.header_timeout_s))
        .max_buf_size(MAX_BUFFER_BYTES.max(2 * limits.max_header_bytes))
        .max_headers(MAX_HEADERS);
    let service = {
        let app = app.clone();
        hyper::service::service_fn(move |request| answer(app.clone(), router.clone(), peer, request))
    };
    let open = &app.metrics.open_connections;
    open.fetch_add(1, Ordering::Relaxed);
    let mut connection = std::pin::pin!(builder.serve_connection(io, service));
    let is_closing = *closing.borrow();
    if is_closing {
        connection.as_mut().graceful_shutdown();
    }
    // However it ends, it is the client's affair.
    let ended = tokio::select! {
        _ = connection.as_mut() => true,
        _ = closing.changed() => false,
    };
    if !ended {
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }
    open.fetch_sub(1, Ordering::Relaxed);
}

/// Adds what browsers need, where they are let in.
async fn answer(
    app: Arc<App>,
    mut router: Router,
    peer: SocketAddr,
    request: hyper::Request<Incoming>,
) -> Result<Response<Body>, std::convert::Infallible> {
    let mut request: Request = request.map(Body::new);
    request.extensions_mut().insert(Peer(peer));
    let origin = request.headers().get(header::ORIGIN).filter(|origin| is_allowed(&app, origin)).cloned();
    if let (Some(origin), true) = (&origin, request.method() == Method::OPTIONS) {
        return Ok(preflight(origin.clone()));
    }
    let mut response = router.call(request).await?;
    if let Some(origin) = origin {
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        response.headers_mut().append(header::VARY, HeaderValue::from_static("Origin"));
    }
    Ok(response)
}

fn is_allowed(app: &App, origin: &HeaderValue) -> bool {
    app.config.allowed_origins.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin.as_bytes())
}

fn preflight(origin: HeaderValue) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, PUT, DELETE"));
    let allowed = "authorization, content-type, x-request-id";
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(allowed));
    response
}

/// A socket whose reader must take something now and then.
struct Stalling {
    stream: TcpStream,
    limit: Duration,
    /// Runs while a write waits.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stalling {
    fn new(stream: TcpStream, limit: Duration) -> Self {
        Self { stream, limit, timer: None }
    }

    fn checked<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.timer = None;
            return polled;
        }
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Stalling {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.checked(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.checked(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
