//! A device that costs its side as little as can be: a socket, a request made of text, frames by hand. Start with [`Device`].
//!
//! `firmware-sim` is a device as it should be built; this one only carries load, and also talks to an echo server.

use std::{
    io::Cursor,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use firmware_sim::tls::{Stream, Tls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use tokio_tungstenite::tungstenite::protocol::frame::{
    FrameHeader,
    coding::{Control, Data, OpCode},
};
use uuid::Uuid;

/// Devices that share a source address: far fewer than the ports that Linux has for one, with as many still closing.
const DEVICES_PER_SOURCE: usize = 1_000;
/// Greatest answer to an upgrade, welcome included.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
/// What `Sec-WebSocket-Key` is: any 16 bytes do, and the answer to it is known.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// Who a device is.
#[derive(Clone, Debug)]
pub struct Account {
    pub id: Uuid,
    pub secret: String,
    pub source: IpAddr,
}

/// Accounts from the number alone: every run has the same.
pub fn accounts(count: usize) -> Vec<Account> {
    (0..count)
        .map(|number| {
            // Any multiplier spreads ids over the gateway's tables; this is the golden ratio's.
            let id = Uuid::from_u128((number as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
            let host = u8::try_from(number / DEVICES_PER_SOURCE % 250 + 1).unwrap_or(1);
            Account {
                id,
                secret: format!("{:0>43}", id.simple()),
                source: Ipv4Addr::new(127, 0, 0, host).into(),
            }
        })
        .collect()
}

/// The accounts as `devices import` reads them.
pub fn csv(accounts: &[Account]) -> String {
    let mut text = String::from("id,secret\n");
    for account in accounts {
        text.push_str(&format!("{},{}\n", account.id, account.secret));
    }
    text
}

/// What a device says when it connects.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub server: SocketAddr,
    /// `None`: plain TCP.
    pub tls: Option<&'a Tls>,
    pub account: &'a Account,
    pub firmware: &'a str,
    pub slot: Option<&'a str>,
    pub resume: Option<&'a str>,
    /// A gateway sends a frame of its own behind the 101.
    pub awaits_welcome: bool,
}

/// How an attempt went.
pub enum Answer {
    Connected {
        device: Device,
        resume: Option<String>,
    },
    /// 503: return later.
    Later {
        after: Duration,
        slot: Option<String>,
    },
    /// Another status.
    Refused(u16),
}

/// A connected device.
pub struct Device {
    stream: Stream,
    /// Read, and not yet used.
    unread: Vec<u8>,
}

impl Device {
    /// One attempt.
    ///
    /// # Errors
    /// The connection broke, or the answer is none.
    pub async fn connect(request: Request<'_>) -> Result<Answer> {
        let tcp = Self::dial(&request).await?;
        Self::send_request(tcp, request).await
    }

    /// The TCP connection of an attempt. Nothing is sent on it.
    ///
    /// # Errors
    /// The server does not accept it.
    pub async fn dial(request: &Request<'_>) -> Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(request.account.source, 0))?;
        let tcp = socket.connect(request.server).await.context("connecting")?;
        tcp.set_nodelay(true)?;
        Ok(tcp)
    }

    /// The rest of an attempt: the TLS handshake, the request and its answer.
    ///
    /// # Errors
    /// The connection broke, or the answer is not HTTP.
    pub async fn send_request(tcp: TcpStream, request: Request<'_>) -> Result<Answer> {
        let stream = match request.tls {
            Some(tls) => Stream::Tls(Box::new(tls.connect(tcp).await.context("making the TLS handshake")?)),
            None => Stream::Plain(tcp),
        };
        let mut device = Self {
            stream,
            unread: Vec::new(),
        };
        device.stream.write_all(request.to_text().as_bytes()).await?;
        let head = device.head().await?;
        let status = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
        match status {
            101 => {
                let mut resume = None;
                if request.awaits_welcome {
                    let (_, welcome) = device.frame().await?;
                    let welcome: serde_json::Value = serde_json::from_slice(&welcome).context("reading the welcome")?;
                    resume = welcome["resume"].as_str().map(str::to_owned);
                }
                Ok(Answer::Connected { device, resume })
            }
            503 => Ok(Answer::Later {
                after: Duration::from_millis(
                    header(&head, "Seawall-Retry-After-Ms")
                        .and_then(|after| after.parse().ok())
                        .unwrap_or(1000),
                ),
                slot: header(&head, "Seawall-Slot").map(str::to_owned),
            }),
            _ => {
                // To the end: a reset would hide a server that closes its side first.
                let _ = device.stream.read_to_end(&mut device.unread).await;
                Ok(Answer::Refused(status))
            }
        }
    }

    /// Sends a text frame of at most 125 bytes, and waits for the text that answers it.
    pub async fn ask(&mut self, text: &str) -> Result<()> {
        self.send(0x81, text.as_bytes()).await?;
        self.text().await.map(drop)
    }

    /// Sends a ping, and waits for its pong.
    pub async fn ping(&mut self) -> Result<()> {
        self.send(0x89, b"").await?;
        loop {
            let (opcode, _) = self.frame().await?;
            match opcode {
                OpCode::Control(Control::Pong) => return Ok(()),
                opcode @ (OpCode::Control(_) | OpCode::Data(_)) => self.react(opcode).await?,
            }
        }
    }

    /// The next text; pings before it are answered.
    pub async fn text(&mut self) -> Result<Vec<u8>> {
        loop {
            let (opcode, payload) = self.frame().await?;
            match opcode {
                OpCode::Data(Data::Text) => return Ok(payload),
                opcode @ (OpCode::Control(_) | OpCode::Data(_)) => self.react(opcode).await?,
            }
        }
    }

    /// Sends a text frame of at most 125 bytes.
    pub async fn say(&mut self, text: &str) -> Result<()> {
        self.send(0x81, text.as_bytes()).await
    }

    /// The connection ends with a reset, as one does whose network is gone.
    pub fn reset(self) {
        // Without it the connection ends in order, which only takes longer.
        let _ = rustix::net::sockopt::set_socket_linger(self.stream.tcp(), Some(Duration::ZERO));
    }

    async fn react(&mut self, opcode: OpCode) -> Result<()> {
        match opcode {
            OpCode::Control(Control::Ping) => self.send(0x8a, b"").await,
            OpCode::Control(Control::Close) => bail!("the server closed the connection"),
            OpCode::Control(_) | OpCode::Data(_) => Ok(()),
        }
    }

    async fn send(&mut self, first: u8, payload: &[u8]) -> Result<()> {
        let len = u8::try_from(payload.len()).context("a frame of over 125 bytes")?;
        ensure!(len < 126, "a frame of over 125 bytes");
        // Masked with zeros: a server can't tell, and we need not.
        let mut frame = vec![first, 0x80 | len, 0, 0, 0, 0];
        frame.extend_from_slice(payload);
        Ok(self.stream.write_all(&frame).await?)
    }

    async fn head(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.unread.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = self.unread.drain(..end + 4).collect();
                return String::from_utf8(head).context("an answer that is not text");
            }
            self.read().await?;
        }
    }

    async fn frame(&mut self) -> Result<(OpCode, Vec<u8>)> {
        loop {
            let mut cursor = Cursor::new(&self.unread);
            if let Some((header, len)) = FrameHeader::parse(&mut cursor)? {
                let start = usize::try_from(cursor.position())?;
                let end = start.saturating_add(usize::try_from(len)?);
                if end <= self.unread.len() {
                    let payload = self.unread[start..end].to_vec();
                    self.unread.drain(..end);
                    if self.unread.is_empty() {
                        self.unread = Vec::new();
                    }
                    return Ok((header.opcode, payload));
                }
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<()> {
        ensure!(self.unread.len() < ANSWER_BYTES_MAX, "an answer without an end");
        self.unread.reserve(1024);
        ensure!(
            self.stream.read_buf(&mut self.unread).await? > 0,
            "the server closed the connection"
        );
        Ok(())
    }
}

impl Request<'_> {
    fn to_text(self) -> String {
        let Account { id, secret, .. } = self.account;
        let mut text = format!(
            "GET /v1/connect HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Protocol: seawall.v1\r\nSeawall-Device: {id}\r\n\
             Authorization: Bearer {secret}\r\nSeawall-Firmware: {}\r\n",
            self.server, self.firmware
        );
        for (name, value) in [("Seawall-Slot", self.slot), ("Seawall-Resume", self.resume)] {
            if let Some(value) = value {
                text.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        text.push_str("\r\n");
        text
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(": "))
        .find_map(|(of, value)| of.eq_ignore_ascii_case(name).then_some(value))
}
