//! One device's connection by hand: for tests and tools that say themselves what happens next.
//!
//! [`Connection`] decides nothing: no heartbeat, no ack, no retry. Pings are answered whenever it is read.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use seawall_proto::id::DeviceId;
use serde::Serialize;
use serde_json::Value;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{
    self, Message,
    http::{HeaderName, HeaderValue},
    protocol::{CloseFrame, frame::coding::CloseCode},
};

pub use crate::handshake::{Credential, OpenError, Refused, SUBPROTOCOL};
use crate::{
    handshake::{Hello, Socket, SocketOptions, open, upgrade},
    target::Target,
    tls::Trust,
};

/// How long [`Connection::open`] waits for an answer: over the 3 s in which the gateway answers everyone.
pub const OPEN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// What a device shows when it connects. Every field may be changed.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    pub id: DeviceId,
    /// Sent in place of the id: what a device calls itself that has no UUID. Default: none.
    pub external_id: Option<String>,
    pub credential: Credential,
    pub firmware: Option<String>,
    pub model: Option<String>,
    pub tenant: Option<String>,
    pub slot: Option<String>,
    pub resume: Option<String>,
    /// `Sec-WebSocket-Protocol`, several with commas. Default `seawall.v1`; `None` for a plain session.
    pub protocols: Option<String>,
    /// Added to the request; a header of ours that is named here is replaced.
    pub headers: Vec<(String, String)>,
    /// Local address to connect from. Default: the system's choice.
    pub source: Option<IpAddr>,
    /// CAs that verify a gateway at `wss://`.
    pub trust: Trust,
    /// Default [`OPEN_TIMEOUT_DEFAULT`].
    pub open_timeout: Duration,
}

impl DeviceConfig {
    /// A device that speaks `seawall.v1` and shows its secret as a bearer.
    #[must_use]
    pub fn new(id: DeviceId, secret: &str) -> Self {
        Self {
            id,
            external_id: None,
            credential: Credential::Bearer(secret.into()),
            firmware: None,
            model: None,
            tenant: None,
            slot: None,
            resume: None,
            protocols: Some(SUBPROTOCOL.into()),
            headers: Vec::new(),
            source: None,
            trust: Trust::default(),
            open_timeout: OPEN_TIMEOUT_DEFAULT,
        }
    }

    /// The same with this firmware version.
    #[must_use]
    pub fn firmware(mut self, version: &str) -> Self {
        self.firmware = Some(version.into());
        self
    }
}

/// An open session.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    protocol: Option<String>,
}

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    Text(String),
    Binary(Vec<u8>),
    /// Its pong is on the way.
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    /// A close frame; `code` is 1005 where it had none. It has been answered.
    Closed {
        code: u16,
        reason: String,
    },
    /// The connection ended without a close frame.
    Lost,
}

impl Connection {
    /// Connects to `ws://host:port[/path]`, `wss://…` or `host:port`.
    ///
    /// # Errors
    /// [`OpenError::Refused`] with the gateway's answer, or why there was none.
    ///
    /// # Cancel safety
    /// Dropped, it gives the attempt up.
    pub async fn open(url: &str, config: &DeviceConfig) -> Result<Self, OpenError> {
        Self::open_at(&Target::resolve_trusting(url, &config.trust).await?, config).await
    }

    /// The same, to an address that was looked up before. The target's authorities verify it, not those of `config`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Cancel safety
    /// Dropped, it gives the attempt up.
    pub async fn open_at(target: &Target, config: &DeviceConfig) -> Result<Self, OpenError> {
        let hello = Hello {
            device: config.id,
            external_id: config.external_id.as_deref(),
            credential: &config.credential,
            firmware: config.firmware.as_deref(),
            model: config.model.as_deref(),
            tenant: config.tenant.as_deref(),
            slot: config.slot.as_deref(),
            resume: config.resume.as_deref(),
            protocols: config.protocols.as_deref(),
        };
        let mut request = hello.request(target)?;
        for (name, value) in &config.headers {
            let name: HeaderName = name.parse().map_err(|_| OpenError::BadHello)?;
            let value = HeaderValue::from_str(value).map_err(|_| OpenError::BadHello)?;
            request.headers_mut().insert(name, value);
        }
        let options = SocketOptions {
            source: config.source,
            is_slow: false,
        };
        let opening = async { upgrade(open(target, options).await?, request).await };
        let (socket, protocol) = timeout(config.open_timeout, opening)
            .await
            .map_err(|_| OpenError::TimedOut(config.open_timeout))??;
        Ok(Self { socket, protocol })
    }

    /// The sub-protocol that the gateway confirmed.
    #[must_use]
    pub fn protocol(&self) -> Option<&str> {
        self.protocol.as_deref()
    }

    /// This end of the connection.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.socket.get_ref().tcp().local_addr()
    }

    /// Sends a frame as JSON text.
    ///
    /// # Errors
    /// The connection is gone, or the frame has no JSON form.
    pub async fn send_json(&mut self, frame: &impl Serialize) -> Result<(), SendError> {
        let text = serde_json::to_string(frame)?;
        self.send(Message::text(text)).await
    }

    /// Sends any message: text that is not JSON, binary, ping, pong.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(&mut self, message: Message) -> Result<(), SendError> {
        Ok(self.socket.send(message).await?)
    }

    /// The next thing that comes, pings and pongs too. Waits for ever.
    ///
    /// # Cancel safety
    /// Safe for texts and binary data: none is lost. A ping or close may be answered and yet not returned.
    pub async fn next_frame(&mut self) -> Received {
        match self.socket.next().await {
            Some(Ok(Message::Text(text))) => Received::Text(text.as_str().to_owned()),
            Some(Ok(Message::Binary(data))) => Received::Binary(data.to_vec()),
            Some(Ok(Message::Ping(data))) => {
                // The socket layer has queued the pong. A connection that is gone says so at the next read.
                let _ = self.socket.flush().await;
                Received::Ping(data.to_vec())
            }
            Some(Ok(Message::Pong(data))) => Received::Pong(data.to_vec()),
            Some(Ok(Message::Close(frame))) => {
                // The answer to the close is queued in the socket layer. The peer may have gone.
                let _ = self.socket.flush().await;
                let (code, reason) = frame.map_or((1005, String::new()), |frame| {
                    (frame.code.into(), frame.reason.as_str().to_owned())
                });
                Received::Closed { code, reason }
            }
            Some(Ok(Message::Frame(_)) | Err(_)) | None => Received::Lost,
        }
    }

    /// The next text frame as JSON; pings and pongs before it are passed over.
    ///
    /// # Errors
    /// Nothing in this time, or something else.
    pub async fn next_json(&mut self, within: Duration) -> Result<Value, NextError> {
        let next = async {
            loop {
                match self.next_frame().await {
                    Received::Text(text) => {
                        return serde_json::from_str(&text).map_err(|_| NextError::Other(Received::Text(text)));
                    }
                    Received::Ping(_) | Received::Pong(_) => {}
                    other @ (Received::Binary(_) | Received::Closed { .. } | Received::Lost) => {
                        return Err(NextError::Other(other));
                    }
                }
            }
        };
        timeout(within, next).await.map_err(|_| NextError::Nothing(within))?
    }

    /// How the session ends: code and reason. Whatever comes before is passed over.
    ///
    /// # Errors
    /// No end in this time, or one without a close frame.
    pub async fn closed(&mut self, within: Duration) -> Result<(u16, String), NextError> {
        let end = async {
            loop {
                match self.next_frame().await {
                    Received::Closed { code, reason } => return Ok((code, reason)),
                    Received::Lost => return Err(NextError::Other(Received::Lost)),
                    Received::Text(_) | Received::Binary(_) | Received::Ping(_) | Received::Pong(_) => {}
                }
            }
        };
        timeout(within, end).await.map_err(|_| NextError::Nothing(within))?
    }

    /// Sends a close frame; the gateway's answer comes by [`closed`](Self::closed).
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn close(&mut self, code: u16, reason: &str) -> Result<(), SendError> {
        let frame = CloseFrame {
            code: CloseCode::from(code),
            reason: reason.into(),
        };
        Ok(self.socket.close(Some(frame)).await?)
    }

    /// Resets the connection, as a device that loses its power: no close frame, no FIN.
    pub fn abort(self) {
        reset(self.socket);
    }
}

/// Closes the socket with a reset. A socket that is already closed has nothing to reset.
pub(crate) fn reset(socket: Socket) {
    let _ = socket.get_ref().tcp().set_zero_linger();
    drop(socket);
}

/// A frame could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("the frame has no JSON form")]
    NoJson(#[from] serde_json::Error),
    #[error("the connection is gone")]
    Gone(#[from] tungstenite::Error),
}

/// What a test waited for did not come.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NextError {
    #[error("nothing in {0:?}")]
    Nothing(Duration),
    #[error("something else came: {0:?}")]
    Other(Received),
}
