//! What is written to a connection before it is a session: refusals, the 101, readiness. And how a refused one ends.

use std::{io, time::Duration};

use seawall_proto::refusal::{Code, Refusal};
use tokio::{io::AsyncWriteExt, time::timeout};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{door::Door, socket::drain, state::Shared, transport::Transport};

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

/// Writes a refusal and ends the connection such that the peer can read it.
pub(super) async fn refuse(shared: &Shared, door: &Door, stream: Transport, refusal: &Refusal, linger: Linger) {
    let mut response = Vec::new();
    refusal.write_response(&mut response);
    end_with(shared, door, stream, &response, linger).await;
}

/// The same for a HEAD request, whose answer has no body.
pub(super) async fn refuse_head(shared: &Shared, door: &Door, stream: Transport, refusal: &Refusal, linger: Linger) {
    let mut response = Vec::new();
    refusal.write_response_to_head(&mut response);
    end_with(shared, door, stream, &response, linger).await;
}

async fn end_with(shared: &Shared, door: &Door, mut stream: Transport, response: &[u8], linger: Linger) {
    if write(shared, &mut stream, response).await.is_err() {
        return;
    }
    if linger == Linger::AllRead {
        return say_goodbye(shared, &mut stream).await;
    }
    if let Ok(_permit) = door.lingering.try_acquire() {
        drain(&mut stream, LINGER_LEN_MAX, LINGER_TIME).await;
    }
}

/// `GET` or `HEAD` of `/readyz` or `/healthz`: a status, for balancers.
pub(super) async fn probe(shared: &Shared, mut stream: Transport, is_ready: bool) {
    shared.metrics.connections.increment("probe");
    let status = if is_ready { "200 OK" } else { "503 Service Unavailable" };
    let response =
        format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\nCache-Control: no-store\r\n\r\n");
    if write(shared, &mut stream, response.as_bytes()).await.is_ok() {
        say_goodbye(shared, &mut stream).await;
    }
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
pub(super) async fn write(shared: &Shared, stream: &mut Transport, response: &[u8]) -> io::Result<()> {
    let writing = async {
        stream.write_all(response).await?;
        stream.flush().await
    };
    timeout(shared.config.limits.answer_timeout(), writing)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Ends what was said in time, or not at all: a peer that does not read has no use for it.
async fn say_goodbye(shared: &Shared, stream: &mut Transport) {
    let _ = timeout(shared.config.limits.answer_timeout(), stream.say_goodbye()).await;
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
