//! The life of a device's connection, top to bottom: TLS, head, hello, decisions, answer, and the hand-over to its session.
//!
//! [`serve`] is that life until the answer. Behind a 101 the session goes on in a task of its own ([`live`]), because a
//! task is as large as its largest moment. No policy in here: what to decide is `seawall_proto`'s, this asks and obeys.

mod answer;
mod arrive;
mod attempt;
mod live;
mod online;
mod patience;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use seawall_proto::{
    handshake::{self, Admitted, Next, Policy},
    hello::{self, Certified, Hello, Request, SessionKind},
    refusal::{Limit, Peers, Refusal},
};
use tokio::{io::Interest, net::TcpStream, time::timeout};

use crate::{
    address::{Network, Share},
    cohorts::Outcome,
    connection::{
        answer::Linger,
        arrive::{Arrived, Astray},
        attempt::Attempt,
        live::Live,
        online::Online,
        patience::{Hurry, Patience},
    },
    door::{Door, Handshake, Sent, TURNED_HEAD_TIME_MAX, Turned},
    drain,
    head::{Complete, HeadError, HeadReader},
    lookup::Concluded,
    memory::Room,
    rules,
    sessions::{Session, SessionInfo},
    state::Shared,
    transport::Transport,
};

/// A node that is full sends devices away for at least this long.
const NODE_FULL_FOR: Duration = Duration::from_secs(30);

/// How a peer shows that it has left, whatever it has sent before: on Linux, waiting for priority waits for the end of the stream too.
/// Elsewhere only a broken connection shows behind bytes that nobody has read.
#[cfg(target_os = "linux")]
const LEFT: Interest = Interest::PRIORITY.add(Interest::ERROR);
#[cfg(not(target_os = "linux"))]
const LEFT: Interest = Interest::ERROR;

/// From accept to the answer; an upgraded connection goes on as a session, in another task. Without a `place` it never is one.
/// Thousands may be here at a time and show no head: steps that not all come to stand in boxes of their own, for as long as they take.
pub async fn serve(
    shared: Shared,
    door: Arc<Door>,
    tcp: TcpStream,
    peer: SocketAddr,
    mut place: Result<Share, Turned>,
    mut handshake: Handshake,
) {
    let mut attempt = Attempt::begin(&shared, peer);
    match arrive::introduce(&shared, &door, &tcp, peer, &mut handshake).await {
        Ok(None) => {}
        Ok(Some(origin)) => {
            attempt.comes_from(origin);
            // A balancer behind a balancer: its own header says who it is.
            if !shared.proxies.forwards(origin.ip()) {
                place = door.settle(place, Some(&mut handshake), Network::from(origin.ip()));
            }
        }
        Err(ended) => return attempt.ended_early(ended),
    }
    let mut limit = place.as_ref().err().copied().and_then(Turned::limit);
    let Arrived { mut stream, certified } = match arrive::arrive(&shared, &door, tcp, limit, &mut handshake).await {
        Ok(arrived) => arrived,
        Err(Astray::Ended(ended)) => return attempt.ended_early(ended),
        Err(Astray::Plain(stream)) => {
            attempt.never_began("plain_http");
            drop(handshake);
            let refusal = Refusal::bad_request("TLS is spoken here: connect with wss:// or https://");
            return answer::refuse(&shared, &door, stream, &refusal, Linger::Unread).await;
        }
    };
    let reading = Reading {
        certified,
        peer: attempt.peer().ip(),
        limit,
    };
    let head = read_head(&shared, &door, &mut stream, reading, &mut handshake).await;
    drop(handshake);

    let Complete { parsed, leftover } = match head {
        Ok(complete) => complete,
        Err(NoHead::PeerGone { has_begun: true }) => return attempt.count(Outcome::Abandoned),
        Err(NoHead::PeerGone { has_begun: false }) => return attempt.never_began(silent(limit)),
        Err(NoHead::Silent(refusal)) => {
            attempt.refused_silent(silent(limit), &refusal);
            return answer::refuse(&shared, &door, stream, &refusal, Linger::Unread).await;
        }
        Err(NoHead::Refused(refusal)) => {
            let refusal = limit.map_or(refusal, |limit| throttled(&door, limit));
            attempt.refused(&refusal);
            return answer::refuse(&shared, &door, stream, &refusal, Linger::Unread).await;
        }
    };
    let Parsed {
        forwarded_for,
        is_head,
        request,
    } = parsed;
    if let Ok(Request::Connect(_)) = &request {
        if let Some(origin) = forwarded_for {
            attempt.comes_from(SocketAddr::new(origin, 0));
        }
        // Where a balancer names nobody, its own address is all there is to count by.
        if place.as_ref().is_ok_and(|connection| !connection.is_settled()) {
            place = door.settle(place, None, Network::from(attempt.peer().ip()));
            limit = place.as_ref().err().copied().and_then(Turned::limit);
        }
    }
    let hello = match request {
        Ok(Request::Connect(hello)) => hello,
        Ok(Request::Ready) => {
            let is_ready = shared.readiness().ready;
            return answer::probe(&shared, stream, is_ready).await;
        }
        Ok(Request::Health) => return answer::probe(&shared, stream, true).await,
        Err(refusal) => {
            let linger = Linger::behind(&refusal, &leftover);
            // Bounds come before the form (contract section 2): what is wrong with a request has no hint, which would slow its sender down.
            let refusal = limit.map_or(refusal, |limit| throttled(&door, limit));
            attempt.refused(&refusal);
            return if is_head {
                answer::refuse_head(&shared, &door, stream, &refusal, linger).await
            } else {
                answer::refuse(&shared, &door, stream, &refusal, linger).await
            };
        }
    };
    let mut attempt = attempt.by(&hello);
    if place.as_ref().err().is_some_and(|turned| turned.is_by_pace())
        && is_awaited(&shared, &hello, Network::from(attempt.peer().ip()))
    {
        place = door.readmit(Network::from(attempt.peer().ip()));
    }
    let fitting = place.and_then(|connection| Ok((connection, fit(&shared, &hello)?)));
    let (connection, room) = match fitting {
        Ok(fitting) => fitting,
        Err(turned) => {
            let slot = || {
                shared
                    .gate
                    .slot_for_turned(hello.device, hello.slot.as_deref(), NODE_FULL_FOR)
            };
            let refusal = match turned {
                Turned::NodeFull => Refusal::overloaded(slot()),
                Turned::Address(limit) => throttled(&door, limit),
            };
            attempt.refused(&refusal);
            return answer::refuse(&shared, &door, stream, &refusal, Linger::behind(&refusal, &leftover)).await;
        }
    };
    let decided = tokio::select! {
        biased;
        decision = Box::pin(decide(&shared, hello, Network::from(attempt.peer().ip()).site())) => decision,
        // Dropping the decision takes the device out of the queue: it never reaches the database.
        () = peer_gone(stream.tcp()) => return attempt.count(Outcome::Abandoned),
        () = door.closing.cancelled() => concluded(Err(leaving(&shared))),
    };
    attempt.looked_up(decided.took);
    match decided.result {
        Ok(admitted) => {
            let holds = Holds { connection, room };
            Box::pin(upgrade(shared, door, stream, leftover, attempt, admitted, holds)).await;
        }
        Err(refusal) => {
            drop(room);
            attempt.refused(&refusal);
            let linger = Linger::behind(&refusal, &leftover);
            answer::refuse(&shared, &door, stream, &refusal, linger).await;
        }
    }
}

/// Why a connection never showed a complete head.
enum NoHead {
    PeerGone {
        has_begun: bool,
    },
    /// The deadline passed without a byte.
    Silent(Refusal),
    Refused(Refusal),
}

impl NoHead {
    /// The process ends.
    fn closing(shared: &Shared, has_begun: bool) -> Self {
        if has_begun {
            Self::Refused(leaving(shared))
        } else {
            Self::PeerGone { has_begun }
        }
    }
}

/// What a device is told by a node that ends.
fn leaving(shared: &Shared) -> Refusal {
    let peers = shared.drain.peers().unwrap_or(Peers::None);
    Refusal::draining(peers, &mut rand::rng())
}

/// What a device is told that a limit on its address refuses.
fn throttled(door: &Door, limit: Limit) -> Refusal {
    match limit {
        Limit::AddressHandshakes => Refusal::crowded_out(door.hint_range(), &mut rand::rng()),
        Limit::AddressConnections | Limit::AddressRate | Limit::Credential => {
            Refusal::throttled(limit, &mut rand::rng())
        }
    }
}

/// A connection that never sent a byte is no attempt.
fn silent(limit: Option<Limit>) -> &'static str {
    limit.map_or("silent", |_| "address_limited")
}

/// What a head is read with.
#[derive(Clone, Copy)]
struct Reading {
    certified: Option<Certified>,
    peer: IpAddr,
    /// A limit on the address refuses the connection already: only a moment is waited for its head.
    limit: Option<Limit>,
}

/// What a head says.
struct Parsed {
    /// Whom a balancer says it comes from.
    forwarded_for: Option<IpAddr>,
    /// The answer to HEAD has no body.
    is_head: bool,
    request: Result<Request, Refusal>,
}

/// Reads one head.
async fn read_head(
    shared: &Shared,
    door: &Door,
    stream: &mut Transport,
    reading: Reading,
    handshake: &mut Handshake,
) -> Result<Complete<Parsed>, NoHead> {
    let Reading { certified, peer, limit } = reading;
    let limits = &shared.config.limits;
    let time_max = limit.map_or(limits.head_timeout(), |_| TURNED_HEAD_TIME_MAX);
    let mut patience = Patience::begin(door, handshake, time_max, limits.head_timeout());
    let mut reader = HeadReader::new(limits.head_bytes_max);
    let proxies = &shared.proxies;
    let mut parse = |head: &hello::Head<'_>| {
        let origin = proxies
            .forwards(peer)
            .then(|| hello::forwarded_for(head.headers, |address| proxies.is_trusted(address)));
        let config = &shared.config;
        Parsed {
            forwarded_for: origin.flatten(),
            is_head: head.method == "HEAD",
            request: hello::parse(head, &config.server.paths, &config.identity, certified),
        }
    };
    let reading = async {
        loop {
            if let Ok(read) = timeout(patience.span(), reader.read(stream, &mut parse)).await {
                break Ok(read);
            }
            // The keys of TLS are there: it has cost more than silence.
            let is_silent = !reader.has_begun() && matches!(stream, Transport::Plain(_));
            let sent = if is_silent { Sent::Nothing } else { Sent::Something };
            match patience.look(sent, || stream.has_unread()) {
                Ok(()) => {}
                Err(Hurry::TimedOut) => {
                    break Err(limit.map_or_else(Refusal::request_timeout, |limit| throttled(door, limit)));
                }
                Err(Hurry::MakeWay) => break Err(throttled(door, limit.unwrap_or(Limit::AddressHandshakes))),
            }
        }
    };
    let read = tokio::select! {
        read = reading => read,
        () = door.closing.cancelled() => return Err(NoHead::closing(shared, reader.has_begun())),
    };
    match read {
        Ok(Ok(complete)) => {
            door.note_head();
            Ok(complete)
        }
        Ok(Err(HeadError::PeerGone)) => Err(NoHead::PeerGone {
            has_begun: reader.has_begun(),
        }),
        Ok(Err(HeadError::Refused(refusal))) => Err(NoHead::Refused(refusal)),
        Err(refusal) if reader.has_begun() => Err(NoHead::Refused(refusal)),
        Err(refusal) => Err(NoHead::Silent(refusal)),
    }
}

/// The order of `seawall_proto::handshake`, with resume token and look-up in their places.
async fn decide(shared: &Shared, hello: Hello, network: Network) -> Concluded {
    let arrived = shared.clock.now();
    let screened = {
        let rules = shared.rules.current();
        let policy = Policy {
            rules: &rules,
            draining: shared.drain.peers(),
            wall: shared.clock.wall(),
        };
        handshake::screen(hello, &policy, &mut rand::rng())
    };
    let screened = match screened {
        Ok(screened) => screened,
        Err(refusal) => return concluded(Err(refusal)),
    };
    let resumption = shared.resume.weigh(screened, &shared.rules.current(), &shared.clock);
    if let Some(outcome) = resumption.outcome {
        shared.metrics.resumes.increment(outcome.as_str());
    }
    let unproven = match resumption.next {
        Next::LookUp(unproven) => unproven,
        Next::Session(admitted) => {
            shared.gate.handle_admitted(admitted.hello.device, admitted.tenant());
            return concluded(Ok(*admitted));
        }
        Next::Refused(refusal) => return concluded(Err(refusal)),
    };
    let mut concluded = shared.gate.admit(unproven, network, arrived).await;
    // A drain may have begun meanwhile.
    if let (Ok(_), Some(peers)) = (&concluded.result, shared.drain.peers()) {
        concluded.result = Err(Refusal::draining(peers, &mut rand::rng()));
    }
    concluded
}

/// Decided without a look-up.
const fn concluded(result: Result<Admitted, Refusal>) -> Concluded {
    Concluded { result, took: None }
}

/// Drain and evictor look at every session that is registered; one that registers behind their backs looks at them.
fn obey_orders_given_meanwhile(shared: &Shared, session: &Session) {
    if shared.drain.is_draining() {
        drain::send_away(shared, session, &mut rand::rng());
    }
    rules::evict_newcomer(shared, session);
}

/// What a device holds that becomes a session.
struct Holds {
    connection: Share,
    room: Room,
}

/// Whether a device shows by a token of ours that it comes as it was told, or comes back to its session: it is never throttled
/// (contract section 3). That its credential is right is for the decision to find out.
fn is_awaited(shared: &Shared, hello: &Hello, network: Network) -> bool {
    let is_at_its_slot = |token: &str| shared.gate.is_at_its_slot(hello.device, token, network);
    shared.resume.is_shown_by(hello, &shared.clock) || hello.slot.as_deref().is_some_and(is_at_its_slot)
}

/// Room in memory for a device, before anything is spent on it. Strangers hold no more than half of it while it is
/// open whether they stay. One that is online here needs none: it can only replace its own session.
fn fit(shared: &Shared, hello: &Hello) -> Result<Room, Turned> {
    let memory = &shared.memory;
    let is_its_turn = !memory.is_crowded()
        || shared.gate.is_known(hello.device, hello.slot.as_deref())
        || shared.resume.is_shown_by(hello, &shared.clock);
    let room = if is_its_turn { memory.take() } else { None };
    let room = room.or_else(|| {
        let is_online = shared.sessions.get(hello.device).is_some();
        is_online.then(|| memory.take_to_replace()).flatten()
    });
    room.ok_or_else(|| {
        shared.metrics.memory_refusals.increment(1);
        Turned::NodeFull
    })
}

/// Ready once the peer has closed its side or broken the connection. A peer that sends on is still there.
async fn peer_gone(stream: &TcpStream) {
    if let Ok(1..) = stream.peek(&mut [0]).await {
        // An error here is one of the connection's.
        let _ = stream.ready(LEFT).await;
    }
}

/// Registers the session, answers 101, and starts the session's own task.
async fn upgrade(
    shared: Shared,
    door: Arc<Door>,
    mut stream: Transport,
    leftover: Vec<u8>,
    attempt: Attempt,
    admitted: Admitted,
    holds: Holds,
) {
    // A peer that left during the decision must not end the session that its device has. Nothing waits from here to the 101.
    if stream.has_left() {
        return attempt.count(Outcome::Abandoned);
    }
    let hello = &admitted.hello;
    let mut first_bytes = answer::switching_protocols(&hello.websocket_key, hello.protocol.as_deref());
    let kind = hello.session_kind;
    let cohort = shared
        .cohorts
        .intern(admitted.model.as_deref(), hello.firmware.as_deref());
    let tenant = shared.cohorts.tenant(admitted.tenant());
    // Before the 101, so that whoever has read it finds the device online.
    let online = Online::begin(
        &shared,
        SessionInfo {
            device: hello.device,
            external_id: hello.external_id.clone().map(Box::new),
            tenant: Arc::clone(&tenant),
            credential: (&admitted.grant.credential).into(),
            cohort: Arc::clone(&cohort),
            speaks_v1: kind == SessionKind::V1,
            address: attempt.peer().ip(),
            port: attempt.peer().port(),
            since: shared.clock.wall(),
            opened_at: shared.clock.now(),
        },
    );
    obey_orders_given_meanwhile(&shared, online.session());
    // A plain session has no frame for a resume token.
    let mut grant = (kind == SessionKind::V1).then(|| Box::new(admitted.grant.clone()));
    if let Some(grant) = &mut grant {
        grant.tenant.share(&tenant);
        if let (Some(model), Some(shared)) = (&mut grant.model, &cohort.model) {
            model.share(shared);
        }
    }
    let mut machine = live::machine(&shared, &online, kind, grant.as_deref_mut());
    // The welcome goes with the 101: one write, one packet, and no device waits for it.
    live::say_at_once(&mut machine, &mut first_bytes);
    let written = answer::write(&shared, &mut stream, &first_bytes).await;
    if written.is_err() {
        online.cancel();
        return attempt.count(Outcome::Abandoned);
    }
    let Holds { connection, room } = holds;
    room.use_up();
    attempt.admitted(cohort);
    if let Some(before) = admitted.resumed {
        let session = online.session().id;
        tracing::debug!(device.id = %admitted.grant.device, session.id = %session, session.before = %before, "session resumed by token");
        if !shared.resume.offer_drill(&admitted.grant, session) {
            shared.metrics.resume_drills.increment("dropped");
        }
    }
    let live = Live::open(online, machine, stream, &leftover, grant, connection);
    door.spawn(&shared, live.run());
}

#[cfg(test)]
mod tests {
    use seawall_proto::{
        id::{Credential, DeviceId, Label, SecretHash},
        resume::{Generation, Grant},
        time::{Instant, WallTime},
    };
    use socket2::SockRef;
    use tokio::net::TcpListener;

    use super::*;
    use crate::{
        config::{Config, Limits},
        listener::Bounds,
        serve,
    };

    #[tokio::test]
    async fn a_panic_ends_one_connection_and_leaves_nothing_behind() {
        let home = tempfile::tempdir().unwrap();
        let running = gateway(&home).await;
        let shared = Arc::clone(&running.state);
        let door = door();
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let permit = door.enter().await.unwrap();
        let held = door.admit(Some(Network::from(peer.ip())), permit);
        assert!(held.0.is_ok());
        let state = Arc::clone(&shared);
        let life_of_one = async move {
            let _held = held;
            let _attempt = Attempt::begin(&state, peer);
            let _online = Online::begin(&state, session_of(&state, peer));
            panic!("a bug");
        };

        door.spawn(&shared, life_of_one);
        door.tasks.close();
        door.tasks.wait().await;

        assert!(shared.sessions.is_empty());
        assert_eq!(door.connections_held(), 0);
        assert!(door.enter().await.is_ok(), "its place is free again");
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
        let door = door();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (tcp, peer) = listener.accept().await.unwrap();
        let older = Online::begin(&shared, session_of(&shared, peer));
        let permit = door.enter().await.unwrap();
        let holds = Holds {
            connection: door.admit(Some(Network::from(peer.ip())), permit).0.unwrap(),
            room: shared.memory.take().unwrap(),
        };

        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        // The reset has arrived.
        timeout(Duration::from_secs(5), tcp.peek(&mut [0]))
            .await
            .unwrap()
            .unwrap_err();
        let stream = Transport::Plain(tcp);
        let attempt = Attempt::begin(&shared, peer);
        upgrade(
            Arc::clone(&shared),
            door,
            stream,
            Vec::new(),
            attempt,
            admitted(),
            holds,
        )
        .await;

        assert!(!older.session().is_closing());
        assert_eq!(
            shared.sessions.get(device()).map(|session| session.id),
            Some(older.session().id)
        );
        drop(older);
        running.stop().await.unwrap();
    }

    async fn gateway(home: &tempfile::TempDir) -> serve::Running {
        let mut config = Config::default();
        config.server.data_dir = home.path().to_owned();
        config.server.listen.set_port(0);
        config.ops.listen.set_port(0);
        serve::start(config).await.unwrap()
    }

    fn door() -> Arc<Door> {
        let bounds = Bounds {
            connections: 4,
            handshakes: 1,
        };
        Arc::new(Door::new(bounds, &Limits::default(), Arc::default()))
    }

    fn device() -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(1))
    }

    fn admitted() -> Admitted {
        let tenant = Label::parse("default").unwrap().unwrap();
        let credential = SecretHash::of(b"its secret").into();
        Admitted {
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
        }
    }

    fn session_of(shared: &Shared, peer: SocketAddr) -> SessionInfo {
        SessionInfo {
            device: device(),
            external_id: None,
            tenant: "default".into(),
            credential: (&Credential::from(SecretHash::of(b"secret"))).into(),
            cohort: shared.cohorts.intern(None, Some("1.0")),
            speaks_v1: true,
            address: peer.ip(),
            port: peer.port(),
            since: WallTime::from_unix_ms(1),
            opened_at: Instant::ZERO,
        }
    }
}
