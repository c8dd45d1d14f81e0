//! Reads the head of a request from a socket, with a maximum of bytes and headers.
//!
//! hyper answers an invalid or oversized head with an empty body, and closes silently on a late one. docs/PROTOCOL.md
//! promises a device more, so the device listener reads heads itself, with `httparse`. Start with [`HeadReader::read`].
//! The caller enforces deadlines.

use bytes::BufMut;
use seawall_proto::{hello::Head, refusal::Refusal};
use tokio::io::AsyncReadExt;

use crate::edge::transport::Transport;

/// Header lines of a head that is parsed without an allocation. A head has at most as many lines as its bytes allow.
const USUAL_HEADERS: usize = 64;

/// Length of the first read. Most heads fit.
const FIRST_READ_LEN: usize = 1024;

/// Collects a head. Its buffer grows with the head to at most `len_max`, and is freed with the reader.
#[derive(Debug)]
pub struct HeadReader {
    buffer: Vec<u8>,
    len_max: usize,
    /// Length at which the head is parsed next, so that a head that arrives byte by byte is not parsed for each byte.
    parse_at: usize,
}

/// A complete head, and the bytes after it.
#[derive(Debug, PartialEq, Eq)]
pub struct Complete<T> {
    pub parsed: T,
    /// Bytes after the head: the first frames of a client that did not wait for the answer.
    pub leftover: Vec<u8>,
}

/// Why there is no head.
#[derive(Debug)]
pub enum HeadError {
    /// The client left, or its connection broke.
    PeerGone,
    /// The head is malformed or too large. Contains the answer.
    Refused(Refusal),
}

impl HeadReader {
    /// Creates a reader. `len_max` bounds the head, and its target, in bytes.
    #[must_use]
    pub fn new(len_max: usize) -> Self {
        Self {
            buffer: Vec::new(),
            len_max,
            parse_at: 1,
        }
    }

    /// Whether the client has sent anything. Only then is it an attempt.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Reads until the head is complete, and passes it to `parse`.
    ///
    /// # Errors
    /// The client left; or the head is malformed (400), its target too long (414), or it is too large (431).
    ///
    /// # Cancel safety
    /// Safe: bytes that were read stay in the reader.
    pub async fn read<T>(
        &mut self,
        stream: &mut Transport,
        mut parse: impl FnMut(&Head<'_>) -> T,
    ) -> Result<Complete<T>, HeadError> {
        loop {
            let len_before = self.buffer.len();
            self.fill(stream).await?;
            let is_due = self.buffer.len() >= self.parse_at || has_end_of_head(&self.buffer, len_before);
            if is_due && let Some(complete) = self.parse(&mut parse)? {
                return Ok(complete);
            }
            if self.buffer.len() >= self.len_max {
                return Err(HeadError::Refused(too_large(&self.buffer)));
            }
        }
    }

    /// Reads once, never beyond the limit.
    async fn fill(&mut self, stream: &mut Transport) -> Result<(), HeadError> {
        let room = (self.len_max - self.buffer.len()).min(self.buffer.len().max(FIRST_READ_LEN));
        self.buffer.reserve(room);
        match stream.read_buf(&mut (&mut self.buffer).limit(room)).await {
            Ok(1..) => Ok(()),
            Ok(0) | Err(_) => Err(HeadError::PeerGone),
        }
    }

    fn parse<T>(&mut self, parse: &mut impl FnMut(&Head<'_>) -> T) -> Result<Option<Complete<T>>, HeadError> {
        let parsed = parse_into(
            &self.buffer,
            &mut [httparse::EMPTY_HEADER; USUAL_HEADERS],
            &mut [("", b"".as_slice()); USUAL_HEADERS],
            parse,
        );
        let parsed = if matches!(parsed, Err(httparse::Error::TooManyHeaders)) {
            let lines_max = self.buffer.iter().filter(|byte| **byte == b'\n').count() + 1;
            parse_into(
                &self.buffer,
                &mut vec![httparse::EMPTY_HEADER; lines_max],
                &mut vec![("", b"".as_slice()); lines_max],
                parse,
            )
        } else {
            parsed
        };
        match parsed {
            Ok(httparse::Status::Complete((parsed, head_len))) => Ok(Some(Complete {
                parsed,
                leftover: self.buffer[head_len..].to_vec(),
            })),
            Ok(httparse::Status::Partial) => {
                self.parse_at = self.buffer.len().saturating_mul(2);
                Ok(None)
            }
            Err(httparse::Error::TooManyHeaders) => Err(HeadError::Refused(Refusal::headers_too_large())),
            Err(
                httparse::Error::HeaderName
                | httparse::Error::HeaderValue
                | httparse::Error::NewLine
                | httparse::Error::Status
                | httparse::Error::Token
                | httparse::Error::Version,
            ) => Err(HeadError::Refused(Refusal::bad_request("not an HTTP/1.1 request"))),
        }
    }
}

/// Parses a head into `headers` and `pairs`, and passes it to `parse`. Returns the length of the head as well.
fn parse_into<'b, T>(
    buffer: &'b [u8],
    headers: &mut [httparse::Header<'b>],
    pairs: &mut [(&'b str, &'b [u8])],
    parse: &mut impl FnMut(&Head<'_>) -> T,
) -> Result<httparse::Status<(T, usize)>, httparse::Error> {
    let mut request = httparse::Request::new(headers);
    let httparse::Status::Complete(head_len) = request.parse(buffer)? else {
        return Ok(httparse::Status::Partial);
    };
    let headers_len = request.headers.len();
    for (pair, header) in pairs.iter_mut().zip(request.headers.iter()) {
        *pair = (header.name, header.value);
    }
    let parsed = parse(&Head {
        method: request.method.unwrap_or_default(),
        target: request.path.unwrap_or_default(),
        http_minor: request.version.unwrap_or_default(),
        headers: &pairs[..headers_len],
    });
    Ok(httparse::Status::Complete((parsed, head_len)))
}

/// Whether an empty line ends at or after `len_before`. A line may end with or without a carriage return, as `httparse`
/// accepts both.
fn has_end_of_head(buffer: &[u8], len_before: usize) -> bool {
    let fresh = &buffer[len_before.saturating_sub(2)..];
    fresh.windows(2).any(|two| two == b"\n\n") || fresh.windows(3).any(|three| three == b"\n\r\n")
}

/// The answer to a head that is too long. If the first line has not ended, the target is too long.
fn too_large(buffer: &[u8]) -> Refusal {
    let first_line_ended = buffer
        .iter()
        .skip_while(|byte| matches!(byte, b'\r' | b'\n'))
        .any(|&byte| byte == b'\n');
    if first_line_ended {
        Refusal::headers_too_large()
    } else {
        Refusal::uri_too_long()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use seawall_proto::refusal::Code;
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
        time::timeout,
    };

    use super::*;

    const LEN_MAX: usize = 8 * 1024;
    /// Maximum time of a test's read.
    const PATIENCE: Duration = Duration::from_secs(10);

    async fn pair() -> (TcpStream, Transport) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0.into())
    }

    /// Result of reading these bytes, followed by the end of the stream.
    async fn read(bytes: &[u8]) -> Result<Complete<(String, usize)>, HeadError> {
        let (mut client, mut server) = pair().await;
        let bytes = bytes.to_vec();
        let writer = tokio::spawn(async move { client.write_all(&bytes).await });
        let outcome = HeadReader::new(LEN_MAX)
            .read(&mut server, |head| (head.target.to_owned(), head.headers.len()))
            .await;
        drop(server);
        let _ = writer.await.unwrap();
        outcome
    }

    fn code(outcome: Result<Complete<(String, usize)>, HeadError>) -> Option<Code> {
        match outcome {
            Err(HeadError::Refused(refusal)) => Some(refusal.code),
            Ok(_) | Err(HeadError::PeerGone) => None,
        }
    }

    #[tokio::test]
    async fn head_is_read_and_what_follows_is_kept() {
        let complete = read(b"GET /x HTTP/1.1\r\nA: b\r\n\r\n\x81\x00").await.unwrap();

        assert_eq!(complete.parsed, ("/x".to_owned(), 1));
        assert_eq!(complete.leftover, b"\x81\x00");
    }

    #[tokio::test]
    async fn head_that_comes_byte_by_byte_is_read_whatever_ends_its_lines() {
        for head in [
            b"GET / HTTP/1.1\nHost: x\n\n".as_slice(),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n\n",
            b"GET / HTTP/1.1\nHost: x\n\r\n",
        ] {
            let (mut client, mut server) = pair().await;
            client.set_nodelay(true).unwrap();
            let writer = tokio::spawn(async move {
                for byte in head {
                    client.write_all(&[*byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
                client
            });

            let mut reader = HeadReader::new(LEN_MAX);
            let reading = reader.read(&mut server, |head| head.headers.len());
            let complete = timeout(PATIENCE, reading).await.expect("a complete head").unwrap();

            assert_eq!(complete.parsed, 1);
            drop(writer.await.unwrap());
        }
    }

    #[tokio::test]
    async fn peer_that_leaves_is_gone() {
        let (client, mut server) = pair().await;
        drop(client);
        let mut reader = HeadReader::new(LEN_MAX);

        assert!(matches!(
            reader.read(&mut server, |_| ()).await,
            Err(HeadError::PeerGone)
        ));
        assert!(!reader.has_begun());
        assert!(matches!(read(b"GET / HT").await, Err(HeadError::PeerGone)));
    }

    #[tokio::test]
    async fn what_is_no_http_is_refused_at_once() {
        for bytes in [
            b"\x16\x03\x01\x02\x00\x01\x00".as_slice(),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET / HTTP/1.1\r\nBad Name: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
            b"GET  HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(code(read(bytes).await), Some(Code::BadRequest), "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn limits_have_their_own_answers() {
        let long_target = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(LEN_MAX));
        let long_header = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(LEN_MAX));
        let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(LEN_MAX / 6));

        assert_eq!(code(read(long_target.as_bytes()).await), Some(Code::UriTooLong));
        assert_eq!(code(read(long_header.as_bytes()).await), Some(Code::HeadersTooLarge));
        assert_eq!(code(read(many_headers.as_bytes()).await), Some(Code::HeadersTooLarge));
    }

    #[tokio::test]
    async fn number_of_header_lines_is_bounded_by_the_size_of_the_head_alone() {
        for lines in [USUAL_HEADERS, USUAL_HEADERS + 1, 67, 2_700] {
            let head = format!("GET / HTTP/1.1\n{}\n", "a:\n".repeat(lines));
            assert!(head.len() <= LEN_MAX);

            assert_eq!(read(head.as_bytes()).await.unwrap().parsed.1, lines);
        }
    }

    #[tokio::test]
    async fn head_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() {
        let head = |len: usize| {
            let frame = "GET / HTTP/1.1\r\nX: \r\n\r\n";
            format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(len - frame.len()))
        };

        assert!(read(head(LEN_MAX).as_bytes()).await.is_ok());
        assert_eq!(
            code(read(head(LEN_MAX + 1).as_bytes()).await),
            Some(Code::HeadersTooLarge)
        );
    }
}
