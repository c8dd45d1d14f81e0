//! The life of a device's connection, top to bottom: head, hello, decisions, answer, and the hand-over to its session.
//!
//! [`serve`] is that life until the answer. Behind a 101 the session goes on in a task of its own ([`live`]), because a
//! task is as large as its largest moment. No policy in here: what to decide is `seawall_proto`'s, this asks and obeys.

mod answer;
mod attempt;
mod live;
mod online;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use seawall_proto::{
    handshake::{self, Admitted, Next, Policy},
    hello::{self, Hello, Request, SessionKind},
    refusal::{Peers, Refusal},
    resume::{Judge, Revoked},
};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    address::Share,
    cohorts::Outcome,
    connection::{answer::Linger, attempt::Attempt, live::Live, online::Online},
    drain,
    head::{Complete, HeadError, HeadReader},
    listener::{Door, Handshake},
    lookup::Concluded,
    rules,
    sessions::{Session, SessionInfo},
    state::Shared,
};

pub use answer::{Turned, turn_away};

/// A head that has taken this part of its time counts as slow: under pressure its address is then held to a fair share. Not
/// sooner, since a crowd that comes back at once has slow ones too.
const SLOW_AFTER_PART: u32 = 2;

/// A node that is full sends devices away for at least this long.
const NODE_FULL_FOR: Duration = Duration::from_secs(30);

/// From accept to the answer; an upgraded connection goes on as a session, in another task. `connection` is `None` where the
/// node is full.
pub async fn serve(
    shared: Shared,
    door: Arc<Door>,
    stream: TcpStream,
    peer: SocketAddr,
    connection: Option<Share>,
    mut handshake: Handshake,
) {
    let attempt = Attempt::begin(&shared, peer);
    let head = read_head(&shared, &door, &stream, &mut handshake).await;
    drop(handshake);

    let Complete { parsed, leftover } = match head {
        Ok(complete) => complete,
        Err(NoHead::PeerGone { has_begun: true }) => return attempt.count(Outcome::Abandoned),
        Err(NoHead::PeerGone { has_begun: false }) => return shared.metrics.connections.increment("silent"),
        Err(NoHead::Silent) => {
            shared.metrics.connections.increment("silent");
            return answer::refuse(&shared, &door, stream, &Refusal::request_timeout(), Linger::Unread).await;
        }
        Err(NoHead::Refused(refusal)) => {
            attempt.refused(&refusal);
            return answer::refuse(&shared, &door, stream, &refusal, Linger::Unread).await;
        }
    };
    let hello = match parsed {
        Ok(Request::Connect(hello)) => hello,
        Ok(Request::Ready) => return answer::readiness(&shared, stream).await,
        Err(refusal) => {
            attempt.refused(&refusal);
            let linger = Linger::behind(&refusal, &leftover);
            return answer::refuse(&shared, &door, stream, &refusal, linger).await;
        }
    };
    let mut attempt = attempt.by(&hello);
    let Some(connection) = connection else {
        let refusal = Refusal::overloaded(shared.gate.slot_for_close(hello.device, NODE_FULL_FOR));
        attempt.refused(&refusal);
        return answer::refuse(&shared, &door, stream, &refusal, Linger::behind(&refusal, &leftover)).await;
    };
    let decided = tokio::select! {
        biased;
        decision = decide(&shared, hello) => decision,
        // Dropping the decision takes the device out of the queue: it never reaches the database.
        () = peer_gone(&stream) => return attempt.count(Outcome::Abandoned),
        () = door.closing.cancelled() => concluded(Err(leaving(&shared))),
    };
    attempt.looked_up(decided.took);
    match decided.result {
        Ok(admitted) => upgrade(shared, door, stream, leftover, attempt, admitted, connection).await,
        Err(refusal) => {
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
    Silent,
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

async fn read_head(
    shared: &Shared,
    door: &Door,
    stream: &TcpStream,
    handshake: &mut Handshake,
) -> Result<Complete<Result<Request, Refusal>>, NoHead> {
    let limits = &shared.config.limits;
    let mut reader = HeadReader::new(limits.head_bytes_max);
    let mut parse = |head: &hello::Head<'_>| hello::parse(head, &shared.config.identity);
    let slow_after = limits.head_timeout() / SLOW_AFTER_PART;
    let reading = async {
        let mut read = timeout(slow_after, reader.read(stream, &mut parse)).await;
        if read.is_err() && !handshake.share.mark_slow() {
            let rest = limits.head_timeout().saturating_sub(slow_after);
            read = timeout(rest, reader.read(stream, &mut parse)).await;
        }
        read
    };
    let read = tokio::select! {
        read = reading => read,
        () = door.closing.cancelled() => return Err(NoHead::closing(shared, reader.has_begun())),
    };
    match read {
        Ok(Ok(complete)) => Ok(complete),
        Ok(Err(HeadError::PeerGone)) => Err(NoHead::PeerGone {
            has_begun: reader.has_begun(),
        }),
        Ok(Err(HeadError::Refused(refusal))) => Err(NoHead::Refused(refusal)),
        Err(_) if reader.has_begun() => Err(NoHead::Refused(Refusal::request_timeout())),
        Err(_) => Err(NoHead::Silent),
    }
}

/// The order of `seawall_proto::handshake`, with the look-up in its place.
async fn decide(shared: &Shared, hello: Hello) -> Concluded {
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
    let resumption = {
        let judge = Judge {
            keys: &shared.resume_keys,
            revoked: &Revoked::unknown(),
            is_stale: false,
        };
        let rules = shared.rules.current();
        handshake::resume(screened, &judge, &rules, shared.clock.wall(), &mut rand::rng())
    };
    let unproven = match resumption.next {
        Next::LookUp(unproven) => unproven,
        Next::Session(admitted) => return concluded(Ok(*admitted)),
        Next::Refused(refusal) => return concluded(Err(refusal)),
    };
    let mut concluded = shared.gate.admit(unproven, arrived, || shared.rules.current()).await;
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

/// Ready once the peer has closed its side or broken the connection. A peer that sends on is still there.
async fn peer_gone(stream: &TcpStream) {
    if let Ok(1..) = stream.peek(&mut [0]).await {
        std::future::pending::<()>().await;
    }
}

/// Registers the session, answers 101, and starts the session's own task.
async fn upgrade(
    shared: Shared,
    door: Arc<Door>,
    mut stream: TcpStream,
    leftover: Vec<u8>,
    attempt: Attempt,
    admitted: Admitted,
    connection: Share,
) {
    let hello = &admitted.hello;
    let switching = answer::switching_protocols(&hello.websocket_key, hello.protocol.as_deref());
    let kind = hello.session_kind;
    let cohort = shared
        .cohorts
        .intern(admitted.model.as_deref(), hello.firmware.as_deref());
    // Before the 101, so that whoever has read it finds the device online.
    let online = Online::begin(
        &shared,
        SessionInfo {
            device: hello.device,
            tenant: admitted.tenant().as_str().into(),
            cohort: Arc::clone(&cohort),
            speaks_v1: kind == SessionKind::V1,
            peer: attempt.peer(),
            since: shared.clock.wall(),
        },
    );
    obey_orders_given_meanwhile(&shared, online.session());
    let written = answer::write(&shared, &mut stream, &switching).await;
    if written.is_err() {
        online.cancel();
        return attempt.count(Outcome::Abandoned);
    }
    attempt.admitted(cohort);
    let live = Live::open(shared, online, stream, leftover, kind, connection).await;
    door.tasks.spawn(Box::new(live).run());
}
