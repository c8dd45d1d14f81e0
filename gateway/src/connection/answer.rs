//! Answers to a connection before it is a session (refusals, the 101, readiness), and the close of a refused
//! connection.

use std::{io, time::Duration};

use seawall_proto::refusal::{Code, Refusal};
use tokio::{io::AsyncWriteExt, time::timeout};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{
    edge::{limiter::ConnectionLimiter, transport::Transport},
    node::Shared,
    session::socket::drain,
};

/// Maximum data that is still read from a refused client: twice the maximum head, for half a second.
const LINGER_LEN_MAX: usize = 16 * 1024;
const LINGER_TIME: Duration = Duration::from_millis(500);
/// Maximum time for which the kernel keeps an unacknowledged answer after its connection was closed: four
/// retransmissions (RFC 6298 §5.5).
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(20);

/// Whether all data of the client had been read when it was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Linger {
    /// Closing sends a plain end of stream: nothing more to do.
    AllRead,
    /// Closing at once may send a reset, which destroys the answer in transit.
    Unread,
}

impl Linger {
    /// For a complete head that was refused. If the form was wrong, a body may follow.
    pub(super) fn behind(refusal: &Refusal, leftover: &[u8]) -> Self {
        let may_have_body = matches!(refusal.code, Code::BadRequest | Code::NotFound | Code::MethodNotAllowed);
        if may_have_body || !leftover.is_empty() {
            Self::Unread
        } else {
            Self::AllRead
        }
    }
}

/// A refusal, and how its connection is closed.
pub(super) struct Answer {
    pub(super) refusal: Refusal,
    linger: Linger,
    body: Body,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    Written,
    /// The answer to HEAD has no body.
    LeftOut,
}

impl Answer {
    pub(super) const fn new(refusal: Refusal, linger: Linger) -> Self {
        Self {
            refusal,
            linger,
            body: Body::Written,
        }
    }

    /// The same for a HEAD request.
    pub(super) fn without_body(self) -> Self {
        Self {
            body: Body::LeftOut,
            ..self
        }
    }

    /// Writes it, and closes the connection so that the client can read it.
    pub(super) async fn write(self, shared: &Shared, limiter: &ConnectionLimiter, stream: Transport) {
        let mut response = Vec::new();
        match self.body {
            Body::Written => self.refusal.write_response(&mut response),
            Body::LeftOut => self.refusal.write_response_to_head(&mut response),
        }
        end_with(shared, limiter, stream, &response, self.linger).await;
    }
}

/// Answers `GET` or `HEAD` of `/readyz` or `/healthz` with a status, for load balancers.
pub(super) async fn answer_probe(shared: &Shared, limiter: &ConnectionLimiter, stream: Transport, is_ready: bool) {
    let status = if is_ready { "200 OK" } else { "503 Service Unavailable" };
    let response =
        format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\nCache-Control: no-store\r\n\r\n");
    end_with(shared, limiter, stream, response.as_bytes(), Linger::AllRead).await;
}

async fn end_with(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    mut stream: Transport,
    response: &[u8],
    linger: Linger,
) {
    stream.keep_unacknowledged_for(UNACKNOWLEDGED_MAX);
    if write(shared, &mut stream, response).await.is_err() {
        return;
    }
    if linger == Linger::AllRead {
        // Within the time only: a client that does not read does not need it.
        let _ = timeout(shared.config.limits.answer_timeout(), stream.say_goodbye()).await;
    } else if let Ok(_permit) = limiter.lingering.try_acquire() {
        drain(&mut stream, LINGER_LEN_MAX, LINGER_TIME).await;
    }
}

/// The 101 of RFC 6455 §4.2.2, with the sub-protocol confirmed if one was offered.
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

/// Writes an answer within the configured time. If that fails the connection is closed with a reset, so that the kernel
/// keeps nothing for it.
pub(super) async fn write(shared: &Shared, stream: &mut Transport, response: &[u8]) -> io::Result<()> {
    let writing = async {
        stream.write_all(response).await?;
        stream.flush().await
    };
    let written = match timeout(shared.config.limits.answer_timeout(), writing).await {
        Ok(written) => written,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    if written.is_err() {
        stream.reset_at_end();
    }
    written
}

#[cfg(test)]
mod tests {
    use std::{net::TcpStream as StdStream, sync::Arc};

    use socket2::SockRef;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::{
        edge::listener::Bounds,
        runtime::config::{Config, Limits},
        serve,
    };

    #[tokio::test]
    async fn kernel_keeps_no_answer_for_long_that_nobody_takes() {
        let home = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.server.data_dir = home.path().to_owned();
        config.server.listen.set_port(0);
        config.ops.listen.set_port(0);
        config.limits.answer_timeout_ms = 100;
        let running = serve::start(config).await.unwrap();
        let bounds = Bounds {
            connections: 4,
            handshakes: 1,
        };
        let limiter = ConnectionLimiter::new(bounds, &Limits::default(), Arc::default());
        let answered = async |response: &[u8]| {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let accepted = listener.accept().await.unwrap().0.into_std().unwrap();
            let kept: StdStream = accepted.try_clone().unwrap();
            let stream = TcpStream::from_std(accepted).unwrap().into();
            end_with(&running.state, &limiter, stream, response, Linger::AllRead).await;
            let socket = SockRef::from(&kept);
            (socket.tcp_user_timeout().unwrap(), socket.linger().unwrap())
        };

        let taken = answered(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").await;
        let (_, ending) = answered(&vec![b'x'; 64 << 20]).await;

        assert_eq!(taken, (Some(UNACKNOWLEDGED_MAX), None));
        assert_eq!(ending, Some(Duration::ZERO), "nobody read it");
        running.stop().await.unwrap();
    }

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
