//! One attempt of a device to connect, over a plain TCP socket: the request, and whatever answers it.

use std::{io, net::SocketAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_proto::refusal::{Code, Hint};
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::protocol::{Role, WebSocketConfig},
};

use crate::plan::Device;

/// Greatest head of an answer, and greatest body of a refusal, in bytes.
const ANSWER_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 32;
/// A device is told little at a time: what it keeps for reading, in bytes.
const READ_BUFFER_BYTES: usize = 1024;
/// Refuses to buffer more for a gateway that does not read, in bytes.
const WRITE_BUFFER_BYTES_MAX: usize = 16 * 1024;

/// An open connection.
pub type Socket = WebSocketStream<TcpStream>;

/// Why there is no connection.
#[derive(Debug)]
pub enum NotConnected {
    /// The server said no. The code is None where the contract does not know it.
    Refused { code: Option<Code>, hint: Option<Hint> },
    /// Refused or reset by TCP, cut short, or no HTTP.
    Failed,
}

/// The part of a refusal's body that a device reads.
#[derive(Deserialize)]
struct Problem {
    code: String,
}

/// Connects, asks for `seawall.v1`, and reads the answer.
///
/// # Errors
/// The server refused, or did not answer.
///
/// # Cancel safety
/// Dropped, it closes the connection; nothing else is lost.
pub async fn dial(
    address: SocketAddr,
    device: &Device,
    slot: Option<&str>,
    resume: Option<&str>,
) -> Result<Box<Socket>, NotConnected> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream
        .write_all(request(address, device, slot, resume).as_bytes())
        .await?;
    let (head, rest) = read_head(&mut stream).await?;
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut answer = httparse::Response::new(&mut headers);
    answer.parse(&head).map_err(|_| NotConnected::Failed)?;
    if answer.code == Some(101) {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_write_buffer_size(WRITE_BUFFER_BYTES_MAX);
        let socket = WebSocketStream::from_partially_read(stream, rest, Role::Client, Some(config)).await;
        return Ok(Box::new(socket));
    }
    let hint = hint(answer.headers);
    let length = text_of(answer.headers, "Content-Length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let body = read_body(&mut stream, rest, length).await?;
    let problem: Option<Problem> = serde_json::from_slice(&body).ok();
    let code = problem.and_then(|problem| Code::ALL.into_iter().find(|code| code.as_str() == problem.code));
    Err(NotConnected::Refused { code, hint })
}

impl From<io::Error> for NotConnected {
    /// Why TCP failed makes no difference to a device.
    fn from(_: io::Error) -> Self {
        Self::Failed
    }
}

fn request(address: SocketAddr, device: &Device, slot: Option<&str>, resume: Option<&str>) -> String {
    let key = STANDARD.encode(uuid::Uuid::new_v4().as_bytes());
    let mut request = format!(
        "GET /v1/connect HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: seawall.v1\r\n\
         Seawall-Device: {}\r\nAuthorization: Bearer {}\r\nSeawall-Firmware: {}\r\n",
        device.id, device.secret, device.firmware,
    );
    let optional = [
        ("Seawall-Model", device.model.as_deref()),
        ("Seawall-Tenant", device.tenant.as_deref()),
        ("Seawall-Slot", slot),
        ("Seawall-Resume", resume),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            request.extend([name, ": ", value, "\r\n"]);
        }
    }
    request + "\r\n"
}

/// The head, and what came behind it.
async fn read_head(stream: &mut TcpStream) -> Result<(Vec<u8>, Vec<u8>), NotConnected> {
    let mut read = Vec::with_capacity(512);
    loop {
        if stream.read_buf(&mut read).await? == 0 || read.len() > ANSWER_BYTES_MAX {
            return Err(NotConnected::Failed);
        }
        if let Some(at) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = read.split_off(at + 4);
            return Ok((read, rest));
        }
    }
}

async fn read_body(stream: &mut TcpStream, mut body: Vec<u8>, length: usize) -> Result<Vec<u8>, NotConnected> {
    if length > ANSWER_BYTES_MAX {
        return Err(NotConnected::Failed);
    }
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Err(NotConnected::Failed);
        }
    }
    body.truncate(length);
    Ok(body)
}

fn hint(headers: &[httparse::Header<'_>]) -> Option<Hint> {
    let number = |name| text_of(headers, name).and_then(|text| text.parse::<u64>().ok());
    let after = number("Seawall-Retry-After-Ms")
        .map(Duration::from_millis)
        .or_else(|| number("Retry-After").map(Duration::from_secs))?;
    Some(Hint {
        after,
        slot: text_of(headers, "Seawall-Slot").map(Box::from),
    })
}

fn text_of<'a>(headers: &[httparse::Header<'a>], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
    std::str::from_utf8(found.value).ok().map(str::trim)
}
