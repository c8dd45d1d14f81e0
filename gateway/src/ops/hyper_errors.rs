//! The answers that hyper itself makes, replaced by errors in the API's form.
//!
//! A head that is too large or malformed never reaches a handler: hyper writes a status without a body (431, 414, 400)
//! and closes. [`RewriteErrors`] is the stream below hyper. It replaces that answer, and then reads what the client
//! still sends for a moment: closing with unread bytes resets the connection and destroys the answer. It also ends a
//! connection whose peer does not read.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::problem::{Code, MEDIA_TYPE, Problem};
use crate::edge::transport::Transport;

/// A part of every answer that hyper itself makes. Answers of handlers have bodies.
const NO_BODY: &[u8] = b"content-length: 0\r\n";
/// Maximum size, in bytes, and time of what is read from a client after its head was refused.
const LINGER_LEN_MAX: usize = 256 * 1024;
const LINGER_TIME: Duration = Duration::from_millis(500);

/// Maximum time in which a peer takes no byte of an answer. Then its connection is closed.
const STALLED_MAX: Duration = Duration::from_secs(30);

/// A connection whose answers by hyper are replaced.
pub struct RewriteErrors {
    stream: Transport,
    refusal: Option<Refusal>,
    /// End of the connection. Only set while the peer takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

/// An error that is written in place of hyper's answer.
struct Refusal {
    response: Vec<u8>,
    written: usize,
    /// Length of hyper's answer, in bytes. It is reported as written when the error is.
    stands_for: usize,
    lingered: usize,
    linger: Option<Pin<Box<Sleep>>>,
}

impl RewriteErrors {
    pub fn new(stream: Transport) -> Self {
        Self {
            stream,
            refusal: None,
            stalled: None,
        }
    }

    /// Writes, and fails if the peer has taken nothing for [`STALLED_MAX`].
    fn poll_write_in_time(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, bytes) {
            Poll::Ready(written) => {
                self.stalled = None;
                Poll::Ready(written)
            }
            Poll::Pending => {
                let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(STALLED_MAX)));
                stalled.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

/// Returns the error for an answer that hyper itself made; `None` for all others.
fn problem_for(bytes: &[u8]) -> Option<Problem> {
    let status = bytes.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    let is_bare = bytes.ends_with(b"\r\n\r\n") && bytes.windows(NO_BODY.len()).any(|window| window == NO_BODY);
    match status {
        _ if !is_bare => None,
        b"400" => Some(Problem::new(Code::BadRequest, "not an HTTP/1.1 request")),
        b"414" => Some(Problem::new(Code::UriTooLong, "the path is too long")),
        b"431" => Some(Problem::new(
            Code::HeadersTooLarge,
            "the head of the request is over 16 KiB, or has over 100 lines",
        )),
        _ => None,
    }
}

/// Returns the bytes of an error, as the last answer of a connection.
pub fn written_out(problem: Problem) -> Vec<u8> {
    let (status, body) = problem.into_json();
    let phrase = status.canonical_reason().unwrap_or_default();
    format!(
        "HTTP/1.1 {} {phrase}\r\ncontent-type: {MEDIA_TYPE}\r\nconnection: close\r\ncache-control: no-store\r\n\
         x-content-type-options: nosniff\r\ncontent-length: {}\r\n\r\n{body}",
        status.as_u16(),
        body.len()
    )
    .into_bytes()
}

impl AsyncRead for RewriteErrors {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for RewriteErrors {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.refusal.is_none() {
            this.refusal = problem_for(bytes).map(|problem| Refusal {
                response: written_out(problem),
                written: 0,
                stands_for: bytes.len(),
                lingered: 0,
                linger: None,
            });
        }
        let Some(refusal) = &mut this.refusal else {
            return this.poll_write_in_time(cx, bytes);
        };
        while refusal.written < refusal.response.len() {
            let rest = &refusal.response[refusal.written..];
            match ready!(Pin::new(&mut this.stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => refusal.written += written,
            }
        }
        Poll::Ready(Ok(refusal.stands_for.min(bytes.len())))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        let Some(refusal) = &mut this.refusal else {
            return Poll::Ready(Ok(()));
        };
        let linger = refusal.linger.get_or_insert_with(|| Box::pin(sleep(LINGER_TIME)));
        let mut space = [0; 4096];
        while refusal.lingered < LINGER_LEN_MAX && linger.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => refusal.lingered += buffer.filled().len(),
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_without_a_body_are_rewritten() {
        let bare = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let ours = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}";
        let empty = b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n";

        let text = String::from_utf8(written_out(problem_for(bare).unwrap())).unwrap();

        assert!(
            text.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"),
            "{text}"
        );
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{text}");
        assert!(body.contains("\"code\":\"headers_too_large\""), "{text}");
        assert!(problem_for(ours).is_none() && problem_for(empty).is_none());
        assert!(problem_for(b"data: 400\n\n").is_none());
    }
}
