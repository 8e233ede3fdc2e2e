//! One connection: hyper with its limits, around the router.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use futures_util::task::AtomicWaker;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Sleep;
use tower_service::Service;

use crate::app::App;
use crate::router::Peer;

/// Headers of one request.
const MAX_HEADERS: usize = 256;
/// hyper's buffer is larger than the limit on headers, so that the router can say in its own shape what is too large.
const MIN_BUFFER_BYTES: usize = 128 << 10;

/// While so many bytes of a stream wait for the socket, no further text is made.
const MAX_UNSENT_BYTES: usize = 16 << 10;

/// How long a client may take to close its side after the last answer.
const LINGER: Duration = Duration::from_secs(1);

/// What a connection's stream has made and its socket has not taken, as far as streams must know: what goes around their
/// events on the line is not counted.
#[derive(Debug, Default)]
pub(crate) struct Unsent {
    bytes: AtomicUsize,
    stream: AtomicWaker,
}

impl Unsent {
    /// Ready once there is room for more.
    pub fn poll_room(&self, context: &mut Context<'_>) -> Poll<()> {
        if self.bytes.load(Ordering::Relaxed) < MAX_UNSENT_BYTES {
            return Poll::Ready(());
        }
        // A connection is one task: nothing is taken between these lines.
        self.stream.register(context.waker());
        Poll::Pending
    }

    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn remove(&self, bytes: usize) {
        let before = self.bytes.load(Ordering::Relaxed);
        self.bytes.store(before.saturating_sub(bytes), Ordering::Relaxed);
        if before >= MAX_UNSENT_BYTES {
            self.stream.wake();
        }
    }
}

/// Serves one connection to its end. With `stop`, it ends after the request that is being answered.
pub(crate) async fn serve(
    app: Arc<App>,
    router: Router,
    stream: TcpStream,
    peer: Peer,
    mut stop: watch::Receiver<bool>,
) {
    let _count = OpenConnection::new(app.clone());
    let limits = &app.config.limits;
    let unsent = peer.unsent.clone();
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        // The router is ready at all times.
        router.clone().call(request.map(Body::new))
    });
    let stall = Duration::from_secs_f64(limits.stall_timeout_s);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs_f64(limits.header_timeout_s))
        .max_buf_size((2 * limits.max_header_bytes).max(MIN_BUFFER_BYTES))
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(Timed { stream, stall, unsent, timer: None }), service);
    tokio::pin!(connection);
    let mut is_stopping = *stop.borrow_and_update();
    loop {
        if is_stopping {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
            return;
        }
        tokio::select! {
            // What went wrong with a connection is its client's business.
            _ = connection.as_mut() => return,
            changed = stop.changed() => is_stopping = changed.is_err() || *stop.borrow_and_update(),
        }
    }
}

/// Counts an open connection for as long as it lives.
struct OpenConnection(Arc<App>);

impl OpenConnection {
    fn new(app: Arc<App>) -> Self {
        app.metrics.open_connections.fetch_add(1, Ordering::Relaxed);
        Self(app)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.metrics.open_connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A socket that fails when its reader takes nothing for too long, and that is closed so that the last answer arrives. It
/// has no vectored writes: for small events they cost more than they save.
struct Timed {
    stream: TcpStream,
    stall: Duration,
    unsent: Arc<Unsent>,
    /// Runs while a write waits, or while the client has not closed its side.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Timed {
    fn watch<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.timer = None;
            return polled;
        }
        let stall = self.stall;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall)));
        timer.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Timed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(written)) = &polled {
            self.unsent.remove(*written);
        }
        self.watch(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    /// Closing with something unread, such as the body of a refused request, would reset the connection, and the answer
    /// would be lost on its way: what still comes is read for a while.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        let this = &mut *self;
        let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        let mut scratch = [0; 8 << 10];
        while timer.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut this.stream).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker;

    use super::*;

    #[test]
    fn a_stream_makes_no_more_than_the_socket_should_hold() {
        let (unsent, waker) = (Unsent::default(), noop_waker());
        let has_room = |unsent: &Unsent| unsent.poll_room(&mut Context::from_waker(&waker)).is_ready();
        unsent.add(MAX_UNSENT_BYTES - 1);
        assert!(has_room(&unsent));
        unsent.add(1);
        assert!(!has_room(&unsent));
        unsent.remove(1);
        assert!(has_room(&unsent));
        // With what goes around events, the socket takes more than streams have made.
        unsent.remove(2 * MAX_UNSENT_BYTES);
        unsent.add(MAX_UNSENT_BYTES);
        assert!(!has_room(&unsent));
    }
}
