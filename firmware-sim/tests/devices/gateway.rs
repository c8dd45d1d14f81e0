//! A gateway that does what a test says, and notes what came.

use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Instant,
};

use futures_util::SinkExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

/// One attempt: when, and with which headers (names in lower case).
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub headers: BTreeMap<String, String>,
}

#[derive(Clone, Debug)]
pub struct Gateway {
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

pub const WELCOME: &str = r#"{"type":"welcome","session":"1","heartbeat_ms":30000,"backoff_cap_ms":60000,"server_time":"2026-01-01T00:00:00Z"}"#;

impl Gateway {
    /// Calls `answer` with the number of the attempt (from 0) for each, in a task of its own.
    pub async fn start<F>(answer: impl Fn(usize, Attempt) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener, answer)
    }

    pub fn on<F>(listener: TcpListener, answer: impl Fn(usize, Attempt) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let gateway = Self {
            addr: listener.local_addr().unwrap(),
            seen: Arc::default(),
        };
        let (seen, answer) = (Arc::clone(&gateway.seen), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                tokio::spawn(async move {
                    let at = Instant::now();
                    let Some(attempt) = Attempt::read(tcp).await else {
                        return;
                    };
                    let number = {
                        let mut seen = seen.lock().unwrap();
                        seen.push(Seen {
                            at,
                            headers: attempt.headers.clone(),
                        });
                        seen.len() - 1
                    };
                    answer(number, attempt).await;
                });
            }
        });
        gateway
    }

    pub fn url(&self) -> String {
        format!("ws://{}", self.addr)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

pub struct Attempt {
    tcp: TcpStream,
    pub headers: BTreeMap<String, String>,
}

impl Attempt {
    async fn read(mut tcp: TcpStream) -> Option<Self> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tcp.read_u8().await.ok()?);
        }
        let text = String::from_utf8(head).unwrap();
        let headers = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        Some(Self { tcp, headers })
    }

    /// Refuses with 503.
    pub async fn refuse(mut self, code: &str, retry_after_ms: u64, slot: &str) {
        let body = format!(
            r#"{{"type":"about:blank","title":"t","status":503,"code":"{code}","detail":"d","retry_after_ms":{retry_after_ms}}}"#
        );
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nContent-Length: {}\r\nConnection: close\r\n\
             Retry-After: {}\r\nSeawall-Retry-After-Ms: {retry_after_ms}\r\nSeawall-Slot: {slot}\r\n\r\n{body}",
            body.len(),
            retry_after_ms.div_ceil(1000),
        );
        self.tcp.write_all(answer.as_bytes()).await.unwrap();
    }

    pub async fn accept(mut self) -> WebSocketStream<TcpStream> {
        let key = derive_accept_key(self.headers["sec-websocket-key"].as_bytes());
        let protocol = self
            .headers
            .get("sec-websocket-protocol")
            .map(|offer| format!("Sec-WebSocket-Protocol: {offer}\r\n"))
            .unwrap_or_default();
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {key}\r\n{protocol}\r\n"
        );
        self.tcp.write_all(answer.as_bytes()).await.unwrap();
        WebSocketStream::from_raw_socket(self.tcp, Role::Server, None).await
    }

    pub async fn welcome(self) -> WebSocketStream<TcpStream> {
        let mut socket = self.accept().await;
        socket.send(Message::text(WELCOME)).await.unwrap();
        socket
    }
}
