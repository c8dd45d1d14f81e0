//! The head of the gateway's answer: reading it, and whether it is the upgrade that was asked for (RFC 6455 §4.1).

use std::io;

use tokio::io::AsyncReadExt;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{OpenError, Stream};

/// Maximum length of an answer's head, in bytes.
const HEAD_LEN_MAX: usize = 8 * 1024;

/// Maximum number of headers of an answer.
const HEADERS_MAX: usize = 64;

/// Bytes read at a time: an answer of the gateway fits.
const CHUNK: usize = 1024;

/// The head of an answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Names in lower case.
    pub(super) headers: Vec<(String, String)>,
}

impl Answer {
    /// Reads the head. Returns it with the bytes that came after it.
    pub(super) async fn read(stream: &mut Stream) -> Result<(Self, Vec<u8>), OpenError> {
        let mut bytes = Vec::with_capacity(CHUNK);
        loop {
            if stream.read_buf(&mut bytes).await.map_err(OpenError::NoAnswer)? == 0 {
                return Err(OpenError::NoAnswer(io::ErrorKind::UnexpectedEof.into()));
            }
            if let Some((answer, len)) = Self::parse(&bytes)? {
                // A copy of the exact size: the session keeps its buffer for life.
                return Ok((answer, bytes.get(len..).unwrap_or_default().to_vec()));
            }
            if bytes.len() > HEAD_LEN_MAX {
                return Err(OpenError::BadAnswer("its head is too long"));
            }
        }
    }

    /// Parses a head. `None`: it is not complete.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, OpenError> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response
            .parse(bytes)
            .map_err(|_| OpenError::BadAnswer("not an HTTP response"))?;
        let (httparse::Status::Complete(len), Some(status)) = (parsed, response.code) else {
            return Ok(None);
        };
        let headers = response
            .headers
            .iter()
            .map(|header| {
                (
                    header.name.to_lowercase(),
                    String::from_utf8_lossy(header.value).into_owned(),
                )
            })
            .collect();
        Ok(Some((Self { status, headers }, len)))
    }

    /// The first header of this name.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(of, _)| of == name)
            .map(|(_, value)| value.as_str())
    }

    /// Checks that the answer confirms the upgrade with this key and one of these sub-protocols, or none: then the
    /// session is plain.
    pub(super) fn check_upgrade(&self, key: &str, offered: Option<&str>) -> Result<(), OpenError> {
        let has_token = |name, token: &str| {
            let list = self.header(name).unwrap_or_default();
            list.split(',').any(|entry| entry.trim().eq_ignore_ascii_case(token))
        };
        if !has_token("upgrade", "websocket") || !has_token("connection", "upgrade") {
            return Err(OpenError::BadAnswer("its upgrade is not to WebSocket"));
        }
        if self.header("sec-websocket-accept") != Some(derive_accept_key(key.as_bytes()).as_str()) {
            return Err(OpenError::BadAnswer("it does not match the request's key"));
        }
        if self.header("sec-websocket-extensions").is_some() {
            return Err(OpenError::BadAnswer("it confirms an extension that was not offered"));
        }
        match self.header("sec-websocket-protocol") {
            Some(protocol) if !offered.is_some_and(|list| list.split(',').any(|entry| entry.trim() == protocol)) => {
                Err(OpenError::BadAnswer("it confirms a sub-protocol that was not offered"))
            }
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 6455 §1.3.
    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
    const ACCEPT: &str = "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

    fn checked(headers: &str, offered: Option<&str>) -> Result<(), String> {
        let text = format!("HTTP/1.1 101 x\r\n{headers}\r\n\r\n");
        let (answer, len) = Answer::parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(len, text.len());
        answer.check_upgrade(KEY, offered).map_err(|error| error.to_string())
    }

    #[test]
    fn upgrade_is_taken_with_the_sub_protocol_or_without() {
        let plain = format!("upgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n{ACCEPT}");

        assert_eq!(checked(&plain, None), Ok(()));
        assert_eq!(checked(&plain, Some("seawall.v1")), Ok(()));
        let confirmed = format!("{plain}\r\nSec-WebSocket-Protocol: b");
        assert_eq!(checked(&confirmed, Some("a, b")), Ok(()));
        assert!(checked(&confirmed, Some("a")).unwrap_err().contains("sub-protocol"));
        assert!(checked(&confirmed, None).unwrap_err().contains("sub-protocol"));
    }

    #[test]
    fn other_answers_are_no_upgrade() {
        for (headers, words) in [
            (format!("Connection: Upgrade\r\n{ACCEPT}"), "not to WebSocket"),
            (format!("Upgrade: websocket\r\n{ACCEPT}"), "not to WebSocket"),
            ("Upgrade: websocket\r\nConnection: Upgrade".into(), "key"),
            (
                format!("Upgrade: websocket\r\nConnection: Upgrade\r\n{ACCEPT}\r\nSec-WebSocket-Extensions: x"),
                "extension",
            ),
        ] {
            let message = checked(&headers, None).unwrap_err();

            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn half_a_head_is_waited_for_and_nonsense_is_not() {
        assert!(Answer::parse(b"HTTP/1.1 503 Service Unavail").unwrap().is_none());
        assert!(Answer::parse(b"SSH-2.0-OpenSSH_9.2\r\n").is_err());
    }
}
