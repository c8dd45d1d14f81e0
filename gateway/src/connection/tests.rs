use std::{net::SocketAddr, time::Duration};

use seawall_proto::{
    hello::SessionKind,
    id::{Credential, DeviceId, Label, SecretHash},
    resume::{Generation, Grant},
    time::{Instant, WallTime},
};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::timeout,
};

use super::{online::Online, *};
use crate::{
    edge::listener::Bounds,
    runtime::config::{Config, Limits},
    serve,
    session::sessions::SessionInfo,
};

#[tokio::test]
async fn a_panic_ends_one_connection_and_leaves_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    let running = gateway(&home).await;
    let shared = Arc::clone(&running.state);
    let limiter = limiter();
    let peer = SocketAddr::from(([127, 0, 0, 1], 1));
    let permit = limiter.acquire().await.unwrap();
    let held = limiter.admit(Some(Network::from(peer.ip())), permit);
    assert!(held.0.is_ok());
    let state = Arc::clone(&shared);
    let life_of_one = async move {
        let _held = held;
        let _attempt = AttemptRecord::begin(&state, peer);
        let _online = Online::begin(&state, session_of(&state, peer));
        panic!("a bug");
    };

    limiter.spawn(&shared.panics, life_of_one);
    limiter.tasks.close();
    limiter.tasks.wait().await;

    assert!(shared.sessions.is_empty());
    assert_eq!(limiter.connections_held(), 0);
    assert!(limiter.acquire().await.is_ok(), "its permit is free again");
    let text = shared.metrics.render();
    for line in [
        "seawall_sessions 0",
        "seawall_task_panics_total 1",
        "seawall_handshakes_total{outcome=\"abandoned\"} 1",
        "seawall_connections_total{outcome=\"request\"} 1",
        "seawall_closes_total{reason=\"failed\"} 1",
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line} is not in {text}");
    }
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_device_that_left_during_the_decision_keeps_its_older_session() {
    let home = tempfile::tempdir().unwrap();
    let running = gateway(&home).await;
    let shared = Arc::clone(&running.state);
    let limiter = limiter();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (tcp, peer) = listener.accept().await.unwrap();
    let older = Online::begin(&shared, session_of(&shared, peer));
    let permit = limiter.acquire().await.unwrap();
    let share = limiter.admit(Some(Network::from(peer.ip())), permit).0.unwrap();
    let accepted = accepted(shared.memory.take().unwrap());

    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    // The reset has arrived.
    timeout(Duration::from_secs(5), tcp.peek(&mut [0]))
        .await
        .unwrap()
        .unwrap_err();
    let stream = Transport::Plain(tcp);
    let record = AttemptRecord::begin(&shared, peer);
    upgrade::upgrade(Arc::clone(&shared), limiter, stream, record, accepted, share).await;

    assert!(!older.session().is_closing());
    assert_eq!(
        shared.sessions.get(device()).map(|session| session.id),
        Some(older.session().id)
    );
    drop(older);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_refused_connection_counts_until_its_answer_is_written_and_it_has_ended() {
    let home = tempfile::tempdir().unwrap();
    let running = gateway(&home).await;
    let limiter = limiter();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (stream, peer) = listener.accept().await.unwrap();
    let (share, permit) = limiter.admit(Some(Network::from(peer.ip())), limiter.acquire().await.unwrap());
    let connection = Connection {
        stream,
        peer,
        share,
        permit,
    };
    let serving = tokio::spawn(serve(Arc::clone(&running.state), Arc::clone(&limiter), connection));

    // Data that may be a body is read for a while after the answer.
    client
        .write_all(b"POST /v1/connect HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 405");
    assert_eq!(limiter.connections_held(), 1);

    drop(client);
    serving.await.unwrap();
    assert_eq!(limiter.connections_held(), 0);
    running.stop().await.unwrap();
}

async fn gateway(home: &tempfile::TempDir) -> serve::Running {
    let mut config = Config::default();
    config.server.data_dir = home.path().to_owned();
    config.server.listen.set_port(0);
    config.ops.listen.set_port(0);
    serve::start(config).await.unwrap()
}

fn limiter() -> Arc<ConnectionLimiter> {
    let bounds = Bounds {
        connections: 4,
        handshakes: 1,
    };
    Arc::new(ConnectionLimiter::new(bounds, &Limits::default(), Arc::default()))
}

fn device() -> DeviceId {
    DeviceId::from_uuid(uuid::Uuid::from_u128(1))
}

fn accepted(room: Room) -> Accepted {
    let tenant = Label::parse("default").unwrap().unwrap();
    let credential = SecretHash::of(b"its secret").into();
    Accepted {
        hello: Hello {
            device: device(),
            external_id: None,
            credential: Some(credential),
            firmware: None,
            model: None,
            tenant: None,
            slot: None,
            resume: None,
            session_kind: SessionKind::Plain,
            protocol: None,
            websocket_key: *b"dGhlIHNhbXBsZSBub25jZQ==",
        },
        admitted: Admitted {
            model: None,
            grant: Grant {
                device: device(),
                credential,
                tenant,
                model: None,
                generation: Generation::default(),
                credential_until: None,
            },
            resumed: None,
        },
        leftover: Vec::new(),
        room,
    }
}

fn session_of(shared: &Shared, peer: SocketAddr) -> SessionInfo {
    SessionInfo {
        device: device(),
        external_id: None,
        group: shared
            .history
            .groups()
            .of(&shared.cohorts.intern(None, Some("1.0")), &"default".into(), None),
        credential: (&Credential::from(SecretHash::of(b"secret"))).into(),
        speaks_v1: true,
        address: peer.ip(),
        port: peer.port(),
        since: WallTime::from_unix_ms(1),
        opened_at: Instant::ZERO,
    }
}
