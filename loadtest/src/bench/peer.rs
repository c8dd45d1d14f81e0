//! The servers that the gateway is measured beside, each a process of its own: this program again.
//!
//! [`Kind::Echo`] is tokio-tungstenite as it should be used (a small read buffer, the handshake in a future of its own so that nothing
//! of it stays) and knows nobody. [`Kind::Refuse`] is no more than sockets: accept, read, write, close.

use std::{fs, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async_with_config,
    tungstenite::{
        Message,
        handshake::server::{ErrorResponse, Request, Response},
        http::HeaderValue,
        protocol::WebSocketConfig,
    },
};

use crate::process::{self, Process};

const START_TIME_MAX: Duration = Duration::from_secs(10);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4_096;
const READ_BUFFER_BYTES: usize = 1_024;
/// As long as what the gateway answers to a device that a rule refuses.
const REFUSAL_BODY_BYTES: usize = 200;

/// What it does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    Echo,
    Refuse,
}

/// Starts it as a process of its own, and waits until it listens.
///
/// # Errors
/// It does not start.
pub(super) async fn start(kind: Kind, folder: &Path) -> Result<(Process, SocketAddr)> {
    let name = match kind {
        Kind::Echo => "echo",
        Kind::Refuse => "refuse",
    };
    let file = folder.join(name);
    let mut command = Command::new(std::env::current_exe().context("looking for this program's own file")?);
    command
        .arg("bench-peer")
        .arg("--kind")
        .arg(name)
        .arg("--address")
        .arg(&file);
    let mut process = Process::start(name, &mut command, &file.with_extension("log"))?;
    let read = || fs::read_to_string(&file).ok()?.strip_suffix('\n')?.parse().ok();
    let address = process::await_from(&mut process, "address", START_TIME_MAX, read).await?;
    Ok((process, address))
}

/// Serves until the process ends. Its address goes into the file `address`.
///
/// # Errors
/// It can't listen.
pub async fn serve(kind: Kind, address: &Path) -> Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_nodelay(true)?;
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let listener = socket.listen(BACKLOG).context("listening")?;
    fs::write(address, format!("{}\n", listener.local_addr()?)).context("writing the address")?;
    accept(kind, listener).await
}

async fn accept(kind: Kind, listener: TcpListener) -> Result<()> {
    loop {
        match (listener.accept().await, kind) {
            (Ok((stream, _)), Kind::Echo) => drop(tokio::spawn(upgrade(stream))),
            (Ok((stream, _)), Kind::Refuse) => drop(tokio::spawn(refuse(stream))),
            // Out of open files: the one courtesy it has is not to spin.
            (Err(_), _) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// The task of a session is another one: a task stays as large as its largest moment.
async fn upgrade(stream: TcpStream) {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0);
    if let Ok(socket) = accept_hdr_async_with_config(stream, confirm, Some(config)).await {
        tokio::spawn(echo(socket));
    }
}

#[expect(clippy::result_large_err, reason = "the library's own type")]
fn confirm(_: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    response
        .headers_mut()
        .append("Sec-WebSocket-Protocol", HeaderValue::from_static("seawall.v1"));
    Ok(response)
}

async fn echo(mut socket: WebSocketStream<TcpStream>) {
    while let Some(Ok(message)) = socket.next().await {
        let sent = match message {
            Message::Text(_) | Message::Binary(_) => socket.send(message).await,
            Message::Ping(_) => socket.flush().await,
            Message::Pong(_) | Message::Frame(_) => Ok(()),
            Message::Close(_) => return,
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn refuse(mut stream: TcpStream) {
    let mut head = [0; 2048];
    if stream.read(&mut head).await.is_ok() {
        let body = "x".repeat(REFUSAL_BODY_BYTES);
        let answer = format!(
            "HTTP/1.1 403 Forbidden\r\nContent-Type: application/problem+json\r\nConnection: close\r\nContent-Length: {REFUSAL_BODY_BYTES}\r\n\r\n{body}"
        );
        // A client that has left gets no answer.
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}
