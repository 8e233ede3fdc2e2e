//! HTTP/1.1 over one socket: a request out, the answer's head and body in.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes of an answer that are read at once.
const READ_BYTES: usize = 8 << 10;
const MAX_HEADERS: usize = 64;

/// A keep-alive connection.
pub(super) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were taken.
    taken: usize,
    /// Requests that it has sent.
    pub num_sent: u64,
}

/// An answer's head.
#[derive(Debug, PartialEq)]
pub(super) struct Head {
    pub status: u16,
    pub body: Body,
    /// Nothing further can be sent on this connection.
    pub closes: bool,
}

/// What is left of a body.
#[derive(Debug, PartialEq)]
pub(super) enum Body {
    Sized(usize),
    /// Of the current chunk and the line end behind it.
    Chunked(usize),
    UntilClose,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::new(), taken: 0, num_sent: 0 })
    }

    pub async fn send(&mut self, request: &[u8]) -> io::Result<()> {
        self.num_sent += 1;
        self.stream.write_all(request).await
    }

    async fn fill(&mut self) -> io::Result<()> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.reserve(READ_BYTES);
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Whether an answer has begun.
    pub fn has_bytes(&self) -> bool {
        self.taken < self.buffer.len()
    }

    pub async fn head(&mut self) -> io::Result<Head> {
        loop {
            if let Some((head, len)) = parse_head(&self.buffer[self.taken..])? {
                self.taken += len;
                return Ok(head);
            }
            self.fill().await?;
        }
    }

    /// What is there of the body; empty at its end.
    pub async fn data(&mut self, body: &mut Body) -> io::Result<&[u8]> {
        let len = loop {
            let unread = self.buffer.len() - self.taken;
            match body {
                Body::Sized(0) => break 0,
                Body::Sized(left) if unread > 0 => {
                    let len = unread.min(*left);
                    *left -= len;
                    break len;
                }
                Body::Chunked(0) => match httparse::parse_chunk_size(&self.buffer[self.taken..]) {
                    Ok(httparse::Status::Complete((start, 0))) if unread >= start + 2 => {
                        self.taken += start + 2;
                        *body = Body::Sized(0);
                    }
                    Ok(httparse::Status::Complete((start, len))) if len > 0 => {
                        self.taken += start;
                        *body = Body::Chunked(len as usize + 2);
                    }
                    Ok(_) => self.fill().await?,
                    Err(_) => return Err(io::ErrorKind::InvalidData.into()),
                },
                Body::Chunked(left) if *left > 2 && unread > 0 => {
                    let len = unread.min(*left - 2);
                    *left -= len;
                    break len;
                }
                Body::Chunked(left) if unread > 0 => {
                    let len = unread.min(*left);
                    (*left, self.taken) = (*left - len, self.taken + len);
                }
                Body::UntilClose if unread > 0 => break unread,
                Body::UntilClose => match self.fill().await {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break 0,
                    filled => filled?,
                },
                _ => self.fill().await?,
            }
        };
        let start = self.taken;
        self.taken += len;
        Ok(&self.buffer[start..self.taken])
    }

    /// The whole body.
    pub async fn whole(&mut self, mut body: Body) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let data = self.data(&mut body).await?;
            if data.is_empty() {
                return Ok(all);
            }
            all.extend_from_slice(data);
        }
    }
}

/// A head and its bytes, once it is whole.
fn parse_head(bytes: &[u8]) -> io::Result<Option<(Head, usize)>> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(len) = answer.parse(bytes).map_err(|_| bad())? else { return Ok(None) };
    let status = answer.code.ok_or_else(bad)?;
    let value = |name: &str| {
        let found = answer.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| std::str::from_utf8(header.value).unwrap_or_default().trim().to_ascii_lowercase())
    };
    let body = match (value("transfer-encoding"), value("content-length")) {
        _ if status == 204 => Body::Sized(0),
        (Some(_), _) => Body::Chunked(0),
        (None, Some(len)) => Body::Sized(len.parse().map_err(|_| bad())?),
        (None, None) => Body::UntilClose,
    };
    let closes = value("connection").is_some_and(|value| value == "close") || body == Body::UntilClose;
    Ok(Some((Head { status, body, closes }, len)))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Reads an answer that comes in pieces of so many bytes.
    async fn answer(bytes: &'static [u8], piece: usize) -> io::Result<(Head, Vec<u8>)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            for piece in bytes.chunks(piece) {
                stream.write_all(piece).await?;
                tokio::task::yield_now().await;
            }
            Ok::<_, io::Error>(())
        });
        let mut connection = Connection::open(address).await?;
        let mut head = connection.head().await?;
        let body = connection.whole(std::mem::replace(&mut head.body, Body::Sized(0))).await?;
        server.await??;
        Ok((head, body))
    }

    #[tokio::test]
    async fn bodies_are_read_however_they_are_framed_and_cut() {
        let answers: [&'static [u8]; 4] = [
            b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello \r\n5;x=y\r\nworld\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\nB\r\nhello world\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\nhello world",
        ];
        for (index, bytes) in answers.into_iter().enumerate() {
            for piece in [1, 2, 7, 1000] {
                let (head, body) = answer(bytes, piece).await.unwrap();
                assert_eq!((head.status, body.as_slice()), (200, &b"hello world"[..]), "{index} in pieces of {piece}");
                assert_eq!(head.closes, index >= 2);
            }
        }
    }

    #[tokio::test]
    async fn what_is_cut_or_no_http_is_an_error() {
        let kind = async |bytes| answer(bytes, 1000).await.unwrap_err().kind();
        assert_eq!(kind(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello").await, io::ErrorKind::UnexpectedEof);
        assert_eq!(
            kind(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel").await,
            io::ErrorKind::UnexpectedEof
        );
        assert_eq!(
            kind(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx\r\n").await,
            io::ErrorKind::InvalidData
        );
        assert_eq!(kind(b"SSH-2.0-OpenSSH\r\n\r\n").await, io::ErrorKind::InvalidData);
        assert_eq!(kind(b"").await, io::ErrorKind::UnexpectedEof);
    }
}
