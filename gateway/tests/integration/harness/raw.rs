//! A device in bytes: requests, answers and frames, written by hand.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::wait::SHORT_PATIENCE;

pub const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
pub const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// The answer before any upgrade.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    head: String,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (header, value) = line.split_once(':')?;
            header.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    /// The body as JSON.
    pub fn problem(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// The `code` of the body; empty if there is none.
    pub fn code(&self) -> String {
        serde_json::from_str::<serde_json::Value>(&self.body)
            .ok()
            .and_then(|problem| Some(problem["code"].as_str()?.to_owned()))
            .unwrap_or_default()
    }

    /// Head and body without the values that are drawn for each refusal.
    pub fn without_hints(&self) -> String {
        let mut problem = self.problem();
        problem["retry_after_ms"] = 0.into();
        let head = self
            .head
            .lines()
            .filter(|line| !line.to_lowercase().contains("retry-after") && !line.starts_with("Content-Length"));
        format!("{:?} {problem}", head.collect::<Vec<_>>())
    }
}

/// The request of a correct device.
pub fn request(extra: &[&str]) -> String {
    let mut request = format!(
        "GET /v1/connect HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n"
    );
    for line in extra {
        request.push_str(line);
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    request
}

/// Sends bytes, and reads until the gateway closes or upgrades.
pub async fn ask(address: SocketAddr, bytes: &[u8]) -> Response {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // A refusal may arrive before all of a large request is written.
    let _ = stream.write_all(bytes).await;
    response(&mut stream).await
}

/// Reads one answer, byte by byte up to the end of its head, so that frames after a 101 stay in the stream.
pub async fn response(stream: &mut (impl AsyncRead + Unpin)) -> Response {
    let reading = async {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut answer = Response {
            status,
            head,
            body: String::new(),
        };
        if status != 101 {
            let length: usize = answer.header("Content-Length").unwrap().parse().unwrap();
            let mut body = Vec::new();
            stream.read_to_end(&mut body).await.unwrap();
            assert_eq!(body.len(), length);
            answer.body = String::from_utf8(body).unwrap();
        }
        answer
    };
    timeout(SHORT_PATIENCE, reading).await.unwrap()
}

/// One frame from the gateway.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    pub opcode: u8,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn text(&self) -> &str {
        assert_eq!(self.opcode, 1, "{self:?}");
        std::str::from_utf8(&self.payload).unwrap()
    }

    /// Code and reason of a close frame.
    pub fn close(&self) -> (u16, &str) {
        assert_eq!(self.opcode, 8, "{self:?}");
        let (code, reason) = self.payload.split_at(2);
        (
            u16::from_be_bytes([code[0], code[1]]),
            std::str::from_utf8(reason).unwrap(),
        )
    }
}

/// An upgraded device.
pub struct Device {
    pub stream: TcpStream,
}

impl Device {
    /// Connects with these header lines. It must be upgraded.
    pub async fn connect(address: SocketAddr, lines: &[&str]) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request(lines).as_bytes()).await.unwrap();
        let response = response(&mut stream).await;
        assert_eq!(response.status, 101, "{response:?}");
        Self { stream }
    }

    pub async fn send(&mut self, first: u8, payload: &[u8]) {
        self.stream.write_all(&masked(first, payload)).await.unwrap();
    }

    pub async fn text(&mut self, text: &str) {
        self.send(0x81, text.as_bytes()).await;
    }

    /// The next frame that is not a ping.
    pub async fn frame(&mut self) -> Frame {
        loop {
            let frame = self.any_frame().await;
            if frame.opcode != 9 {
                return frame;
            }
        }
    }

    pub async fn any_frame(&mut self) -> Frame {
        timeout(SHORT_PATIENCE, self.read_frame()).await.unwrap()
    }

    async fn read_frame(&mut self) -> Frame {
        let first = self.stream.read_u8().await.unwrap();
        assert_eq!(
            first & 0xf0,
            0x80,
            "the gateway neither fragments nor sets reserved bits"
        );
        let len = match self.stream.read_u8().await.unwrap() {
            126 => usize::from(self.stream.read_u16().await.unwrap()),
            127 => usize::try_from(self.stream.read_u64().await.unwrap()).unwrap(),
            len => usize::from(len),
        };
        let mut payload = vec![0; len];
        self.stream.read_exact(&mut payload).await.unwrap();
        Frame {
            opcode: first & 0x0f,
            payload,
        }
    }

    /// Reads until the stream ends.
    pub async fn until_end(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        timeout(SHORT_PATIENCE, self.stream.read_to_end(&mut rest))
            .await
            .unwrap()
            .unwrap();
        rest
    }
}

/// A frame as a client sends it: masked, here with a key of zeros.
pub fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        len if len < 126 => bytes.push(0x80 | u8::try_from(len).unwrap()),
        len if len < 65_536 => {
            bytes.push(0x80 | 126);
            bytes.extend_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
        }
        len => {
            bytes.push(0x80 | 127);
            bytes.extend_from_slice(&u64::try_from(len).unwrap().to_be_bytes());
        }
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(payload);
    bytes
}
