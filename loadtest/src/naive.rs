//! A naive server for comparison: it accepts every connection, sends one query for each, and has no limits.
//!
//! It is a real server (WebSockets by tokio-tungstenite, PostgreSQL by sqlx) and no straw man: the statement is the gateway's, the
//! pool is a pool as anyone would configure it, and the check of the credential is right. What it lacks is what Seawall is for:
//! a limit with a queue bounded in time, and an answer for those who must wait. A device that gave up leaves its look-up in the
//! pool's queue. Its presence is that of a heartbeat service ([`heartbeats`]).

mod heartbeats;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use seawall_proto::id::{DeviceId, SecretHash};
use sqlx::{
    PgPool, Row,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::broadcast,
    time::MissedTickBehavior,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};
use tokio_util::task::TaskTracker;

use self::heartbeats::{Heartbeats, Held};
use crate::scenario;

/// The statement of the gateway's look-up, for one device. Relies on the primary key of `devices`.
const LOOK_UP: &str = "SELECT secret_sha256, state FROM devices WHERE id = ANY($1)";
/// Greatest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Headers of a request.
const HEADERS_MAX: usize = 64;
/// Patience with the pool: practically none is ever lost, as with the defaults of 2020.
const POOL_PATIENCE: Duration = Duration::from_secs(600);
const READ_BUFFER_BYTES: usize = 1024;

/// A running naive server. It ends with this value.
#[derive(Debug)]
pub struct Naive {
    devices: SocketAddr,
    ops: SocketAddr,
    tasks: TaskTracker,
    accepting: [tokio::task::JoinHandle<()>; 2],
    heartbeats: Arc<Heartbeats>,
}

/// What `/metrics` tells.
#[derive(Debug, Default)]
struct Counts {
    sessions: AtomicI64,
    /// Taken by a connection of the pool, or waiting for one.
    asked: AtomicI64,
    statements: AtomicU64,
    admitted: AtomicU64,
    unauthorized: AtomicU64,
    abandoned: AtomicU64,
}

/// What a device says in its request.
#[derive(Debug, PartialEq)]
struct Hello {
    device: DeviceId,
    secret: String,
    key: String,
    offers_v1: bool,
}

impl Naive {
    /// Listens on two free ports: devices, and `/metrics`.
    ///
    /// # Errors
    /// No port, or no database.
    pub async fn start(database: PgConnectOptions, settings: &scenario::Naive) -> Result<Self> {
        let pool_size = settings.pool;
        let pool = PgPoolOptions::new()
            .max_connections(pool_size)
            .acquire_timeout(POOL_PATIENCE)
            .test_before_acquire(false)
            .connect_with(database)
            .await
            .context("connecting to the database")?;
        let counts = Arc::new(Counts::default());
        let heartbeats = Heartbeats::start(
            Duration::from_secs_f64(settings.heartbeat_seconds),
            Duration::from_secs_f64(settings.deadline_seconds),
        );
        let tasks = TaskTracker::new();
        let devices = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("listening for devices")?;
        let ops = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("listening for the sampler")?;
        let addresses = (devices.local_addr()?, ops.local_addr()?);
        let accepting = [
            tokio::spawn(accept_devices(
                devices,
                pool.clone(),
                Arc::clone(&counts),
                Arc::clone(&heartbeats),
                tasks.clone(),
            )),
            tokio::spawn(accept_ops(ops, pool, pool_size, counts, Arc::clone(&heartbeats))),
        ];
        Ok(Self {
            devices: addresses.0,
            ops: addresses.1,
            tasks,
            accepting,
            heartbeats,
        })
    }

    #[must_use]
    pub const fn devices(&self) -> SocketAddr {
        self.devices
    }

    #[must_use]
    pub const fn ops(&self) -> SocketAddr {
        self.ops
    }

    /// Connections it holds, whatever their state.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.tasks.len()
    }
}

impl Drop for Naive {
    fn drop(&mut self) {
        self.accepting.iter().for_each(tokio::task::JoinHandle::abort);
        self.heartbeats.stop();
    }
}

async fn accept_devices(
    listener: TcpListener,
    pool: PgPool,
    counts: Arc<Counts>,
    heartbeats: Arc<Heartbeats>,
    tasks: TaskTracker,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (pool, counts, heartbeats) = (pool.clone(), Arc::clone(&counts), Arc::clone(&heartbeats));
                tasks.spawn(async move {
                    // Whatever goes wrong with one device ends that device's connection, and is its own to count.
                    drop(serve(stream, &pool, &counts, &heartbeats).await);
                });
            }
            // Out of open files, most likely: the one courtesy it has is not to spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn serve(mut stream: TcpStream, pool: &PgPool, counts: &Counts, heartbeats: &Heartbeats) -> Result<()> {
    stream.set_nodelay(true)?;
    let head = read_head(&mut stream).await?;
    let Some(hello) = parse(&head) else {
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            .await?;
        bail!("not a device's request");
    };
    if !is_known(&hello, pool, counts).await? {
        counts.unauthorized.fetch_add(1, Ordering::Relaxed);
        stream
            .write_all(b"HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            .await?;
        return Ok(());
    }
    let protocol = if hello.offers_v1 {
        "Sec-WebSocket-Protocol: seawall.v1\r\n"
    } else {
        ""
    };
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {}\r\n{protocol}\r\n",
        derive_accept_key(hello.key.as_bytes())
    );
    if let Err(error) = stream.write_all(answer.as_bytes()).await {
        counts.abandoned.fetch_add(1, Ordering::Relaxed);
        return Err(error.into());
    }
    counts.admitted.fetch_add(1, Ordering::Relaxed);
    counts.sessions.fetch_add(1, Ordering::Relaxed);
    let held = heartbeats.begin(hello.device);
    let ended = session(stream, hello.offers_v1, heartbeats, &held).await;
    heartbeats.end(&held);
    counts.sessions.fetch_sub(1, Ordering::Relaxed);
    ended
}

/// One query a connect. Nobody looks whether the device is still there: like most handlers, it continues until it has its answer.
async fn is_known(hello: &Hello, pool: &PgPool, counts: &Counts) -> Result<bool> {
    counts.asked.fetch_add(1, Ordering::Relaxed);
    let answer = sqlx::query(LOOK_UP)
        .bind(vec![hello.device.as_uuid()])
        .fetch_optional(pool)
        .await;
    counts.asked.fetch_sub(1, Ordering::Relaxed);
    counts.statements.fetch_add(1, Ordering::Relaxed);
    let Some(row) = answer.context("looking the device up")? else {
        return Ok(false);
    };
    let hash: Vec<u8> = row.try_get("secret_sha256").context("reading the credential's hash")?;
    let state: i16 = row.try_get("state").context("reading the device's state")?;
    let is_right = hash
        .try_into()
        .is_ok_and(|hash| SecretHash::from_bytes(hash) == SecretHash::of(hello.secret.as_bytes()));
    Ok(is_right && state == 0)
}

async fn session(stream: TcpStream, is_v1: bool, heartbeats: &Heartbeats, held: &Held) -> Result<()> {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0);
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    if is_v1 {
        socket.send(Message::text(welcome(heartbeats.every()))).await?;
    }
    let mut ping = tokio::time::interval(heartbeats.every());
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ping.reset();
    loop {
        tokio::select! {
            message = socket.next() => match message {
                None => return Ok(()),
                Some(message) => {
                    drop(message?);
                    heartbeats.processed(held);
                }
            },
            _ = ping.tick() => socket.send(Message::Ping(bytes::Bytes::new())).await?,
        }
    }
}

fn welcome(heartbeat: Duration) -> String {
    format!(
        r#"{{"type":"welcome","session":"naive","heartbeat_ms":{},"backoff_cap_ms":60000,"resume":"","server_time":"2020-02-08T03:10:00Z"}}"#,
        heartbeat.as_millis()
    )
}

async fn read_head(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut head = Vec::with_capacity(512);
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= HEAD_BYTES_MAX || stream.read_buf(&mut head).await? == 0 {
            bail!("no complete request");
        }
    }
    Ok(head)
}

/// The device's id and credential, as a Basic or Bearer `Authorization` with the gateway's header names.
fn parse(head: &[u8]) -> Option<Hello> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    if !request.parse(head).ok()?.is_complete() {
        return None;
    }
    let header = |name: &str| {
        let found = request
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(found.value).ok()
    };
    Some(Hello {
        device: header("Seawall-Device")?.parse().ok()?,
        secret: header("Authorization")?.strip_prefix("Bearer ")?.to_owned(),
        key: header("Sec-WebSocket-Key")?.to_owned(),
        offers_v1: header("Sec-WebSocket-Protocol").is_some_and(|offers| offers.contains("seawall.v1")),
    })
}

/// Metrics, counts of presence and the stream of its events.
async fn accept_ops(
    listener: TcpListener,
    pool: PgPool,
    pool_size: u32,
    counts: Arc<Counts>,
    heartbeats: Arc<Heartbeats>,
) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(head) = read_head(&mut stream).await else {
            continue;
        };
        if head.starts_with(b"GET /api/v1/events ") {
            tokio::spawn(publish(stream, heartbeats.subscribe()));
            continue;
        }
        let (status, text) = if head.starts_with(b"GET /metrics ") {
            ("200 OK", counts.text(&pool, pool_size))
        } else if head.starts_with(b"GET /api/v1/presence?") {
            ("200 OK", heartbeats.counts())
        } else {
            ("404 Not Found", String::new())
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        );
        drop(stream.write_all(answer.as_bytes()).await); // a sampler that has gone asks again
    }
}

/// Server-sent events, until the reader or the server has gone.
async fn publish(mut stream: TcpStream, mut events: broadcast::Receiver<String>) {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n: naive\n\n";
    let mut is_open = stream.write_all(head.as_bytes()).await.is_ok();
    while is_open {
        let event = match events.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(_)) => r#"{"type":"missed"}"#.to_owned(),
            Err(broadcast::error::RecvError::Closed) => return,
        };
        is_open = stream.write_all(format!("data: {event}\n\n").as_bytes()).await.is_ok();
    }
}

impl Counts {
    fn text(&self, pool: &PgPool, pool_size: u32) -> String {
        let asked = self.asked.load(Ordering::Relaxed).max(0);
        let busy = i64::from(pool.size()) - i64::try_from(pool.num_idle()).unwrap_or(0);
        let sent = asked.min(busy.clamp(0, i64::from(pool_size)));
        let statements = self.statements.load(Ordering::Relaxed);
        format!(
            "seawall_sessions {}\nseawall_lookups_in_flight {sent}\nseawall_admission_queue {}\n\
             seawall_lookup_statements_total {statements}\nseawall_lookups_total {statements}\n\
             seawall_handshakes_total{{outcome=\"admitted\"}} {}\nseawall_handshakes_total{{outcome=\"unauthorized\"}} {}\n\
             seawall_handshakes_total{{outcome=\"abandoned\"}} {}\n",
            self.sessions.load(Ordering::Relaxed),
            asked - sent,
            self.admitted.load(Ordering::Relaxed),
            self.unauthorized.load(Ordering::Relaxed),
            self.abandoned.load(Ordering::Relaxed),
        )
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection, PgConnection};
    use uuid::Uuid;

    use super::*;
    use crate::{metrics::Ops, postgres::Postgres};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn devices_connect_to_it_over_real_sockets_by_one_query_each() {
        let postgres = Postgres::start(None).await.unwrap();
        let device = Uuid::new_v4();
        register(&postgres, device, "secret-of-the-device").await;
        let naive = Naive::start(postgres.options(), &settings()).await.unwrap();

        let known = connect(naive.devices(), device, "secret-of-the-device").await;
        let wrong = connect(naive.devices(), device, "another-secret").await;
        let stranger = connect(naive.devices(), Uuid::new_v4(), "secret-of-the-device").await;

        assert!(known.0.starts_with("HTTP/1.1 101 "), "{}", known.0);
        assert!(
            known
                .0
                .contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"),
            "{}",
            known.0
        );
        assert!(wrong.0.starts_with("HTTP/1.1 401 ") && stranger.0.starts_with("HTTP/1.1 401 "));
        let ops = Ops::new(&format!("http://{}", naive.ops()), None);
        let metrics = tokio::task::spawn_blocking(move || ops.metrics())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(metrics.value("seawall_sessions"), Some(1.0));
        assert_eq!(metrics.value("seawall_lookup_statements_total"), Some(3.0));
        assert_eq!(metrics.value("seawall_lookups_in_flight"), Some(0.0));
        drop(naive);
        postgres.stop().await;
    }

    fn settings() -> scenario::Naive {
        toml::from_str("pool = 4\nheartbeat_seconds = 1\ndeadline_seconds = 3").unwrap()
    }

    #[test]
    fn a_request_is_read() {
        let head = b"GET /v1/connect HTTP/1.1\r\nseawall-device: 9b0c2e4a11d27f0080000000000000aa\r\n\
            Authorization: Bearer s\r\nSec-WebSocket-Key: k\r\n\r\n";

        let hello = parse(head).unwrap();

        assert_eq!((hello.secret.as_str(), hello.offers_v1), ("s", false));
        assert_eq!(parse(b"GET / HTTP/1.1\r\n\r\n"), None);
        assert_eq!(parse(b"\x16\x03\r\n\r\n"), None);
    }

    async fn register(postgres: &Postgres, device: Uuid, secret: &str) {
        let mut connection = PgConnection::connect_with(&postgres.options()).await.unwrap();
        sqlx::query(
            "CREATE TABLE devices (id UUID PRIMARY KEY, secret_sha256 BYTEA NOT NULL, state SMALLINT NOT NULL)",
        )
        .execute(&mut connection)
        .await
        .unwrap();
        sqlx::query("INSERT INTO devices VALUES ($1, $2, 0)")
            .bind(device)
            .bind(SecretHash::of(secret.as_bytes()).as_bytes().to_vec())
            .execute(&mut connection)
            .await
            .unwrap();
    }

    /// The answer's head, and the socket, which must live for the session to.
    async fn connect(address: SocketAddr, device: Uuid, secret: &str) -> (String, TcpStream) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!(
            "GET /v1/connect HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSeawall-Device: {device}\r\nAuthorization: Bearer {secret}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let head = tokio::time::timeout(Duration::from_secs(10), read_head(&mut stream))
            .await
            .unwrap()
            .unwrap();
        (String::from_utf8(head).unwrap(), stream)
    }
}
