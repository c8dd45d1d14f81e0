//! Opening a WebSocket: the TCP connection, the upgrade request, and the gateway's answer.
//!
//! tungstenite's own handshake leaves a 4 KiB buffer with every session, and does not read the body of a refusal that
//! arrives after its head. So the handshake is here.

mod answer;
mod hello;
mod refused;
mod stream;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use rustix::io::Errno;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::client::{Request, generate_request},
        protocol::{Role, WebSocketConfig},
    },
};

use self::answer::Answer;
pub(crate) use self::hello::Hello;
pub use self::{hello::Credential, refused::Refused, stream::Stream};
use crate::target::Target;

/// The sub-protocol of frames.
pub const SUBPROTOCOL: &str = "seawall.v1";

/// A session's read buffer, allocated at once and kept: 1 KiB holds every frame but large messages. The default of
/// tokio-tungstenite would cost 133 KB per connection.
const READ_BUFFER: usize = 1024;
/// What a device writes at a time.
const WRITE_BUFFER: usize = 1024;
/// A gateway that does not read can make a device hold this much, in bytes; then its session counts as lost.
const WRITE_BUFFER_MAX: usize = 64 * 1024;
/// Longest message that a device takes, in bytes: four times the gateway's own default.
const MESSAGE_LEN_MAX: usize = 256 * 1024;
/// Receive buffer that a slow reader asks for, in bytes; the kernel doubles it.
const SLOW_RECEIVE_BUFFER: u32 = 4096;
/// Maximum length read of a refusal's body, in bytes.
const BODY_LEN_MAX: usize = 8 * 1024;

/// An open session's socket.
pub type Socket = WebSocketStream<Stream>;

/// Sockets of one attempt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SocketOptions {
    /// Local address to connect from.
    pub(crate) source: Option<IpAddr>,
    /// Ask for a receive buffer that a slow reader fills quickly.
    pub(crate) is_slow: bool,
}

/// Connects to `target`, with TLS where it asks for it. Has no deadline of its own.
///
/// # Cancel safety
/// Dropped, it gives the attempt up: the socket closes.
pub(crate) async fn open(target: &Target, options: SocketOptions) -> Result<Stream, OpenError> {
    let tcp = dial(target.addr(), options).await.map_err(OpenError::Unreachable)?;
    Ok(match target.tls() {
        None => Stream::Plain(tcp),
        // Boxed: the handshake would make every device's task larger.
        Some(tls) => Stream::Tls(Box::new(Box::pin(tls.connect(tcp)).await.map_err(OpenError::NoAnswer)?)),
    })
}

/// Upgrades; also tells the sub-protocol that was confirmed. Has no deadline of its own.
///
/// # Cancel safety
/// Dropped, it gives the attempt up: the socket closes.
pub(crate) async fn upgrade(mut stream: Stream, request: Request) -> Result<(Socket, Option<String>), OpenError> {
    let offered = request.headers().get("sec-websocket-protocol").cloned();
    let (request, key) = generate_request(request).map_err(|_| OpenError::BadHello)?;
    stream.write_all(&request).await.map_err(OpenError::NoAnswer)?;
    let (answer, rest) = Answer::read(&mut stream).await?;
    if answer.status != 101 {
        let body = body(&mut stream, &answer, rest).await;
        return Err(OpenError::Refused(Box::new(Refused::read(answer, &body))));
    }
    answer.check_upgrade(&key, offered.as_ref().and_then(|offered| offered.to_str().ok()))?;
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(WRITE_BUFFER_MAX)
        .max_message_size(Some(MESSAGE_LEN_MAX))
        .max_frame_size(Some(MESSAGE_LEN_MAX));
    let socket = WebSocketStream::from_partially_read(stream, rest, Role::Client, Some(config)).await;
    Ok((socket, answer.header("sec-websocket-protocol").map(str::to_owned)))
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

/// The body that the head announces, as far as it comes. The head alone is a refusal already.
async fn body(stream: &mut Stream, answer: &Answer, mut body: Vec<u8>) -> Vec<u8> {
    let announced = answer
        .header("content-length")
        .and_then(|text| text.trim().parse().ok());
    let wanted = announced.unwrap_or(0_usize).min(BODY_LEN_MAX);
    while body.len() < wanted {
        match stream.read_buf(&mut body).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
    }
    body.truncate(wanted);
    body
}

/// Reason why an attempt failed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The gateway refused.
    #[error("{0}")]
    Refused(Box<Refused>),
    /// No TCP connection.
    #[error("the gateway could not be reached")]
    Unreachable(#[source] io::Error),
    /// A connection, and then a reset or its end.
    #[error("the gateway did not answer")]
    NoAnswer(#[source] io::Error),
    /// The answer is not a valid upgrade.
    #[error("the gateway's answer is invalid: {0}")]
    BadAnswer(&'static str),
    /// Nothing within this.
    #[error("the gateway did not answer in {0:?}")]
    TimedOut(Duration),
    /// A secret, version or label that can't stand in a header.
    #[error("an identity value of the device is not allowed in a header")]
    BadHello,
    /// The URL is invalid.
    #[error(transparent)]
    Target(#[from] crate::target::TargetError),
}

impl OpenError {
    /// Whether this machine is the cause, not the gateway: no open file, port or memory was left for the socket.
    #[must_use]
    pub fn is_local(&self) -> bool {
        const LOCAL: [Errno; 5] = [
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOBUFS,
            Errno::NOMEM,
            Errno::ADDRNOTAVAIL,
        ];
        let Self::Unreachable(error) = self else {
            return false;
        };
        Errno::from_io_error(error).is_some_and(|errno| LOCAL.contains(&errno))
    }

    /// The gateway's answer, where there was one.
    #[must_use]
    pub fn refused(&self) -> Option<&Refused> {
        match self {
            Self::Refused(refused) => Some(refused),
            Self::Unreachable(_)
            | Self::NoAnswer(_)
            | Self::BadAnswer(_)
            | Self::TimedOut(_)
            | Self::BadHello
            | Self::Target(_) => None,
        }
    }
}
