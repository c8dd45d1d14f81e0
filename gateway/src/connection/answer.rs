//! What is written to a connection before it is a session: refusals, the 101, readiness. And how a refused one ends.

use std::{io, mem::MaybeUninit, time::Duration};

use seawall_proto::refusal::{Code, Refusal};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{door::Door, socket::drain, state::Shared};

/// What is still read from a refused peer: a head of twice the size allowed, in a moment.
const LINGER_LEN_MAX: usize = 16 * 1024;
const LINGER_TIME: Duration = Duration::from_millis(500);

/// Whether the peer's bytes were all read when it was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Linger {
    /// Closing sends a plain end of stream: nothing more to do.
    AllRead,
    /// Closing at once might send a reset, which destroys the answer on its way.
    Unread,
}

impl Linger {
    /// A complete head was refused. Those refused for their form may have a body on its way.
    pub(super) fn behind(refusal: &Refusal, leftover: &[u8]) -> Self {
        let may_have_body = matches!(refusal.code, Code::BadRequest | Code::NotFound | Code::MethodNotAllowed);
        if may_have_body || !leftover.is_empty() {
            Self::Unread
        } else {
            Self::AllRead
        }
    }
}

/// Whether the peer has sent anything. Asks the kernel, since the runtime may not have looked at this socket yet.
pub(super) fn has_unread(stream: &TcpStream) -> bool {
    let peeked = socket2::SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]);
    peeked.is_ok_and(|len| len > 0)
}

/// Writes a refusal and ends the connection such that the peer can read it.
pub(super) async fn refuse(shared: &Shared, door: &Door, mut stream: TcpStream, refusal: &Refusal, linger: Linger) {
    let mut response = Vec::new();
    refusal.write_response(&mut response);
    if write(shared, &mut stream, &response).await.is_err() || linger == Linger::AllRead {
        return;
    }
    if let Ok(_permit) = door.lingering.try_acquire() {
        drain(&mut stream, LINGER_LEN_MAX, LINGER_TIME).await;
    }
}

/// `GET /readyz`: a status, for balancers.
pub(super) async fn readiness(shared: &Shared, mut stream: TcpStream) {
    shared.metrics.connections.increment("probe");
    let status = if shared.readiness().ready {
        "200 OK"
    } else {
        "503 Service Unavailable"
    };
    let response =
        format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\nCache-Control: no-store\r\n\r\n");
    // A balancer that left without the answer has none.
    let _ = write(shared, &mut stream, response.as_bytes()).await;
}

/// The 101 of RFC 6455 §4.2.2, with the sub-protocol confirmed where one was offered.
pub(super) fn switching_protocols(key: &[u8], protocol: Option<&str>) -> Vec<u8> {
    let accept = derive_accept_key(key);
    let mut response = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n"
    );
    if let Some(protocol) = protocol {
        response.push_str("Sec-WebSocket-Protocol: ");
        response.push_str(protocol);
        response.push_str("\r\n");
    }
    response.push_str("\r\n");
    response.into_bytes()
}

/// Writes an answer within the time that a peer gets for it.
pub(super) async fn write(shared: &Shared, stream: &mut TcpStream, response: &[u8]) -> io::Result<()> {
    timeout(shared.config.limits.answer_timeout(), stream.write_all(response))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switching_protocols_confirms_the_key_of_rfc_6455() {
        let response = switching_protocols(b"dGhlIHNhbXBsZSBub25jZQ==", Some("arduino"));

        assert_eq!(
            String::from_utf8(response).unwrap(),
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: arduino\r\n\r\n"
        );
    }
}
