//! The life of a device's connection, top to bottom: PROXY header, TLS, head, hello, decision, answer, and the start of
//! its session.
//!
//! [`serve`] runs until the answer. After a 101 the session continues in a separate task ([`live`]), because a task
//! keeps the size of its largest state. There is no policy here: `seawall_proto::connect` decides.

mod answer;
mod arrive;
mod deadline;
mod end;
mod live;
mod online;
mod record;
mod request;
mod restricted;
mod room;
mod upgrade;

use std::{net::SocketAddr, sync::Arc};

use self::{
    answer::{Answer, Linger},
    arrive::NoRequest,
    record::AttemptRecord,
    request::Complete,
    restricted::Restricted,
};
use crate::{
    edge::{
        address::{Network, Share},
        limiter::{ConnectionLimiter, HandshakePermit, Rejected},
        listener::Connection,
        transport::Transport,
    },
    fleet::cohorts::Outcome,
    node::Shared,
    runtime::memory::Room,
};
use seawall_proto::{
    connect::{Admitted, Decision},
    hello::{Certified, Hello},
    refusal::{Limit, Peers, Refusal},
};
use tokio::net::TcpStream;

/// End of a connection that does not become a session.
enum Ended {
    /// It was not a request, and cannot be answered.
    Early(Early),
    /// It was not a request, and is refused with an answer.
    Refused(Early, Answer),
    /// A probe of a load balancer.
    Probed { is_ready: bool },
    /// The client left after it had sent a part of a request.
    Abandoned,
    /// The request is refused.
    RequestRefused(Answer),
}

/// End of a connection that was not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Early {
    /// The label of `seawall_connections_total`.
    outcome: &'static str,
    /// The limit for which it was given up, if there was one.
    limit: Option<Limit>,
}

impl Early {
    const fn by_itself(outcome: &'static str) -> Self {
        Self { outcome, limit: None }
    }
}

/// A device that is upgraded.
enum Upgrade {
    Admitted(Accepted),
    /// Not authenticated.
    Restricted(Restricted),
}

/// An admitted device, and what its connection holds.
struct Accepted {
    hello: Hello,
    admitted: Admitted,
    /// Data that the device sent after its head.
    leftover: Vec<u8>,
    room: Room,
}

/// State of a connection until its head is complete.
struct Arrival {
    permit: HandshakePermit,
    /// The device that a client certificate names.
    certified: Option<Certified>,
}

/// Runs a connection from accept to the answer. An upgraded connection continues as a session, in another task.
/// Thousands of connections may wait here without a head, so steps that few of them reach are boxed while they run.
pub async fn serve(shared: Shared, limiter: Arc<ConnectionLimiter>, connection: Connection) {
    let mut record = AttemptRecord::begin(&shared, connection.peer);
    let Connection {
        stream: tcp,
        peer,
        // Held until the answer is written: a client that does not read it is still counted.
        mut share,
        permit,
    } = connection;
    let (mut stream, arrival) = match arrive(&shared, &limiter, (tcp, peer), &mut share, permit, &mut record).await {
        Ok(arrived) => arrived,
        Err(NoRequest::Early(early)) => return record.ended_early(early),
        Err(NoRequest::PlainHttp(stream)) => {
            let refusal = Refusal::bad_request("this port uses TLS: connect with wss:// or https://");
            let ended = Ended::Refused(Early::by_itself("plain_http"), Answer::new(refusal, Linger::Unread));
            return finish(&shared, &limiter, stream, record, ended).await;
        }
    };
    match handshake(&shared, &limiter, &mut stream, &mut share, arrival, &mut record).await {
        Ok(upgrade) => {
            let share = share.expect("room is only taken for a connection that has its share");
            match upgrade {
                Upgrade::Admitted(accepted) => {
                    Box::pin(upgrade::upgrade(shared, limiter, stream, record, accepted, share)).await;
                }
                Upgrade::Restricted(restricted) => {
                    Box::pin(restricted::run(shared, limiter, stream, record, restricted, share)).await;
                }
            }
        }
        Err(ended) => finish(&shared, &limiter, stream, record, ended).await,
    }
}

/// Reads a load balancer's PROXY header, then runs TLS, as configured.
async fn arrive(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    (tcp, peer): (TcpStream, SocketAddr),
    share: &mut Result<Share, Rejected>,
    mut permit: HandshakePermit,
    record: &mut AttemptRecord,
) -> Result<(Transport, Arrival), NoRequest> {
    if let Some(origin) = arrive::read_proxy_header(shared, limiter, &tcp, peer, &mut permit).await? {
        record.comes_from(origin);
        // A load balancer behind another one: its own header will name the client.
        if !shared.proxies.forwards(origin.ip()) {
            limiter.settle(share, Some(&mut permit), Network::from(origin.ip()));
        }
    }
    let (stream, certified) = arrive::secure(shared, limiter, tcp, limit_of(share), &mut permit).await?;
    Ok((stream, Arrival { permit, certified }))
}

/// Reads the head, and decides on its device.
async fn handshake(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    stream: &mut Transport,
    share: &mut Result<Share, Rejected>,
    arrival: Arrival,
    record: &mut AttemptRecord,
) -> Result<Upgrade, Ended> {
    let Complete { hello, leftover } = request::read(shared, limiter, stream, share, arrival, record).await?;
    let refused = |refusal: Refusal| {
        let linger = Linger::behind(&refusal, &leftover);
        Ended::RequestRefused(Answer::new(refusal, linger))
    };
    record.is_by(&hello);
    let network = record.network();
    let room = room::take(shared, limiter, share, &hello, network).map_err(refused)?;
    let attempt = hello.attempt(network.site(), shared.clock.now());
    let conclusion = tokio::select! {
        biased;
        conclusion = Box::pin(shared.lookups.connect(attempt)) => conclusion,
        // Dropping the decision removes the device from the queue: it never reaches the database.
        () = stream.peer_gone() => return Err(Ended::Abandoned),
        () = limiter.closing.cancelled() => return Err(refused(leaving(shared))),
    };
    record.was_looked_up(conclusion.look_up);
    if let Some(rule) = conclusion.dry_run {
        record.count_dry_run(rule);
    }
    match conclusion.decision {
        Decision::Admitted(admitted) => Ok(Upgrade::Admitted(Accepted {
            hello,
            admitted,
            leftover,
            room,
        })),
        Decision::Restricted(restriction) => match shared.restricted.take().await {
            Some(place) => Ok(Upgrade::Restricted(Restricted {
                hello,
                restriction,
                leftover,
                place,
                room,
            })),
            None => Err(refused(restriction.refusal)),
        },
        Decision::Refused(refusal) => Err(refused(refusal)),
    }
}

/// Counts how a connection ended, and answers it.
async fn finish(shared: &Shared, limiter: &ConnectionLimiter, stream: Transport, record: AttemptRecord, ended: Ended) {
    let answer = match ended {
        Ended::Early(early) => return record.ended_early(early),
        Ended::Abandoned => return record.count(Outcome::Abandoned),
        Ended::Probed { is_ready } => {
            record.ended_early(Early::by_itself("probe"));
            return answer::answer_probe(shared, limiter, stream, is_ready).await;
        }
        Ended::Refused(early, answer) => {
            record.note_refusal(&answer.refusal);
            record.ended_early(early);
            answer
        }
        Ended::RequestRefused(answer) => {
            record.refused(&answer.refusal);
            answer
        }
    };
    answer.write(shared, limiter, stream).await;
}

/// The refusal of a node that is about to end.
fn leaving(shared: &Shared) -> Refusal {
    Refusal::draining(shared.departures.peers().unwrap_or(Peers::None), &mut rand::rng())
}

/// The refusal of a device by a limit on its address.
fn throttled(limiter: &ConnectionLimiter, limit: Limit) -> Refusal {
    match limit {
        Limit::AddressHandshakes => Refusal::crowded_out(limiter.hint_range(), &mut rand::rng()),
        Limit::AddressConnections | Limit::AddressRate | Limit::Credential | Limit::Rule => {
            Refusal::throttled(limit, &mut rand::rng())
        }
    }
}

/// The limit on its address that refuses a connection, if there is one.
fn limit_of(share: &Result<Share, Rejected>) -> Option<Limit> {
    share.as_ref().err().copied().and_then(Rejected::limit)
}

#[cfg(test)]
mod tests;
