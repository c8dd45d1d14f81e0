//! From nothing to an open WebSocket: the TCP connection, the upgrade request, and reading a refusal.

use std::{fmt, io, net::IpAddr, net::SocketAddr, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use seawall_proto::{
    id::DeviceId,
    refusal::{Code, Hint},
};
use serde::Deserialize;
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self,
        handshake::client::{Request, Response, generate_key},
        http::{HeaderMap, HeaderName, HeaderValue, header},
        protocol::WebSocketConfig,
    },
};

use crate::target::Target;

/// The sub-protocol of frames. Contract section 4.
pub const SUBPROTOCOL: &str = "seawall.v1";

/// A session's read buffer, allocated at once and kept: 1 KiB holds every frame but large messages. dependencies.md
/// section 1 has the measurements.
const READ_BUFFER: usize = 1024;
/// What a device writes at a time.
const WRITE_BUFFER: usize = 1024;
/// A gateway that does not read can make a device hold this much, in bytes; then its session counts as lost.
const WRITE_BUFFER_MAX: usize = 64 * 1024;
/// Longest message that a device takes, in bytes: four times the gateway's own default.
const MESSAGE_LEN_MAX: usize = 256 * 1024;
/// Receive buffer that a slow reader asks for, in bytes; the kernel doubles it.
const SLOW_RECEIVE_BUFFER: u32 = 4096;

/// An open session's socket.
pub type Socket = WebSocketStream<TcpStream>;

/// How a device proves who it is. Contract section 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// `Authorization: Bearer SECRET`.
    Bearer(Box<str>),
    /// `Authorization: Basic base64(UUID:SECRET)`; no `Seawall-Device` header.
    Basic(Box<str>),
    /// None at all.
    Missing,
}

/// What a device says of itself in one attempt.
#[derive(Clone, Debug)]
pub(crate) struct Hello<'a> {
    pub(crate) device: DeviceId,
    pub(crate) credential: &'a Credential,
    pub(crate) firmware: Option<&'a str>,
    pub(crate) model: Option<&'a str>,
    pub(crate) tenant: Option<&'a str>,
    pub(crate) slot: Option<&'a str>,
    pub(crate) resume: Option<&'a str>,
    pub(crate) protocols: Option<&'a str>,
}

impl Hello<'_> {
    pub(crate) fn request(&self, target: &Target) -> Result<Request, OpenError> {
        let mut request = Request::new(());
        *request.uri_mut() = target.uri().clone();
        let authority = target.uri().authority().map_or("", |authority| authority.as_str());
        let headers = request.headers_mut();
        for (name, value) in [
            (header::HOST, authority),
            (header::CONNECTION, "Upgrade"),
            (header::UPGRADE, "websocket"),
            (header::SEC_WEBSOCKET_VERSION, "13"),
            (header::SEC_WEBSOCKET_KEY, generate_key().as_str()),
        ] {
            headers.insert(name, value_of(value)?);
        }
        self.credentials(headers)?;
        for (name, value) in [
            ("seawall-firmware", self.firmware),
            ("seawall-model", self.model),
            ("seawall-tenant", self.tenant),
            ("seawall-slot", self.slot),
            ("seawall-resume", self.resume),
            ("sec-websocket-protocol", self.protocols),
        ] {
            if let Some(value) = value {
                headers.insert(HeaderName::from_static(name), value_of(value)?);
            }
        }
        Ok(request)
    }

    fn credentials(&self, headers: &mut HeaderMap) -> Result<(), OpenError> {
        let authorization = match self.credential {
            Credential::Bearer(secret) => Some(format!("Bearer {secret}")),
            Credential::Basic(secret) => {
                let pair = BASE64_STANDARD.encode(format!("{}:{secret}", self.device));
                Some(format!("Basic {pair}"))
            }
            Credential::Missing => None,
        };
        if let Some(authorization) = authorization {
            headers.insert(header::AUTHORIZATION, value_of(&authorization)?);
        }
        if !matches!(self.credential, Credential::Basic(_)) {
            let id = HeaderName::from_static("seawall-device");
            headers.insert(id, value_of(&self.device.to_string())?);
        }
        Ok(())
    }
}

fn value_of(text: &str) -> Result<HeaderValue, OpenError> {
    HeaderValue::from_str(text).map_err(|_| OpenError::BadHello)
}

/// Sockets of one attempt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SocketOptions {
    /// Local address to connect from.
    pub(crate) source: Option<IpAddr>,
    /// Ask for a receive buffer that a slow reader fills quickly.
    pub(crate) is_slow: bool,
}

/// Connects and upgrades. Has no deadline of its own.
///
/// # Cancel safety
/// Dropped, it gives the attempt up: the socket closes.
pub(crate) async fn open(
    target: &Target,
    request: Request,
    options: SocketOptions,
) -> Result<(Socket, Response), OpenError> {
    let tcp = dial(target.addr(), options).await.map_err(OpenError::Unreachable)?;
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(WRITE_BUFFER_MAX)
        .max_message_size(Some(MESSAGE_LEN_MAX))
        .max_frame_size(Some(MESSAGE_LEN_MAX));
    match client_async_with_config(request, tcp, Some(config)).await {
        Ok(open) => Ok(open),
        Err(tungstenite::Error::Http(response)) => Err(OpenError::Refused(Box::new(Refused::read(&response)))),
        Err(error) => Err(OpenError::NoAnswer(Box::new(error))),
    }
}

async fn dial(to: SocketAddr, options: SocketOptions) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if options.is_slow {
        socket.set_recv_buffer_size(SLOW_RECEIVE_BUFFER)?;
    }
    if let Some(source) = options.source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    let tcp = socket.connect(to).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The gateway answered, and said no.
    #[error("{0}")]
    Refused(Box<Refused>),
    /// No TCP connection.
    #[error("the gateway could not be reached")]
    Unreachable(#[source] io::Error),
    /// A connection, and then a reset, its end, or something that is no WebSocket.
    #[error("the gateway did not answer")]
    NoAnswer(#[source] Box<tungstenite::Error>),
    /// Nothing within this.
    #[error("the gateway did not answer in {0:?}")]
    TimedOut(Duration),
    /// A secret, version or label that can't stand in a header.
    #[error("what the device says of itself can't stand in a header")]
    BadHello,
    /// The URL is no use.
    #[error(transparent)]
    Target(#[from] crate::target::TargetError),
}

impl OpenError {
    /// The gateway's answer, where there was one.
    #[must_use]
    pub fn refused(&self) -> Option<&Refused> {
        match self {
            Self::Refused(refused) => Some(refused),
            Self::Unreachable(_) | Self::NoAnswer(_) | Self::TimedOut(_) | Self::BadHello | Self::Target(_) => None,
        }
    }
}

/// A refusal, as it came over the wire. Contract section 3.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    pub status: u16,
    /// `code` of the problem document. `None` where the body is none.
    pub code: Option<String>,
    pub detail: Option<String>,
    /// Id of the rule that refused.
    pub rule: Option<String>,
    /// `Seawall-Retry-After-Ms`, else `Retry-After` in whole seconds.
    pub retry_after_ms: Option<u64>,
    pub slot: Option<String>,
    /// All headers, names in lower case, in the order of arrival for each name.
    pub headers: Vec<(String, String)>,
    /// As far as it came with the head: the gateway sends both at once.
    pub body: String,
}

impl Refused {
    fn read(response: &Response) -> Self {
        let headers: Vec<(String, String)> = response
            .headers()
            .iter()
            .map(|(name, value)| {
                (
                    name.as_str().to_owned(),
                    String::from_utf8_lossy(value.as_bytes()).into_owned(),
                )
            })
            .collect();
        let body = String::from_utf8_lossy(response.body().as_deref().unwrap_or_default()).into_owned();
        let problem: Problem = serde_json::from_str(&body).unwrap_or_default();
        let refused = Self {
            status: response.status().as_u16(),
            code: problem.code,
            detail: problem.detail,
            rule: problem.rule,
            headers,
            body,
            ..Self::default()
        };
        let number = |name| refused.header(name).and_then(|text| text.trim().parse::<u64>().ok());
        Self {
            retry_after_ms: number("seawall-retry-after-ms")
                .or_else(|| number("retry-after").map(|seconds| seconds.saturating_mul(1000))),
            slot: refused.header("seawall-slot").map(str::to_owned),
            ..refused
        }
    }

    /// The first header of this name (lower case).
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(of, _)| of == name)
            .map(|(_, value)| value.as_str())
    }

    /// The code, where it is one of the contract's.
    #[must_use]
    pub fn known_code(&self) -> Option<Code> {
        let code = self.code.as_deref()?;
        Code::ALL.into_iter().find(|known| known.as_str() == code)
    }

    /// What the device machine obeys.
    #[must_use]
    pub fn hint(&self) -> Option<Hint> {
        self.retry_after_ms.map(|ms| Hint {
            after: Duration::from_millis(ms),
            slot: self.slot.as_deref().map(Box::from),
        })
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "refused with {} {}",
            self.status,
            self.code.as_deref().unwrap_or("without a code")
        )?;
        match self.retry_after_ms {
            Some(ms) => write!(f, ", to come back in {ms} ms"),
            None => Ok(()),
        }
    }
}

#[derive(Default, Deserialize)]
struct Problem {
    code: Option<String>,
    detail: Option<String>,
    rule: Option<String>,
}
