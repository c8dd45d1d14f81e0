//! A complete head with its hello, or why there is none. Start with [`read`].

use std::net::{IpAddr, SocketAddr};

use seawall_proto::{
    hello::{self, Certified, Hello, Request},
    refusal::{Limit, Refusal},
};
use tokio::time::timeout;

use super::{
    Arrival, Early, Ended,
    answer::{Answer, Linger},
    deadline::{GivenUp, StepDeadline},
    leaving, limit_of,
    record::AttemptRecord,
    throttled,
};
use crate::{
    edge::{
        address::Share,
        head::{self, HeadError, HeadReader},
        limiter::{ConnectionLimiter, HandshakePermit, REJECTED_HEAD_TIME_MAX, Rejected, Sent},
        transport::Transport,
    },
    node::Shared,
};

/// A device's request.
pub(super) struct Complete {
    pub(super) hello: Hello,
    /// Bytes after the head.
    pub(super) leftover: Vec<u8>,
}

/// Content of a head.
struct Parsed {
    /// The origin that a load balancer names.
    forwarded_for: Option<IpAddr>,
    /// The answer to HEAD has no body.
    is_head: bool,
    request: Result<Request, Refusal>,
}

/// Reads a request. Limits on the address are checked before its form: a malformed request gets no hint, which would
/// slow its sender down.
pub(super) async fn read(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    stream: &mut Transport,
    share: &mut Result<Share, Rejected>,
    arrival: Arrival,
    record: &mut AttemptRecord,
) -> Result<Complete, Ended> {
    let Arrival { mut permit, certified } = arrival;
    let reading = Reading {
        certified,
        peer: record.peer().ip(),
        limit: limit_of(share),
    };
    let head = read_head(shared, limiter, stream, reading, &mut permit).await?;
    drop(permit);
    let Parsed {
        forwarded_for,
        is_head,
        request,
    } = head.parsed;
    match request {
        Ok(Request::Connect(hello)) => {
            if let Some(origin) = forwarded_for {
                record.comes_from(SocketAddr::new(origin, 0));
            }
            // If a load balancer names no client, its own address is counted.
            if share.as_ref().is_ok_and(|share| !share.is_settled()) {
                limiter.settle(share, None, record.network());
            }
            Ok(Complete {
                hello,
                leftover: head.leftover,
            })
        }
        Ok(Request::Ready) => Err(Ended::Probed {
            is_ready: shared.readiness().ready,
        }),
        Ok(Request::Health) => Err(Ended::Probed { is_ready: true }),
        Err(refusal) => {
            let linger = Linger::behind(&refusal, &head.leftover);
            let refusal = reading.limit.map_or(refusal, |limit| throttled(limiter, limit));
            let answer = Answer::new(refusal, linger);
            Err(Ended::RequestRefused(if is_head {
                answer.without_body()
            } else {
                answer
            }))
        }
    }
}

/// Parameters for reading a head.
#[derive(Clone, Copy)]
struct Reading {
    certified: Option<Certified>,
    peer: IpAddr,
    /// The limit on the address that already refuses the connection. The wait for its head is then short.
    limit: Option<Limit>,
}

async fn read_head(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    stream: &mut Transport,
    reading: Reading,
    permit: &mut HandshakePermit,
) -> Result<head::Complete<Parsed>, Ended> {
    let Reading { certified, peer, limit } = reading;
    let limits = &shared.config.limits;
    let time_max = limit.map_or(limits.head_timeout(), |_| REJECTED_HEAD_TIME_MAX);
    let mut deadline = StepDeadline::begin(limiter, permit, time_max, limits.head_timeout());
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
            if let Ok(read) = timeout(deadline.next_check(), reader.read(stream, &mut parse)).await {
                break Ok(read);
            }
            // The TLS handshake is complete, so it has cost more than a silent connection.
            let is_silent = !reader.has_begun() && matches!(stream, Transport::Plain(_));
            let sent = if is_silent { Sent::Nothing } else { Sent::Something };
            match deadline.check(sent, || stream.has_unread()) {
                Ok(()) => {}
                Err(GivenUp::TimedOut) => {
                    break Err(limit.map_or_else(Refusal::request_timeout, |limit| throttled(limiter, limit)));
                }
                Err(GivenUp::MadeWay) => break Err(throttled(limiter, limit.unwrap_or(Limit::AddressHandshakes))),
            }
        }
    };
    let refused = |refusal| {
        let refusal = limit.map_or(refusal, |limit| throttled(limiter, limit));
        Ended::RequestRefused(Answer::new(refusal, Linger::Unread))
    };
    let read = tokio::select! {
        read = reading => read,
        () = limiter.closing.cancelled() => {
            return Err(if reader.has_begun() { refused(leaving(shared)) } else { Ended::Early(silent(limit)) });
        }
    };
    match read {
        Ok(Ok(complete)) => {
            limiter.note_head();
            Ok(complete)
        }
        Ok(Err(HeadError::PeerGone)) if reader.has_begun() => Err(Ended::Abandoned),
        Ok(Err(HeadError::PeerGone)) => Err(Ended::Early(silent(limit))),
        Ok(Err(HeadError::Refused(refusal))) => Err(refused(refusal)),
        Err(refusal) if reader.has_begun() => Err(refused(refusal)),
        // It is answered, but a connection that never sent a byte is not a request.
        Err(refusal) => Err(Ended::Refused(silent(limit), Answer::new(refusal, Linger::Unread))),
    }
}

/// A connection that never sent a byte.
fn silent(limit: Option<Limit>) -> Early {
    Early::by_itself(limit.map_or("silent", |_| "address_limited"))
}
